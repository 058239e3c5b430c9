import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from modeling_fer.data.sampling import DebiasFeedbackSampler, class_quotas, feedback_weights

PINNED_EPOCH_0 = [0, 6, 6, 2, 4, 5, 1, 4]
PINNED_EPOCH_1 = [6, 5, 3, 0, 2, 5, 6, 4]
LONG_TAIL = [0] * 60 + [1] * 25 + [2] * 9 + [-1] * 6


def draw(sampler: DebiasFeedbackSampler, steps: int) -> list[list[int]]:
    """Global batches of a single process, as the training loop draws them."""
    drawn: list[list[int]] = []
    while len(drawn) < steps:
        indices = list(sampler)
        for start in range(0, len(indices), sampler.batch_size):
            drawn.append(indices[start : start + sampler.batch_size])
            sampler.advance()
            if len(drawn) == steps:
                break
    return drawn


def test_order_is_pinned():
    """The order of a seed is part of the contract: a change of it changes every published run."""
    sampler = DebiasFeedbackSampler([0, 0, 0, 0, 1, 1, 2], 3, batch_size=4, seed=7)
    assert list(sampler) == PINNED_EPOCH_0
    sampler.epoch = 1
    assert list(sampler) == PINNED_EPOCH_1


def test_natural_round_holds_every_example_once():
    sampler = DebiasFeedbackSampler(LONG_TAIL[:94], 3, batch_size=47, alpha=0)
    assert sorted(sampler) == list(range(94))


def test_uniform_round_holds_classes_equally_and_spreads_within_them():
    sampler = DebiasFeedbackSampler(LONG_TAIL, 3, batch_size=30)
    indices = np.array(list(sampler))
    assert len(indices) == len(sampler) == 120
    assert np.bincount(np.array(LONG_TAIL)[indices]).tolist() == [40, 40, 40]
    times = [np.bincount(indices, minlength=100)[np.array(LONG_TAIL) == c] for c in range(3)]
    # No example comes again before all of its class have come.
    assert all(t.max() - t.min() <= 1 for t in times)
    assert not set(indices) & set(range(94, 100)), "unlabelled rows are never drawn"


def test_no_example_comes_again_before_all_of_its_class_have_come():
    sampler = DebiasFeedbackSampler(LONG_TAIL, 3, batch_size=30)
    indices = np.array([i for batch in draw(sampler, 12) for i in batch])
    for c, size in enumerate((60, 25, 9)):
        stream = indices[np.array(LONG_TAIL)[indices] == c]
        assert len(stream) == 120
        for start in range(0, len(stream) - size + 1, size):
            assert len(set(stream[start : start + size])) == size


def test_other_data_is_told():
    state = DebiasFeedbackSampler([0, 1, 1, 0], 2, batch_size=2).state_dict()
    with pytest.raises(ValueError, match="labels of the data, or the features"):
        DebiasFeedbackSampler([0, 1, 0, 1], 2, batch_size=2).load_state_dict(state)


