"""Probabilities that mean what they say: a temperature and class biases, fitted on held-out examples."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax


def fit_bias_corrected(
    logits: NDArray[np.floating], references: NDArray[np.integer]
) -> tuple[float, NDArray[np.float64]]:
    """Fit temperature T and class biases b so that softmax(logits / T + b) is likeliest.

    Bias-corrected temperature scaling (Alexandari, Kundaje and Shrikumar, "Maximum Likelihood with
    Bias-Corrected Calibration is Hard-To-Beat at Label Shift Adaptation", ICML 2020, arXiv 1901.06852). Where
    labels to train on and to be judged by come from different annotators, classes are given more
    or less often than the model learnt; the biases make up for it. The likelihood is convex in (1 / T, b).

    Args:
        logits: (N, C) of examples that the model has not learnt from.
        references: (N,) class ids below C.

    Returns:
        The temperature, and biases (C,) of mean 0.

    Raises:
        ValueError: shapes do not fit, or there is no example.
    """
    scores, truth = np.asarray(logits, dtype=np.float64), np.asarray(references)
    if scores.ndim != 2 or truth.shape != scores.shape[:1] or not len(truth):
        raise ValueError(f"expected logits (N, C) and references (N,), got {scores.shape}, {truth.shape}")
    count, classes = scores.shape
    rows = np.arange(count)

    def loss(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scaled = scores * values[0] + values[1:]
        error = softmax(scaled, axis=1)
        error[rows, truth] -= 1
        slopes = np.concatenate([[(error * scores).sum()], error.sum(0)]) / count
        return float(-log_softmax(scaled, axis=1)[rows, truth].mean()), slopes

    start = np.concatenate([[1.0], np.zeros(classes)])
    bounds = [
        (0.05, 20.0),
        *[(-10.0, 10.0)] * classes,
    ]  # of a class that never occurs, the bias would run off
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(1 / found[0]), found[1:] - found[1:].mean()
