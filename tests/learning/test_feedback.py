"""Teacher and student: losses and gradients by hand, and what a pseudo-label that helps or hurts leads to."""

import contextlib
import io
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fixmatch import (
    CLASSES,
    Classifier,
    assert_same_tensors,
    backward,
    batch,
    gradients,
    strong_view,
    update,
    weak_view,
)

from modeling_fer.learning.debias import Marginal
from modeling_fer.learning.feedback import FeedbackStep
from modeling_fer.learning.fixmatch import SamplerFeedback, Views
from modeling_fer.learning.gate import make_gate
from modeling_fer.learning.optimization import build_schedule
from modeling_fer.learning.pseudo_labels import PseudoLabeler
from modeling_fer.learning.thresholds import make_rule

RATE = 0.1  # of the teacher's plain SGD
ALONE: Any = SimpleNamespace(backward=backward, reduce=lambda value, how: value)


def make(
    tau=0.0, threshold=0.0, seed=0, steps=100, finetune_steps=0, weak=weak_view, dropout=0.0, warmup=0.0,
    ends=10**9, model=Classifier, optimizer=torch.optim.SGD, rate=RATE, num_classes=CLASSES, **options,
):  # fmt: skip
    torch.manual_seed(seed)
    student, teacher = model(dropout), model()
    optimizer = optimizer(teacher.parameters(), rate)
    labeler = PseudoLabeler(
        make_rule("fixed", num_classes, threshold), Marginal(num_classes, 0.9), tau, None, make_gate("none"),
        gather=lambda part: part, rank=0,
    )  # fmt: skip
    views: Any = Views(weak, weak, strong_view)
    options = {
        "lambda_u": 0.7, "label_smoothing": 0.0, "soft_labels": False, "feedback": SamplerFeedback(1.0),
        "feedback_weight": 2.0, "max_grad_norm": math.inf, **options,
    }  # fmt: skip
    return FeedbackStep(
        student, student, teacher, optimizer, build_schedule(optimizer, warmup, ends), views, labeler,
        contextlib.nullcontext, steps=steps, finetune_steps=finetune_steps, accelerator=ALONE, **options,
    )  # fmt: skip


