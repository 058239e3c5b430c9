import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_fer.learning.debias import Alignment, Marginal, debiased, with_margin


def random_probabilities(seed, batch=6, classes=5):
    return torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed)).softmax(1)


def skewed(momentum=0.5):
    """Return a marginal that has seen one class alone, twice."""
    marginal = Marginal(4, momentum)
    for _ in range(2):
        marginal.observe(torch.tensor([[1.0, 0, 0, 0]] * 3))
    return marginal


def test_marginal_by_hand():
    marginal = Marginal(4, 0.5)
    assert marginal.value.tolist() == [0.25] * 4
    assert marginal.value.dtype == torch.float64
    marginal.observe(torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0]]))
    assert marginal.value.tolist() == [0.5, 0.25, 0.125, 0.125]
    marginal.observe(torch.tensor([[0.0, 0, 1, 0]]))
    assert marginal.value.tolist() == [0.25, 0.125, 0.5625, 0.0625]


def test_uniform_predictions_leave_everything_alone():
    marginal = Marginal(8)
    for _ in range(100):
        marginal.observe(torch.full((3, 8), 1 / 8))
    assert torch.allclose(marginal.value, torch.full((8,), 1 / 8).double(), rtol=0, atol=1e-15)
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    for adjust in (debiased, with_margin):
        adjusted = adjust(logits, marginal.value, 1.5)
        assert torch.allclose(adjusted.softmax(1), logits.softmax(1), atol=1e-6)


def test_skewed_predictions_turn_labels_as_the_equation_says():
    marginal = skewed()
    assert marginal.value.tolist() == [0.8125, 0.0625, 0.0625, 0.0625]
    logits = torch.tensor([[1.0, 0.0, -1.0, -2.0], [4.0, 0.0, 0.0, 0.0]])
    advantage = math.log(13)  # of class 0 over the others, 2.56
    found = debiased(logits, marginal.value, 1.0)
    assert found.argmax(1).tolist() == [1, 0]
    assert logits.argmax(1).tolist() == [0, 0]
    differences = found[:, :1] - found[:, 1:]
    expected = torch.tensor([[1.0, 2, 3], [4, 4, 4]]) - advantage
    assert torch.allclose(differences, expected, atol=1e-6)
    assert debiased(logits, marginal.value, 0.1).argmax(1).tolist() == [0, 0]  # 1 > 0.1 * 2.56
    assert torch.allclose(found, logits - marginal.value.log().float())
    assert found.dtype == torch.float32


def test_the_margin_is_the_opposite():
    logits, marginal = torch.randn(3, 4), skewed().value
    assert torch.allclose(with_margin(logits, marginal, 0.7), logits + 0.7 * marginal.log().float())
    assert torch.allclose(debiased(with_margin(logits, marginal, 0.7), marginal, 0.7), logits, atol=1e-6)


def test_the_margin_lets_gradients_through():
    logits = torch.zeros(1, 4, requires_grad=True)
    torch.nn.functional.cross_entropy(with_margin(logits, skewed().value, 1.0), torch.tensor([1])).backward()
    expected = skewed().value.float() - torch.tensor([0, 1.0, 0, 0])  # softmax(log p) - one-hot
    assert torch.allclose(logits.grad[0], expected, atol=1e-6)


@pytest.mark.parametrize("adjust", [debiased, with_margin])
def test_tau_of_zero_is_plain_fixmatch(adjust):
    logits = torch.randn(3, 4)
    assert adjust(logits, skewed().value, 0) is logits
    assert adjust(logits, skewed().value, 0.0) is logits


@pytest.mark.parametrize("adjust", [debiased, with_margin])
def test_bad_tau_and_bad_marginal(adjust):
    logits = torch.zeros(3, 4)
    for tau in (-0.1, math.nan):
        with pytest.raises(ValueError, match="tau must not be negative"):
            adjust(logits, skewed().value, tau)
    for marginal in (torch.tensor(0.3), torch.ones(1), torch.ones(3, 4), torch.ones(5)):
        with pytest.raises(ValueError, match="one number a class"):
            adjust(logits, marginal, 1.0)


def test_a_class_that_is_never_predicted():
    marginal = Marginal(2, 0.0)
    marginal.observe(torch.tensor([[1.0, 0.0]]))
    assert marginal.value.tolist() == [1, 0]
    assert debiased(torch.zeros(1, 2), marginal.value, 1.0).isfinite().all()


