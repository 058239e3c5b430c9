import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from modeling_fer.learning.gate import GATES, auroc, make_gate


def with_energy(*values):
    """Two equal logits whose log-sum-exp is each value."""
    return (torch.tensor(values) - math.log(2))[:, None].repeat(1, 2)


def random_logits(seed, batch=9):
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed))


def test_scores_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [5.0, 5.0]])
    assert GATES["energy"](logits).tolist() == pytest.approx([math.log(4), 5 + math.log(2)])
    assert GATES["probability"](logits).tolist() == pytest.approx([0.75, 0.5])
    assert GATES["none"](logits).tolist() == [0, 0]


def test_the_floor_by_hand():
    gate = make_gate("energy", quantile=0.25, momentum=0.5)
    images = with_energy(-9.0, 0.9, 1.1, 1.9, 2.1)
    assert gate(images).all()  # nothing is known yet
    gate.observe(with_energy(0.0, 1.0, 2.0, 3.0, 4.0))  # quantile 1, taken as it is
    assert gate(images).tolist() == [False, False, True, True, True]
    gate.observe(with_energy(2.0, 3.0, 4.0, 5.0, 6.0))  # quantile 3, so that the floor is 2
    assert gate(images).tolist() == [False, False, False, False, True]
    assert gate(images).dtype == torch.bool
    assert float(gate.floor) == pytest.approx(2)


def test_the_floor_itself_is_kept():
    gate, logits = make_gate("probability", quantile=0.0), random_logits(0)
    gate.observe(logits)
    assert gate(logits).all()


def test_probability_and_energy_differ():
    """Small logits of one clear winner: probable, but of low energy."""
    inside, odd = torch.tensor([[9.0, 8.0]] * 3), torch.tensor([[2.0, -2.0]])
    kept = {}
    for name in GATES:
        gate = make_gate(name)
        gate.observe(inside)
        kept[name] = gate(odd).tolist()
    assert kept == {"none": [True], "probability": [True], "energy": [False]}


@given(st.integers(0, 2**31))
def test_none_keeps_all(seed):
    gate = make_gate("none", quantile=1.0)
    gate.observe(100 + random_logits(seed))
    assert gate(random_logits(seed + 1)).all()


@pytest.mark.parametrize("name", GATES)
@given(seed=st.integers(0, 2**31), order=st.permutations(range(4)))
def test_the_order_of_classes_and_images_does_not_matter(name, seed, order):
    first, second = make_gate(name, 0.3), make_gate(name, 0.3)
    first.observe(random_logits(seed))
    second.observe(random_logits(seed)[:, order].flip(0))
    assert torch.allclose(first.floor, second.floor, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", GATES)
def test_a_saved_gate_continues_bit_for_bit(name):
    gate, restored = make_gate(name, momentum=0.9), make_gate(name, momentum=0.9)
    fresh = make_gate(name)
    fresh.load_state_dict(gate.state_dict())
    assert fresh(random_logits(0)).all()  # saved before anything was observed
    gate.observe(random_logits(0))
    restored.load_state_dict(gate.state_dict())
    for step in range(1, 4):
        for each in (gate, restored):
            each.observe(random_logits(step))
        assert torch.equal(gate.floor, restored.floor)
        assert torch.equal(gate(random_logits(9, 50)), restored(random_logits(9, 50)))
    with pytest.raises(ValueError, match=r"a single number, got shape \(3,\)"):
        gate.load_state_dict({"floor": torch.zeros(3)})


def test_bad_input():
    with pytest.raises(ValueError, match="one of none, probability, energy, got 'entropy'"):
        make_gate("entropy")
    with pytest.raises(ValueError, match="quantile must lie between 0 and 1, got 5"):
        make_gate("energy", quantile=5)
    with pytest.raises(ValueError, match="momentum"):
        make_gate("energy", momentum=1.0)
    for shape in ((0, 4), (4,)):
        with pytest.raises(ValueError, match=r"labelled logits must be \(L, C\)"):
            make_gate("energy").observe(torch.zeros(shape))


def test_auroc_by_hand():
    assert auroc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1
    assert auroc(torch.tensor([0.0]), torch.tensor([1.0])) == 0
    assert auroc(torch.tensor([1.0, 1.0]), torch.tensor([1.0])) == 0.5
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0, 3.0])) == pytest.approx((1.5 + 2) / 6)
    with pytest.raises(ValueError, match="got 0 inside, 3 outside"):
        auroc(torch.zeros(0), torch.zeros(3))


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=20), st.lists(st.integers(0, 5), min_size=1, max_size=20)
)
def test_auroc_is_scikit_learns(inside, outside):
    expected = roc_auc_score([1] * len(inside) + [0] * len(outside), inside + outside)
    assert auroc(torch.tensor(inside), torch.tensor(outside)) == pytest.approx(expected)
