"""The labeler against the equations it stands for, written out in numpy."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_fer.learning.debias import Alignment, Marginal
from modeling_fer.learning.gate import GATES, make_gate
from modeling_fer.learning.pseudo_labels import PseudoLabeler
from modeling_fer.learning.thresholds import THRESHOLD_RULES, make_rule

CLASSES = 4
UNKNOWN = torch.full((6,), -1)


def make(
    rule="fixed",
    threshold=0.5,
    tau=0.0,
    align="none",
    gate="none",
    momentum=0.5,
    gather=None,
    rank=0,
    memory=6,
):
    return PseudoLabeler(
        make_rule(rule, CLASSES, threshold, momentum, memory),
        Marginal(CLASSES, momentum),
        tau,
        None if align == "none" else Alignment(align, CLASSES, momentum),
        make_gate(gate, 0.2, momentum),
        gather or (lambda part: part),
        rank,
    )


def batch(seed, faces=6, labelled=4):
    """Logits of faces, their numbers, logits of labelled faces and their classes; hidden labels are apart."""
    g = torch.Generator().manual_seed(seed)
    return {
        "logits": 2 * torch.randn(faces, CLASSES, generator=g),
        "index": torch.arange(faces),
        "labelled_logits": 2 * torch.randn(labelled, CLASSES, generator=g),
        "labels": torch.randint(CLASSES, (labelled,), generator=g),
    }


def softmax(logits):
    powers = np.exp(logits)
    return powers / powers.sum(1, keepdims=True)


def assert_same(a, b):
    """Equality to the last bit of nested dicts of tensors."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    else:
        assert torch.equal(a, b)


def test_skewed_predictions_move_marginal_and_labels_as_the_equations_say():
    """`p <- m p + (1 - m) mean softmax(f(w(u)))`, then the label from `softmax(f(w(u)) - tau log p)`."""
    labeler, tau, p = make(tau=1.0), 1.0, np.full(CLASSES, 1 / CLASSES)
    turned = 0
    for seed in range(3):
        given = batch(seed)
        given["logits"][:, 0] += 2  # most faces seem to be of class 0
        logits = given["logits"].double().numpy()
        p = 0.5 * p + 0.5 * softmax(logits).mean(0)
        wanted = softmax(logits - tau * np.log(p))
        found = labeler(hidden=UNKNOWN, **given)
        assert np.allclose(labeler.marginal.value, p, rtol=0, atol=1e-15)
        assert np.allclose(found.distributions, wanted, rtol=0, atol=1e-7)
        assert found.labels.tolist() == wanted.argmax(1).tolist()
        assert found.weights.tolist() == (wanted.max(1) >= 0.5).tolist()
        turned += (wanted.argmax(1) != logits.argmax(1)).sum()
    assert labeler.marginal.value.argmax() == 0
    assert turned > 3, "the bias was strong enough to turn labels"


def test_uniform_predictions_leave_labels_alone():
    """Each row comes with all its rotations, so that the mean of the predictions is uniform."""
    row = torch.tensor([1.5, 0.2, -1.0, 0.6])
    logits = torch.stack([row.roll(i) for i in range(CLASSES)])
    labeler = make(tau=2.0)
    for _ in range(10):
        found = labeler(logits, torch.arange(4), UNKNOWN[:4], logits, torch.arange(4))
    assert torch.allclose(labeler.marginal.value, torch.full((4,), 0.25).double(), rtol=0, atol=1e-15)
    assert torch.allclose(found.distributions, logits.softmax(1), atol=1e-7)
    assert found.labels.tolist() == logits.argmax(1).tolist()


def test_without_debiasing_the_distributions_are_the_predictions():
    labeler = make(tau=0.0)
    for seed in range(3):
        given = batch(seed)
        given["logits"][:, 1] += 3
        found = labeler(hidden=UNKNOWN, **given)
        assert torch.equal(found.distributions, given["logits"].double().softmax(1).float())
    assert labeler.marginal.value.argmax() == 1, "the marginal is kept all the same"


