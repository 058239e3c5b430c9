"""Figures of an evaluation, made without pyplot: no display is needed and no global state is touched."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from modeling_fer.evaluation.metrics import ReliabilityBins, confusion_scores, write_whole
from modeling_fer.evaluation.selective import RiskCoverage
from modeling_fer.labels import CLASSES

DPI = 150
Curve = tuple[list[int], list[float]]  # steps, values
SCORES = {"validation/macro_f1": "macro F1", "validation/accuracy": "accuracy"}

BLUE, ORANGE, GREY, GREEN = "#2f6db3", "#d9792b", "#8a8f98", "#3a8f5c"


def confusion_matrix_figure(
    matrix: ArrayLike, class_names: Sequence[str] = CLASSES, title: str = "Confusion matrix"
) -> Figure:
    """Draw a confusion matrix: colour and percent are shares of the true class, small numbers are counts.

    Args:
        matrix: (C, C) counts, rows = truth.
        class_names: the C names. A class that never occurs in the truth has an empty row.
        title: words before the macro F1.

    Raises:
        ValueError: the matrix is not (C, C).
    """
    counts = np.asarray(matrix)
    num_classes = len(class_names)
    if counts.shape != (num_classes, num_classes):
        raise ValueError(f"matrix: expected shape ({num_classes}, {num_classes}), got {counts.shape}")
    support = counts.sum(1)
    share = counts / np.maximum(support, 1)[:, None]
    scores = confusion_scores(counts)

    side = 2.6 + 0.78 * num_classes
    figure = Figure(figsize=(side + 0.7, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(num_classes, num_classes):
        if not support[row]:
            continue
        ink = "white" if share[row, column] > 0.55 else "#1f2933" if counts[row, column] else "#aab2bd"
        weight = "bold" if row == column else "normal"
        centred: dict[str, Any] = {"ha": "center", "va": "center", "color": ink}
        axes.text(column, row - 0.12, f"{share[row, column]:.0%}", weight=weight, **centred)
        axes.text(column, row + 0.24, f"{counts[row, column]:,}", fontsize=7, **centred)
    axes.set_xticks(range(num_classes), class_names, rotation=35, ha="right", rotation_mode="anchor")
    names = [f"{name}\nn = {total:,}" for name, total in zip(class_names, support, strict=True)]
    axes.set_yticks(range(num_classes), names)
    axes.set_xticks(np.arange(num_classes + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(num_classes + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("Predicted")
    axes.set_ylabel("True")
    f1, accuracy = float(scores["macro_f1"]), float(scores["accuracy"])
    axes.set_title(f"{title}: macro F1 {f1:.3f}, accuracy {accuracy:.3f}", pad=12)
    bar = figure.colorbar(image, ax=axes, shrink=0.75, pad=0.02, format=PercentFormatter(1))
    bar.set_label("Share of the true class")
    bar.outline.set_visible(False)
    return figure


def reliability_figure(bins: ReliabilityBins, title: str = "Reliability") -> Figure:
    """Draw accuracy against confidence (calibrated: the diagonal), and the share of examples in each bin."""
    width = np.diff(bins.edges)
    middle = bins.edges[:-1] + width / 2
    filled = bins.counts > 0

    figure = Figure(figsize=(5.2, 6.2), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.2, label="calibrated", zorder=3)
    heights = bins.accuracy[filled]
    axes.bar(middle[filled], heights, width[filled] * 0.94, color=BLUE, label="accuracy", zorder=2)
    dots: dict[str, Any] = {"color": "white", "markeredgecolor": "#173b63", "markersize": 5, "clip_on": False}
    axes.plot(bins.confidence[filled], heights, "o", label="at mean confidence", zorder=4, **dots)
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="Accuracy")
    axes.set_title(f"{title}: ECE {bins.ece:.3f}, {int(bins.counts.sum()):,} examples", pad=10)
    axes.legend(loc="upper left", frameon=False)
    below.bar(middle, bins.counts / max(bins.counts.sum(), 1), width * 0.94, color=GREY, zorder=2)
    below.set(xlabel="Confidence (highest probability)", ylabel="Examples")
    below.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    below.yaxis.set_major_locator(MaxNLocator(3))
    _tidy(axes)
    _tidy(below)
    return figure


def risk_coverage_figure(curve: RiskCoverage, title: str = "Answering only when sure") -> Figure:
    """Draw how often a model is right on the share of the examples that it is surest of."""
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.subplots()
    first = min(len(curve.coverage) - 1, len(curve.coverage) // 100)  # the surest few are mere noise
    axes.plot(curve.coverage[first:], curve.accuracy[first:], color=BLUE, linewidth=1.8, label="accuracy")
    axes.plot(
        curve.coverage[first:], curve.threshold[first:], color=GREY, linestyle="--", label="least confidence"
    )
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="Share of the examples answered")
    axes.set_title(f"{title}: AURC {curve.aurc:.3f}, {len(curve.coverage):,} examples", pad=10)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="lower left", frameon=False)
    _tidy(axes)
    return figure


def learning_curve_figure(history: Sequence[Mapping[str, Any]], title: str = "Learning curve") -> Figure:
    """Draw a run over its optimizer steps: training loss, learning rate, and the validation scores.

    Args:
        history: rows in any order, each with `step`. Training rows have `loss` and perhaps `learning_rate`;
            evaluation rows have `validation/macro_f1` and perhaps `validation/accuracy`, or, where no row has
            either, other numbers `validation/*`, all of which are drawn. The best value of the first is
            marked. What is missing is not drawn, and a value that is not finite leaves a gap. A resumed run
            may repeat a step: the later row counts.
        title: heading of the figure.

    Raises:
        ValueError: a row has no step, or there is nothing to draw.
    """
    for row in history:
        if "step" not in row:
            raise ValueError(f"history: expected every row to have 'step', got {dict(row)}")
    loss, lr = _curve(history, "loss"), _curve(history, "learning_rate")
    scores = _scores(history)
    panels = bool(loss[0] or lr[0]) + bool(scores)
    if not panels:
        raise ValueError(
            f"history: expected one of loss, learning_rate, validation/*, got none in {len(history)} rows"
        )

    figure = Figure(figsize=(7.2, 0.9 + 2.8 * panels), layout="constrained")
    rows = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    if loss[0] or lr[0]:
        _draw_training(rows[0], loss, lr)
    if scores:
        _draw_scores(rows[-1], scores)
    rows[0].set_title(title, pad=10)
    rows[-1].set_xlabel("Step")
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def image_rows_figure(rows: Mapping[str, np.ndarray]) -> Figure:
    """Draw named rows of images, each uint8 `(N, 3, H, W)` with the same N."""
    count = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.1 * count + 1.2, 1.1 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image.transpose(1, 2, 0))
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def timeline_figure(
    probabilities: np.ndarray,
    references: np.ndarray,
    frames: np.ndarray,
    class_names: Sequence[str],
    title: str,
) -> Figure:
    """One video: probability of each class by frame as shades, labels and predictions as lines.

    Args:
        probabilities: `(n, C)` of the frames that there are.
        references: class ids `(n,)`, -1 where a frame has no label.
        frames: their numbers `(n,)`, rising; where some are missing the picture is blank.
        class_names: names of the C classes.
        title: what stands above.
    """
    first, last = int(frames[0]), int(frames[-1])
    # Every so many frames have an image, and a long video is thinned to what a picture can show.
    usual = int(np.median(np.diff(frames))) if len(frames) > 1 else 1
    step = max(1, usual, (last - first + 1) // 4000)
    columns = (frames - first) // step
    shades = np.full((len(class_names), (last - first) // step + 1), np.nan)
    shades[:, columns] = probabilities.T
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots()
    extent = (first, last + 1, len(class_names) - 0.5, -0.5)
    image = axes.imshow(
        shades, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest", extent=extent
    )
    lines = np.full((2, shades.shape[1]), np.nan)
    lines[0, columns] = np.where(references >= 0, references, np.nan)
    lines[1, columns] = probabilities.argmax(1)
    places = first + step * (np.arange(shades.shape[1]) + 0.5)
    axes.plot(places, lines[0], color=ORANGE, linewidth=3, label="label", solid_capstyle="butt")
    axes.plot(places, lines[1], color="black", linewidth=1, label="prediction")
    axes.set_yticks(range(len(class_names)), class_names)
    axes.set_xlabel("Frame")
    axes.set_title(title)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False)
    figure.colorbar(image, label="Probability")
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all; equal figures make equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    write_whole(path, buffer.getvalue())


def _curve(history: Sequence[Mapping[str, Any]], name: str) -> Curve:
    points = {int(row["step"]): float(row[name]) for row in history if row.get(name) is not None}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def _scores(history: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Curves by label: those of `SCORES`, or else all validation numbers in order of appearance."""
    names = SCORES
    if not any(name in row for row in history for name in SCORES):
        found = dict.fromkeys(name for row in history for name in row if name.startswith("validation/"))
        names = {name: name.removeprefix("validation/").replace("_", " ") for name in found}
    curves = {label: _curve(history, name) for name, label in names.items()}
    return {label: curve for label, curve in curves.items() if curve[0]}