def test_weights_move_the_class_shares_from_the_next_round():
    sampler = DebiasFeedbackSampler(LONG_TAIL, 3, batch_size=30)
    sampler.set_class_weights([2, 1, 1])
    assert np.allclose(sampler.class_probabilities(), [0.5, 0.25, 0.25])
    assert np.bincount(np.array(LONG_TAIL)[list(sampler)]).tolist() == [60, 30, 30]
    sampler.advance()
    with pytest.raises(RuntimeError, match="between rounds"):
        sampler.set_class_weights([1, 1, 1])


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    alpha=st.floats(0, 1),
    world=st.sampled_from([1, 2, 4]),
    per_rank=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 50),
)
def test_processes_share_each_global_batch_of_one_process(counts, alpha, world, per_rank, seed, epoch):
    labels = np.repeat(np.arange(len(counts)), counts)
    batch = world * per_rank

    def sampler(rank, size):
        made = DebiasFeedbackSampler(labels, len(counts), batch, alpha, seed, rank, size)
        made.epoch = epoch
        return made

    alone = np.array(list(sampler(0, 1))).reshape(-1, batch)
    parts = [np.array(list(sampler(rank, world))).reshape(-1, per_rank) for rank in range(world)]
    together = np.concatenate(parts, axis=1)
    assert np.array_equal(np.sort(alone), np.sort(together))
    assert all(len(sampler(rank, world)) == alone.size // world for rank in range(world))


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1), min_size=1, max_size=8), total=st.integers(0, 1000))
def test_quotas_sum_to_the_total_and_keep_the_shares(weights, total):
    shares = np.array(weights) / np.sum(weights)
    quotas = class_quotas(shares, total)
    assert quotas.sum() == total
    assert (np.abs(quotas - shares * total) < 1 + 1e-6).all()


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 9])
def test_interrupted_is_uninterrupted(stop):
    def fresh():
        return DebiasFeedbackSampler(LONG_TAIL, 3, batch_size=30, seed=3)

    first = fresh()
    whole = draw(fresh(), 12)
    head = draw(first, stop)
    second = fresh()
    second.load_state_dict(first.state_dict())
    assert head + draw(second, 12 - stop) == whole


def test_rounds_and_seeds_differ_and_do_not_collide():
    orders = {
        (seed, epoch): tuple(_at(seed, epoch).global_order()) for seed in range(4) for epoch in range(4)
    }
    assert len(set(orders.values())) == 16, "seed and epoch must not be added or multiplied"


def _at(seed: int, epoch: int) -> DebiasFeedbackSampler:
    sampler = DebiasFeedbackSampler(LONG_TAIL, 3, 30, seed=seed)
    sampler.epoch = epoch
    return sampler


def test_works_behind_a_data_loader():
    sampler = DebiasFeedbackSampler(LONG_TAIL, 3, batch_size=30, rank=1, world_size=2)
    loader = DataLoader(range(100), batch_size=15, sampler=sampler)
    assert len(loader) == sampler.batches_per_epoch == 4
    assert [i for batch in loader for i in batch.tolist()] == list(sampler)


@pytest.mark.parametrize(
    ("labels", "classes", "options", "message"),
    [
        ([0, 0, 2], 3, {"batch_size": 2}, r"classes \[1\] have no examples"),
        ([0, 1], 2, {"batch_size": 3, "world_size": 2}, "multiple of the 2 processes"),
        ([0, 1], 2, {"batch_size": 0}, "positive multiple"),
        ([0, 1], 2, {"batch_size": 2, "alpha": 1.5}, "alpha"),
    ],
)
def test_bad_arguments_are_told(labels, classes, options, message):
    with pytest.raises(ValueError, match=message):
        DebiasFeedbackSampler(labels, classes, **options)


@pytest.mark.parametrize("weights", [[1, 1], [1, 1, 0], [1, 1, -1], [1, 1, np.nan], [1, 1, np.inf]])
def test_bad_weights_are_told(weights):
    with pytest.raises(ValueError, match="3 positive finite class weights"):
        DebiasFeedbackSampler(LONG_TAIL, 3, batch_size=2).set_class_weights(weights)


def test_a_round_may_have_any_number_of_batches():
    sampler = DebiasFeedbackSampler(LONG_TAIL, 3, batch_size=30, round_batches=7)
    assert (sampler.batches_per_pass, sampler.batches_per_epoch, len(sampler)) == (4, 7, 210)
    assert np.bincount(np.array(LONG_TAIL)[list(sampler)]).tolist() == [70, 70, 70]
    assert [sampler.advance() for _ in range(14)] == [False] * 6 + [True] + [False] * 6 + [True]
    assert sampler.epoch == 2