@given(seed=st.integers(0, 2**31), order=st.permutations(range(5)), tau=st.floats(0, 3))
@settings(max_examples=50, deadline=None)
def test_permuting_classes_permutes_everything(seed, order, tau):
    plain, permuted = Marginal(5, 0.7), Marginal(5, 0.7)
    aligned, also = Alignment("labelled", 5, 0.7), Alignment("labelled", 5, 0.7)
    for step in range(3):
        given_rows, labelled = random_probabilities(seed + step), random_probabilities(seed + step + 7)
        plain.observe(given_rows)
        permuted.observe(given_rows[:, order])
        aligned.observe(given_rows, labelled)
        also.observe(given_rows[:, order], labelled[:, order])
    assert torch.allclose(permuted.value, plain.value[order], rtol=0, atol=1e-12)
    for adjust in (debiased, with_margin):
        expected = adjust(given_rows, plain.value, tau)[:, order]
        assert torch.allclose(adjust(given_rows[:, order], permuted.value, tau), expected, atol=1e-5)
    assert torch.allclose(also(given_rows[:, order]), aligned(given_rows)[:, order], atol=1e-6)


def test_the_marginal_does_not_depend_on_the_order_of_summation():
    probabilities = random_probabilities(0, 4096)
    first, second = Marginal(5, 0.0), Marginal(5, 0.0)
    first.observe(probabilities)
    second.observe(probabilities[torch.randperm(4096, generator=torch.Generator().manual_seed(1))])
    assert torch.allclose(first.value, second.value, rtol=0, atol=1e-13)


def test_the_marginal_holds_no_graph():
    marginal = Marginal(3)
    marginal.observe(torch.randn(2, 3, requires_grad=True).softmax(1))
    assert not marginal.value.requires_grad


def test_a_saved_marginal_continues_bit_for_bit():
    marginal, restored = Marginal(5, 0.9), Marginal(5, 0.9)
    marginal.observe(random_probabilities(0))
    restored.load_state_dict(marginal.state_dict())
    for step in range(1, 4):
        marginal.observe(random_probabilities(step))
        restored.observe(random_probabilities(step))
        assert torch.equal(marginal.value, restored.value)
    with pytest.raises(ValueError, match=r"shape \(5,\), expected \(4,\); continue with the classes"):
        Marginal(4).load_state_dict(marginal.state_dict())


def test_bad_marginals():
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        Marginal(1)
    for momentum in (-0.1, 1.0):
        with pytest.raises(ValueError, match="momentum"):
            Marginal(4, momentum)
    for shape in ((0, 4), (3, 5), (4,)):
        with pytest.raises(ValueError, match=r"must be \(B, 4\) with B at least 1"):
            Marginal(4).observe(torch.ones(shape))


def test_uniform_alignment_by_hand():
    alignment = Alignment("uniform", 2, 0.5)
    alignment.observe(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    # mean prediction (3/4, 1/4): ratio to uniform 2/3, 2
    found = alignment(torch.tensor([[0.5, 0.5], [0.6, 0.4]]))
    assert torch.allclose(found, torch.tensor([[1 / 4, 3 / 4], [0.4 / 1.2, 0.8 / 1.2]]))
    assert found.dtype == torch.float32


def test_labelled_alignment_by_hand():
    alignment = Alignment("labelled", 2, 0.5)
    alignment.observe(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.25, 0.75], [0.75, 0.25]]))
    alignment.observe(torch.tensor([[0.25, 0.75]]), torch.tensor([[0.0, 1.0]]))
    # unlabelled (3/4, 1/4) then (1/2, 1/2); labelled (1/2, 1/2) then (1/4, 3/4): ratio 1/2, 3/2
    found = alignment(torch.tensor([[0.6, 0.4], [1.0, 0.0]]))
    assert torch.allclose(found, torch.tensor([[0.3 / 0.9, 0.6 / 0.9], [1.0, 0.0]]))


@pytest.mark.parametrize("target", ["uniform", "labelled"])
def test_alignment_without_a_difference_changes_no_bit(target):
    alignment, probabilities = Alignment(target, 5, 0.9), random_probabilities(3, 1000)
    assert torch.equal(alignment(probabilities), probabilities)
    if target == "labelled":
        alignment.observe(probabilities, probabilities)
        assert torch.equal(alignment(probabilities), probabilities)


@given(st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_aligned_rows_are_distributions(seed):
    alignment = Alignment("labelled", 5, 0.5)
    alignment.observe(random_probabilities(seed), random_probabilities(seed + 1))
    found = alignment(random_probabilities(seed + 2))
    assert (found >= 0).all()
    assert torch.allclose(found.sum(1), torch.ones(6), atol=1e-6)


def test_a_saved_alignment_continues_bit_for_bit():
    alignment, restored = (Alignment("labelled", 5, 0.9) for _ in range(2))
    alignment.observe(random_probabilities(0), random_probabilities(1))
    restored.load_state_dict(alignment.state_dict())
    for step in range(2, 5):
        for each in (alignment, restored):
            each.observe(random_probabilities(step), random_probabilities(step + 9))
        assert torch.equal(alignment(random_probabilities(7)), restored(random_probabilities(7)))
    with pytest.raises(ValueError, match="continue with the classes"):
        Alignment("labelled", 4).load_state_dict(alignment.state_dict())


def test_an_unknown_target():
    with pytest.raises(ValueError, match="one of uniform, labelled, got 'balanced'"):
        Alignment("balanced", 5)
