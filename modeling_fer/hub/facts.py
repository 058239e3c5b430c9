"""What the files of a run and of its evaluations say about a model: the facts that its card tells.

In a run folder they are read from the run. With the card goes `card_facts.json`, so that a model folder
away from its run has the same card; `arguments.json`, `environment.json` and `metrics.json` lie beside it.
"""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_fer.evaluation.metrics import write_whole
from modeling_fer.evaluation.report import stored_postprocess, weights_digest
from modeling_fer.hub.runs import (
    FACTS,
    DataSet,
    hub_id,
    reach,
    read_history,
    read_json,
    read_lineage,
    run_of,
    start_of,
)

EXAMPLE = "example_"  # how names of files for the Hub's widget begin
TASKS = {
    "FerForImageClassification": "image-classification",
    "FerForVideoClassification": "video-classification",
}
CROSSED = ("folds", "mean", "spread", "pooled")  # what a card tells of a cross-validation
# Where the records of a run and of its evaluations name files and folders.
PLACES = (
    "data", "output_dir", "cache_dir", "encoder", "encoder_config", "teacher", "stream", "resume", "model",
)  # fmt: skip
# Of weights that learnt from a source, by its name in the report.json of a prepared folder; else unknown.
OURS, RESEARCH, UNKNOWN = "apache-2.0", "research-only", "unknown"
LICENCES = {"synthetic": OURS, "fer2013": RESEARCH, "aff_wild2": RESEARCH}

Evaluation = tuple[Path, dict[str, Any]]  # the folder that `fer eval` wrote, and its metrics


@dataclass(frozen=True)
class Facts:
    """What the files say.

    Attributes:
        model: its folder.
        config, arguments, environment: its files, as they are; empty: not there.
        evaluations: the main one first.
        calibration: calibration.json of `fer calibrate`.
        cross_validation: `CROSSED` of cross_validation.json.
        data, origin, base_model: see `Lineage`.
        best: `step` and `macro_f1` of the validation that chose the weights, the first with the highest.
        stages: likewise.
        name, repo_id, licence_given, widget: as the card was last written.
    """

    model: Path
    config: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    cross_validation: dict[str, Any] | None = None
    data: list[DataSet] = field(default_factory=list)
    origin: str = ""
    base_model: str | None = None
    best: dict[str, Any] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    name: str = ""
    repo_id: str | None = None
    licence_given: str | None = None
    widget: list[dict[str, Any]] = field(default_factory=list)

    @property
    def task(self) -> str:
        """What the Hub calls the model's task."""
        return TASKS[self.config["architectures"][0]]

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the logits."""
        return [self.config["id2label"][str(i)] for i in range(len(self.config["id2label"]))]

    @property
    def licence(self) -> str:
        """Of the weights: as given; else the narrowest that their data leave, ours for drawn faces alone."""
        found = [LICENCES.get(one.source, UNKNOWN) for one in self.data] + [UNKNOWN] * bool(self.origin)
        left = next((one for one in (RESEARCH, UNKNOWN, OURS) if one in found), UNKNOWN)
        return self.licence_given or left

    def save(self) -> None:
        """Write `card_facts.json` beside the model: all that no other file beside it says, without paths."""
        own = ("model", "config", "arguments", "environment", "evaluations")
        told = {key: value for key, value in dataclasses.asdict(self).items() if key not in own}
        others = [{**metrics, "data": Path(metrics["data"]).name} for _, metrics in self.evaluations[1:]]
        told["evaluations"] = [{k: v for k, v in one.items() if k != "model"} for one in others]
        write_whole(self.model / FACTS, (json.dumps(told, indent=2, allow_nan=False) + "\n").encode())


# --- Runs ---


def public(path: Path) -> bytes:
    """A file of a run as others may see it: where its JSON names a place on this machine, the end alone.

    Of data and of output folders that is the name; of a model, a stream or a checkpoint `.../folder/name`,
    which is no name on the Hub.
    """
    record = read_json(path) if path.suffix == ".json" else None
    if not isinstance(record, dict):
        return path.read_bytes()
    home = record.get("output_dir", "")
    told = {key: record[key] for key in PLACES if isinstance(record.get(key), str)}
    for key, value in told.items():
        if key in ("output_dir", "cache_dir"):
            record[key] = Path(value).name
        elif key == "data":
            record[key] = re.sub(r"[^,=]*/", "", re.sub(r"/+(,|$)", r"\1", value))
        elif "/" in value and (
            key == "model" or reach(value, start_of(path.parent, home)) or not hub_id(value, home)
        ):
            record[key] = "/".join(("...", *value.strip("/").split("/")[-2:]))
    return (json.dumps(record, indent=2) + "\n").encode()


def read_run(model: Path) -> tuple[dict[str, Any], Path]:
    """What the run behind a model says, as attributes of `Facts`, and the folder where its paths begin."""
    home = run_of(model) or model
    told: dict[str, Any] = {
        "arguments": read_json(home / "arguments.json") or {},
        "environment": read_json(home / "environment.json") or {},
        "calibration": read_json(home / "calibration.json"),
        "name": home.name,
    }
    judged = [row for row in read_history(home) if "validation/macro_f1" in row]
    if best := max(judged, key=lambda row: row["validation/macro_f1"], default=None):
        told["best"] = {"step": best["step"], "macro_f1": best["validation/macro_f1"]}
    folds = inside(model, "cross_validation.json")
    if len(folds) > 1:
        raise ValueError(f"{' and '.join(map(str, folds))} are of one model: keep the one that counts")
    if folds and (crossed := read_json(folds[0])):
        told["cross_validation"] = {key: crossed[key] for key in CROSSED}

    if not told["arguments"]:
        return told, Path()
    told |= vars(read_lineage(model, told["arguments"]))
    return told, start_of(run_of(model), told["arguments"]["output_dir"])


# --- Evaluations ---


def title_of(metrics: dict[str, Any]) -> str:
    """Which images an evaluation is of."""
    return ", ".join([f"{metrics['split']} split of {Path(metrics['data']).name}", *conditions_of(metrics)])


def conditions_of(metrics: dict[str, Any]) -> list[str]:
    """What was done otherwise than to judge each image once."""
    dropped = [f"without {metrics['dropped']}"] if metrics.get("dropped") else []
    return dropped + (["each face with its mirror image"] if metrics.get("mirror") else [])


def inside(model: Path, name: str) -> list[Path]:
    """Files of a name in the folder of a model's run and in the folders in it, but for the model's own."""
    run = run_of(model)
    found = [*run.glob(name), *run.glob(f"*/{name}")] if run else []
    return sorted(path for path in found if path.parent != model)


def check_metrics(metrics: dict[str, Any], path: Path, model: Path, digest: str | None) -> None:
    """Raise unless an evaluation says its data, and is of the weights that lie in a model's folder now."""
    if not {"data", "split"} <= metrics.keys():
        raise ValueError(f"{path} does not say of which data it is: write it with `fer eval`")
    remedy = (
        f"write one with `fer eval --model {model} --out OUT` and name it with --eval OUT, or delete this one"
    )
    if digest is None or metrics.get("weights") != digest:
        of = (
            "is of other weights than"
            if "weights" in metrics
            else "does not say that it is of the weights in"
        )
        raise ValueError(f"{path} {of} {model}: {remedy}")
    if metrics.get("postprocess") != stored_postprocess(model):
        raise ValueError(f"{path} is of other post-processing than {model}/config.json has: {remedy}")


