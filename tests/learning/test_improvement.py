"""Feedback against references: a tiny teacher and student whose every pseudo-label can be tried in turn."""

import dataclasses
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_fer.learning.improvement import Improvement

FEATURES, HIDDEN, LABELLED = 4, 5, 6
SEEDS = range(12)


@dataclasses.dataclass
class Problem:
    """A teacher, a student (two layers each, float64), labelled `x, y` and two views of unlabelled faces."""

    teacher: list[torch.Tensor]
    student: list[torch.Tensor]
    x: torch.Tensor
    y: torch.Tensor
    weak: torch.Tensor
    strong: torch.Tensor


def make(seed, classes=3, faces=1, strength=1.0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def network():
        return [p.requires_grad_() for p in (normal(FEATURES, HIDDEN), normal(HIDDEN, classes))]

    teacher, student, x, weak = network(), network(), normal(LABELLED, FEATURES), normal(faces, FEATURES)
    y = torch.randint(classes, (LABELLED,), generator=g)
    return Problem(teacher, student, x, y, weak, weak + strength * normal(faces, FEATURES))


def forward(network, x):
    return torch.tanh(x @ network[0]) @ network[1]


def labelled_loss(p, student):
    return F.cross_entropy(forward(student, p.x), p.y)


def after_step(p, targets, rate, weights=None):
    """Labelled loss of the student after one SGD step on strong views; differentiable in soft `targets`."""
    losses = F.cross_entropy(forward(p.student, p.strong), targets, reduction="none")
    loss = (losses if weights is None else weights * losses).mean()
    grads = torch.autograd.grad(loss, p.student, create_graph=True)
    return labelled_loss(p, [w - rate * g for w, g in zip(p.student, grads, strict=True)])


def flat(scalar, parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, parameters, retain_graph=True)])


def all_labels(p):
    """Every way to label the unlabelled faces: (C^B, B)."""
    classes = p.student[1].shape[1]
    return torch.tensor(list(itertools.product(range(classes), repeat=len(p.weak))))


def chance(logits, labels):
    """Probability of each row of labels, drawn independently from softmax(logits): (C^B,)."""
    return torch.stack([F.cross_entropy(logits, row, reduction="sum") for row in labels]).neg().exp()


def gains(p, rate, weights=None):
    """`before - after` for each way to label: (C^B,). The raw `h` of `Improvement`."""
    before = labelled_loss(p, p.student)
    return torch.stack([before - after_step(p, row, rate, weights) for row in all_labels(p)]).detach()


def sampled_objective(p, rate, weights=None, logits=None):
    """Expected labelled loss of the student after a step on labels that the teacher draws."""
    logits = forward(p.teacher, p.weak) if logits is None else logits
    return labelled_loss(p, p.student).detach() - chance(logits, all_labels(p)) @ gains(p, rate, weights)


def feedback(p, h, logits=None, weights=None, source=None, labels=None):
    """Expected gradient of the teacher's term `h * sum_i w_i CE(logits_i, yhat_i)`, all draws in turn.

    `source`: logits that labels are drawn from (the weak view's if None); `labels`: other ones for the term.
    """
    weak = forward(p.teacher, p.weak)
    source, logits = (weak if source is None else source), (weak if logits is None else logits)
    probability = chance(source, all_labels(p)).detach()
    weights = torch.ones(len(p.weak), dtype=torch.float64) if weights is None else weights
    rows = all_labels(p) if labels is None else labels.expand(len(h), -1)
    terms = torch.stack([weights @ F.cross_entropy(logits, row, reduction="none") for row in rows])
    return flat(probability @ (h * terms), p.teacher)


def centred(p, h):
    """`h` less its mean under the teacher, the baseline that a moving average stands for."""
    return h - chance(forward(p.teacher, p.weak), all_labels(p)).detach() @ h


def cosine(a, b):
    return F.cosine_similarity(a, b, dim=0).item()


