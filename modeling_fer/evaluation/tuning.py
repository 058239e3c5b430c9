"""Fits post-processing (temperature, smoothing, per-class bias) to the logits of videos.

What is fitted here must never be reported on: hand in logits of *training* videos that their model has not
seen (out-of-fold, see `folds_by_group`), fit once, and report on validation videos. `cross_fit` estimates
what fitting is worth without touching those.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from modeling_fer.evaluation.metrics import Floats, Ints, confusion_matrix, confusion_scores
from modeling_fer.labels import IGNORE
from modeling_fer.postprocess_fer import SMOOTHINGS, PostProcess

HALF_WIDTHS = (0, 1, 2, 4, 8, 16, 32, 64)  # frames to each side; 64 is about 2 seconds
TEMPERATURES = (0.05, 20.0)  # bounds
BIAS_BOUND = 3.0  # odds change by a factor of 20 at most
BIAS_PENALTY = 1e-4  # macro F1 that a squared unit of bias must be worth
BIAS_GAP = 1e-5  # values that are closer are one to float32, in which post-processing works
BIAS_SWEEPS = 20  # at most; a sweep that gains less than BIAS_GAIN is the last
BIAS_GAIN = 1e-5
STRENGTHS = (0.0, 0.5, 1.0)  # of the bias, tried on groups that it was not fitted on


@dataclasses.dataclass(frozen=True)
class VideoLogits:
    """What a model says of the T frames of one video that show a face.

    `logits` (T, C) float32; `references` (T,) class ids, -1 where a frame has no label; `positions` (T,)
    times in frames, rising; `group`: recording or subject, never split between folds.

    Raises:
        ValueError: lengths differ, a logit is not finite, or a class id is out of range.
    """

    logits: NDArray[np.float32]
    references: Ints
    positions: Floats
    group: str

    def __post_init__(self) -> None:
        shapes = [np.shape(values) for values in (self.logits, self.references, self.positions)]
        if len(shapes[0]) != 2 or shapes[1:] != [shapes[0][:1]] * 2:
            raise ValueError(
                f"a video of group {self.group!r} needs logits (T, C), references (T,) and positions (T,), "
                f"got shapes {shapes}"
            )
        if not np.isfinite(self.logits).all():
            raise ValueError(f"a video of group {self.group!r} has logits that are NaN or infinite")
        outside = (self.references < IGNORE) | (self.references >= shapes[0][1])
        if outside.any():
            raise ValueError(
                f"a video of group {self.group!r}: expected class ids {IGNORE} to {shapes[0][1] - 1}, "
                f"got {np.unique(self.references[outside])[:5].tolist()}"
            )


def fit(
    videos: Sequence[VideoLogits],
    causal: bool = False,
    half_widths: Sequence[int] = HALF_WIDTHS,
    smoothings: Sequence[str] = tuple(SMOOTHINGS),
    folds: int = 5,
    seed: int = 0,
) -> tuple[PostProcess, dict[str, Any]]:
    """Fit all settings, one after the other, on the labelled frames of all videos together.

    First the temperature, by the likelihood of single frames; then kind and half-width of smoothing, by
    macro F1 (of equals the narrowest); then the bias (`fit_bias`), at the strength, 0 included, that does
    best on groups held out from fitting it.

    Args:
        videos: from at least two groups; those without a label count for nothing.
        causal: fit for streams, where later frames are not known.
        half_widths, smoothings: what is tried; no smoothing always is.
        folds: into which groups are held out to choose the strength; fewer where there are fewer groups.
        seed: of these folds.

    Returns:
        The settings and a report of plain values: `videos`, `groups`, `frames` (labelled), `temperature`,
        `nll_before` and `nll_after` (by temperature alone), `settings` (`smoothing`, `half_width`, `macro_f1`
        each), `bias_strength`, `bias_held_out` (strength -> held-out macro F1), `macro_f1_before` (highest
        logit) and `macro_f1_after`, both on these videos and therefore flattering.

    Raises:
        ValueError: fewer than two groups have labels, or videos differ in their classes.
    """
    videos = [video for video in videos if (video.references != IGNORE).any()]
    groups = sorted({video.group for video in videos})
    if len(groups) < 2:
        raise ValueError(
            f"post-processing is fitted on videos of at least 2 groups with labels, got {groups}; "
            "give logits of more recordings"
        )
    if len(sizes := sorted({video.logits.shape[1] for video in videos})) > 1:
        raise ValueError(f"videos must have the same classes, got logits of {sizes} classes")
    references = _references(videos)
    logits = np.concatenate([video.logits[video.references != IGNORE] for video in videos])
    temperature = fit_temperature(logits, references)
    report: dict[str, Any] = {
        "videos": len(videos),
        "groups": len(groups),
        "frames": len(references),
        "temperature": temperature,
        "nll_before": _nll(logits, references, 1.0),
        "nll_after": _nll(logits, references, temperature),
        "macro_f1_before": _macro_f1(_matrix(references, logits)),
    }

    plain = PostProcess(temperature=temperature, causal=causal)
    tried = [plain] + [
        dataclasses.replace(plain, smoothing=smoothing, half_width=half_width)
        for half_width in sorted(half_widths)
        for smoothing in smoothings
        if half_width > 0 and smoothing != "none"
    ]
    scores = [_macro_f1(_matrix(references, apply(post, videos))) for post in tried]
    best = tried[int(np.argmax(scores))]
    report["settings"] = [
        {"smoothing": post.smoothing, "half_width": post.half_width, "macro_f1": score}
        for post, score in zip(tried, scores, strict=True)
    ]

    log_probabilities = _log(apply(best, videos))
    fold = folds_by_group(
        [video.group for video in videos],
        [video.references for video in videos],
        min(folds, len(groups)),
        seed,
    )
    fold_of_frame = np.repeat(fold, [(video.references != IGNORE).sum() for video in videos])
    held_out = _held_out_scores(log_probabilities, references, fold_of_frame)
    strength = max(held_out, key=held_out.__getitem__)  # of equals the first, which is the weakest
    bias = strength * fit_bias(log_probabilities, references)
    if bias.any():
        best = dataclasses.replace(best, bias=tuple(bias.tolist()))
    report["bias_strength"] = strength
    report["bias_held_out"] = {str(key): score for key, score in held_out.items()}
    report["macro_f1_after"] = _macro_f1(_matrix(references, apply(best, videos)))
    return best, report


def cross_fit(
    videos: Sequence[VideoLogits],
    folds: Sequence[int] | Ints,
    causal: bool = False,
    half_widths: Sequence[int] = HALF_WIDTHS,
    smoothings: Sequence[str] = tuple(SMOOTHINGS),
    seed: int = 0,
) -> dict[str, Any]:
    """Estimate what fitting gains: each fold is scored with settings fitted on the others.

    Args:
        videos: as in `fit`.
        folds: fold number of each video (`folds_by_group`).
        causal, half_widths, smoothings, seed: as in `fit`.

    Returns:
        `before` (highest logit) and `after`: `mean` and `spread` (standard deviation) of macro F1 over folds,
        and `pooled`, over the frames of all folds; `folds`: `fold`, `macro_f1_before`, `macro_f1_after` and
        `postprocess`, the settings, of each.

    Raises:
        ValueError: as `fit`; fewer than two folds, a group in two folds, or a fold without a label.
    """
    numbers = np.asarray(folds)
    if numbers.shape != (len(videos),) or len(np.unique(numbers)) < 2:
        raise ValueError(
            f"expected a fold number for each of {len(videos)} videos, two at least that differ, "
            f"got {np.unique(numbers).tolist()} for {len(numbers)}"
        )
    fold_of: dict[str, int] = {}
    for video, number in zip(videos, numbers.tolist(), strict=True):
        if fold_of.setdefault(video.group, number) != number:
            raise ValueError(f"group {video.group!r} is in two folds; `folds_by_group` keeps groups whole")
    rows, matrices = [], []
    for number in np.unique(numbers).tolist():
        inside = [video for video, own in zip(videos, numbers, strict=True) if own != number]
        outside = [video for video, own in zip(videos, numbers, strict=True) if own == number]
        references = _references(outside)
        if not len(references):
            raise ValueError(f"no frame of fold {number} has a label; make fewer folds")
        post, _ = fit(inside, causal, half_widths, smoothings, seed=seed)
        pair = [_matrix(references, apply(p, outside)) for p in (PostProcess(), post)]
        matrices.append(pair)
        before, after = map(_macro_f1, pair)
        rows.append(
            {
                "fold": number,
                "macro_f1_before": before,
                "macro_f1_after": after,
                "postprocess": post.to_dict(),
            }
        )
    result: dict[str, Any] = {"folds": rows}
    for which, pooled in zip(("before", "after"), np.sum(matrices, 0), strict=True):
        scores = [row[f"macro_f1_{which}"] for row in rows]
        result[which] = {
            "mean": float(np.mean(scores)),
            "spread": float(np.std(scores, ddof=1)),
            "pooled": _macro_f1(pooled),
        }
    return result


def folds_by_group(
    groups: Sequence[str], labels: Sequence[Ints], folds: int, seed: int = 0
) -> NDArray[np.int64]:
    """Deal videos to folds, whole groups at a time, with classes spread as evenly as it goes.

    Groups are dealt from the largest down, each to the fold that so far has the least of what it holds, where
    the frames of a class count as shares of that class: a rare one matters as much as a frequent one. The
    order of the videos does not matter.

    Args:
        groups: recording or subject of each of the N videos.
        labels: class ids of each video's frames, -1 where a frame has none.
        folds: how many.
        seed: for the order of groups of one size.

    Returns:
        Fold number of each video, (N,), from 0; none is empty.

    Raises:
        ValueError: fewer than 2 folds, or fewer groups than folds.
    """
    names, number = np.unique([str(group) for group in groups], return_inverse=True)
    if not 2 <= folds <= len(names):
        raise ValueError(
            f"the number of folds must lie between 2 and that of groups, {len(names)}; got {folds}"
        )
    classes = 1 + max((int(own.max(initial=IGNORE)) for own in labels), default=IGNORE)
    counts = np.zeros((len(names), classes + 1))  # the last column: frames, with or without a label
    for group, own in zip(number, labels, strict=True):
        counts[group, :-1] += np.bincount(own[own != IGNORE], minlength=classes)
        counts[group, -1] += max(len(own), 1)
    shares = counts / np.maximum(counts.sum(0), 1)
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-shares[order].sum(1), kind="stable")]
    totals, fold = np.zeros((folds, classes + 1)), np.zeros(len(names), np.int64)
    for group in order:
        # The sum of squares over folds and classes grows by 2 (totals @ shares) and a constant.
        fold[group] = (totals @ shares[group]).argmin()
        totals[fold[group]] += shares[group]
    return fold[number]


def fit_temperature(logits: NDArray[np.float32], references: Ints) -> float:
    """The temperature of least negative log-likelihood (Guo et al. 2017, arXiv 1706.04599, section 4.2).

    Args:
        logits: (M, C), all with a label.
        references: (M,) class ids.
    """
    exact = logits.astype(np.float64)
    low, high = map(math.log, TEMPERATURES)
    found = minimize_scalar(
        lambda log: _nll(exact, references, math.exp(log)), bounds=(low, high), method="bounded"
    )
    return math.exp(found.x)


def fit_bias(log_probabilities: Floats, references: Ints) -> Floats:
    """The bias of highest macro F1, by coordinate ascent from 0.

    Each step finds the exact maximum over the bias of one class: with the others fixed, a frame is called
    this class from some value up, so that sorting these values and going through them once gives the macro F1
    at all of them. A unit of squared bias costs `BIAS_PENALTY`, so that what gains nothing stays 0.

    Args:
        log_probabilities: (M, C), finite.
        references: (M,) class ids.

    Returns:
        (C,) values from -3 to 3. Classes are taken from the rarest up (of equals, the less likely first),
        so that their ids do not matter.
    """
    bias = np.zeros(log_probabilities.shape[1])
    order = np.lexsort((log_probabilities.sum(0), np.bincount(references, minlength=len(bias))))
    score = _macro_f1(_matrix(references, log_probabilities))
    for _ in range(BIAS_SWEEPS):
        before = score
        for c in order:
            value, found = _best_value(log_probabilities, references, bias, int(c))
            found -= BIAS_PENALTY * float((np.delete(bias, c) ** 2).sum())
            if found > score + 1e-12:  # beyond rounding
                bias[c], score = value, found
        if score - before < BIAS_GAIN:
            break
    return bias


def apply(post: PostProcess, videos: Sequence[VideoLogits]) -> NDArray[np.float32]:
    """Probabilities (M, C) of the labelled frames of all videos, one after the other."""
    rows = []
    for video in videos:
        logits, positions = torch.tensor(video.logits[None]), torch.tensor(video.positions[None])
        rows.append(post(logits, positions=positions)[0].numpy()[video.references != IGNORE])
    return np.concatenate(rows)


def _references(videos: Sequence[VideoLogits]) -> Ints:
    """Class ids of the labelled frames of all videos, (M,)."""
    found = [video.references[video.references != IGNORE] for video in videos]
    return np.concatenate(found).astype(np.int64)


def _log(probabilities: NDArray[np.float32]) -> Floats:
    """Logarithms as `PostProcess` takes them."""
    return np.log(np.maximum(probabilities, np.finfo(np.float32).tiny).astype(np.float64))


def _nll(logits: NDArray[Any], references: Ints, temperature: float) -> float:
    scores = log_softmax(logits / temperature, axis=1)
    return float(-scores[np.arange(len(references)), references].mean())


def _matrix(references: Ints, scores: NDArray[Any]) -> Ints:
    """Confusion matrix (C, C) of the highest score."""
    return confusion_matrix(references, scores.argmax(1), scores.shape[1])


def _macro_f1(matrix: Ints) -> float:
    # Rounded, so that equals are equal whatever the order of the classes that were summed.
    return round(float(confusion_scores(matrix)["macro_f1"]), 12)


def _held_out_scores(log_probabilities: Floats, references: Ints, folds: Ints) -> dict[float, float]:
    """Macro F1 of each strength of the bias, on frames of folds that it was not fitted on."""
    size = log_probabilities.shape[1]
    matrices = {strength: np.zeros((size, size), np.int64) for strength in STRENGTHS}
    for fold in np.unique(folds):
        own = folds == fold
        bias = fit_bias(log_probabilities[~own], references[~own])
        for strength in STRENGTHS:
            matrices[strength] += _matrix(references[own], log_probabilities[own] + strength * bias)
    return {strength: _macro_f1(matrix) for strength, matrix in matrices.items()}


def _best_value(scores: Floats, references: Ints, bias: Floats, c: int) -> tuple[float, float]:
    """The bias of class c that is best while the others stay, and its macro F1 less its own penalty."""
    size = len(bias)
    others = scores + bias
    others[:, c] = -np.inf
    rival = others.argmax(1)
    threshold = others[np.arange(len(rival)), rival] - scores[:, c]  # a frame is called c above it
    moving = np.flatnonzero(np.abs(threshold) < BIAS_BOUND)
    moving = moving[np.argsort(threshold[moving], kind="stable")]

    # At the lower bound, then class by class as one moving frame after the other turns to c.
    predictions = np.where(threshold <= -BIAS_BOUND, c, rival)
    losers, truth = rival[moving], references[moving]
    support = np.bincount(references, minlength=size)
    called = np.bincount(predictions, minlength=size)
    hits = np.bincount(references[predictions == references], minlength=size)
    won = np.append(0, np.cumsum(truth == c))
    total = _f1(hits[c] + won, support[c] + called[c] + np.arange(len(won)))
    changes = np.zeros(len(won))
    for j in range(size):
        if j != c:
            at = np.flatnonzero(losers == j)
            lost = np.append(0, np.cumsum(truth[at] == j))
            f1 = _f1(hits[j] - lost, support[j] + called[j] - np.arange(len(lost)))
            changes[0] += f1[0]
            changes[at + 1] = np.diff(f1)
    total = (total + np.cumsum(changes)) / size

    edges = np.concatenate([[-BIAS_BOUND], threshold[moving], [BIAS_BOUND]])
    low, high = edges[:-1], edges[1:]
    values = np.where((low < 0) & (high > 0), 0.0, (low + high) / 2)
    objective = np.where(high - low > BIAS_GAP, total - BIAS_PENALTY * values**2, -np.inf)
    best = int(objective.argmax())
    return float(values[best]), float(objective[best])


def _f1(hits: NDArray[Any], total: NDArray[Any]) -> Floats:
    """F1 from hits and support + called, 0 where a class is neither there nor called."""
    return 2 * hits / np.maximum(total, 1)
