"""Loss over the frames of videos, against closed forms."""

import pytest
import torch
from torch.nn import functional as F

from modeling_fer.learning.losses import FrameLoss

LOGITS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[0, 1, -1, 2, 2], [-1, -1, 0, 0, 1]])
COUNTS = torch.tensor([6.0, 3.0, 1.0])
HERE = LABELS >= 0


def mean(kind, **options):
    total, weight = FrameLoss(kind, COUNTS, **options)(LOGITS, LABELS)
    return total / weight


def test_plain_is_the_cross_entropy_of_labelled_frames():
    assert torch.allclose(mean("plain"), F.cross_entropy(LOGITS[HERE], LABELS[HERE]))
    smoothed = F.cross_entropy(LOGITS[HERE], LABELS[HERE], label_smoothing=0.2)
    assert torch.allclose(mean("plain", label_smoothing=0.2), smoothed)


def test_balanced_weighs_frames_by_the_inverse_of_their_class():
    expected = F.cross_entropy(LOGITS[HERE], LABELS[HERE], weight=1 / COUNTS)
    assert torch.allclose(mean("balanced"), expected)


def test_logit_adjustment_adds_the_logarithm_of_the_prior():
    expected = F.cross_entropy(LOGITS[HERE] + (COUNTS / 10).log(), LABELS[HERE])
    assert torch.allclose(mean("logit_adjusted"), expected)


def test_a_model_that_knows_nothing_is_best_off_with_even_logits_under_logit_adjustment():
    """The optimum of constant logits is 0 for every class: the adjustment has taken the prior over."""
    labels = torch.repeat_interleave(torch.arange(3), COUNTS.long())[None]
    logits = torch.zeros(3, requires_grad=True)
    total, _ = FrameLoss("logit_adjusted", COUNTS)(logits.expand(1, 10, 3), labels)
    total.backward()
    assert torch.allclose(logits.grad, torch.zeros(3), atol=1e-5)


def test_nothing_labelled_weighs_nothing():
    total, weight = FrameLoss("plain", COUNTS)(LOGITS, torch.full((2, 5), -1))
    assert (total, weight) == (0, 0)


@pytest.mark.parametrize(
    ("kind", "counts", "message"),
    [
        ("focal", [1, 1], "class loss must be one of"),
        ("plain", [0, 0], "not all 0"),
        ("plain", [-1, 2], "negative"),
    ],
)
def test_what_cannot_be(kind, counts, message):
    with pytest.raises(ValueError, match=message):
        FrameLoss(kind, torch.tensor(counts))