@settings(max_examples=60, deadline=None)
@given(
    permutation=st.permutations(range(CLASSES)),
    rule=st.sampled_from(sorted(THRESHOLD_RULES)),
    align=st.sampled_from(["none", "uniform", "labelled"]),
    gate=st.sampled_from(sorted(GATES)),
    seed=st.integers(0, 1000),
)
def test_permuted_classes_permute_everything(permutation, rule, align, gate, seed):
    order = torch.tensor(permutation)  # the new class i is the old class order[i]
    place = order.argsort()
    plain, permuted = (make(rule, 0.6, 0.8, align, gate) for _ in range(2))
    for step in range(3):
        given = batch(1000 * step + seed)
        a = plain(hidden=UNKNOWN, **given)
        given |= {name: given[name][:, order] for name in ("logits", "labelled_logits")}
        b = permuted(hidden=UNKNOWN, **given | {"labels": place[given["labels"]]})
        assert torch.equal(b.labels, place[a.labels])
        assert torch.allclose(b.distributions, a.distributions[:, order], atol=1e-6)
        assert torch.allclose(b.weights, a.weights, atol=1e-6)
    assert torch.allclose(permuted.marginal.value, plain.marginal.value[order], atol=1e-12)
    assert torch.allclose(permuted.rule.thresholds(), plain.rule.thresholds()[order], atol=1e-12)
    assert torch.allclose(permuted.shares(), plain.shares()[order], atol=1e-12)


@pytest.mark.parametrize("rule", THRESHOLD_RULES)
def test_hidden_labels_are_measured_and_never_learnt(rule):
    known, unknown = (make(rule, 0.6, 1.0, "labelled", "energy") for _ in range(2))
    for seed in range(3):
        given = batch(seed)
        hidden = torch.randint(CLASSES, (6,), generator=torch.Generator().manual_seed(seed))
        a, b = known(hidden=hidden, **given), unknown(hidden=UNKNOWN, **given)
        assert_same(vars(a), vars(b))
    states = [labeler.state_dict() for labeler in (known, unknown)]
    counts = [state.pop("counts") for state in states]
    assert_same(*states)
    assert counts[0]["known"].sum() > counts[1]["known"].sum() == 0
    for name in ("weight", "gated", "faces"):
        assert_same(*(count[name] for count in counts))
    assert "pseudo_label_accuracy" in known.end_round()
    assert "pseudo_label_accuracy" not in unknown.end_round()


def test_alignment_reaches_its_target_with_debiasing_too():
    """Told the raw predictions, it would take away twice what debiasing has taken already."""
    labeler = make(tau=1.0, align="uniform")
    torch.manual_seed(0)
    skew = torch.tensor([2.0, 0.5, -0.5, -1.0])
    for _ in range(12):
        logits = 2 * torch.randn(512, 4) + skew
        found = labeler(logits, torch.arange(512), torch.full((512,), -1), logits[:4], torch.arange(4))
    assert np.allclose(found.distributions.mean(0), 0.25, atol=0.06)


def test_alignment_rescales_the_debiased_distributions():
    labeler, given = make(tau=0.5, align="labelled"), batch(0)
    found = labeler(hidden=UNKNOWN, **given)
    raw, labelled = (softmax(given[name].double().numpy()) for name in ("logits", "labelled_logits"))
    p = 0.125 + 0.5 * raw.mean(0)
    wanted = softmax(given["logits"].double().numpy() - 0.5 * np.log(p))
    # Both running means start uniform.
    wanted = wanted * (0.125 + 0.5 * labelled.mean(0)) / (0.125 + 0.5 * wanted.mean(0))
    assert np.allclose(found.distributions, wanted / wanted.sum(1, keepdims=True), atol=1e-7)
    assert found.labels.tolist() == wanted.argmax(1).tolist()


def test_each_face_has_its_own_weight_and_the_gate_takes_some_away():
    certain, doubtful = [5.0, 0, 0, 0], [0.1, 0, 0, 0]
    unlike = [-3.0, -9, -9, -9]  # certain, but of low energy: no labelled face looks like it
    logits = torch.tensor([certain, doubtful, unlike, certain])
    labelled = torch.tensor([certain, [0, 5.0, 0, 0]])
    for gate, weights in (("none", [1, 0, 1, 1]), ("energy", [1, 0, 0, 1])):
        labeler = make(threshold=0.9, gate=gate)
        found = labeler(logits, torch.arange(4), UNKNOWN[:4], labelled, torch.tensor([0, 1]))
        assert found.weights.tolist() == weights
        # What is doubtful has a low energy too.
        assert labeler.end_round()["gated"] == (0.5 if gate == "energy" else 0)