def _smooth(values: list[float]) -> list[float]:
    """Average over the nearest 5 % of points on either side: the eye sees the trend, not the batch noise."""
    half = math.ceil(len(values) / 20)
    windows = (np.asarray(values[max(i - half, 0) : i + half + 1]) for i in range(len(values)))
    return [float(w[np.isfinite(w)].mean()) if np.isfinite(w).any() else math.nan for w in windows]


def _draw_training(axes: Axes, loss: Curve, lr: Curve) -> None:
    lines = []
    if len(loss[0]) >= 40:
        axes.plot(*loss, color=BLUE, alpha=0.3, linewidth=1)
        lines += axes.plot(
            loss[0], _smooth(loss[1]), color=BLUE, linewidth=1.8, label="training loss (smoothed)"
        )
    elif loss[0]:
        lines += axes.plot(*loss, color=BLUE, linewidth=1.8, label="training loss")
    _tidy(axes)
    if loss[0]:
        axes.set_ylabel("Loss")
    if lr[0]:
        right = axes.twinx() if loss[0] else axes
        lines += right.plot(*lr, color=GREY, linestyle="--", linewidth=1.2, label="learning rate")
        right.set_ylabel("Learning rate")
        right.set_ylim(bottom=0)
        right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
        right.spines[["top"]].set_visible(False)
    axes.legend(handles=lines, loc="upper right", frameon=False)


def _draw_scores(axes: Axes, scores: Mapping[str, Curve]) -> None:
    styles = itertools.cycle(((ORANGE, "o", 4, 1.8), (GREEN, "s", 3.5, 1.4), (BLUE, "^", 4, 1.4)))
    for (label, curve), (color, marker, size, width) in zip(scores.items(), styles, strict=False):
        axes.plot(*curve, color=color, marker=marker, markersize=size, linewidth=width, label=label)
    steps, values = next(iter(scores.values()))
    if finite := [(value, step) for value, step in zip(values, steps, strict=True) if math.isfinite(value)]:
        value, step = max(finite)
        axes.plot(step, value, "o", markersize=10, markerfacecolor="none", markeredgecolor=ORANGE)
        offset: dict[str, Any] = {"xytext": (0, -17), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"best {value:.3f}", (step, value), color=ORANGE, weight="bold", **offset)
    drawn = [value for _, values in scores.values() for value in values if math.isfinite(value)]
    axes.set_ylabel("Validation score")
    lowest = min([0, *drawn])
    axes.set_ylim(lowest - 0.15 * (lowest < 0), max([1, *drawn]))  # room for words below a negative best
    axes.legend(loc="lower right", frameon=False)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e6ea", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