def read_evaluations(
    model: Path, start: Path, asked: Sequence[str | Path], kept: Sequence[dict[str, Any]] = ()
) -> list[Evaluation]:
    """Evaluations of a model, all of the weights that it has now.

    Those asked for; else those in its run folder; else the one beside it (metrics.json), then those `kept` in
    card_facts.json.
    """
    digest = weights_digest(model)
    folders = [Path(os.path.abspath(one)) for one in asked]
    found: list[Evaluation] = []
    for folder in folders or [path.parent for path in inside(model, "metrics.json")]:
        if (metrics := read_json(folder / "metrics.json")) is None:
            raise FileNotFoundError(f"{folder} has no metrics.json: pass what `fer eval --out` wrote")
        told = metrics.get("model", "")
        is_named = told and any((base / told).resolve() == model.resolve() for base in (start, Path()))
        now = (digest, stored_postprocess(model))
        if "chose" in metrics and not asked and (metrics.get("weights"), metrics.get("postprocess")) != now:
            continue  # training wrote it unasked, and the model was changed since
        if asked or is_named or (digest and metrics.get("weights") == digest):
            check_metrics(metrics, folder / "metrics.json", model, digest)
            found.append((folder, metrics))
    if not found:
        if beside := read_json(model / "metrics.json"):
            check_metrics(beside, model / "metrics.json", model, digest)
            found = [(model, beside)]
        for metrics in kept:
            check_metrics(metrics, model / FACTS, model, digest)
            if not beside or title_of(metrics) != title_of(beside):
                found.append((model, metrics))
    elif not asked:
        found.sort(key=lambda one: [one[1]["split"] != split for split in ("test", "validation")])
    seen: dict[str, Path] = {}
    for folder, metrics in found:
        if (title := title_of(metrics)) in seen:
            raise ValueError(f"{seen[title]} and {folder} are both of the {title}: name those to show")
        seen[title] = folder
    return found


def read_facts(folder: str | Path, evaluations: Sequence[str | Path] = ()) -> Facts:
    """Read what the files of a run say, or those beside a model away from its run.

    Args:
        folder: a run folder of `train.py`, its model folder, or a copy of that.
        evaluations: folders that `fer eval` wrote, the main one first. None: those in the run folder, or what
            came with the model.

    Raises:
        FileNotFoundError: no model there, or no evaluation where one was named.
        ValueError: no facial-expression classifier, a damaged file, or an evaluation of other weights.
    """
    model = Path(os.path.abspath(folder))
    model = model if (model / "config.json").is_file() else model / "model"
    if (config := read_json(model / "config.json")) is None:
        raise FileNotFoundError(
            f"{folder} holds no model (config.json or model/config.json): "
            "pass a run folder of train.py, or its model folder"
        )
    kind = (config.get("architectures") or ["no architecture"])[0]
    if kind not in TASKS:
        raise ValueError(f"{model / 'config.json'} is of {kind}; cards are for {' and '.join(TASKS)}")
    stored = None if run_of(model) else read_json(model / FACTS)
    if stored is None:
        told, start = read_run(model)
        return Facts(model, config, evaluations=read_evaluations(model, start, evaluations), **told)
    kept = stored.pop("evaluations")
    stored["data"] = [DataSet(**one) for one in stored["data"]]
    return Facts(
        model,
        config,
        read_json(model / "arguments.json") or {},
        read_json(model / "environment.json") or {},
        read_evaluations(model, Path(), evaluations, kept),
        **stored,
    )
