import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_fer.learning.thresholds import THRESHOLD_RULES, make_rule

MEMORY = 6


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)


def observe(rule, probabilities, index=None, labelled=None, labels=()):
    """Tell a rule of a batch, by default in slots 0, 1, ... and without labelled faces."""
    index = torch.arange(len(probabilities)) if index is None else torch.tensor(index)
    labelled = torch.zeros(0, rule.num_classes) if labelled is None else labelled
    rule.observe(probabilities, index, labelled, torch.tensor(labels, dtype=torch.long))


def random_batch(seed, classes=5, batch=7, labelled=4):
    """One step's arguments, confident about some."""
    generator = torch.Generator().manual_seed(seed)
    return (
        (3 * torch.randn(batch, classes, generator=generator)).softmax(1),
        torch.randint(MEMORY, (batch,), generator=generator),
        (3 * torch.randn(labelled, classes, generator=generator)).softmax(1),
        torch.randint(classes, (labelled,), generator=generator),
    )


def test_fixed_is_fixmatch():
    rule = make_rule("fixed", 3)
    at, below = torch.tensor(0.95), torch.tensor(0.95).nextafter(torch.tensor(0.0))
    probabilities = torch.stack([torch.stack([1 - p, p, 0 * p]) for p in (at, below, torch.tensor(0.99))])
    observe(rule, probabilities)
    assert rule.weights(probabilities).tolist() == [1, 0, 1]  # at the threshold it counts, in float32 too
    assert rule.thresholds().tolist() == [0.95] * 3
    assert rule.state_dict() == {}


def test_flex_by_hand():
    rule = make_rule("flex", 3, threshold=0.8, memory=MEMORY)
    assert rule.thresholds().tolist() == [0, 0, 0]
    # Slots 0 and 1 to class 0, slot 2 to class 1, slot 3 not confident: 3 without class, the largest count.
    observe(rule, rows([0.9, 0.05, 0.05], [0.8, 0.1, 0.1], [0.1, 0.9, 0.0], [0.2, 0.1, 0.7]))
    beta = torch.tensor([2 / 3, 1 / 3, 0]).double()
    assert torch.allclose(rule.thresholds(), 0.8 * beta / (2 - beta))
    # Slot 1 turns to class 2, slot 0 is no longer confident and keeps class 0, slots 3 to 5 join class 1.
    observe(
        rule,
        rows([0.0, 0.1, 0.9], [0.6, 0.2, 0.2], [0, 1, 0], [0, 1, 0], [0, 0.85, 0.15]),
        index=[1, 0, 3, 4, 5],
    )
    beta = torch.tensor([1 / 4, 1, 1 / 4]).double()  # counts 1, 4, 1; none without
    assert torch.allclose(rule.thresholds(), 0.8 * beta / (2 - beta))
    low = 0.8 / 7
    assert rule.thresholds().tolist() == pytest.approx([low, 0.8, low])
    assert rule.weights(rows([0.4, 0.35, 0.25], [0.15, 0.75, 0.1], [0.1, 0.81, 0.09])).tolist() == [1, 0, 1]


def test_flex_when_a_slot_comes_twice():
    rule = make_rule("flex", 3, threshold=0.8, memory=3)
    observe(rule, rows([0.9, 0.1, 0.0], [0.0, 0.1, 0.9], [0.1, 0.7, 0.2]), index=[1, 1, 1])
    assert rule.state_dict()["assigned"].tolist() == [-1, 2, -1]  # the last confident view


@pytest.mark.parametrize("index", [[0, MEMORY], [-1, 0]])
def test_flex_and_a_slot_outside_the_memory(index):
    rule = make_rule("flex", 2, memory=MEMORY)
    with pytest.raises(ValueError, match=r"index must lie from 0 to 5, .*number of unlabelled examples"):
        observe(rule, rows([1, 0], [1, 0]), index=index)


