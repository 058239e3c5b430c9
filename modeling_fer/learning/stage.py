"""What a training stage hands to the loop: model, data, step, and how it is judged and saved."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from modeling_fer.data.feed import Pool, Streamed
from modeling_fer.learning.step import Step


@dataclass
class Stage:
    """One kind of training, ready for the loop in train.py.

    Attributes:
        model: the model to train, on any device.
        labelled: the faces whose passes make the rounds; batch size and rounds are those of its sampler.
        unlabelled: faces that come beside them in each batch, if any.
        make_step: prepared model and the number of steps to come, to training step.
        evaluate: model to numbers, `criterion` among them, higher is better. Called on every process.
        criterion: the number by which the best model is chosen.
        save: write a model that can be released to a folder.
    """

    model: nn.Module
    labelled: Pool
    make_step: Callable[[nn.Module, int], Step]
    evaluate: Callable[[nn.Module], dict[str, Any]]
    criterion: str
    save: Callable[[nn.Module, Path], None]
    unlabelled: Pool | Streamed | None = None
