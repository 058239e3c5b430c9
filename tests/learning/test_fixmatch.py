"""One step against FixMatch written out by hand."""

import contextlib
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modeling_fer.data.sampling import feedback_weights
from modeling_fer.learning.debias import Marginal
from modeling_fer.learning.fixmatch import FixMatchStep, SamplerFeedback, Views
from modeling_fer.learning.gate import make_gate
from modeling_fer.learning.pseudo_labels import PseudoLabeler
from modeling_fer.learning.thresholds import make_rule

CLASSES, PIXELS = 3, 3 * 2 * 2


class Classifier(nn.Module):
    """A network of two layers that is called as the models are."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(PIXELS, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, CLASSES)
        )

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.layers(pixel_values))


def weak_view(pixels):
    return pixels.float() / 64 - 2


def strong_view(pixels):
    return weak_view(pixels).flip(3) * 0.5


def batch(seed, labelled=4, faces=8):
    g = torch.Generator().manual_seed(seed)
    return {
        "pixels": torch.randint(256, (labelled, 3, 2, 2), generator=g, dtype=torch.uint8),
        "labels": torch.randint(CLASSES, (labelled,), generator=g),
        "targets": torch.rand(labelled, CLASSES, generator=g).softmax(1),
        "unlabelled_pixels": torch.randint(256, (faces, 3, 2, 2), generator=g, dtype=torch.uint8),
        "unlabelled_labels": torch.randint(-1, CLASSES, (faces,), generator=g),
        "unlabelled_index": torch.arange(faces),
    }


def make(tau=0.0, threshold=0.5, dropout=0.0, seed=0, bound=1.0, recall=None, **options):
    torch.manual_seed(seed)
    model = Classifier(dropout)
    labeler = PseudoLabeler(
        make_rule("fixed", CLASSES, threshold), Marginal(CLASSES, 0.9), tau, None, make_gate("none"),
        gather=lambda part: part, rank=0,
    )  # fmt: skip
    options = {"lambda_u": 0.7, "label_smoothing": 0.0, "soft_labels": False, "teacher_ema": 0.0, **options}
    views: Any = Views(weak_view, weak_view, strong_view)
    feedback = SamplerFeedback(bound, recall)
    return FixMatchStep(model, model, views, labeler, contextlib.nullcontext, feedback=feedback, **options)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def assert_same_tensors(a, b):
    assert len(a) == len(b) > 0
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def backward(loss):
    loss.backward()


def update(step, rate=0.5):
    """What the loop does after a step: here plain SGD."""
    with torch.no_grad():
        for p in step.plain.parameters():
            p -= rate * p.grad
            p.grad = None
    step.after_update()


def test_without_debiasing_it_is_plain_fixmatch_to_the_last_bit():
    step, given = make(threshold=0.45), batch(0)
    step.labeler.marginal.value = torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64)  # must not matter
    logs = step(given, backward)
    ours = gradients(step.model)

    model = make().model
    with torch.no_grad():
        confidence, label = model(weak_view(given["unlabelled_pixels"])).logits.softmax(1).max(1)
    both = torch.cat([weak_view(given["pixels"]), strong_view(given["unlabelled_pixels"])])
    logits = model(both).logits
    mask = (confidence >= 0.45).float()
    assert 0 < mask.sum() < 8
    labelled = F.cross_entropy(logits[:4], given["labels"])
    unlabelled = (F.cross_entropy(logits[4:], label, reduction="none") * mask).mean()
    loss = labelled + 0.7 * unlabelled
    loss.backward()

    assert torch.equal(logs["loss"], loss.detach())
    assert torch.equal(logs["labelled_loss"], labelled.detach())
    assert torch.equal(logs["unlabelled_loss"], unlabelled.detach())
    assert logs["pseudo_label_rate"] == mask.mean()
    assert_same_tensors(ours, gradients(model))


def test_debiased_labels_and_margin_as_the_equations_say():
    tau, p = 1.3, torch.tensor([0.9, 0.05, 0.05], dtype=torch.float64)
    step, given = make(tau, threshold=0.6), batch(1)
    step.labeler.marginal.value = p
    logs = step(given, backward)
    ours = gradients(step.model)

    model = make().model
    with torch.no_grad():
        weak = model(weak_view(given["unlabelled_pixels"])).logits.double()
    p = 0.9 * p + 0.1 * weak.softmax(1).mean(0)
    confidence, label = (weak - tau * p.log()).softmax(1).max(1)
    assert (label != weak.argmax(1)).any(), "the habit was strong enough to turn labels"
    mask = confidence >= 0.6
    assert 0 < mask.sum() < 8
    strong = model(strong_view(given["unlabelled_pixels"])).logits + tau * p.log()
    loss = F.cross_entropy(model(weak_view(given["pixels"])).logits, given["labels"])
    for row in range(8):  # each face has its own mask
        if mask[row]:
            loss = loss + 0.7 / 8 * F.cross_entropy(strong[row], label[row])
    loss.backward()
    assert logs["loss"].item() == pytest.approx(loss.item(), abs=1e-6)
    for a, b in zip(ours, gradients(model), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_soft_labels_and_smoothing_are_those_of_the_labelled_loss():
    given = batch(2)
    logs = make(soft_labels=True, label_smoothing=0.2)(given, backward)
    logits = make().model(weak_view(given["pixels"])).logits
    expected = F.cross_entropy(logits, given["targets"], label_smoothing=0.2)
    assert logs["labelled_loss"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_hidden_labels_change_nothing_that_is_learnt():
    known, unknown = make(1.0), make(1.0)
    for seed in range(4):
        given = batch(seed)
        known(given, backward)
        unknown({**given, "unlabelled_labels": torch.full((8,), -1)}, backward)
        update(known)
        update(unknown)
    assert_same_tensors(list(known.model.parameters()), list(unknown.model.parameters()))
    assert torch.equal(known.labeler.marginal.value, unknown.labeler.marginal.value)
    assert known.labeler.counts["known"].sum() > unknown.labeler.counts["known"].sum()


def test_the_averaged_teacher_chooses_the_labels():
    step = make(teacher_ema=0.2, threshold=0.0)
    decays = []
    for seed in range(4):
        before = [p.detach().clone() for p in step.teacher.module.parameters()]
        step(batch(seed), backward)
        update(step, rate=3.0)
        after, new = list(step.teacher.module.parameters()), list(step.plain.parameters())
        # The first update copies the weights; then the decay grows from 2/11 up to 0.2.
        decays.append(0.0 if seed == 0 else min(0.2, (1 + seed) / (10 + seed)))
        for old, average, weight in zip(before, after, new, strict=True):
            assert torch.allclose(average, decays[-1] * old + (1 - decays[-1]) * weight, atol=1e-6)
    assert decays[-1] == 0.2
    given = batch(9, faces=64)
    weak = weak_view(given["unlabelled_pixels"])
    labels = [model(weak).logits.argmax(1) for model in (step.teacher.module, step.plain)]
    assert (labels[0] != labels[1]).any()
    strong = step.plain(strong_view(given["unlabelled_pixels"])).logits
    by_teacher, by_model = (F.cross_entropy(strong, chosen).item() for chosen in labels)
    found = step(given, backward)["unlabelled_loss"].item()
    assert found == pytest.approx(by_teacher, abs=1e-5)
    assert found != pytest.approx(by_model, abs=1e-3)
    assert all(p.grad is None for p in step.teacher.parameters())


def test_labels_are_chosen_without_dropout_and_learnt_with_it():
    step = make(dropout=0.5)
    views = weak_view(batch(0)["unlabelled_pixels"])
    found = step.predict(step.plain, views)
    assert step.plain.training
    assert not found.requires_grad
    assert torch.equal(found, step.plain.eval()(views).logits)
    step.plain.train()
    assert not torch.equal(found, step.plain(views).logits)


@pytest.mark.parametrize("teacher_ema", [0.0, 0.9])
def test_saved_and_loaded_goes_on_as_if_nothing_had_happened(teacher_ema):
    first = make(1.0, teacher_ema=teacher_ema)
    for seed in range(3):
        first(batch(seed), backward)
        update(first)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = make(1.0, seed=1, teacher_ema=teacher_ema)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for seed in range(3, 6):
        logs = [step(batch(seed), backward) for step in (first, second)]
        assert logs[0] == logs[1]
        for step in (first, second):
            update(step)
    assert_same_tensors(list(first.model.parameters()), list(second.model.parameters()))
    assert first.end_round() == second.end_round()


def test_a_round_hands_class_weights_to_the_sampler():
    recall = np.array([1, 2, 4]), np.array([4, 4, 4])
    step = make(bound=3.0, recall=lambda model: recall)
    assert step.labeler.shares() is None, "no faces yet: recall alone has a say"
    alone = step.end_round().class_weights
    assert np.array_equal(alone, feedback_weights(np.full(3, 1 / 3), np.array([0.25, 0.5, 1]), 3.0))
    step(batch(0), backward)
    shares = step.labeler.shares().numpy()  # there, though no label was sure enough
    assert shares.sum() == pytest.approx(1)
    assert shares.min() > 0
    ended = step.end_round()
    assert np.array_equal(ended.class_weights, feedback_weights(shares, np.array([0.25, 0.5, 1]), 3.0))
    assert ended.logs["class_weights"] == ended.class_weights.tolist()
    assert ended.logs["held_out_recall"] == [0.25, 0.5, 1]
    assert ended.logs["pseudo_label_histogram"] == [0, 0, 0]
    assert step.labeler.counts["faces"].sum() == 0, "a new round has begun"


def test_the_gate_compares_scores_of_one_model_without_dropout():
    step = make(dropout=0.9)
    step.labeler.gate = make_gate("energy")
    step(batch(0), backward)
    with torch.no_grad():
        logits = step.model.eval()(weak_view(batch(0)["pixels"])).logits.double()
    assert step.labeler.gate.floor.item() == pytest.approx(
        logits.logsumexp(1).quantile(0.05).item(), abs=1e-6
    )


def test_a_bound_of_one_is_no_feedback():
    def never(model):
        raise AssertionError("nothing is measured in vain")

    assert SamplerFeedback(1.0, never)(nn.Identity(), torch.ones(2)) == (None, {})


def test_a_class_without_held_out_faces_is_not_taken_for_one_never_right():
    """A class of a single face keeps it for training: of its recall nothing is known."""
    feedback = SamplerFeedback(5.0, lambda model: (np.array([3, 1, 0]), np.array([4, 4, 0])))
    weights, logs = feedback(nn.Identity(), torch.full((3,), 1 / 3))
    assert weights[0] < weights[2] < weights[1]
    assert logs["held_out_recall"] == [0.75, 0.25, 0.5]
