"""What a training stage hands to the loop: model, data, step, and how it is judged and saved."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from modeling_fer.data.sampling import DebiasFeedbackSampler
from modeling_fer.learning.step import Step


@dataclass
class Stage:
    """One kind of training, ready for the loop in train.py.

    Attributes:
        model: the model to train, on any device.
        dataset: fetches whole batches (`__getitems__`).
        sampler: order of its examples, and the place in it.
        make_step: prepared model to training step.
        evaluate: model to numbers, `criterion` among them, higher is better. Called on every process.
        criterion: the number by which the best model is chosen.
        save: write a model that can be released to a folder.
        report: write figures on the best model's validation to a folder; called on the main process when it
            has improved.
    """

    model: nn.Module
    dataset: Dataset
    sampler: DebiasFeedbackSampler
    make_step: Callable[[nn.Module], Step]
    evaluate: Callable[[nn.Module], dict[str, Any]]
    criterion: str
    save: Callable[[nn.Module, Path], None]
