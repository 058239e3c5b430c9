"""Scores of hard predictions and of probabilities, with bootstrap intervals. Handed arrays; knows no model.

Two macro F1 scores are given, because they answer different questions:

- `macro_f1` is the ABAW rule: the mean of F1 over *all* classes, where a class that neither the truth nor the
  predictions contain counts 0 (as scikit-learn with every label listed and `zero_division=0`);
- `macro_f1_present` is the mean over the classes that occur in the truth, for sets that lack some of them.

A reference of -1 (`IGNORE`) marks a row without a label. Such rows are removed first, whatever they hold.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from sklearn.metrics import log_loss, precision_recall_fscore_support

from modeling_fer.evaluation.bootstrap import Floats, Ints, resample_examples, resample_groups
from modeling_fer.labels import CLASSES, IGNORE

INTERVAL_SCORES = ("macro_f1", "macro_f1_present", "accuracy", "balanced_accuracy")
CLASS_SCORES = ("precision", "recall", "f1")
INTERVAL_PERCENTILES = (2.5, 97.5)  # the middle 95 %
ROW_SUM_TOLERANCE = 1e-3  # wide enough for a float16 softmax; logits are far outside

Bools = NDArray[np.bool_]


def confusion_matrix(references: ArrayLike, predictions: ArrayLike, num_classes: int) -> Ints:
    """Count (truth, prediction) pairs.

    Args:
        references: (N,) class ids; rows with -1 do not count.
        predictions: (N,) class ids; ignored where the reference is -1.
        num_classes: C, the number of classes.

    Returns:
        (C, C) int64 counts, rows = truth, columns = prediction. All zero if no row is labelled.

    Raises:
        ValueError: lengths differ, or an id is no whole number or out of range.
    """
    truth, labelled = _references(references, num_classes)
    predicted = _predictions(predictions, labelled, num_classes)
    if not len(truth):  # scikit-learn refuses an empty set
        return np.zeros((num_classes, num_classes), np.int64)
    return sklearn_confusion_matrix(truth, predicted, labels=np.arange(num_classes)).astype(np.int64)


def confusion_scores(matrices: ArrayLike) -> dict[str, Floats]:
    """Compute the scores that have an interval, for any number of confusion matrices at once.

    Args:
        matrices: (..., C, C) counts, rows = truth.

    Returns:
        `macro_f1`, `macro_f1_present`, `accuracy`, `balanced_accuracy`, each of shape (...); all 0 for a
        matrix of zeros.
    """
    counts = np.asarray(matrices, dtype=np.float64)
    present = counts.sum(-1) > 0
    classes_present = np.maximum(present.sum(-1), 1)
    by_class = class_scores(counts)
    return {
        "macro_f1": by_class["f1"].mean(-1),
        "macro_f1_present": (by_class["f1"] * present).sum(-1) / classes_present,
        "accuracy": _ratio(np.trace(counts, axis1=-2, axis2=-1), counts.sum((-2, -1))),
        "balanced_accuracy": by_class["recall"].sum(-1) / classes_present,
    }


def class_scores(matrices: ArrayLike) -> dict[str, Floats]:
    """Compute the scores of each class, for any number of confusion matrices at once.

    Args:
        matrices: (..., C, C) counts, rows = truth.

    Returns:
        `precision`, `recall`, `f1`, each of shape (..., C); 0 where undefined.
    """
    counts = np.asarray(matrices, dtype=np.float64)
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    support, called = counts.sum(-1), counts.sum(-2)
    return {
        "precision": _ratio(hits, called),
        "recall": _ratio(hits, support),
        "f1": _ratio(2 * hits, support + called),
    }


def compute_metrics(
    references: ArrayLike,
    predictions: ArrayLike,
    probabilities: ArrayLike | None = None,
    class_names: Sequence[str] = CLASSES,
    groups: ArrayLike | None = None,
    bootstrap_samples: int = 1000,
    seed: int = 0,
    bins: int = 15,
) -> dict[str, Any]:
    """Score predictions against references.

    Args:
        references: (N,) class ids; rows with -1 do not count, in any score.
        predictions: (N,) class ids; not always the argmax of `probabilities` (post-processing moves them).
        probabilities: (N, C) rows that sum to 1, used by `ece` and `nll` only.
        class_names: the C class names in the order of the ids.
        groups: (N,) ids of the units to resample for the intervals, usually videos or subjects: frames of one
            video are near-copies of each other, and resampling them singly makes intervals far too narrow.
            None: examples.
        bootstrap_samples: number of bootstrap replicates; 0 leaves the intervals out.
        seed: of the bootstrap.
        bins: confidence bins of `ece`.

    Returns:
        A dictionary of plain Python values, ready for JSON; NaN never occurs.

        - `macro_f1`, `macro_f1_present`, `accuracy`, `balanced_accuracy` (mean recall over the classes in the
          truth), `worst_class_recall` (lowest recall of those classes): floats in [0, 1];
        - `classes_present`: names of the classes in the truth; `samples`: number of labelled rows;
        - `per_class`: name -> `precision`, `recall`, `f1` (0 where undefined) and `support`;
        - `confusion_matrix`: C lists of C counts, rows = truth;
        - with `probabilities`: `ece` (see `reliability_bins`), `nll` (mean negative log-likelihood in nats,
          probabilities clipped at 2.2e-16 as in scikit-learn);
        - with `bootstrap_samples`: `interval`, name of each of the first four scores -> [low, high], the 95 %
          percentile bootstrap (Efron 1979); in `per_class`, for classes in the truth, `precision_interval`,
          `recall_interval`, `f1_interval` (0 in a replicate where undefined); `bootstrap`: `samples`,
          `seed`, `unit` ("example" or "group").

    Raises:
        ValueError: no labelled row, lengths differ, an id out of range, a probability that is negative or not
            finite, a row that does not sum to 1, a missing group id, or fewer than two groups.
    """
    names = [str(name) for name in class_names]
    num_classes = len(names)
    if num_classes < 2 or len(set(names)) != num_classes:
        raise ValueError(f"class_names: expected at least 2 different names, got {names}")
    if bootstrap_samples < 0:
        raise ValueError(f"bootstrap_samples: expected 0 or more, got {bootstrap_samples}")
    truth, labelled = _references(references, num_classes, needed=True)
    predicted = _predictions(predictions, labelled, num_classes)

    ids = np.arange(num_classes)
    matrix = confusion_matrix(truth, predicted, num_classes)
    per_class = precision_recall_fscore_support(truth, predicted, labels=ids, zero_division=0)
    _, recall, f1, support = per_class
    present = support > 0
    result: dict[str, Any] = {
        "macro_f1": float(f1.mean()),
        "macro_f1_present": float(f1[present].mean()),
        "accuracy": float((truth == predicted).mean()),
        "balanced_accuracy": float(recall[present].mean()),
        "worst_class_recall": float(recall[present].min()),
        "classes_present": [name for name, there in zip(names, present, strict=True) if there],
        "samples": len(truth),
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for name, p, r, f, n in zip(names, *per_class, strict=True)
        },
        "confusion_matrix": matrix.tolist(),
    }
    if probabilities is not None:
        rows = _probabilities(probabilities, labelled, num_classes)
        result["ece"] = _bin_confidences(truth, rows, bins).ece
        result["nll"] = float(log_loss(truth, rows, labels=ids))
    if bootstrap_samples:
        rng = np.random.default_rng(seed)
        drawn: NDArray[Any]
        if groups is None:
            drawn = resample_examples(matrix, bootstrap_samples, rng)
        else:
            cells = truth * num_classes + predicted
            drawn = resample_groups(cells, _groups(groups, labelled), num_classes, bootstrap_samples, rng)
        scores = confusion_scores(drawn)
        result["interval"] = {name: _middle(scores[name]) for name in INTERVAL_SCORES}
        by_class = class_scores(drawn)
        for i in np.flatnonzero(present):
            bounds = {f"{name}_interval": _middle(by_class[name][:, i]) for name in CLASS_SCORES}
            result["per_class"][names[i]] |= bounds
        unit = "example" if groups is None else "group"
        result["bootstrap"] = {"samples": int(bootstrap_samples), "seed": int(seed), "unit": unit}
    return result


@dataclasses.dataclass(frozen=True)
class ReliabilityBins:
    """Examples sorted by confidence into B equal-width bins; empty bins hold zeros.

    `edges` (B + 1,): bounds, the upper one belonging to its bin; `counts` (B,): examples; `confidence` (B,):
    their mean highest probability; `accuracy` (B,): how often their most probable class is the true one.
    """

    edges: Floats
    counts: Ints
    confidence: Floats
    accuracy: Floats

    @property
    def ece(self) -> float:
        """Expected calibration error in [0, 1]: mean |accuracy - confidence|, bins weighted by count."""
        return float(np.abs(self.accuracy - self.confidence) @ self.counts / max(self.counts.sum(), 1))


def reliability_bins(references: ArrayLike, probabilities: ArrayLike, bins: int = 15) -> ReliabilityBins:
    """Compare how sure a model is with how often it is right.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (arXiv 1706.04599), section 2:
    equal-width bins over the highest probability, the prediction being the class that has it.

    Args:
        references: (N,) class ids; rows with -1 do not count.
        probabilities: (N, C) rows that sum to 1.
        bins: number of bins over [0, 1].

    Raises:
        ValueError: as `compute_metrics`.
    """
    shape = np.shape(probabilities)
    if len(shape) != 2:
        raise ValueError(f"probabilities: expected shape (N, C), got {shape}")
    truth, labelled = _references(references, shape[1], needed=True)
    return _bin_confidences(truth, _probabilities(probabilities, labelled, shape[1]), bins)


class FerMetric(evaluate.Metric):
    """`compute_metrics` as an `evaluate` metric that needs neither the network nor a cache folder.

    Probabilities, groups and the other arguments of `compute_metrics` go to `compute`; after `add_batch`,
    those of all batches together, in the same order.

    Example:
        >>> FerMetric().compute(references=[0, 4], predictions=[0, 1], bootstrap_samples=0)["accuracy"]
        0.5
    """

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **kwargs: Any) -> None:
        self._makes_folder = not keep_in_memory
        super().__init__(config_name, keep_in_memory=keep_in_memory, **kwargs)

    def _build_data_dir(self) -> str:
        # The base class makes its cache folder even where it keeps everything in memory.
        return super()._build_data_dir() if self._makes_folder else ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Macro F1 over all expression classes (ABAW rule), accuracy, calibration, intervals.",
            citation="",
            inputs_description="The arguments and the result are those of `compute_metrics`.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, *, predictions: ArrayLike, references: ArrayLike, **kwargs: Any) -> dict[str, Any]:
        return compute_metrics(references, predictions, **kwargs)


def write_metrics(metrics: dict[str, Any], path: str | Path) -> None:
    """Write a result as JSON, whole or not at all.

    Raises:
        ValueError: a value is NaN or infinite, which JSON does not have; an older file is left as it was.
    """
    write_whole(path, (json.dumps(metrics, indent=2, allow_nan=False) + "\n").encode())


def write_whole(path: str | Path, content: bytes) -> None:
    """Write `content` beside `path`, then rename, so that no reader and no crash ever meets half a file.

    Missing folders are made. An older file is replaced only once the new one is complete on disk.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)  # gone after the rename; left by a full disk


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Divide, 0 where the denominator is 0 (there the numerator is 0, too)."""
    return numerator / np.maximum(denominator, 1)


def _middle(scores: Floats) -> list[float]:
    """Bounds of the middle 95 %."""
    return [float(bound) for bound in np.percentile(scores, INTERVAL_PERCENTILES)]


def _ids(values: ArrayLike, what: str) -> Ints:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{what}: expected shape (N,), got {array.shape}")
    if len(array) and not np.issubdtype(array.dtype, np.integer):  # numpy makes an empty list float
        raise ValueError(f"{what}: expected whole-number class ids, got values of type {array.dtype}")
    return array.astype(np.int64)


def _in_range(values: Ints, num_classes: int, what: str) -> Ints:
    outside = np.unique(values[(values < 0) | (values >= num_classes)])
    if len(outside):
        raise ValueError(f"{what}: expected ids 0 to {num_classes - 1}, got {outside[:5].tolist()}")
    return values


def _references(references: ArrayLike, num_classes: int, needed: bool = False) -> tuple[Ints, Bools]:
    """Return the labels of the M labelled rows, (M,), and which rows they are, (N,); `needed`: M is not 0."""
    truth = _ids(references, "references")
    labelled = truth != IGNORE
    if needed and not labelled.any():
        raise ValueError(f"references: expected some other than {IGNORE}, got none in {len(truth)} rows")
    return _in_range(truth[labelled], num_classes, f"references other than {IGNORE}"), labelled


def _aligned(array: NDArray[Any], labelled: Bools, what: str) -> NDArray[Any]:
    if len(array) != len(labelled):
        raise ValueError(f"{what}: expected {len(labelled)} rows, one per reference, got {len(array)}")
    return array[labelled]


def _predictions(predictions: ArrayLike, labelled: Bools, num_classes: int) -> Ints:
    """Return the predictions of the labelled rows, (M,)."""
    kept = _aligned(_ids(predictions, "predictions"), labelled, "predictions")
    return _in_range(kept, num_classes, "predictions")


def _probabilities(probabilities: ArrayLike, labelled: Bools, num_classes: int) -> Floats:
    """Return the labelled rows, (M, C) float64, checked and scaled to sum to 1 exactly."""
    array = np.asarray(probabilities, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != num_classes:
        raise ValueError(f"probabilities: expected shape (N, {num_classes}), got {array.shape}")
    array = _aligned(array, labelled, "probabilities")
    bad = ~np.isfinite(array).all(1)
    if bad.any():
        raise ValueError(f"probabilities: expected finite values, got {bad.sum()} rows with NaN or infinity")
    if array.min() < 0:
        raise ValueError(f"probabilities: expected values in [0, 1], not logits, got {array.min():.6g}")
    sums = array.sum(1, keepdims=True)
    worst = float(sums[np.abs(sums - 1).argmax(), 0])
    if abs(worst - 1) > ROW_SUM_TOLERANCE:
        raise ValueError(f"probabilities: expected rows that sum to 1, got a row that sums to {worst:.6g}")
    return array / sums


def _bin_confidences(truth: Ints, probabilities: Floats, bins: int) -> ReliabilityBins:
    if bins < 1:
        raise ValueError(f"bins: expected 1 or more, got {bins}")
    edges = np.linspace(0, 1, bins + 1)
    confidence = probabilities.max(1)
    place = np.searchsorted(edges[1:-1], confidence, side="left")  # left: a bin holds its upper bound
    counts = np.bincount(place, minlength=bins)
    right = (probabilities.argmax(1) == truth).astype(np.float64)
    filled = np.maximum(counts, 1)
    return ReliabilityBins(
        edges=edges,
        counts=counts.astype(np.int64),
        confidence=np.bincount(place, weights=confidence, minlength=bins) / filled,
        accuracy=np.bincount(place, weights=right, minlength=bins) / filled,
    )


def _groups(groups: ArrayLike, labelled: Bools) -> Ints:
    """Return the group of each labelled row as a number from 0, (M,)."""
    array = np.asarray(groups)
    if array.ndim != 1:
        raise ValueError(f"groups: expected shape (N,), got {array.shape}")
    rows = _aligned(array, labelled, "groups").tolist()
    missing = sum(row is None or row != row for row in rows)  # NaN is what pandas makes of a missing id
    if missing:
        raise ValueError(f"groups: expected an id for every labelled row, got {missing} rows without one")
    names, numbers = np.unique([str(row) for row in rows], return_inverse=True)
    if len(names) < 2:
        raise ValueError(
            f"groups: expected at least 2 groups to resample, got 1 ({str(names[0])!r}); "
            "leave groups out or set bootstrap_samples=0"
        )
    return numbers.astype(np.int64)
