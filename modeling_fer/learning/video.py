"""Stage `video`: a temporal head on the features of a trained image model."""

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from modeling_fer import FerConfig, FerForVideoClassification
from modeling_fer.data.augment import Normalize
from modeling_fer.data.collection import Collection
from modeling_fer.data.feed import Pool
from modeling_fer.data.pixels import decode_split
from modeling_fer.data.sampling import DebiasFeedbackSampler
from modeling_fer.data.windows import Track, WindowDataset
from modeling_fer.evaluation.metrics import compute_metrics
from modeling_fer.evaluation.tuning import folds_by_group
from modeling_fer.labels import CLASSES, IGNORE
from modeling_fer.learning.adapters import add_lora, merge_lora
from modeling_fer.learning.arguments import FerTrainingArguments
from modeling_fer.learning.features import EncodedFrames, frame_features, model_digest
from modeling_fer.learning.image import choose_classes, crop_to_state, freeze_unused, save_model
from modeling_fer.learning.inference import load_model
from modeling_fer.learning.losses import FrameLoss
from modeling_fer.learning.stage import Stage, report_validation
from modeling_fer.learning.step import Batch, Logs, PlainStep, Step
from modeling_fer.learning.timelines import postprocess, predict_tracks, tracks_of

# Fields that may change when the training of a video model goes on.
TRAINING_OPTIONS = ("temporal_dropout", "classifier_dropout", "num_frames")


class WindowView(nn.Module):
    """Windows cut from longer stretches on the device, played faster or slower, with frames hidden and noise.

    Randomness comes from torch's global generator. In evaluation mode nothing is random: the middle of the
    stretch at its own speed.

    Args:
        frames: frames `T` of a window.
        jitter: the speed lies between `1 / (1 + jitter)` and `1 + jitter` times the true one.
        masking: share of a window's frames whose features are hidden, though their labels count.
        noise: deviation of what is added to features.
    """

    def __init__(self, frames: int, jitter: float, masking: float, noise: float) -> None:
        super().__init__()
        self.frames, self.jitter, self.masking, self.noise = frames, jitter, masking, noise

    def slots(self) -> int:
        """Frames of the stretch that a window is cut from: at the highest speed its anchor stays inside."""
        return 2 * math.ceil(self.frames * (1 + self.jitter)) - 1

    def forward(self, batch: Batch) -> Batch:
        """Stretches to windows: `values` `(B, S, ...)`, `mask` and `labels` `(B, S)`, `T` in place of `S`."""
        shape, device = batch["mask"].shape, batch["mask"].device
        draws = torch.rand((3, shape[0], 1)) if self.training else torch.full((3, shape[0], 1), 0.5)
        draws = draws.to(device)
        speed = (1 + self.jitter) ** (2 * draws[0] - 1)
        # The anchor, in the middle of the stretch, comes anywhere into the window.
        first = shape[1] // 2 - (draws[1] * (self.frames - 1)).round() * speed
        places = (first + speed * torch.arange(self.frames, device=device)).round().long()
        repeated = F.pad(places[:, 1:] == places[:, :-1], (1, 0))  # a slow video has fewer frames
        values = batch["values"].gather(
            1,
            places.view(*places.shape, *[1] * (batch["values"].ndim - 2)).expand(
                -1, -1, *batch["values"].shape[2:]
            ),
        )
        return {
            "values": values,
            "mask": batch["mask"].gather(1, places) & ~repeated,
            "labels": batch["labels"].gather(1, places),
        }

    def distort(self, features: torch.Tensor) -> torch.Tensor:
        """Hide some frames of `(B, T, ...)` and add noise."""
        if not self.training:
            return features
        kept = (torch.rand(features.shape[:2]) >= self.masking).to(features.device)
        if self.noise:
            features = features + (torch.randn(features.shape) * self.noise).to(features)
        return features * kept.view(*kept.shape, *[1] * (features.ndim - 2))


