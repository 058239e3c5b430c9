"""What an evaluation leaves on disk: metrics.json, confusion_matrix.png, reliability.png."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from modeling_fer.evaluation import plots
from modeling_fer.evaluation.metrics import compute_metrics, reliability_bins, write_metrics
from modeling_fer.labels import CLASSES


def write_report(
    folder: Path,
    references: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str] = CLASSES,
    about: dict[str, str] | None = None,
    groups: ArrayLike | None = None,
    unit: str = "groups",
) -> dict:
    """Evaluate and write the report; returns the metrics.

    Args:
        folder: made if it is not there; files of an earlier report are replaced.
        references: true ids `(N,)`, -1 where a row does not count.
        probabilities: `(N, C)`, rows sum to 1.
        class_names: names of the C classes.
        about: what was evaluated (model, data, split), kept in metrics.json.
        groups: `(N,)` ids of the units to resample for the intervals, as in `compute_metrics`; None: images.
        unit: what the groups are ("videos", "subjects"), named beside the intervals.
    """
    metrics = compute_metrics(
        references, probabilities.argmax(-1), probabilities, class_names=class_names, groups=groups
    )
    metrics["bootstrap"]["unit"] = "images" if groups is None else unit
    folder.mkdir(parents=True, exist_ok=True)
    write_metrics({**(about or {}), **metrics}, folder / "metrics.json")
    confusion = plots.confusion_matrix_figure(metrics["confusion_matrix"], class_names)
    plots.save(confusion, folder / "confusion_matrix.png")
    reliability = plots.reliability_figure(reliability_bins(references, probabilities))
    plots.save(reliability, folder / "reliability.png")
    return metrics


def summary(metrics: dict) -> str:
    """The main figures as a few lines of text."""
    low, high = metrics["interval"]["macro_f1"]
    lines = [
        f"macro F1 {metrics['macro_f1']:.3f} over {len(metrics['per_class'])} classes "
        f"(95 % interval over {metrics['bootstrap']['unit']} {low:.3f} to {high:.3f})"
    ]
    present = metrics["classes_present"]
    if absent := [name for name in metrics["per_class"] if name not in present]:
        score = f"macro F1 {metrics['macro_f1_present']:.3f} over the {len(present)} classes present"
        lines.append(f"no rows of {', '.join(absent)}; {score}")
    lines.append(
        f"accuracy {metrics['accuracy']:.3f}   balanced accuracy {metrics['balanced_accuracy']:.3f}   "
        f"ECE {metrics['ece']:.3f}   {metrics['samples']} faces"
    )
    width = max(map(len, metrics["per_class"]))
    lines.append(f"{'':{width}}  precision  recall     F1  support")
    for name, row in metrics["per_class"].items():
        scores = f"{row['precision']:9.3f}  {row['recall']:6.3f}  {row['f1']:5.3f}"
        lines.append(f"{name:{width}}  {scores}  {row['support']:7d}")
    return "\n".join(lines)
