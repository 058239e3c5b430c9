"""What a training stage hands to the loop: model, data, step, and how it is judged and saved."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from torch import nn

from modeling_fer.data.collection import Collection, expressions_of
from modeling_fer.data.feed import Pool, Streamed
from modeling_fer.data.videos import recording
from modeling_fer.evaluation.report import write_report
from modeling_fer.labels import CLASSES, IGNORE
from modeling_fer.learning.inference import load_model
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
        report: write into a run folder how its saved model does on the validation split; None: it is no
            classifier, or is judged on something else. Called on every process.
    """

    model: nn.Module
    labelled: Pool
    make_step: Callable[[nn.Module, int], Step]
    evaluate: Callable[[nn.Module], dict[str, Any]]
    criterion: str
    save: Callable[[nn.Module, Path], None]
    unlabelled: Pool | Streamed | None = None
    report: Callable[[Path], None] | None = None


def resampling_groups(rows: Dataset) -> tuple[np.ndarray | None, str]:
    """Ids of what the intervals resample, a row each, and its name: videos, else subjects, else images.

    A column counts where every labelled row has an id and the ids are two at least.
    """
    labelled = np.flatnonzero(expressions_of(rows) != IGNORE)
    for column in ("video", "subject"):
        ids = rows[column][:]
        if column == "video":  # two people's tracks of one recording are resampled together
            ids = [None if video is None else recording(video) for video in ids]
        found = {ids[row] for row in labelled}
        if None not in found and len(found) > 1:
            return np.asarray(ids, dtype=object), f"{column}s"
    return None, "images"


def report_validation(
    collection: Collection,
    rows: Dataset,
    predict: Callable[[nn.Module], np.ndarray],
    accelerator: Accelerator,
    run: Path,
) -> None:
    """Write what `fer eval` would of a run's saved model on the validation split, which chose its step.

    Args:
        collection: the run's data; several folders are named together.
        rows: the validation rows.
        predict: model to probabilities `(N, 8)` of the rows, the same on every process.
        accelerator: of the run.
        run: its folder, with the model in `model`.
    """
    accelerator.wait_for_everyone()  # the main process may still be writing it
    model, _ = load_model(run / "model")
    probabilities = predict(model)
    if not accelerator.is_main_process:
        return
    paths = [path for path, data in collection.folders["labelled"] if "validation" in data]
    about = {
        "model": str(run / "model"),
        "data": paths[0] if len(paths) == 1 else " and ".join(Path(path).name for path in paths),
        "split": "validation",
        "chose": "the training step",
    }
    groups, unit = resampling_groups(rows)
    write_report(run, expressions_of(rows), probabilities, CLASSES, about, groups, unit)
