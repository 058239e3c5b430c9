"""What an evaluation leaves on disk: metrics.json, confusion_matrix.png, reliability.png."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from modeling_fer.evaluation import plots
from modeling_fer.evaluation.metrics import compute_metrics, reliability_bins, write_metrics
from modeling_fer.evaluation.selective import risk_coverage
from modeling_fer.labels import CLASSES, IGNORE

WEIGHTS = "model.safetensors"
UNSTATED = "not stated"  # the group of rows whose column is empty


def weights_digest(model: Path) -> str | None:
    """Sha256 of the weights in a model's folder, which ties an evaluation to them; None: it has none."""
    path = model / WEIGHTS
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stored_postprocess(model: Path) -> dict[str, Any] | None:
    """How a video model in a folder turns logits into probabilities, by its config.json; None: plainly."""
    path = model / "config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("postprocess") if path.is_file() else None


def score_groups(
    references: np.ndarray,
    predictions: np.ndarray,
    values: ArrayLike,
    class_names: Sequence[str] = CLASSES,
    units: ArrayLike | None = None,
) -> dict[str, dict[str, Any]]:
    """Score each group of faces for itself.

    Args:
        references, predictions: class ids `(N,)`; rows with reference -1 do not count.
        values: name of each row's group `(N,)`; empty or None: not stated.
        class_names: names of the C classes.
        units: `(N,)` ids of what the intervals resample; None: rows. A group of one unit has no interval.

    Returns:
        Name of each group with labelled rows, in order, to its `samples`, `macro_f1_present`, `accuracy`,
        `balanced_accuracy` and their `interval`.

    Raises:
        ValueError: as `compute_metrics`.
    """
    empty = (None, "")
    told = np.asarray(values, dtype=object)
    known = np.array([UNSTATED if one in empty or one != one else str(one) for one in told])
    if len(known) != len(references):
        raise ValueError(f"groups of faces: expected {len(references)} values, a row each, got {len(known)}")
    resampled = None if units is None else np.asarray(units, dtype=object)
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(set(known[references != IGNORE].tolist())):
        rows = (known == name) & (references != IGNORE)
        own = None if resampled is None else resampled[rows]
        few = own is not None and len(set(own)) < 2
        scores = compute_metrics(
            references[rows],
            predictions[rows],
            class_names=class_names,
            groups=None if few else own,
            bootstrap_samples=0 if few else 1000,
        )
        kept = ("samples", "macro_f1_present", "accuracy", "balanced_accuracy")
        found[name] = {key: scores[key] for key in kept}
        if not few:
            found[name]["interval"] = {key: scores["interval"][key] for key in kept[1:]}
    return found


def write_report(
    folder: Path,
    references: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str] = CLASSES,
    about: Mapping[str, Any] | None = None,
    groups: ArrayLike | None = None,
    unit: str = "groups",
    per_group: Mapping[str, ArrayLike] | None = None,
) -> dict:
    """Evaluate and write the report; returns the metrics.

    Where `about` names a model's folder, the digest of its `weights` and its `postprocess` are kept: a model
    card shows no metrics of others.

    Args:
        folder: made if it is not there; files of an earlier report are replaced.
        references: true ids `(N,)`, -1 where a row does not count.
        probabilities: `(N, C)`, rows sum to 1.
        class_names: names of the C classes.
        about: what was evaluated (model, data, split), kept in metrics.json.
        groups: `(N,)` ids of the units to resample for the intervals, as in `compute_metrics`; None: images.
        unit: what the groups are ("videos", "subjects"), named beside the intervals.
        per_group: name of a column (age, say) to its values `(N,)`; each value's rows are scored for
            themselves, see `score_groups`.
    """
    about = dict(about or {})
    if "model" in about and (digest := weights_digest(Path(about["model"]))):
        about |= {"weights": digest, "postprocess": stored_postprocess(Path(about["model"]))}
    predictions = probabilities.argmax(-1)
    metrics = compute_metrics(references, predictions, probabilities, class_names=class_names, groups=groups)
    metrics["bootstrap"]["unit"] = "images" if groups is None else unit
    if per_group:
        metrics["per_group"] = {
            column: score_groups(references, predictions, values, class_names, groups)
            for column, values in per_group.items()
        }
    answered = risk_coverage(references, probabilities)
    metrics["selective"] = answered.summary()
    folder.mkdir(parents=True, exist_ok=True)
    write_metrics({**about, **metrics}, folder / "metrics.json")
    confusion = plots.confusion_matrix_figure(metrics["confusion_matrix"], class_names)
    plots.save(confusion, folder / "confusion_matrix.png")
    reliability = plots.reliability_figure(reliability_bins(references, probabilities))
    plots.save(reliability, folder / "reliability.png")
    plots.save(plots.risk_coverage_figure(answered), folder / "risk_coverage.png")
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
    for column, found in metrics.get("per_group", {}).items():
        lines.append(f"by {column}:")
        for name, row in found.items():
            score = f"macro F1 {row['macro_f1_present']:.3f} over classes present"
            lines.append(f"  {name}: {score}, accuracy {row['accuracy']:.3f}, {row['samples']} faces")
    return "\n".join(lines)
