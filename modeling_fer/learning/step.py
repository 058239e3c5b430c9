"""Training steps: each turns a batch into gradients and numbers to log, out of the loop's sight."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

Batch = dict[str, torch.Tensor]
Logs = dict[str, torch.Tensor]


@dataclass
class Round:
    """What a step has to say at the end of a round.

    Attributes:
        class_weights: weights `(C,)` for the labelled sampler in the next round, or None to keep them.
        logs: numbers, or lists of one number a class, on the round that ended.
    """

    class_weights: np.ndarray | None = None
    logs: dict[str, Any] = field(default_factory=dict)


class Step(Protocol):
    """What the training loop asks of a method."""

    def __call__(self, batch: Batch, backward: Callable[[torch.Tensor], None]) -> Logs:
        """Compute losses of one batch and call `backward` on what is to be minimised.

        The loop owns gradient clipping, the optimizer and the schedule of the main model; a step may own
        further models and optimizers, which then belong to its state. Returns detached scalars to log, one
        called `loss`.
        """

    def after_update(self) -> Logs:
        """Act on the updated main model; returns more to log."""

    def end_round(self) -> Round:
        """Sum up a round of the labelled sampler, and start the next."""

    def state_dict(self) -> dict[str, Any]:
        """All state that decides the next step."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""


class PlainStep:
    """A step without state or feedback: the methods that such a one need not define."""

    def after_update(self) -> Logs:
        """Nothing to do."""
        return {}

    def end_round(self) -> Round:
        """Nothing to feed back."""
        return Round()

    def state_dict(self) -> dict[str, Any]:
        """There is none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is none."""


class SupervisedStep(PlainStep):
    """Cross-entropy on weak views of labelled faces, and perhaps on what a teacher says of these views.

    `(1 - a) CE(f(v), y) + a CE(f(v), softmax(g(v)))` with a teacher `g` and its share `a`: distillation at
    temperature 1 (Hinton et al. 2015, arXiv 1503.02531) on views that both see alike (Beyer et al. 2022,
    arXiv 2106.05237), but for noise, which is the model's alone (Xie et al. 2020, arXiv 1911.04252).

    Args:
        model: classifier, prepared for its device; called with `pixel_values`, returns `logits`.
        view: uint8 images to normalised views, on the device.
        autocast: makes the context in which the forward pass runs.
        label_smoothing: share of each target that is spread over all classes.
        soft_labels: use `batch["targets"]` (distributions) instead of `batch["labels"]`.
        teacher: classifier of the same classes, on the same device, that stays as it is; None: labels alone.
        distillation: the teacher's share.
        noise: views to what the model sees of them, new ones; the teacher sees the views. None: the same.
    """

    def __init__(
        self,
        model: nn.Module,
        view: nn.Module,
        autocast: Callable[[], Any],
        label_smoothing: float = 0.0,
        soft_labels: bool = False,
        teacher: nn.Module | None = None,
        distillation: float = 0.0,
        noise: nn.Module | None = None,
    ) -> None:
        self.model, self.view, self.autocast = model, view, autocast
        self.noise = noise
        self.teacher, self.distillation = teacher, distillation
        self.label_smoothing = label_smoothing
        self.target = "targets" if soft_labels else "labels"

    def __call__(self, batch: Batch, backward: Callable[[torch.Tensor], None]) -> Logs:
        """See `Step`. Batch: `pixels` uint8 `(B, 3, H, W)`, and `labels` `(B,)` or `targets` `(B, C)`."""
        views = self.view(batch["pixels"])
        seen = views if self.noise is None else self.noise(views)
        with self.autocast():
            logits = self.model(pixel_values=seen).logits
        loss = nn.functional.cross_entropy(
            logits.float(), batch[self.target], label_smoothing=self.label_smoothing
        )
        logs = {"accuracy": (logits.argmax(-1) == batch["labels"]).float().mean()}
        if self.teacher is not None:
            with torch.no_grad(), self.autocast():
                taught = self.teacher(pixel_values=views).logits.float().softmax(-1)
            imitation = nn.functional.cross_entropy(logits.float(), taught)
            logs["teacher_accuracy"] = (taught.argmax(-1) == batch["labels"]).float().mean()
            loss = torch.lerp(loss, imitation, self.distillation)
        backward(loss)
        return {"loss": loss.detach(), **logs}
