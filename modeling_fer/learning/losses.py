"""Losses of semi-supervised learning."""

import torch
import torch.nn.functional as F


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
