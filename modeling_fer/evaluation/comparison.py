"""Two models on the same faces: is the second better than the first?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from modeling_fer.evaluation import plots
from modeling_fer.evaluation.metrics import confusion_scores, write_metrics
from modeling_fer.labels import CLASSES, IGNORE

SCORES = ("macro_f1", "accuracy", "balanced_accuracy")


def compare(
    references: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    class_names: Sequence[str] = CLASSES,
    groups: ArrayLike | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of both and their differences, with paired bootstrap intervals.

    The same groups are drawn for both models, so that what makes a face hard for either cancels out (Efron
    and Tibshirani, "An Introduction to the Bootstrap", 1993, section 8.3).

    Args:
        references: true ids `(N,)`, -1 where a row does not count.
        first, second: predicted ids `(N,)`.
        class_names: names of the classes.
        groups: `(N,)` ids of what is resampled (videos, subjects); None: rows.
        samples: bootstrap replicates.
        seed: of the bootstrap.

    Returns:
        For each of `macro_f1`, `accuracy`, `balanced_accuracy`: `first`, `second`, `difference` (second less
        first) and `interval`, its middle 95 %; `recall`: class name to the recall of both.

    Raises:
        ValueError: lengths differ, or no row has a label.
    """
    truth, *predicted = (np.asarray(values) for values in (references, first, second))
    if {len(p) for p in predicted} != {len(truth)}:
        raise ValueError(f"{len(truth)} references, but {[len(p) for p in predicted]} predictions")
    counted = truth != IGNORE
    if not counted.any():
        raise ValueError("no row has a label: there is nothing to compare on")
    size = len(class_names)
    units = np.arange(len(truth)) if groups is None else np.asarray(groups, dtype=str)
    _, unit = np.unique(units[counted], return_inverse=True)
    # Confusion matrices of each unit, flat: (units, C * C) for each model.
    cells = [
        np.bincount(
            (unit * size + truth[counted]) * size + p[counted], minlength=(unit.max() + 1) * size * size
        ).reshape(-1, size * size)
        for p in predicted
    ]
    rng = np.random.default_rng(seed)
    times = [np.bincount(rng.integers(len(c), size=len(c)), minlength=len(c)) for c in [cells[0]] * samples]
    draws = [np.stack([weights @ c for weights in times]).reshape(-1, size, size) for c in cells]
    drawn = [confusion_scores(d) for d in draws]
    exact = [confusion_scores(c.sum(0).reshape(1, size, size)) for c in cells]
    result: dict[str, Any] = {}
    for name in SCORES:
        a, b = (float(scores[name][0]) for scores in exact)
        low, high = np.percentile(drawn[1][name] - drawn[0][name], (2.5, 97.5))
        result[name] = {"first": a, "second": b, "difference": b - a, "interval": [float(low), float(high)]}
    totals = [c.sum(0).reshape(size, size) for c in cells]
    result["recall"] = {
        name: [float(t[i, i] / t[i].sum()) for t in totals]
        for i, name in enumerate(class_names)
        if totals[0][i].any()
    }
    return result


def comparison_figure(result: dict[str, Any], names: tuple[str, str]) -> Figure:
    """Recall by class of both models, side by side."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(result["recall"]))
    for k, (name, colour) in enumerate(zip(names, (plots.GREY, plots.BLUE), strict=True)):
        heights = [100 * pair[k] for pair in result["recall"].values()]
        axes.bar(places + 0.4 * k - 0.2, heights, 0.38, color=colour, label=name)
    axes.set_xticks(places, list(result["recall"]), rotation=20)
    axes.set_ylabel("recall, %")
    axes.set_ylim(0, 100)
    score = result["macro_f1"]
    axes.set_title(f"macro F1 {score['first']:.3f} to {score['second']:.3f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def write_comparison(folder: Path, result: dict[str, Any], names: tuple[str, str]) -> str:
    """Write comparison.json and comparison.png; returns the main figures as text."""
    write_metrics({"first_model": names[0], "second_model": names[1], **result}, folder / "comparison.json")
    plots.save(comparison_figure(result, names), folder / "comparison.png")
    lines = []
    for name in SCORES:
        score = result[name]
        low, high = score["interval"]
        lines.append(
            f"{name} {score['first']:.3f} to {score['second']:.3f}: {score['difference']:+.3f} "
            f"(95 % interval {low:+.3f} to {high:+.3f})"
        )
    return "\n".join(lines)