def test_the_numbers_of_a_round_by_hand():
    labeler = make(threshold=0.9)
    assert labeler.shares() is None, "nothing counted yet"
    assert labeler.end_round() == {}
    high = 8 * torch.eye(4)
    logits = torch.stack([high[0], high[0], high[2], torch.zeros(4)])
    for hidden in ([0, 1, -1, 3], [0, 0, 2, -1]):
        labeler(logits, torch.arange(4), torch.tensor(hidden), high, torch.arange(4))
    assert labeler.shares().tolist() == pytest.approx(logits.double().softmax(1).mean(0).tolist(), abs=1e-12)
    found = labeler.end_round()
    assert found["pseudo_label_rate"] == 6 / 8
    assert found["pseudo_label_histogram"] == [4 / 6, 0, 2 / 6, 0]
    assert found["pseudo_label_accuracy"] == 4 / 5
    assert found["gated"] == 0
    assert found["thresholds"] == [0.9] * 4
    assert found["marginal"] == labeler.marginal.value.tolist()
    assert labeler.end_round() == {}, "a new count"


def test_a_stream_has_no_end_but_the_memory_has():
    labeler = make("flex", 0.9, memory=5)
    logits = torch.stack([8 * torch.eye(4)[1], 8 * torch.eye(4)[3]])
    labeler(logits, torch.tensor([7, 10**9 + 4]), UNKNOWN[:2], logits, torch.tensor([1, 3]))
    assert labeler.rule.state["assigned"].tolist() == [-1, -1, 1, -1, 3]


@pytest.mark.parametrize("rule", THRESHOLD_RULES)
def test_saved_and_loaded_goes_on_as_if_nothing_had_happened(rule):
    options = {"rule": rule, "threshold": 0.6, "tau": 1.0, "align": "labelled", "gate": "energy"}
    first, second = make(**options), make(**options)
    hidden = torch.tensor([0, 1, 2, 3, -1, -1])
    for seed in range(3):
        first(hidden=hidden, **batch(seed))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for seed in range(3, 6):
        assert_same(*(vars(labeler(hidden=hidden, **batch(seed))) for labeler in (first, second)))
        assert_same(first.state_dict(), second.state_dict())
    assert first.end_round() == second.end_round()


@pytest.mark.parametrize("rule", THRESHOLD_RULES)
def test_two_processes_agree_with_each_other_and_with_one(rule):
    """Two threads that meet in `gather`, each with half of the batch."""
    barrier, parts = threading.Barrier(2, timeout=20), [torch.empty(0)] * 2

    def gather_as(rank):
        def gather(part):
            parts[rank] = part
            barrier.wait()
            whole = torch.cat(parts)
            barrier.wait()
            return whole

        return gather

    options = {"rule": rule, "threshold": 0.6, "tau": 1.0, "align": "labelled", "gate": "energy"}
    hidden = torch.tensor([0, 1, 2, 3, -1, -1])

    def work(rank):
        labeler, found = make(**options, gather=gather_as(rank), rank=rank), []
        for seed in range(4):
            given = {"hidden": hidden, **batch(seed)}
            mine = {
                name: values[rank * (len(values) // 2) :][: len(values) // 2]
                for name, values in given.items()
            }
            found.append(labeler(**mine))
        return labeler, found

    with ThreadPoolExecutor(2) as pool:
        (first, first_found), (second, second_found) = pool.map(work, range(2))
    alone = make(**options)
    for seed, halves in enumerate(zip(first_found, second_found, strict=True)):
        whole = alone(hidden=hidden, **batch(seed))
        for name, values in vars(whole).items():
            assert torch.equal(values, torch.cat([getattr(half, name) for half in halves]))
    assert_same(first.state_dict(), second.state_dict())
    assert_same(first.state_dict(), alone.state_dict())
