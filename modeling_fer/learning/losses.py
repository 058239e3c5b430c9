"""Losses of semi-supervised learning and of temporal models."""

import torch
import torch.nn.functional as F
from torch import nn


def masked_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of pseudo-labelled examples, each counted with its weight.

    `1/B * sum_b weights_b * CE(logits_b, targets_b)`: the mean is over all B examples, not over the sum of
    the weights, so that few confident examples weigh little (Sohn et al. 2020, FixMatch, eq. 4).

    Args:
        logits: `(B, C)`.
        targets: classes `(B,)` as integers, or distributions `(B, C)` as floats.
        weights: `(B,)`, bool or number.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes or types do not fit, or the batch is empty.
    """
    if logits.dim() != 2 or len(logits) == 0:
        raise ValueError(f"logits must be (B, C) with B at least 1, got shape {tuple(logits.shape)}")
    hard = not targets.is_floating_point()
    expected = logits.shape[:1] if hard else logits.shape
    if targets.shape != expected:
        raise ValueError(
            f"{targets.dtype} targets must have shape {tuple(expected)} for logits {tuple(logits.shape)}, "
            f"got {tuple(targets.shape)}; give classes (B,) as integers or distributions (B, C) as floats"
        )
    if weights.shape != logits.shape[:1]:  # (B, 1) would broadcast against (B,) to (B, B), unseen
        raise ValueError(
            f"weights must have shape ({len(logits)},), one for each example, got {tuple(weights.shape)}"
        )
    targets = targets.long() if hard else targets.to(logits.dtype)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (weights.to(losses.dtype) * losses).mean()


class FrameLoss(nn.Module):
    """Cross-entropy over the labelled frames of videos, whose classes may be far from balanced.

    - `plain`: every labelled frame counts alike.
    - `balanced`: frames count in inverse proportion to how often their class comes, so that classes count
      alike.
    - `logit_adjusted`: `log prior` is added to the logits (Menon et al., "Long-tail learning via logit
      adjustment", 2021, equation 10, tau = 1): the logits themselves then answer for even classes.

    Args:
        kind: one of these.
        counts: `(C,)`, how often each class comes in training, in any unit.
        label_smoothing: share of each target that is spread over all classes.

    Raises:
        ValueError: an unknown kind, or counts that are negative or all 0.
    """

    KINDS = ("plain", "balanced", "logit_adjusted")
    adjustment: torch.Tensor
    weights: torch.Tensor

    def __init__(self, kind: str, counts: torch.Tensor, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if kind not in self.KINDS:
            raise ValueError(f"class loss must be one of {', '.join(self.KINDS)}, got {kind!r}")
        if not (counts >= 0).all() or not counts.sum() > 0:
            raise ValueError(f"expected counts of classes, not negative and not all 0, got {counts.tolist()}")
        prior = (counts.double() / counts.sum()).clamp(min=1e-6)
        weights = prior.mean() / prior if kind == "balanced" else torch.ones_like(prior)
        adjustment = prior.log() if kind == "logit_adjusted" else torch.zeros_like(prior)
        self.register_buffer("weights", weights.float())
        self.register_buffer("adjustment", adjustment.float())
        self.label_smoothing = label_smoothing

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of losses and sum of weights of the frames that count.

        Args:
            logits: `(B, T, C)`.
            labels: classes `(B, T)`, -1 where a frame does not count.
        """
        weight = self.weights[labels.clamp(min=0)] * (labels >= 0)
        losses = F.cross_entropy(
            (logits + self.adjustment).flatten(0, 1),
            labels.flatten().clamp(min=0),
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return (losses * weight.flatten()).sum(), weight.sum()