def differences(p, function, step=1e-5):
    """Central finite differences of `function()` over the teacher's parameters."""
    found = []
    with torch.no_grad():
        entries = [weight.view(-1)[i : i + 1] for weight in p.teacher for i in range(weight.numel())]
    for entry in entries:
        ends = []
        for shift in (step, -2 * step):
            with torch.no_grad():
                entry += shift
            ends.append(function().item())
        with torch.no_grad():
            entry += step
        found.append((ends[0] - ends[1]) / (2 * step))
    return torch.tensor(found, dtype=torch.float64)


# The sign


@pytest.mark.parametrize("faces", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_minimising_h_times_cross_entropy_descends_the_students_loss(seed, faces):
    p = make(seed, faces=faces)
    exact = flat(sampled_objective(p, rate=0.5), p.teacher)
    torch.testing.assert_close(differences(p, lambda: sampled_objective(p, 0.5)), exact, rtol=1e-6, atol=1e-9)

    # The whole of it: no small step is assumed, and one pass over the labels is one expectation.
    torch.testing.assert_close(feedback(p, gains(p, 0.5)), exact, rtol=1e-10, atol=1e-12)

    # Down this gradient the student's loss falls; with the sign turned round it rises.
    start = sampled_objective(p, 0.5).item()
    moved = {}
    for sign in (1, -1):
        grads = torch.autograd.grad(sign * sampled_objective(p, 0.5), p.teacher)
        q = dataclasses.replace(
            p,
            teacher=[(w - 0.1 * g).detach().requires_grad_() for w, g in zip(p.teacher, grads, strict=True)],
        )
        moved[sign] = sampled_objective(q, 0.5).item()
    assert moved[1] < start < moved[-1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_the_second_order_gradient_of_soft_labels_for_small_steps(seed):
    p = make(seed, faces=2)

    def soft(rate):
        return after_step(p, F.softmax(forward(p.teacher, p.weak), -1), rate)

    second_order = flat(soft(0.1), p.teacher)
    torch.testing.assert_close(differences(p, lambda: soft(0.1)), second_order, rtol=1e-5, atol=1e-9)
    errors = []
    for rate in (1e-2, 1e-3):
        reference = flat(soft(rate), p.teacher)
        errors.append(((feedback(p, gains(p, rate)) - reference).norm() / reference.norm()).item())
    assert errors[0] < 0.1
    assert errors[1] < 0.2 * errors[0]  # first order in the learning rate


def test_a_label_that_helped_becomes_more_probable():
    logits = torch.tensor([[0.3, -0.2, 0.1]], requires_grad=True)
    h = Improvement()
    h(1.0, 1.0)
    for loss_after, better in ((0.9, True), (1.1, False)):
        (grad,) = torch.autograd.grad(h(1.0, loss_after) * F.cross_entropy(logits, torch.tensor([1])), logits)
        change = F.softmax(logits - grad, -1) - F.softmax(logits, -1)
        assert (change[0, 1] > 0).item() is better


# The size


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_h_is_learning_rate_times_a_product_of_gradients(seed):
    p = make(seed)
    on_labelled = flat(labelled_loss(p, p.student), p.student)
    for row, label in enumerate(all_labels(p)):
        on_pseudo = flat(F.cross_entropy(forward(p.student, p.strong), label), p.student)
        product = on_labelled @ on_pseudo
        errors = [abs((gains(p, rate)[row] / (rate * product)).item() - 1) for rate in (1e-3, 1e-4, 1e-5)]
        assert errors[2] < 1e-3
        assert errors[1] < 0.2 * errors[0]
        assert errors[2] < 0.2 * errors[1]


# The label


@pytest.mark.parametrize("seed", SEEDS)
def test_of_two_classes_the_label_of_the_student_is_right_and_the_other_wrong(seed):
    p = make(seed, classes=2)
    exact = flat(sampled_objective(p, 0.1), p.teacher)
    h = centred(p, gains(p, 0.1))
    for label in (0, 1):
        for term, agreement in ((label, 1.0), (1 - label, -1.0)):
            loss = h[label] * F.cross_entropy(forward(p.teacher, p.weak), torch.tensor([term]))
            assert cosine(flat(loss, p.teacher), exact) == pytest.approx(agreement)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_label_that_does_not_follow_the_students_says_nothing(seed):
    p = make(seed)
    exact = flat(sampled_objective(p, 0.1), p.teacher)
    other = forward(p.teacher, p.strong).argmax(-1)
    blind = feedback(p, centred(p, gains(p, 0.1)), labels=other)
    assert blind.norm() < 1e-12 * max(1, exact.norm())
    assert exact.norm() > 1e-5
    # Without a baseline it goes the same way whatever the student learned.
    towards = flat(F.cross_entropy(forward(p.teacher, p.weak), other), p.teacher)
    assert abs(cosine(feedback(p, gains(p, 0.1), labels=other), towards)) == pytest.approx(1)


def test_the_argmax_of_the_strong_view_misleads_where_the_views_differ():
    right, wrong = [], []
    for seed in range(60):
        p = make(seed, classes=8)
        label, other = (forward(p.teacher, view).argmax(-1) for view in (p.weak, p.strong))
        if label == other:
            continue
        exact = flat(sampled_objective(p, 0.1), p.teacher)
        h = centred(p, gains(p, 0.1))[label.item()]
        for cosines, view, term in ((right, p.weak, label), (wrong, p.strong, other)):
            loss = h * F.cross_entropy(forward(p.teacher, view), term)
            cosines.append(cosine(flat(loss, p.teacher), exact))
    right, wrong = torch.tensor(right), torch.tensor(wrong)
    assert len(right) > 20
    assert (right > 0).float().mean() > 0.9
    assert wrong.mean() < 0
    assert wrong.mean() < right.mean() - 0.5


# The baseline


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_constant_baseline_leaves_drawn_labels_alone_and_not_the_most_probable(seed):
    p = make(seed, faces=2)
    h = gains(p, 0.1)
    torch.testing.assert_close(feedback(p, h - 0.7), feedback(p, h), rtol=1e-9, atol=1e-12)
    logits = forward(p.teacher, p.weak)
    loss = F.cross_entropy(logits, logits.argmax(-1), reduction="sum")
    assert flat(loss, p.teacher).norm() > 1e-2


# The view and the logits


def test_another_view_than_the_labels_own_is_an_approximation():
    means = {}
    for strength in (0.0, 0.5, 2.0):
        cosines = []
        for seed in range(40):
            p = make(seed, strength=strength)
            exact, h = flat(sampled_objective(p, 0.1), p.teacher), gains(p, 0.1)
            strong = forward(p.teacher, p.strong)
            cosines.append(
                [cosine(feedback(p, g, logits=strong), exact) for g in (centred(p, h), h)]
                + [cosine(feedback(p, h), exact)]
            )
        means[strength] = torch.tensor(cosines).mean(0)
    torch.testing.assert_close(means[0.0], torch.ones(3))
    for strength in (0.5, 2.0):
        with_baseline, without, weak = means[strength]
        assert without < with_baseline < weak
        assert weak == pytest.approx(1)
    assert means[2.0][0] < means[0.5][0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_another_view_a_baseline_is_a_weight_of_the_consistency_loss(seed):
    p = make(seed, faces=2)
    strong, weak = forward(p.teacher, p.strong), forward(p.teacher, p.weak)
    h = gains(p, 0.1)
    moved = feedback(p, h - 0.7, logits=strong) - feedback(p, h, logits=strong)
    consistency = F.cross_entropy(strong, F.softmax(weak, -1).detach(), reduction="sum")
    torch.testing.assert_close(moved, -0.7 * flat(consistency, p.teacher), rtol=1e-9, atol=1e-12)


def test_debiased_labels_need_debiased_logits_or_a_baseline():
    p = make(0, faces=2)
    weak = forward(p.teacher, p.weak)
    debiased = weak - torch.tensor([0.8, 0.15, 0.05], dtype=torch.float64).log()
    exact = flat(sampled_objective(p, 0.1, logits=debiased), p.teacher)
    h = gains(p, 0.1)
    torch.testing.assert_close(feedback(p, h, debiased, source=debiased), exact, rtol=1e-9, atol=1e-12)
    assert cosine(feedback(p, h, weak, source=debiased), exact) < 0.9

    # The two differ by a constant per class, which the baseline takes away on average.
    h = h - chance(debiased, all_labels(p)).detach() @ h
    torch.testing.assert_close(feedback(p, h, weak, source=debiased), exact, rtol=1e-9, atol=1e-12)


# The weights


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_examples_left_out_for_the_student_may_be_left_out_for_the_teacher(seed):
    p = make(seed, faces=3)
    mask = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    exact, h = flat(sampled_objective(p, 0.1, mask), p.teacher), gains(p, 0.1, mask)
    torch.testing.assert_close(feedback(p, h, weights=mask), exact, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(feedback(p, h), exact, rtol=1e-9, atol=1e-12)


def test_fractional_weights_are_in_h_already():
    p = make(0, faces=3)
    weights = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)
    exact, h = flat(sampled_objective(p, 0.1, weights), p.teacher), gains(p, 0.1, weights)
    torch.testing.assert_close(feedback(p, h), exact, rtol=1e-9, atol=1e-12)
    assert (feedback(p, h, weights=weights) - exact).norm() > 0.1 * exact.norm()

    # Only one `h` per example would want the weights in the teacher's term: the chain rule to first order.
    soft = after_step(p, F.softmax(forward(p.teacher, p.weak), -1), 1e-5, weights)
    alone = torch.zeros_like(exact)
    for i in range(3):
        q = dataclasses.replace(p, weak=p.weak[i : i + 1], strong=p.strong[i : i + 1])
        alone += weights[i] / 3 * feedback(q, gains(q, 1e-5))
    assert cosine(alone, flat(soft, p.teacher)) == pytest.approx(1, abs=1e-6)


# The class

LOSSES = st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=2, max_size=12)


def run(improvement, losses):
    return [improvement(before, after).item() for before, after in losses]


@settings(deadline=None)
@given(LOSSES, st.floats(0, 0.999))
def test_the_baseline_is_the_weighted_mean_of_the_past(losses, momentum):
    found = run(Improvement(momentum), losses)
    assert found[0] == 0
    gain = torch.tensor([before - after for before, after in losses], dtype=torch.float64)
    for t in range(1, len(losses)):
        ages = torch.arange(t - 1, -1, -1, dtype=torch.float64)
        weights = torch.tensor(momentum, dtype=torch.float64) ** ages
        baseline = weights @ gain[:t] / weights.sum()
        assert found[t] == pytest.approx((gain[t] - baseline).item(), abs=1e-9)


@settings(deadline=None)
@given(LOSSES, st.floats(-1, 1))
def test_what_every_step_brings_does_not_count(losses, shared):
    shifted = [(before + shared, after) for before, after in losses]
    assert run(Improvement(), shifted) == pytest.approx(run(Improvement(), losses), abs=1e-9)


def test_two_steps_by_hand():
    improvement = Improvement(momentum=0.75)
    assert run(improvement, [(2.0, 1.0), (3.0, 1.0), (1.0, 1.5)]) == pytest.approx(
        [0.0, 2.0 - 1.0, -0.5 - (0.75 * 1.0 + 2.0) / 1.75]
    )


def test_small_changes_survive_and_no_gradient_leaves():
    improvement = Improvement()
    before = torch.tensor(2.0, requires_grad=True)
    improvement(before, before)
    h = improvement(before, torch.nextafter(before, torch.tensor(0.0)))
    assert h.item() == 2**-23
    assert (h.shape, h.dtype, h.requires_grad) == ((), torch.float64, False)


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_state_goes_on_bit_for_bit(kind):
    losses = [(kind(a), kind(b)) for a, b in [(2.0, 1.9), (1.8, 1.83), (1.7, 1.1), (1.5, 1.3)]]
    whole = Improvement(0.9)
    expected = run(whole, losses)
    first, second = Improvement(0.9), Improvement(0.9)
    run(first, losses[:2])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert run(second, losses[2:]) == expected[2:]
    assert second.state_dict() == whole.state_dict()


def test_what_it_refuses():
    for momentum in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\)"):
            Improvement(momentum)
    with pytest.raises(ValueError, match=r"shape \(2,\) was given, not one number: take the mean"):
        Improvement()(torch.zeros(2), 0.0)
    with pytest.raises(ValueError, match=r"bfloat16 is too coarse .* logits.float\(\)"):
        Improvement()(1.0, torch.tensor(1.0, dtype=torch.bfloat16))