def test_short_rounds_go_on_where_the_last_stopped():
    sampler = DebiasFeedbackSampler(LONG_TAIL[:94], 3, batch_size=9, alpha=1, round_batches=1)
    indices = np.array([i for batch in draw(sampler, 20) for i in batch])  # 20 rounds of 3 a class
    first = indices[np.array(LONG_TAIL)[indices] == 0]
    assert len(first) == len(set(first)) == 60


@settings(max_examples=200, deadline=None)
@given(
    shares=st.lists(st.floats(0, 1), min_size=2, max_size=8).filter(lambda s: sum(s) > 0.01),
    known=st.booleans(),
    bound=st.floats(1, 20),
    data=st.data(),
)
def test_feedback_stays_within_its_bounds_and_follows_the_classes(shares, known, bound, data):
    shares = np.array(shares) / np.sum(shares)
    count = len(shares)
    recall = np.array(data.draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))) if known else None
    weights = feedback_weights(shares, recall, bound)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert (weights * count <= bound * (1 + 1e-9)).all()
    assert (weights * count >= 1 / bound * (1 - 1e-9)).all()
    order = np.array(data.draw(st.permutations(range(count))))
    permuted = feedback_weights(shares[order], None if recall is None else recall[order], bound)
    assert np.allclose(permuted, weights[order], rtol=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    shares=st.lists(st.floats(0.01, 1), min_size=2, max_size=8),
    bound=st.floats(1.01, 20),
    factor=st.floats(1.01, 50),
)
def test_a_class_with_more_pseudo_labels_or_recall_is_drawn_less(shares, bound, factor):
    shares = np.array(shares) / np.sum(shares)
    more = np.append(shares[0] * factor, shares[1:])
    weights = feedback_weights(shares, None, bound)
    # Shares sum to 1: the others' fall, and rise again to the floor where they are tiny.
    assert feedback_weights(more / more.sum(), None, bound)[0] <= weights[0] * (1 + 1e-9)
    before, after = (feedback_weights(shares, np.minimum(r, 1), bound) for r in (shares, more))
    assert after[0] <= before[0] * (1 + 1e-9)
    assert (after[1:] >= before[1:] * (1 - 1e-9)).all()
    assert (np.diff(weights[np.argsort(shares)]) <= 1e-9).all()


def test_feedback_goes_half_of_the_way():
    weights = feedback_weights(np.array([0.64, 0.16, 0.16, 0.04]), None, 10.0)
    assert np.allclose(weights / weights[0], [1, 2, 2, 4])
    weights = feedback_weights(np.full(4, 0.25), np.array([1, 0.25, 0, 0.25]), 20.0)
    assert np.allclose(weights / weights[0], [1, 2, 10, 2]), "recall of none counts as a hundredth"


def test_feedback_without_a_lean_or_a_leeway_is_uniform():
    assert np.allclose(feedback_weights(np.full(8, 1 / 8), np.full(8, 0.3), 3.0), 1 / 8, rtol=1e-12)
    assert np.array_equal(feedback_weights(np.array([0.9, 0.1, 0, 0]), None, 1.0), np.full(4, 0.25))


@pytest.mark.parametrize("bound", [0.5, 0, -3, np.nan])
def test_a_bound_below_one_is_told(bound):
    with pytest.raises(ValueError, match="bound of at least 1, got"):
        feedback_weights(np.full(2, 0.5), None, bound)


def test_saved_weights_keep_their_bits():
    """Divided once more by their sum, weights that stand for a tie would turn it, and the order with it."""
    labels = np.repeat(np.arange(6), [2, 48, 32, 6, 27, 5])
    one = DebiasFeedbackSampler(labels, 6, 8, alpha=0.0, round_batches=5)
    other = DebiasFeedbackSampler(labels, 6, 8, alpha=0.0, round_batches=5)
    other.load_state_dict(one.state_dict())
    assert np.array_equal(other.class_weights, one.class_weights)
    assert np.array_equal(other.global_order(), one.global_order())
