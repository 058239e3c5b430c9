from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import ViTImageProcessor

from modeling_fer.learning.arguments import FerTrainingArguments
from modeling_fer.learning.feedback import FeedbackStep
from modeling_fer.learning.fixmatch import FixMatchStep
from modeling_fer.learning.methods import build_labeler, count_recall, hold_out, step_maker
from modeling_fer.learning.step import SupervisedStep
from modeling_fer.learning.thresholds import Flex


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 1000),
)
def test_a_share_of_each_class_is_held_out_and_never_all(counts, share, seed):
    labels = np.repeat(np.arange(-1, len(counts)), [7, *counts])
    out = hold_out(labels, share, seed)
    assert out.dtype == bool
    assert not out[labels == -1].any()
    for c, count in enumerate(counts):
        held = out[labels == c].sum()
        assert held == min(max(1, round(share * count)), count - 1)
    assert np.array_equal(out, hold_out(labels, share, seed))


def test_which_are_held_out_depends_on_the_seed_and_none_are_without_a_share():
    labels = np.repeat(np.arange(3), 30)
    assert not hold_out(labels, 0.0, 0).any()
    chosen = [hold_out(labels, 0.5, seed) for seed in range(3)]
    assert not np.array_equal(chosen[0], chosen[1])
    places = [np.flatnonzero(chosen[0][labels == c]).tolist() for c in range(3)]
    assert places[0] != places[1], "each class has an order of its own"


def test_a_class_of_one_face_keeps_it():
    assert hold_out(np.array([0, 0, 0, 1]), 0.9, 0)[3] == np.False_
    assert not hold_out(np.array([0, 1, 2]), 0.5, 0).any()


def test_recall_is_counted_by_class():
    labels = np.array([0, 0, 1, 1, 1, 3])
    found = np.eye(4)[[0, 2, 1, 1, 0, 3]]
    seen = []
    recall = count_recall(lambda model, pixels: seen.append(pixels) or found, np.arange(6), labels, 4)
    right, faces = recall(nn.Identity())
    assert right.tolist() == [1, 2, 0, 1]
    assert faces.tolist() == [2, 3, 0, 1]
    assert seen[0].tolist() == list(range(6))


def made(make_model, method, total=20, **options):
    arguments = FerTrainingArguments(
        data="d", output_dir="o", method=method, precision="no", finetune=0.2, warmup=0.0, **options
    )
    processor = ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    accelerator, model = Accelerator(cpu=True), make_model()
    return model, step_maker(arguments, accelerator, model, processor, 8, 10, None)(model, total)


@pytest.mark.parametrize(
    ("method", "kind"),
    [("supervised", SupervisedStep), ("fixmatch", FixMatchStep), ("feedback", FeedbackStep)],
)
def test_each_method_has_its_step(make_model, method, kind):
    _, step = made(make_model, method)
    assert type(step) is kind


def test_arguments_reach_the_labeler():
    arguments = FerTrainingArguments(
        data="d", output_dir="o", method="fixmatch", threshold_rule="flex", threshold=0.7,
        debias_tau=0.4, debias_momentum=0.8,
        align="uniform", gate="energy", gate_quantile=0.3,
    )  # fmt: skip
    labeler = build_labeler(arguments, 5, 11, Accelerator(cpu=True))
    assert isinstance(labeler.rule, Flex)
    assert (labeler.rule.threshold, labeler.rule.memory, labeler.rule.num_classes) == (0.7, 11, 5)
    assert (labeler.tau, labeler.marginal.momentum) == (0.4, 0.8)
    assert not labeler.alignment.follows_labelled
    assert labeler.alignment.predicted.momentum == 0.8
    assert labeler.gate.quantile == 0.3
    defaults = build_labeler(FerTrainingArguments(data="d", output_dir="o"), 5, 11, Accelerator(cpu=True))
    assert defaults.alignment is None
    assert defaults.tau == 0


def test_the_teacher_is_a_copy_with_an_optimizer_of_its_own(make_model):
    model, step = made(make_model, "feedback", feedback_weight=0.3, max_grad_norm=0, learning_rate=0.01)
    ours, theirs = dict(model.named_parameters()), dict(step.teacher.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and ours[n] is not theirs[n] for n in ours)
    moved = {id(p) for group in step.optimizer.param_groups for p in group["params"]}
    assert moved == {id(p) for p in theirs.values() if p.requires_grad}
    assert step.schedule.get_last_lr()[0] == 0.01
    assert (step.feedback_weight, step.max_grad_norm, step.finetune_from) == (0.3, float("inf"), 16)
    assert step.student is step.plain is model


def test_weak_views_are_alike_and_strong_ones_are_not(make_model):
    """Only labelled faces are blanked at random; without augmentation all views are the image, normalised."""
    pixels = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    _, step = made(make_model, "fixmatch", augmentation="none", strong_augmentation="none")
    for view in vars(step.views).values():
        assert torch.allclose(view(pixels), pixels / 127.5 - 1, atol=1e-6)
    _, step = made(make_model, "fixmatch", erasing=1.0)
    torch.manual_seed(0)
    blank = [
        (view(torch.full_like(pixels, 255)).flatten(2) < 0.5).float().mean()
        for view in vars(step.views).values()
    ]
    assert blank[0] > blank[1]
    assert blank[2] > blank[1]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_teacher_sees_views_without_the_noise(share, make_model):
    _, step = made(make_model, "supervised", augmentation="none", noise=share)
    seen, logits = {}, torch.zeros(8, 8, requires_grad=True)

    def watched(name):
        return lambda pixel_values: seen.update({name: pixel_values}) or SimpleNamespace(logits=logits)

    step.model, step.teacher = watched("model"), watched("teacher")
    pixels = torch.full((8, 3, 16, 16), 128, dtype=torch.uint8)
    torch.manual_seed(0)
    step({"pixels": pixels, "labels": torch.zeros(8, dtype=torch.long)}, torch.Tensor.backward)
    assert seen["teacher"].std() == 0
    assert (seen["model"].std() > 0.05) == (share == 1.0)