def test_free_by_hand():
    rule = make_rule("free", 2, momentum=0.75)
    assert rule.thresholds().tolist() == [0.5, 0.5]
    observe(rule, rows([0.75, 0.25], [1.0, 0.0]))  # mean confidence 7/8, mean distribution 7/8, 1/8
    confidence, marginal = 0.375 + 0.21875, (0.375 + 0.21875, 0.375 + 0.03125)
    assert rule.thresholds().tolist() == pytest.approx([confidence, confidence * marginal[1] / marginal[0]])
    observe(rule, rows([0.0, 1.0]))
    confidence = 0.75 * confidence + 0.25
    marginal = (0.75 * marginal[0], 0.75 * marginal[1] + 0.25)
    found = rule.thresholds().tolist()
    assert found == pytest.approx([confidence * marginal[0] / marginal[1], confidence])
    assert rule.weights(rows([found[0] + 0.01, 0], [found[0] - 0.01, 0], [0, 0.68])).tolist() == [1, 0, 0]


def test_soft_by_hand():
    rule = make_rule("soft", 2, momentum=0.5)
    observe(rule, rows([0.75, 0.25], [0.0, 1.0]))  # mean 0.875, variance 2 * 0.125^2 / (2 - 1) = 1/32
    mean, variance = 0.25 + 0.4375, 0.5 + 1 / 64
    assert rule.thresholds().tolist() == [mean, mean]
    expected = torch.tensor([-((mean - 0.5) ** 2) / (2 * variance / 4), 0.0]).exp()
    found = rule.weights(rows([0.5, 0.5], [0.3, 0.7]))
    assert torch.allclose(found, expected)
    assert found.dtype == torch.float32
    observe(rule, rows([0.5, 0.5]))  # one example moves the mean alone
    assert rule.thresholds()[0] == mean / 2 + 0.25
    assert float(rule.state_dict()["variance"]) == variance


def test_soft_where_all_agree():
    rule = make_rule("soft", 2, momentum=0)
    observe(rule, rows([1, 0], [1, 0]))  # the variance is 0
    assert rule.weights(rows([0.0, 1.0], [0.4, 0.6])).tolist() == [1, 0]


def test_ada_by_hand():
    rule = make_rule("ada", 3, threshold=0.9, momentum=0.5)
    labelled = rows([0.6, 0.2, 0.2], [0.8, 0.1, 0.1], [0.99, 0.01, 0.0], [0.0, 0.25, 0.75])
    observe(rule, rows([1, 0, 0]), labelled=labelled, labels=[0, 0, 1, 2])  # the third is wrong
    assert rule.thresholds().tolist() == pytest.approx([0.45 + 0.35, 0.9, 0.45 + 0.375])
    observe(rule, rows([1, 0, 0]), labelled=labelled[:1], labels=[0])
    found = rule.thresholds().tolist()
    assert found == pytest.approx([0.4 + 0.3, 0.9, 0.825])
    assert rule.weights(rows([0.71, 0.29, 0], [0.1, 0.89, 0.01], [0.1, 0.1, 0.8])).tolist() == [1, 0, 0]


@pytest.mark.parametrize("name", ["flex", "free", "ada"])
def test_two_classes_of_one_confidence_fare_differently(name):
    """Thresholds are a vector: the same confidence counts for one class and not for another."""
    rule = make_rule(name, 2, threshold=0.9, momentum=0.5, memory=4)
    sure, labels = rows([0.99, 0.01], [0.99, 0.01], [0.99, 0.01], [0.3, 0.7]), [0, 0, 0, 1]
    for _ in range(20):
        observe(rule, sure, labelled=sure, labels=labels)
    assert rule.weights(rows([0.72, 0.28], [0.28, 0.72])).tolist() == [0, 1]


@pytest.mark.parametrize("name", THRESHOLD_RULES)
@given(seed=st.integers(0, 2**31), order=st.permutations(range(5)))
@settings(max_examples=25, deadline=None)
def test_permuting_classes_permutes_everything(name, seed, order):
    plain, permuted = (make_rule(name, 5, 0.7, 0.9, MEMORY) for _ in range(2))
    for step in range(3):
        probabilities, index, labelled, labels = random_batch(seed + step)
        plain.observe(probabilities, index, labelled, labels)
        position = torch.tensor(order).argsort()
        permuted.observe(probabilities[:, order], index, labelled[:, order], position[labels])
    assert torch.allclose(permuted.thresholds(), plain.thresholds()[order], rtol=0, atol=1e-12)
    found, expected = permuted.weights(probabilities[:, order]), plain.weights(probabilities)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", THRESHOLD_RULES)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_weights_lie_between_0_and_1_and_change_nothing(name, seed):
    rule = make_rule(name, 5, 0.7, 0.9, MEMORY)
    batch = random_batch(seed)
    rule.observe(*batch)
    before = copy.deepcopy(rule.state_dict())
    weights = rule.weights(batch[0])
    assert weights.shape == (7,)
    assert weights.dtype == torch.float32
    assert ((weights >= 0) & (weights <= 1)).all()
    assert name == "soft" or set(weights.tolist()) <= {0.0, 1.0}
    assert rule.thresholds().shape == (5,)
    assert all(torch.equal(before[key], value) for key, value in rule.state_dict().items())


