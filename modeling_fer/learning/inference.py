"""Checkpoints to class probabilities: load a saved model and run it over many faces, on any processes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForVideoClassification

from modeling_fer import FerForImageClassification, FerForVideoClassification
from modeling_fer.data.augment import Normalize
from modeling_fer.labels import CLASSES

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def load_model(folder: str | Path, mirror: bool | None = None) -> tuple[Any, Any]:
    """Load a saved model, of stills or of videos as its configuration says, and its image processor.

    Args:
        folder: as training saved it.
        mirror: whether each face is classified together with its mirror image; None: as the configuration
            says.

    Raises:
        FileNotFoundError: no such folder, or one without configuration, weights or image processor.
        ValueError: its weights are damaged or not all there, its class names are not among ours, or mirror
            images are wanted of another model than our classifier of stills.
    """
    from transformers import ViTImageProcessor  # where torchvision is missing, the import itself warns

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder {folder}; train one (`make demo`) or pass --model DIR")
    for what, names in {
        "configuration": ("config.json",),
        "weights": WEIGHTS,
        "image processor": ("preprocessor_config.json",),
    }.items():
        if not any((folder / name).exists() for name in names):
            raise FileNotFoundError(
                f"{folder} holds no {what} ({' or '.join(names)}); "
                "pass the folder that training saved, usually RUN/model"
            )
    config = AutoConfig.from_pretrained(folder)
    is_video = "FerForVideoClassification" in (config.architectures or ())
    architecture: Any = AutoModelForVideoClassification if is_video else AutoModelForImageClassification
    try:
        model, info = architecture.from_pretrained(folder, output_loading_info=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder}: the weights are damaged, or do not fit config.json: {error}") from error
    if info["missing_keys"]:  # they would be random numbers
        raise ValueError(f"{folder} lacks weights: {', '.join(sorted(info['missing_keys'])[:5])}")
    unknown = sorted(set(class_names(model)) - set(CLASSES))
    if unknown:
        raise ValueError(
            f"{folder / 'config.json'}: id2label names {unknown} are not among our classes {list(CLASSES)}"
        )
    if mirror is not None and isinstance(model, FerForImageClassification):
        model.config.mirror = mirror
    elif mirror:
        kind = "model of videos" if is_video else type(model).__name__
        raise ValueError(f"{folder} is a {kind}, which looks at no mirror images: leave out --mirror")
    return model.eval(), ViTImageProcessor.from_pretrained(folder)


def load_classifier(folder: str | Path, mirror: bool | None = None) -> tuple[Any, Any]:
    """Load a still-image classifier and its image processor, as `load_model` does.

    Raises:
        FileNotFoundError, ValueError: as `load_model`; also ValueError for a model of videos.
    """
    model, processor = load_model(folder, mirror)
    if isinstance(model, FerForVideoClassification):
        raise ValueError(f"{folder} is a model of videos: pass the image model that it was made from")
    return model, processor


def class_names(model: nn.Module) -> list[str]:
    """Class names of a classifier in the order of its logits."""
    names: dict[int, str] = model.config.id2label  # type: ignore[union-attr, assignment]
    return [names[i] for i in range(len(names))]


def over_all_classes(probabilities: np.ndarray, names: list[str]) -> np.ndarray:
    """Probabilities `(N, len(names))` as `(N, 8)` in our order; classes that a model does not know get 0."""
    full = np.zeros((len(probabilities), len(CLASSES)), dtype=probabilities.dtype)
    full[:, [CLASSES.index(name) for name in names]] = probabilities
    return full


@torch.no_grad()
def predict_probabilities(
    model: nn.Module,
    pixels: np.ndarray,
    normalize: Normalize,
    batch_size: int = 256,
    accelerator: Accelerator | None = None,
    show_progress: bool = False,
) -> np.ndarray:
    """Class probabilities `(N, C)` in float32 of uint8 faces `(N, 3, H, W)`, the same on every process.

    Each process takes every `num_processes`-th face. Results travel with the faces' numbers, so that what one
    process repeats to fill its last turn is counted once.

    Raises:
        ValueError: there are no faces, or the model's output is not finite.
    """
    if not len(pixels):
        raise ValueError("there are no faces to predict")
    accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
    rank, world = accelerator.process_index, accelerator.num_processes
    device = accelerator.device
    model.to(device)
    was_training = model.training
    model.eval()
    normalize = normalize.to(device)
    turns = -(-len(pixels) // world)
    mine = np.resize(np.arange(rank, max(len(pixels), rank + 1), world) % len(pixels), turns)
    found = []
    starts = range(0, turns, batch_size)
    for start in tqdm(
        starts, desc="predict", disable=None if show_progress and accelerator.is_main_process else True
    ):
        images = torch.from_numpy(np.ascontiguousarray(pixels[mine[start : start + batch_size]])).to(device)
        found.append(model(pixel_values=normalize(images)).logits.float().softmax(-1))
    model.train(was_training)
    numbers = accelerator.gather(torch.from_numpy(mine).to(device)).cpu().numpy()
    values = accelerator.gather(torch.cat(found)).cpu().numpy()
    probabilities = np.full((len(pixels), values.shape[1]), np.nan, dtype=np.float32)
    probabilities[numbers] = values
    if not np.isfinite(probabilities).all():
        raise ValueError("the model's output is not finite: its weights are damaged, or training diverged")
    return probabilities
