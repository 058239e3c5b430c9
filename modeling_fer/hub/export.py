"""Exports of trained models, each compared with torch on faces before it is put in place.

| format | folder |
|---|---|
| `vit` | a stock `ViTForImageClassification` with its image processor; see `export_vit` |
| `onnx`, stills | `onnx/model.onnx`: pixel_values to logits; with int8 also `onnx/model_quantized.onnx` |
| `onnx`, videos | `onnx/features.onnx`: pixel_values to features; `onnx/temporal.onnx`: on to frame logits |

ONNX folders have the file names that transformers.js looks for, and a `config.json` with the class names: of
the encoder for stills, of the whole model for videos. Logits are the model's, before post-processing.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForImageClassification

from modeling_fer import FerForImageClassification, FerForVideoClassification
from modeling_fer.hub import export_onnx
from modeling_fer.hub.export_vit import plain_model, stock_vit

FORMATS = ("vit", "onnx")
STOCK_LOGITS = 1e-4  # largest difference of logits between a stock model and ours
ONNX_PROBABILITIES = 1e-4  # largest difference of probabilities between a graph and torch
INT8_LABELS = 0.98  # least share of examples that int8 weights must leave in their class
BATCH = 64


@dataclass(frozen=True)
class Agreement:
    """How far an exported file agrees with torch.

    Attributes:
        file: what was compared, within the exported folder.
        examples: how many faces, or frames of videos.
        logits: largest difference of a logit.
        probabilities: largest difference of a probability.
        labels: share of examples with the same class.
    """

    file: str
    examples: int
    logits: float
    probabilities: float
    labels: float

    @classmethod
    def of(cls, file: str, expected: torch.Tensor, found: torch.Tensor) -> "Agreement":
        """Compare logits `(N, C)`."""
        apart = (softmax(expected) - softmax(found)).abs().max().item()
        same = (expected.argmax(-1) == found.argmax(-1)).double().mean().item()
        return cls(file, len(expected), (expected - found).abs().max().item(), apart, same)

    def __str__(self) -> str:
        return (
            f"{self.file}: largest probability difference {self.probabilities:.1e} "
            f"(logits {self.logits:.1e}), same class {self.labels:.1%}, over {self.examples} examples"
        )


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities in float64, so that only the logits' differences count."""
    return logits.double().softmax(dim=-1)


def export(
    model: nn.Module, processor: Any, faces: np.ndarray, out: str | Path, format: str, int8: bool = False
) -> list[Agreement]:
    """Write a model in another format into a new folder, once it agrees with torch on faces.

    Args:
        model: a `FerForImageClassification`, for `onnx` a `FerForVideoClassification` too; LoRA is merged.
        processor: its image processor, which travels with it.
        faces: `(N, 3, H, W)` uint8 face crops to compare on; a model of videos takes them as frames.
        out: folder to write.
        format: one of `FORMATS`.
        int8: also write the stills' ONNX graph with int8 weights.

    Returns:
        What was compared, a row each.

    Raises:
        OSError: `out` is there already, or cannot be written.
        ValueError: unknown format, no faces, a model that the format cannot hold, something not installed, or
            a difference above what is allowed. `out` is not made then.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if faces.ndim != 4 or faces.shape[1] != 3 or faces.dtype != np.uint8 or not len(faces):
        raise ValueError(
            f"faces to compare on must be uint8 (N, 3, H, W), N at least 1; got {faces.dtype} {faces.shape}"
        )
    plain = plain_model(model)
    if not isinstance(plain, FerForImageClassification | FerForVideoClassification):
        raise ValueError(f"expected a model of stills or of videos, got {type(plain).__name__}")
    is_video = isinstance(plain, FerForVideoClassification)
    if int8 and (format != "onnx" or is_video):
        raise ValueError("int8 weights are for models of stills in format onnx: leave out --int8")
    if format == "onnx":
        export_onnx.require_onnx()
    with fresh_folder(Path(out)) as folder, torch.no_grad():
        pixels = pixels_of(processor, faces)
        processor.save_pretrained(folder)
        if format == "vit":
            return write_stock(plain, pixels, folder)
        return write_video(plain, pixels, folder) if is_video else write_stills(plain, pixels, folder, int8)


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to be filled, and renamed to it at the end; an error leaves nothing behind."""
    if out.exists():
        raise FileExistsError(f"{out} is there already: delete it, or export to another folder")
    beside = out.with_name(f".{out.name}.{os.getpid()}.writing")
    try:
        beside.mkdir(parents=True)
        yield beside
        beside.rename(out)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not write {out}: {error}; mend the cause (space, permissions), then export again"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # gone after the rename


def pixels_of(processor: Any, faces: np.ndarray) -> torch.Tensor:
    """Faces as the model takes them, `(N, 3, S, S)`."""
    return processor(images=list(faces.transpose(0, 2, 3, 1)), return_tensors="pt")["pixel_values"]


