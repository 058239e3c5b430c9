import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_fer.learning.losses import masked_cross_entropy

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])


def test_by_hand():
    first = math.log(math.exp(2) + 1 + math.exp(-1))  # cross-entropy of class 1, whose logit is 0
    found = masked_cross_entropy(LOGITS, torch.tensor([1, 2]), torch.tensor([0.25, 1.0]))
    assert found.shape == ()
    assert float(found) == pytest.approx((0.25 * first + math.log(3)) / 2, abs=1e-6)


def test_the_mean_is_over_the_batch_not_over_the_weights():
    logits = LOGITS.repeat(5, 1)
    weights = torch.zeros(10)
    weights[1] = 1
    found = masked_cross_entropy(logits, torch.full((10,), 2), weights)
    assert float(found) == pytest.approx(math.log(3) / 10, abs=1e-6)
    assert float(masked_cross_entropy(logits, torch.full((10,), 2), weights.bool())) == float(found)
    assert float(masked_cross_entropy(logits, torch.full((10,), 2), torch.zeros(10))) == 0


def test_masked_examples_get_no_gradient():
    logits = LOGITS.clone().requires_grad_()
    masked_cross_entropy(logits, torch.tensor([0, 0]), torch.tensor([0.0, 0.5])).backward()
    assert logits.grad[0].tolist() == [0, 0, 0]
    # weight / B * (softmax - one-hot)
    assert torch.allclose(logits.grad[1], 0.25 * torch.tensor([1 / 3 - 1, 1 / 3, 1 / 3]))


def test_classes_equal_their_distributions():
    classes, weights = torch.tensor([2, 0]), torch.tensor([0.3, 0.9])
    hard = masked_cross_entropy(LOGITS, classes, weights)
    assert torch.allclose(hard, masked_cross_entropy(LOGITS, torch.eye(3)[classes], weights))
    assert torch.equal(hard, masked_cross_entropy(LOGITS, classes.int(), weights))
    mixed = masked_cross_entropy(LOGITS, torch.tensor([[0.5, 0.5, 0], [0, 0, 1]]).double(), weights)
    parts = [masked_cross_entropy(LOGITS, torch.tensor([c, 2]), weights) for c in (0, 1)]
    assert torch.allclose(mixed, (parts[0] + parts[1]) / 2)


@pytest.mark.parametrize(
    ("targets", "weights"),
    [
        (torch.zeros(4).long(), torch.ones(4, 1)),  # would broadcast to (4, 4)
        (torch.zeros(4).long(), torch.ones(1)),
        (torch.zeros(4).long(), torch.tensor(1.0)),
        (torch.zeros(4).long(), torch.ones(3)),
        (torch.zeros(4, 1).long(), torch.ones(4)),
        (torch.zeros(4, 3).long(), torch.ones(4)),
        (torch.zeros(3).long(), torch.ones(4)),
        (torch.zeros(4), torch.ones(4)),
        (torch.zeros(4, 2), torch.ones(4)),
    ],
)
def test_shapes_that_do_not_fit(targets, weights):
    with pytest.raises(ValueError, match=r"(weights|targets) must have shape \(4,"):
        masked_cross_entropy(torch.zeros(4, 3), targets, weights)


@pytest.mark.parametrize("shape", [(4,), (0, 3), (2, 2, 3)])
def test_logits_that_are_no_batch(shape):
    with pytest.raises(ValueError, match=r"logits must be \(B, C\)"):
        masked_cross_entropy(torch.zeros(shape), torch.zeros(len(torch.zeros(shape))).long(), torch.ones(0))


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(2, 8))
def test_it_is_the_average_of_its_examples(seed, batch, classes):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator).double()
    targets = torch.randint(classes, (batch,), generator=generator)
    weights = torch.rand(batch, generator=generator).double()
    alone = [
        masked_cross_entropy(logits[i : i + 1], targets[i : i + 1], weights[:1] * 0 + 1) for i in range(batch)
    ]
    expected = sum(float(w) * float(loss) for w, loss in zip(weights, alone, strict=True)) / batch
    assert float(masked_cross_entropy(logits, targets, weights)) == pytest.approx(expected)
