"""The supervised step, alone and with a teacher, against cross-entropies written out by hand."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modeling_fer.learning.step import SupervisedStep

CLASSES = 3


class Classifier(nn.Module):
    """A network with a batch norm and dropout that is called as the models are."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, CLASSES)
        )

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.layers(pixel_values))


def view(pixels):
    return pixels.float() / 64 - 2


def take(share, batch, soft=False, teacher=None, noise=None):
    """Loss, gradients and logs of one step; dropout draws the same each time."""
    model, gradients = Classifier(1).train(), {}

    def backward(loss):
        loss.backward()
        gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})

    step = SupervisedStep(model, view, contextlib.nullcontext, 0.0, soft, teacher, share, noise)
    torch.manual_seed(7)
    logs = step(batch, backward)
    return logs, gradients


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    return {
        "pixels": torch.randint(256, (6, 3, 2, 2), generator=g, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 2, 0, 1, 2]),
        "targets": torch.rand(6, CLASSES, generator=g).softmax(1),
    }


@pytest.fixture
def teacher():
    return Classifier(2).eval().requires_grad_(False)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_loss_is_the_mean_of_what_label_and_teacher_say(share, soft, batch, teacher):
    logs, _ = take(share, batch, soft, teacher)
    model = Classifier(1).train()
    torch.manual_seed(7)
    found = model(view(batch["pixels"])).logits.log_softmax(1)
    aims = batch["targets"] if soft else nn.functional.one_hot(batch["labels"], CLASSES).float()
    taught = teacher(view(batch["pixels"])).logits.softmax(1)
    by_hand = -(((1 - share) * aims + share * taught) * found).sum(1).mean()
    torch.testing.assert_close(logs["loss"], by_hand.detach(), atol=1e-6, rtol=1e-5)


def test_with_the_whole_share_labels_do_not_count(batch, teacher):
    other = {**batch, "labels": batch["labels"].flip(0), "targets": batch["targets"].flip(0)}
    for soft in (False, True):
        (a, first), (b, second) = take(1.0, batch, soft, teacher), take(1.0, other, soft, teacher)
        assert torch.equal(a["loss"], b["loss"])
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not torch.equal(a["loss"], take(0.5, other, soft, teacher)[0]["loss"])


def test_the_teacher_stays_as_it_is(batch, teacher):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    logs, _ = take(0.5, batch, False, teacher)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    right = (teacher(view(batch["pixels"])).logits.argmax(1) == batch["labels"]).float().mean()
    assert logs["teacher_accuracy"] == right
    assert "teacher_accuracy" not in take(0.0, batch)[0]


def test_noise_is_what_the_model_sees_and_the_teacher_does_not(batch, teacher):
    logs, _ = take(0.5, batch, False, teacher, noise=lambda views: views.flip(-1))
    model = Classifier(1).train()
    torch.manual_seed(7)
    found = model(view(batch["pixels"]).flip(-1)).logits
    taught = teacher(view(batch["pixels"])).logits.softmax(1)
    parts = [nn.functional.cross_entropy(found, aim) for aim in (batch["labels"], taught)]
    torch.testing.assert_close(logs["loss"], sum(parts).detach() / 2, atol=1e-6, rtol=1e-5)