class VideoStep(PlainStep):
    """Cross-entropy over the labelled frames of windows.

    Args:
        model: video model, prepared for its device.
        view: makes windows of stretches.
        encode: values `(B, T, ...)` to features `(B, T, D)`.
        autocast: makes the context in which the forward pass runs.
        criterion: logits `(B, T, C)` and labels `(B, T)` to the sum of losses and the number of frames that
            it counts, or their weight.
        over_processes: a number to its mean over the processes.
    """

    def __init__(
        self,
        model: nn.Module,
        view: WindowView,
        encode: Callable[[torch.Tensor], dict[str, torch.Tensor]],
        autocast: Callable[[], Any],
        criterion: nn.Module,
        over_processes: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.model, self.view, self.encode, self.autocast = model, view, encode, autocast
        self.criterion, self.over_processes = criterion, over_processes

    def __call__(self, batch: Batch, backward: Callable[[torch.Tensor], None]) -> Logs:
        """See `Step`. Batch: `values` `(B, S, ...)`, `mask` and `labels` `(B, S)`."""
        window = self.view(batch)
        labels = window["labels"].masked_fill(~window["mask"], IGNORE)
        with self.autocast():
            logits = self.model(
                **self.encode(window["values"]), frame_mask=window["mask"]
            ).frame_logits.float()
        losses, weight = self.criterion(logits, labels)
        # Gradients are averaged over processes, which need not have as many labelled frames as one another.
        loss = losses / self.over_processes(weight).clamp(min=1e-6)
        backward(loss)
        counted = labels != IGNORE
        right = ((logits.argmax(-1) == labels) & counted).sum() / counted.sum().clamp(min=1)
        return {"loss": loss.detach(), "accuracy": right.detach()}


def split_fold(found: Sequence[Track], folds: int, fold: int, seed: int) -> tuple[list[Track], list[Track]]:
    """Tracks outside and inside one of `folds` parts; those of a recording or a person stay together."""
    groups = [track.group for track in found]
    part = folds_by_group(groups, [track.labels for track in found], folds, seed)
    inside = part == fold
    return [t for t, i in zip(found, inside, strict=True) if not i], [
        t for t, i in zip(found, inside, strict=True) if i
    ]


def build_model(arguments: FerTrainingArguments, start: Any, classes: list[str]) -> FerForVideoClassification:
    """A new temporal head on the encoder of a trained image model, or all of a trained video model.

    Raises:
        ValueError: the arguments ask for another temporal head or other classes than the video model has, or
            for another crop convention than the encoder's.
    """
    options: dict[str, Any] = {
        "temporal_head": arguments.temporal_head,
        "temporal_hidden_size": arguments.temporal_hidden_size,
        "temporal_num_layers": arguments.temporal_layers,
        "temporal_num_heads": arguments.temporal_heads,
        "temporal_window": arguments.temporal_window,
        "temporal_causal": arguments.causal,
        "temporal_dropout": arguments.temporal_dropout,
        "classifier_dropout": arguments.dropout,
        "num_frames": arguments.num_frames,
        "frame_rate": arguments.frame_rate,
        "id2label": dict(enumerate(classes)),
    }
    config: Any = start.config
    shared = {
        "encoder_config": config.encoder_config,
        "pooling": config.pooling,
        "image_size": config.image_size,
        "crop": crop_to_state(arguments, config),
    }
    if config.crop not in (None, shared["crop"]):
        raise ValueError(
            f"--encoder {arguments.encoder} knows faces cut out as {config.crop['name']}, margin "
            f"{config.crop['margin']:g}: leave out --crop, or first train an image model on faces like yours"
        )
    model = FerForVideoClassification(FerConfig(**shared, **options))
    if not isinstance(start, FerForVideoClassification):
        model.fer.load_state_dict(start.fer.state_dict())
        return model
    known = {name: getattr(config, name) for name in options if name not in TRAINING_OPTIONS}
    if other := [name for name, value in known.items() if value != options[name]]:
        raise ValueError(
            f"--encoder {arguments.encoder} is a video model with other {', '.join(other)}: ask for its own, "
            "or start from its image model"
        )
    model.load_state_dict(start.state_dict())
    return model


def video_stage(arguments: FerTrainingArguments, accelerator: Accelerator) -> Stage:
    """Set up training of a temporal head on labelled videos."""
    collection = Collection(arguments.data)
    rows = collection.frames("train")
    found = tracks_of(rows, f"{arguments.data}, train")
    if arguments.folds:
        judged_rows = rows
        found, judged = split_fold(found, arguments.folds, arguments.fold, arguments.seed)
    else:
        judged_rows = collection.frames("validation")
        judged = tracks_of(judged_rows, f"{arguments.data}, validation")
    labels = np.concatenate([track.labels for track in found])
    classes = choose_classes(labels[labels != IGNORE], arguments.classes, arguments.data)

    start, processor = load_model(arguments.encoder)
    if arguments.folds and isinstance(start, FerForVideoClassification):
        raise ValueError(
            f"--encoder {arguments.encoder} is a video model that has seen the part to judge by: with "
            "--folds, start from its image model"
        )
    model = build_model(arguments, start, classes)
    normalize = Normalize(processor.image_mean, processor.image_std)
    cache_dir = Path(arguments.cache_dir or collection.cache_dir)
    size, batch_size = model.config.image_size, arguments.eval_batch_size
    trained: nn.Module = model
    load: Callable[..., Any]
    if arguments.lora_rank:  # the encoder learns, too: frames are pixels
        alpha = arguments.lora_alpha or None
        freeze_unused(model, size)
        trained = add_lora(model, arguments.lora_rank, arguments.lora_targets, alpha, arguments.lora_layers)
        show = accelerator.is_main_process
        load = partial(decode_split, size=size, cache_dir=cache_dir, show_progress=show)
    else:
        model.fer.requires_grad_(False)
        load = partial(
            frame_features,
            model.fer,
            normalize=normalize,
            size=size,
            cache_dir=cache_dir,
            accelerator=accelerator,
            batch_size=batch_size,
        )
    with accelerator.main_process_first() if arguments.lora_rank else contextlib.nullcontext():
        values = load(rows)
        judged_values = values if judged_rows is rows else load(judged_rows)

    jitter, masking, noise = arguments.speed_jitter, arguments.frame_masking, arguments.feature_noise
    view = WindowView(arguments.num_frames, jitter, masking, 0.0 if arguments.lora_rank else noise)
    view.train(arguments.augmentation != "none")
    dataset = WindowDataset(values, found, classes, view.slots(), max(1, arguments.num_frames // 2))
    order = DebiasFeedbackSampler(
        dataset.pieces.label,
        len(classes),
        arguments.batch_size,
        arguments.sampling_alpha,
        arguments.seed,
        accelerator.process_index,
        accelerator.num_processes,
        groups=dataset.pieces.track,
    )
    order.data = f"{order.data} {dataset.digest()} {model_digest(model.fer, normalize, size)}"
    counts = order.example_probabilities() @ dataset.labels_around(arguments.num_frames)
    criterion = FrameLoss(arguments.class_loss, torch.from_numpy(counts), arguments.label_smoothing)

    device = accelerator.device
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=arguments.precision == "bf16")

    def inputs(values: torch.Tensor) -> dict[str, torch.Tensor]:
        if values.ndim == 3:
            return {"frame_features": view.distort(values.float())}
        images = normalize.to(device)(values.flatten(0, 1)).unflatten(0, values.shape[:2])
        return {"pixel_values": view.distort(images)}

    def make_step(prepared: nn.Module, steps: int) -> Step:
        return VideoStep(
            prepared,
            view,
            inputs,
            autocast,
            criterion.to(device),
            partial(accelerator.reduce, reduction="mean"),
        )

    references = np.full(len(judged_rows), IGNORE)
    for track in judged:
        references[track.rows] = track.labels
    if not (references != IGNORE).any():
        raise ValueError(f"{arguments.data}: no frame of the videos to judge by has a label")

    def judge(model: nn.Module) -> np.ndarray:
        values: Any = judged_values
        features = values
        if arguments.lora_rank:
            model = merge_lora(copy.deepcopy(model)).eval().to(device)
            encoder: Any = model.fer
            features = EncodedFrames(encoder, values, normalize, batch_size)
        found = np.zeros((len(judged_rows), len(CLASSES)), np.float32)
        for track, logits in zip(judged, predict_tracks(model, features, judged, accelerator), strict=True):
            found[track.rows] = postprocess(model, logits, track.frames)
        return found

    def evaluate(model: nn.Module) -> dict[str, Any]:
        found = judge(model)
        metrics = compute_metrics(references, found.argmax(-1), found, bootstrap_samples=0)
        keys = ("macro_f1", "macro_f1_present", "accuracy", "balanced_accuracy", "ece", "nll")
        return {key: metrics[key] for key in keys}

    save = partial(save_model, processor)
    report = (
        None if arguments.folds else partial(report_validation, collection, judged_rows, judge, accelerator)
    )
    return Stage(trained, Pool(dataset, order), make_step, evaluate, "macro_f1", save, report=report)
