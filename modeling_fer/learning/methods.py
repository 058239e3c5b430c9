"""Methods of stage `image`: how labelled and unlabelled faces become a training step."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from modeling_fer.data.augment import AUGMENTATIONS, CameraNoise, View
from modeling_fer.learning.arguments import FerTrainingArguments
from modeling_fer.learning.debias import Alignment, Marginal
from modeling_fer.learning.feedback import FeedbackStep
from modeling_fer.learning.fixmatch import FixMatchStep, Recall, SamplerFeedback, Views
from modeling_fer.learning.gate import make_gate
from modeling_fer.learning.inference import load_classifier
from modeling_fer.learning.optimization import build_optimizer, build_schedule
from modeling_fer.learning.pseudo_labels import PseudoLabeler
from modeling_fer.learning.step import Step, SupervisedStep
from modeling_fer.learning.thresholds import make_rule


def build_view(name: str, erasing: float, processor: Any, device: torch.device) -> View:
    """uint8 images to augmented and normalised ones, on the device."""
    view = View(AUGMENTATIONS[name](erasing), processor.image_mean, processor.image_std)
    return view.to(device)


def build_labeler(
    arguments: FerTrainingArguments, classes: int, memory: int, accelerator: Accelerator
) -> Any:
    """What chooses pseudo-labels, as the arguments want; `memory`: how many faces a rule may remember."""
    momentum = arguments.debias_momentum
    return PseudoLabeler(
        make_rule(
            arguments.threshold_rule, classes, arguments.threshold, arguments.threshold_momentum, memory
        ),
        Marginal(classes, momentum),
        arguments.debias_tau,
        None if arguments.align == "none" else Alignment(arguments.align, classes, momentum),
        make_gate(arguments.gate, arguments.gate_quantile),
        accelerator.gather,
        accelerator.process_index,
    )


def load_teacher(
    arguments: FerTrainingArguments, student: Any, processor: Any, device: torch.device
) -> nn.Module:
    """The model that a student is to learn from, frozen and ready.

    Raises:
        ValueError: it is none, or has other classes or another input than the student.
    """
    folder = arguments.teacher
    try:
        teacher, seen_by = load_classifier(folder, mirror=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--teacher {folder}: {error}") from error
    for what, theirs, ours in (
        ("classes", teacher.config.class_names, student.config.class_names),
        ("image_size", teacher.config.image_size, student.config.image_size),
        ("image_mean", list(seen_by.image_mean), list(processor.image_mean)),
        ("image_std", list(seen_by.image_std), list(processor.image_std)),
    ):
        if theirs != ours:
            raise ValueError(f"--teacher {folder} has {what} {theirs}, the model to be trained {ours}")
    teacher = teacher.requires_grad_(False).eval().to(device)
    if arguments.compile:
        teacher.compile()
    return teacher


def step_maker(
    arguments: FerTrainingArguments,
    accelerator: Accelerator,
    trained: nn.Module,
    processor: Any,
    classes: int,
    memory: int,
    recall: Recall | None,
) -> Callable[[nn.Module, int], Step]:
    """A function from the prepared model and the number of steps to the step of `--method`."""
    device = accelerator.device
    view = partial(build_view, processor=processor, device=device)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=arguments.precision == "bf16")
    views = Views(
        view(arguments.augmentation, arguments.erasing),
        view(arguments.augmentation, 0.0),
        view(arguments.strong_augmentation, 0.0),
    )
    common: dict[str, Any] = {
        "lambda_u": arguments.lambda_u,
        "label_smoothing": arguments.label_smoothing,
        "soft_labels": arguments.soft_labels,
        "feedback": SamplerFeedback(arguments.sampler_bound, recall),
        "autocast": autocast,
        "views": views,
        "plain": trained,
    }

    def supervised(prepared: nn.Module, total: int) -> Step:
        teacher = noise = None
        if arguments.teacher:
            teacher = load_teacher(arguments, trained, processor, device)
        if arguments.noise:
            noise = CameraNoise(arguments.noise, processor.image_mean, processor.image_std).to(device)
        return SupervisedStep(
            prepared,
            views.labelled,
            autocast,
            arguments.label_smoothing,
            arguments.soft_labels,
            teacher,
            arguments.distillation,
            noise,
        )

    def fixmatch(prepared: nn.Module, total: int) -> Step:
        labeler = build_labeler(arguments, classes, memory, accelerator)
        return FixMatchStep(model=prepared, labeler=labeler, teacher_ema=arguments.teacher_ema, **common)

    def feedback(prepared: nn.Module, total: int) -> Step:
        plain = copy.deepcopy(trained)  # not compiled, even where the student is
        if arguments.compile:
            plain.compile()
        rate, decay = arguments.learning_rate, arguments.weight_decay
        optimizer = build_optimizer(plain, rate, decay, arguments.layer_decay)
        schedule = build_schedule(optimizer, arguments.warmup, total, arguments.finetune)
        teacher, prepared_optimizer = accelerator.prepare(plain, optimizer)
        return FeedbackStep(
            student=prepared,
            teacher=teacher,
            optimizer=prepared_optimizer,
            schedule=schedule,
            labeler=build_labeler(arguments, classes, memory, accelerator),
            feedback_weight=arguments.feedback_weight,
            max_grad_norm=arguments.max_grad_norm or math.inf,
            steps=total,
            finetune_steps=round(arguments.finetune * total),
            accelerator=accelerator,
            student_lambda_x=arguments.student_lambda_x,
            **common,
        )

    return {"supervised": supervised, "fixmatch": fixmatch, "feedback": feedback}[arguments.method]


def count_recall(
    predict: Callable[[nn.Module, np.ndarray], np.ndarray],
    pixels: np.ndarray,
    labels: np.ndarray,
    classes: int,
) -> Recall:
    """A function from a model to the held-out faces by class that it has right, and all of them."""

    def recall(model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        right = labels == predict(model, pixels).argmax(1)
        return np.bincount(labels[right], minlength=classes), np.bincount(labels, minlength=classes)

    return recall


def hold_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which examples `(N,)` to keep from training: about `share` of each class, one at least, never all."""
    out = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels[labels >= 0]) if share else ():
        members = np.flatnonzero(labels == c)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        out[np.random.default_rng([seed, int(c)]).permutation(members)[:count]] = True
    return out
