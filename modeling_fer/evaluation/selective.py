"""Selective prediction: how often a model is right where it is sure, and silent elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from modeling_fer.labels import IGNORE

COVERAGES = (1.0, 0.9, 0.8, 0.7, 0.5, 0.3)  # shares of the faces that are told of in numbers


@dataclass(frozen=True)
class RiskCoverage:
    """What is right among the surest examples, from the surest one to all N.

    `coverage` (N,): share of the examples that are answered; `accuracy` (N,): how often those are right;
    `threshold` (N,): the lowest confidence among them.
    """

    coverage: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    threshold: NDArray[np.float64]

    @property
    def aurc(self) -> float:
        """Area under the curve of risk (1 - accuracy) over coverage, in [0, 1]: the mean risk over coverages.

        Geifman, Uziel and El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR
        2019 (arXiv 1805.08206), section 2.
        """
        return float(1 - self.accuracy.mean())

    def summary(self, coverages: Sequence[float] = COVERAGES) -> dict[str, Any]:
        """The area, and the thresholds that just let these shares be answered: coverage and accuracy there.

        Examples of one confidence are answered together, so that a coverage may be above what was asked for.
        """
        ends = np.append(np.flatnonzero(np.diff(self.threshold)), len(self.threshold) - 1)
        places = [int(ends[np.searchsorted(self.coverage[ends], share - 1e-9)]) for share in coverages]
        return {
            "aurc": self.aurc,
            "coverage": [float(self.coverage[place]) for place in places],
            "accuracy": [float(self.accuracy[place]) for place in places],
            "threshold": [float(self.threshold[place]) for place in places],
        }


def risk_coverage(references: ArrayLike, probabilities: ArrayLike) -> RiskCoverage:
    """Answer only where the highest probability is high, and see what that is worth.

    The rule of Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017 (arXiv
    1705.08500), section 3, with the highest probability as confidence. Examples of one confidence count
    with their mean, so that their order does not matter.

    Args:
        references: (N,) class ids; rows with -1 do not count.
        probabilities: (N, C) rows that sum to 1.

    Raises:
        ValueError: shapes do not fit, or no row counts.
    """
    truth, found = np.asarray(references), np.asarray(probabilities, dtype=np.float64)
    if found.ndim != 2 or truth.shape != found.shape[:1]:
        raise ValueError(f"expected references (N,), probabilities (N, C), got {truth.shape}, {found.shape}")
    truth, found = truth[truth != IGNORE], found[truth != IGNORE]
    if not len(truth):
        raise ValueError("no row has a label")
    right, confidence = (found.argmax(-1) == truth).astype(np.float64), found.max(-1)
    _, same = np.unique(-confidence, return_inverse=True)  # 0: the surest
    mean_right = np.bincount(same, right) / np.bincount(same)
    order = np.argsort(same, kind="stable")
    ranks = np.arange(1, len(truth) + 1)
    return RiskCoverage(ranks / len(truth), mean_right[same][order].cumsum() / ranks, confidence[order])