def primed(step, average):
    """Let the baseline be `average`: without a past the first step teaches nothing."""
    m = step.improvement.momentum
    step.improvement.load_state_dict({"average": average * (1 - m), "steps": 1})
    return step


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("lambda_x", [0.0, 0.6])
def test_both_losses_as_the_formula_says(lambda_x):
    """Losses and gradients of student and teacher, one term after the other, from separate passes."""
    tau, p = 1.3, torch.tensor([0.9, 0.05, 0.05], dtype=torch.float64)
    step, given = primed(make(tau, threshold=0.6, student_lambda_x=lambda_x), -0.2), batch(1)
    step.labeler.marginal.value = p
    same = make(tau, threshold=0.6)  # the same weights, for our own sums
    teacher, student = same.teacher, same.student
    x, y = weak_view(given["pixels"]), given["labels"]
    weak, strong = (view(given["unlabelled_pixels"]) for view in (weak_view, strong_view))

    # Pseudo-labels
    with torch.no_grad():
        logits = teacher(weak).logits.double()
    p = 0.9 * p + 0.1 * logits.softmax(1).mean(0)
    target = (logits - tau * p.log()).softmax(1)
    confidence, label = target.max(1)
    mask = (confidence >= 0.6).float()
    assert 0 < mask.sum() < 8
    margin = tau * p.log().float()

    # Student
    logs = step(given, backward)
    assert all(weight.grad is None for weight in step.teacher.parameters())
    loss = (mask * F.cross_entropy(student(strong).logits + margin, label, reduction="none")).mean()
    loss = loss + lambda_x * F.cross_entropy(student(x).logits, y)
    loss.backward()
    assert logs["loss"].item() == pytest.approx(loss.item(), abs=1e-6)
    for a, b in zip(gradients(step.student), gradients(student), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    before = F.cross_entropy(student(x).logits, y).item()
    with torch.no_grad():
        for weight in student.parameters():
            weight -= 0.5 * weight.grad
    after = F.cross_entropy(student(x).logits, y).item()

    # Teacher
    old = copies(step.teacher)
    with torch.no_grad():
        for weight in step.student.parameters():
            weight -= 0.5 * weight.grad
    more = step.after_update()
    h = before - after + 0.2
    assert more["h"].item() == pytest.approx(h, abs=1e-5)
    assert abs(h) > 0.1, "enough to be seen in the gradient"
    labelled = F.cross_entropy(teacher(x).logits, y)
    consistency = (
        mask * F.cross_entropy(teacher(strong).logits + margin, target.float(), reduction="none")
    ).mean()
    taught = (mask * F.cross_entropy(teacher(weak).logits - margin, label, reduction="none")).mean()
    loss = labelled + 0.7 * consistency + 2.0 * h * taught
    loss.backward()
    assert more["teacher_loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    assert logs["labelled_loss"].item() == pytest.approx(labelled.item(), abs=1e-6)
    assert logs["unlabelled_loss"].item() == pytest.approx(consistency.item(), abs=1e-6)
    for was, now, gradient in zip(old, step.teacher.parameters(), gradients(teacher), strict=True):
        assert torch.allclose((was - now) / RATE, gradient, atol=2e-5)
    assert all(weight.grad is None for weight in step.teacher.parameters()), (
        "nothing is left for the next step"
    )


@pytest.mark.parametrize("helps", [True, False])
def test_labels_that_helped_become_more_probable_and_those_that_hurt_less(helps):
    """One unlabelled face that is also the labelled one: a right pseudo-label helps, a wrong one hurts.

    Against the same step without feedback, so that what the other terms do to the teacher is left out.
    """
    probabilities = {}
    for weight in (0.0, 1.0):
        step = primed(make(feedback_weight=weight, lambda_u=0.0, seed=3), 0.0)
        pixels = batch(5)["pixels"][:1]
        with torch.no_grad():
            chosen = step.teacher(weak_view(pixels)).logits.argmax(1)
        given = {
            "pixels": pixels.flip(3),  # its weak view points the way of the strong view of the unlabelled
            "labels": chosen if helps else (chosen + 1) % CLASSES,
            "unlabelled_pixels": pixels,
            "unlabelled_labels": torch.tensor([-1]),
            "unlabelled_index": torch.tensor([0]),
        }
        step(given, backward)
        update_student(step, 0.05)
        h = step.after_update()["h"].item()
        assert (h > 1e-3) if helps else (h < -1e-3)
        with torch.no_grad():
            probabilities[weight] = step.teacher(weak_view(pixels)).logits.softmax(1)[0, chosen].item()
    assert (probabilities[1.0] > probabilities[0.0]) == helps


def update_student(step, rate):
    with torch.no_grad():
        for p in step.student.parameters():
            p -= rate * p.grad
            p.grad = None


class Perceptron(torch.nn.Module):
    """Seven classes from 64 numbers."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 7))

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.layers(pixel_values))


@pytest.mark.parametrize("lambda_x", [0.0, 1.0])
def test_a_schedule_neither_praises_nor_blames_the_labels(lambda_x):
    """Labels of even quality: in every third of a run about half of the steps help more than usual."""
    steps, rate = 200, 1.5e-3
    step = make(
        0.5, 0.5, model=Perceptron, num_classes=7, optimizer=torch.optim.AdamW, rate=rate, warmup=0.1,
        ends=steps, steps=steps, lambda_u=1.0, feedback_weight=1.0, max_grad_norm=1.0,
        student_lambda_x=lambda_x,
    )  # fmt: skip
    step.views = Views(lambda x: x, lambda x: x, lambda x: x + 0.5 * torch.randn_like(x))  # type: ignore
    means = torch.randn(7, 64) * 0.35
    optimizer = torch.optim.AdamW(step.student.parameters(), rate)
    schedule = build_schedule(optimizer, 0.1, steps)
    signs = []
    for _ in range(steps):
        labels = torch.randint(7, (96,))
        faces = means[labels] + torch.randn(96, 64)
        given = {"pixels": faces[:32], "labels": labels[:32], "unlabelled_pixels": faces[32:]}
        given |= {"unlabelled_labels": labels[32:], "unlabelled_index": torch.arange(64)}
        step(given, backward)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        signs.append(step.after_update()["h"].item() > 0)
    for third in (signs[:66], signs[66:132], signs[132:]):
        assert 0.3 < sum(third) / len(third) < 0.7


def test_a_step_at_no_rate_teaches_nothing_and_is_not_compared_with():
    step = primed(make(warmup=0.5, ends=4), 0.1)  # begins at a rate of 0
    step(batch(0), backward)
    update_student(step, 0.5)
    assert step.after_update()["h"].item() == 0
    assert step.improvement.state_dict()["steps"] == 1


def test_only_the_loop_moves_the_student():
    step = primed(make(), 0.1)
    before, teacher = copies(step.student), copies(step.teacher)
    step(batch(0), backward)
    assert_same_tensors(before, copies(step.student))
    assert_same_tensors(teacher, copies(step.teacher))
    given = gradients(step.student)
    logs = step.after_update()
    assert logs["h"].item() == pytest.approx(-0.1), "a student that has not moved has not improved"
    assert_same_tensors(before, copies(step.student))
    assert_same_tensors(given, gradients(step.student))  # what the teacher learnt left no trace there
    assert not torch.equal(teacher[0], copies(step.teacher)[0])


def test_the_students_loss_is_judged_without_dropout():
    step, given = make(dropout=0.5), batch(0)
    x = weak_view(given["pixels"])
    found = step.judge(x, given["labels"])
    assert step.student.training
    assert found.item() == pytest.approx(
        F.cross_entropy(step.student.eval()(x).logits, given["labels"]).item(), abs=1e-7
    )


def test_hidden_labels_change_nothing_that_is_learnt():
    known, unknown = make(1.0), make(1.0)
    for seed in range(4):
        given = batch(seed)
        known(given, backward)
        unknown({**given, "unlabelled_labels": torch.full((8,), -1)}, backward)
        for step in (known, unknown):
            update(step)
    assert_same_tensors(copies(known.student), copies(unknown.student))
    assert_same_tensors(copies(known.teacher), copies(unknown.teacher))
    assert "pseudo_label_accuracy" in known.end_round().logs


def test_at_the_end_the_student_learns_from_labelled_faces_and_the_teacher_rests():
    step = make(steps=3, finetune_steps=1, label_smoothing=0.1, soft_labels=True)
    for seed in range(2):
        assert "teacher_loss" not in step(batch(seed), backward)
        update_student(step, 0.5)
        assert set(step.after_update()) == {"teacher_loss", "h"}
    teacher, labeler, given = copies(step.teacher), step.labeler.state_dict(), batch(2)
    logs = step(given, backward)
    ours = gradients(step.student)
    step.student.zero_grad()
    loss = F.cross_entropy(
        step.student(weak_view(given["pixels"])).logits, given["targets"], label_smoothing=0.1
    )
    loss.backward()
    assert torch.equal(logs["loss"], loss.detach())
    assert_same_tensors(ours, gradients(step.student))
    assert step.after_update() == {}
    assert_same_tensors(teacher, copies(step.teacher))
    for name in ("weight", "faces"):
        assert torch.equal(labeler["counts"][name], step.labeler.state_dict()["counts"][name])


def test_teachers_gradients_are_clipped():
    step = make(max_grad_norm=1e-3)
    before = copies(step.teacher)
    step(batch(0), backward)
    step.after_update()
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, copies(step.teacher), strict=True)])
    assert moved.norm().item() == pytest.approx(RATE * 1e-3, rel=1e-3)


def test_a_round_tells_how_often_steps_helped():
    step, found = make(), []
    for seed in range(4):
        step(batch(seed), backward)
        update_student(step, 0.5)
        found.append(step.after_update()["h"].item())
    logs = step.end_round().logs
    assert found[0] == 0
    assert logs["h"] == pytest.approx(sum(found) / 4)
    assert logs["h_positive"] == sum(h > 0 for h in found) / 4
    assert "h" not in step.end_round().logs


def test_saved_and_loaded_goes_on_as_if_nothing_had_happened():
    """Weights and optimizers are accelerate's to save; the rest is the step's."""
    first = make(1.0, threshold=0.4, steps=6, finetune_steps=1)
    for seed in range(3):
        first(batch(seed), backward)
        update(first)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = make(1.0, threshold=0.4, steps=6, finetune_steps=1, seed=1)
    second.student.load_state_dict(first.student.state_dict())
    second.teacher.load_state_dict(first.teacher.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for seed in range(3, 6):
        logs = [step(batch(seed), backward) for step in (first, second)]
        assert logs[0] == logs[1]
        update_student(first, 0.5)
        update_student(second, 0.5)
        assert first.after_update() == second.after_update()
        assert first.schedule.state_dict() == second.schedule.state_dict()
    assert "labelled_loss" not in logs[0], "the last step is one of fine-tuning in both"
    assert_same_tensors(copies(first.student), copies(second.student))
    assert_same_tensors(copies(first.teacher), copies(second.teacher))
    assert first.end_round() == second.end_round()