def in_batches(compute: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """What `compute` says of many faces, some at once; the last batch may be smaller."""
    return torch.cat([compute(part) for part in pixels.split(BATCH)])


def write_stock(model: Any, pixels: torch.Tensor, folder: Path) -> list[Agreement]:
    """Write the stock model, load it again as anyone would, and compare."""
    stock_vit(model).save_pretrained(folder)
    stock: Any = AutoModelForImageClassification.from_pretrained(folder).eval()
    found = in_batches(lambda part: stock(part).logits, pixels)
    agreement = Agreement.of("model.safetensors", in_batches(lambda part: model(part).logits, pixels), found)
    hold(agreement, agreement.logits <= STOCK_LOGITS, f"logits may differ by {STOCK_LOGITS:g}")
    return [agreement]


def write_stills(model: Any, pixels: torch.Tensor, folder: Path, int8: bool = False) -> list[Agreement]:
    """Write the graph of a model of stills, with `int8` a quantised one too, and compare."""
    file, small = "onnx/model.onnx", "onnx/model_quantized.onnx"
    export_onnx.export_stills(model, folder / file)
    expected = in_batches(lambda part: model(part).logits, pixels)
    agreements = [Agreement.of(file, expected, run_stills(folder / file, pixels))]
    hold_probabilities(agreements[0])
    if int8:
        export_onnx.quantize(folder / file, folder / small)
        agreements.append(Agreement.of(small, expected, run_stills(folder / small, pixels)))
        allowed = f"{INT8_LABELS:.0%} must keep their class; leave out --int8, or compare on more faces"
        hold(agreements[1], agreements[1].labels >= INT8_LABELS, allowed)
    names = {"id2label": model.config.id2label, "label2id": model.config.label2id}
    own = {**names, "image_size": model.config.image_size}
    write_about(folder, {**model.config.encoder_config.to_dict(), **own})
    return agreements


def run_stills(path: Path, pixels: torch.Tensor) -> torch.Tensor:
    """A graph's output of many faces."""
    session = export_onnx.open_graph(path)
    return in_batches(lambda part: export_onnx.run_graph(session, pixel_values=part), pixels)


def write_video(model: Any, pixels: torch.Tensor, folder: Path) -> list[Agreement]:
    """Write both graphs of a model of videos, and compare frame logits of videos made of the faces.

    The temporal graph takes the features of torch, then those of the other graph.
    """
    first, second = "onnx/features.onnx", "onnx/temporal.onnx"
    export_onnx.export_features(model, folder / first)
    export_onnx.export_temporal(model, folder / second)
    features = in_batches(lambda part: model.fer(part).pooler_output, pixels)
    session = export_onnx.open_graph(folder / second)
    agreements = []
    for name, given in (
        (second, features),
        (f"{first} and {second}", run_stills(folder / first, pixels)),
    ):
        expected, found = [], []
        for rows, mask, times in videos_of(len(features), model.config):
            timing = {"frame_mask": mask, "frame_times": times}
            expected.append(model(frame_features=features[rows], **timing).frame_logits[mask])
            found.append(export_onnx.run_graph(session, frame_features=given[rows], **timing)[mask])
        agreements.append(Agreement.of(name, torch.cat(expected), torch.cat(found)))
        hold_probabilities(agreements[-1])
    write_about(folder, model.config.to_dict())
    return agreements


def videos_of(faces: int, config: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches of videos made of `faces` faces: rows, mask, and times, each `(B, T)`.

    One frame; some; and more than the torch model attends over in one block, with every face there. One frame
    of five is absent; times are uneven and an hour in, where float32 would blur them.
    """
    rng = np.random.default_rng([faces, config.temporal_window])
    long = 3 * config.temporal_window + 17
    for frames in (1, 40, long):
        there = np.arange(frames) % 5 != 4
        videos = max(2, -(-faces // int(there.sum()))) if frames == long else 2
        mask = rng.permuted(np.tile(there, (videos, 1)), axis=1)
        rows = np.zeros(mask.shape, np.int64)
        rows[mask] = np.resize(rng.permutation(faces), int(mask.sum()))
        numbers = 3600 * config.frame_rate + rng.integers(1, 4, mask.shape).cumsum(axis=1)
        yield torch.from_numpy(rows), torch.from_numpy(mask), torch.from_numpy(numbers / config.frame_rate)


def hold_probabilities(agreement: Agreement) -> None:
    """Refuse a float32 graph whose probabilities are not torch's."""
    allowed = (
        f"probabilities may differ by {ONNX_PROBABILITIES:g}; see constraints.txt for versions that agree"
    )
    hold(agreement, agreement.probabilities <= ONNX_PROBABILITIES, allowed)


def hold(agreement: Agreement, good: bool, allowed: str) -> None:
    """Raise a ValueError with the numbers unless they are good (not-a-number is not)."""
    if not good:
        raise ValueError(f"the export does not agree with torch and is not kept. {agreement}; {allowed}")


def write_about(folder: Path, config: dict[str, Any]) -> None:
    """Write the configuration, without what names code or another folder."""
    kept = {
        k: v for k, v in config.items() if k not in ("auto_map", "architectures", "_name_or_path", "dtype")
    }
    (folder / "config.json").write_text(json.dumps(kept, indent=2) + "\n")