@pytest.mark.parametrize("name", [name for name in THRESHOLD_RULES if name != "flex"])
def test_order_within_the_batch_does_not_matter(name):
    first, second = (make_rule(name, 5, 0.7, 0.9, MEMORY) for _ in range(2))
    probabilities, index, labelled, labels = random_batch(0, batch=4096, labelled=512)
    first.observe(probabilities, index, labelled, labels)
    second.observe(probabilities.flip(0), index.flip(0), labelled.flip(0), labels.flip(0))
    assert torch.allclose(first.thresholds(), second.thresholds(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", THRESHOLD_RULES)
def test_a_saved_state_continues_bit_for_bit(name):
    rule, restored = (make_rule(name, 5, 0.7, 0.9, MEMORY) for _ in range(2))
    for step in range(2):
        rule.observe(*random_batch(step))
    saved = rule.state_dict()
    kept = copy.deepcopy(saved)
    restored.load_state_dict(saved)
    for step in range(2, 5):
        for each in (rule, restored):
            each.observe(*random_batch(step))
        assert torch.equal(rule.thresholds(), restored.thresholds())
        assert torch.equal(rule.weights(random_batch(9)[0]), restored.weights(random_batch(9)[0]))
    assert all(torch.equal(kept[key], saved[key]) for key in kept)  # a saved state is a copy
    assert name == "fixed" or any(not torch.equal(kept[key], rule.state_dict()[key]) for key in kept)


def test_state_of_other_sizes():
    for name, other in (("flex", (3, 0.9, 0.9, 5)), ("free", (4, 0.9, 0.9, 0)), ("ada", (4, 0.9, 0.9, 0))):
        with pytest.raises(ValueError, match=r"must have the shapes .*continue with the rule, classes"):
            make_rule(name, 3, memory=4).load_state_dict(make_rule(name, *other).state_dict())
    with pytest.raises(ValueError, match="must have the shapes"):
        make_rule("fixed", 3).load_state_dict(make_rule("soft", 3).state_dict())


def test_bad_batches():
    rule = make_rule("fixed", 3)
    with pytest.raises(ValueError, match=r"^probabilities must be \(B, 3\)"):
        observe(rule, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"^probabilities must be"):
        observe(rule, torch.ones(2, 3), index=[[0], [1]])
    with pytest.raises(ValueError, match=r"^labelled probabilities must be"):
        observe(rule, torch.ones(2, 3), labelled=torch.ones(2, 3), labels=[0])
    with pytest.raises(ValueError, match="no unlabelled examples"):
        observe(rule, torch.ones(0, 3))


def test_bad_settings():
    with pytest.raises(ValueError, match="one of fixed, flex, free, soft, ada, got 'fixmatch'"):
        make_rule("fixmatch", 3)
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        make_rule("fixed", 1)
    with pytest.raises(ValueError, match="between 0 and 1, got 95"):
        make_rule("fixed", 3, threshold=95)
    with pytest.raises(ValueError, match=r"momentum .* less than 1, got 1"):
        make_rule("free", 3, momentum=1)
    with pytest.raises(ValueError, match="memory must be their number, got 0"):
        make_rule("flex", 3)
    with pytest.raises(ValueError, match="at most 127 classes, got 128"):
        make_rule("flex", 128, memory=1)
    last = make_rule("flex", 127, threshold=0.5, memory=1)
    observe(last, torch.eye(127)[126:])
    assert last.thresholds().argmax() == 126
