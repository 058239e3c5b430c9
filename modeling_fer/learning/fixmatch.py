"""Semi-supervised learning by consistency: weak views make pseudo-labels, strong views learn them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from modeling_fer.data.sampling import feedback_weights
from modeling_fer.learning.debias import with_margin
from modeling_fer.learning.losses import masked_cross_entropy
from modeling_fer.learning.optimization import weight_average
from modeling_fer.learning.pseudo_labels import PseudoLabeler
from modeling_fer.learning.step import Batch, Logs, Round

Recall = Callable[
    [nn.Module], tuple[np.ndarray, np.ndarray]
]  # right and all held-out faces by class, (C,) each


@dataclass
class Views:
    """How images become views of the model: each maps uint8 `(B, 3, H, W)` to normalised floats.

    Attributes:
        labelled: of labelled faces.
        weak: of unlabelled faces, for choosing pseudo-labels.
        strong: of unlabelled faces, to learn them on.
    """

    labelled: nn.Module
    weak: nn.Module
    strong: nn.Module


@dataclass
class SamplerFeedback:
    """How pseudo-labels and recall feed back to the labelled sampler at the end of each round.

    Attributes:
        bound: class weights stay within `1/bound` and `bound` times uniform; 1: no feedback.
        recall: counts held-out labelled faces and those that a model has right, on all processes; None: go by
            the probabilities behind the pseudo-labels alone.
    """

    bound: float
    recall: Recall | None = None

    def __call__(
        self, model: nn.Module, shares: torch.Tensor | None
    ) -> tuple[np.ndarray | None, dict[str, Any]]:
        """Class weights for the next round, None to keep them, and what to log."""
        if self.bound <= 1 or (shares is None and self.recall is None):
            return None, {}
        recall, logs = None, {}
        if self.recall is not None:
            right, faces = self.recall(model)
            recall = right / np.maximum(faces, 1)
            recall[faces == 0] = recall[faces > 0].mean()  # not known, which is not the same as never right
            logs = {"held_out_recall": recall.tolist()}
        size = len(recall) if shares is None else len(shares)  # type: ignore[arg-type]
        found = np.full(size, 1 / size) if shares is None else shares.cpu().numpy()
        weights = feedback_weights(found, recall, self.bound)
        return weights, {**logs, "class_weights": weights.tolist()}


class FixMatchStep:
    """One pass of gradients over weak views of labelled and strong views of unlabelled faces.

    `CE(f(w(x)), y) + lambda_u * 1/B sum_b weight_b CE(f(s(u_b)) + tau log p, yhat_b)` with `yhat` and
    `weight` from a pass without gradients over weak views (Sohn et al., "FixMatch", NeurIPS 2020, eq. 3-4;
    margin and debiased labels as in Wang et al., "Debiased Learning from Naturally Imbalanced Pseudo-Labels",
    CVPR 2022).

    Args:
        model: classifier, prepared for its device; called with `pixel_values`, returns `logits`.
        plain: the same model, not wrapped for several processes.
        views: see `Views`.
        labeler: chooses the pseudo-labels; its `tau` is also the margin's.
        autocast: makes the context in which forward passes run.
        lambda_u: weight of the unlabelled loss.
        label_smoothing: of the labelled loss.
        soft_labels: learn from `batch["targets"]` (distributions) instead of `batch["labels"]`.
        teacher_ema: decay of the moving average of the weights that makes the pseudo-labels (Tarvainen and
            Valpola, "Mean Teachers", NeurIPS 2017); 0: the model itself does.
        feedback: see `SamplerFeedback`.
    """

    def __init__(
        self,
        model: nn.Module,
        plain: nn.Module,
        views: Views,
        labeler: PseudoLabeler,
        autocast: Callable[[], Any],
        lambda_u: float,
        label_smoothing: float,
        soft_labels: bool,
        teacher_ema: float,
        feedback: SamplerFeedback,
    ) -> None:
        self.model, self.plain, self.views, self.labeler = model, plain, views, labeler
        self.autocast, self.lambda_u, self.label_smoothing = autocast, lambda_u, label_smoothing
        self.target = "targets" if soft_labels else "labels"
        self.teacher = weight_average(plain, teacher_ema) if teacher_ema else None
        self.feedback = feedback

    def __call__(self, batch: Batch, backward: Callable[[torch.Tensor], None]) -> Logs:
        """See `Step`. Batch: `pixels`, `labels`; `unlabelled_pixels`, `_index`, `_labels` (hidden ones)."""
        x, weak = self.views.labelled(batch["pixels"]), self.views.weak(batch["unlabelled_pixels"])
        strong = self.views.strong(batch["unlabelled_pixels"])
        chosen_by = self.plain if self.teacher is None else self.teacher.module
        # The gate compares scores of labelled and unlabelled faces, so that one model must give both.
        compared = not self.labeler.gate.keeps_all
        weak_logits = self.predict(chosen_by, torch.cat([weak, x]) if compared else weak)
        with self.autocast():
            logits = self.model(pixel_values=torch.cat([x, strong])).logits.float()
        logits, strong_logits = logits[: len(x)], logits[len(x) :]
        pseudo = self.labeler(
            weak_logits[: len(weak)],
            batch["unlabelled_index"],
            batch["unlabelled_labels"],
            weak_logits[len(weak) :] if compared else logits.detach(),
            batch["labels"],
        )
        labelled_loss = cross_entropy(logits, batch[self.target], label_smoothing=self.label_smoothing)
        unlabelled_loss = masked_cross_entropy(
            with_margin(strong_logits, self.labeler.marginal.value, self.labeler.tau),
            pseudo.labels,
            pseudo.weights,
        )
        loss = labelled_loss + self.lambda_u * unlabelled_loss
        backward(loss)
        accuracy = (logits.argmax(-1) == batch["labels"]).float().mean()
        return {
            "loss": loss.detach(),
            "labelled_loss": labelled_loss.detach(),
            "unlabelled_loss": unlabelled_loss.detach(),
            "accuracy": accuracy,
            "pseudo_label_rate": pseudo.weights.mean(),
        }

    @torch.no_grad()
    def predict(self, model: nn.Module, views: torch.Tensor) -> torch.Tensor:
        """Logits `(B, C)` without gradients and dropout."""
        training = model.training
        model.eval()
        with self.autocast():
            logits = model(pixel_values=views).logits.float()
        model.train(training)
        return logits

    def after_update(self) -> Logs:
        """Move the averaged teacher, if there is one, towards the updated model."""
        if self.teacher is not None:
            self.teacher.update_parameters(self.plain)
        return {}

    def end_round(self) -> Round:
        """Log the round; hand class weights to the sampler where there is feedback."""
        weights, logs = self.feedback(self.plain, self.labeler.shares())
        return Round(weights, {**self.labeler.end_round(), **logs})

    def state_dict(self) -> dict[str, Any]:
        """The labeler's statistics, and the averaged teacher."""
        state: dict[str, Any] = {"labeler": self.labeler.state_dict()}
        if self.teacher is not None:
            state["teacher"] = self.teacher.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.labeler.load_state_dict(state["labeler"])
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])
