"""Runs as they lie on the disk, and where a model comes from: what it and those before it learnt from."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FACTS = "card_facts.json"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
THIS, ENCODER, TEACHER = "this model", "its encoder", "its teacher"  # who learnt


@dataclass(frozen=True)
class DataSet:
    """What a model learnt from: a prepared folder, or a stream.

    Attributes:
        role: labelled, pseudo or unlabelled; of weights that nothing more is known of, weights.
        name: last part of its path.
        source: what `fer data prepare` read; empty: unknown.
        counts: split to class (or "no label") to rows; None: unknown.
        warnings: what its report warns of.
        votes: FER+ votes made the labels.
        hub_id: of a stream from the Hub.
        learner: who learnt from it, see `read_lineage`.
    """

    role: str
    name: str
    source: str = ""
    counts: dict[str, dict[str, int]] | None = None
    warnings: list[str] = field(default_factory=list)
    votes: bool = False
    hub_id: str | None = None
    learner: str = THIS


@dataclass
class Lineage:
    """Where a model comes from.

    Attributes:
        data: what it learnt from, then what those before it did.
        stages: what their trainings took, in the same order.
        origin: what the earliest encoder started from, a Hub id or the end of a path; empty: random weights.
        base_model: that, if it is a Hub id.
    """

    data: list[DataSet] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    origin: str = ""
    base_model: str | None = None


def read_json(path: Path) -> dict[str, Any] | None:
    """What a file of JSON holds; None where there is no file. ValueError: it is damaged."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): write it again, or delete it") from error


def run_of(model: Path) -> Path | None:
    """The run folder that a model lies in, as `train.py` leaves it."""
    return model.parent if model.name == "model" and (model.parent / "arguments.json").is_file() else None


def start_of(run: Path | None, output_dir: str) -> Path:
    """The folder that a run was started from, where the paths in its files begin; if unknown, this one."""
    parts, whole = Path(output_dir).parts, () if run is None else run.parts
    return Path(*whole[: -len(parts)]) if whole[-len(parts) :] == parts else Path()


def reach(told: str, start: Path) -> Path | None:
    """The file or folder that a run names, from where it was started or from here; None: not at hand."""
    return next((base / told for base in (start, Path()) if (base / told).exists()), None)


def hub_id(told: str, output_dir: str) -> str | None:
    """What is named `org/name`, if that is not the beginning of the run's own folder; ask `reach` first."""
    return told if HUB_ID.fullmatch(told) and Path(told).parts[:1] != Path(output_dir).parts[:1] else None


def read_history(home: Path) -> list[dict[str, Any]]:
    """The numbers of a run by step; a kill may have cut the last line short."""
    path = home / "history.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def read_data(arguments: dict[str, Any], start: Path, learner: str) -> list[DataSet]:
    """What a run learnt from."""
    data = []
    for part in arguments["data"].split(","):
        role, path = part.split("=", 1) if "=" in part else ("labelled", part)
        is_soft = bool(arguments.get("soft_labels"))  # else FER2013's own labels alone count
        folder = reach(path, start)
        report = (read_json(folder / "report.json") if folder else None) or {}
        options = report.get("options", {})
        data.append(
            DataSet(
                role,
                Path(path).name,
                report.get("source", ""),
                report.get("counts"),
                report.get("warnings", []),
                bool(options.get("ferplus")) and (options.get("rule") != "fer2013" or is_soft),
                learner=learner,
            )
        )
    if stream := arguments.get("stream"):
        page = None if reach(stream, start) else hub_id(stream, arguments["output_dir"])
        data.append(DataSet("unlabelled", Path(stream).name, hub_id=page, learner=learner))
    return data


def read_stage(home: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a run took: as its environment.json says, and in training steps by the speeds of its history."""
    keys = (
        "device", "since_step", "seconds", "energy_kwh", "energy_kwh_estimated", "energy_source",
    )  # fmt: skip
    environment = read_json(home / "environment.json") or {}
    history = read_history(home)
    rows = [row for row in history if "images_per_second" in row]
    pairs = zip([0, *(row["step"] for row in rows)], rows, strict=False)
    size = arguments["batch_size"]
    return {
        "stage": arguments["stage"],
        "steps": history[-1]["step"] if history else None,
        **{key: environment.get(key) for key in keys},
        "step_seconds": sum((row["step"] - n) * size / row["images_per_second"] for n, row in pairs) or None,
    }


def read_lineage(
    model: Path, arguments: dict[str, Any], learner: str = THIS, seen: frozenset[Path] = frozenset()
) -> Lineage:
    """Where the model of a run comes from: its own run, then its encoder's and its teacher's, and so on.

    Args:
        model: its folder.
        arguments: of its run.
        learner: as whose they are told: `this model`; `its encoder`, one before it that it started from; `its
            teacher`, one that it or an encoder before it learnt from, and all before that one.
        seen: models that are being told of, which are not told of again.
    """
    home, seen = run_of(model), seen | {model}
    start = start_of(home, arguments["output_dir"])
    stage = {**read_stage(home or model, arguments), "learner": learner}
    found = Lineage(read_data(arguments, start, learner), [stage])
    for key, other in (("encoder", ENCODER), ("teacher", TEACHER)):
        if not (name := arguments.get(key)) or (key == "teacher" and name == arguments.get("encoder")):
            continue  # a teacher that it also started from is told of once
        who = TEACHER if learner == TEACHER else other
        before = read_before(name, start, arguments["output_dir"], who, seen)
        found.data += before.data
        found.stages += before.stages
        if key == "encoder":
            found.origin, found.base_model = before.origin, before.base_model
        elif before.origin:
            found.data.append(DataSet("weights", before.origin, learner=TEACHER))
    return found


def read_before(name: str, start: Path, output_dir: str, who: str, seen: frozenset[Path]) -> Lineage:
    """Where a model comes from that a run names as its encoder or teacher."""
    if (folder := reach(name, start)) is None:
        return Lineage(origin="/".join(Path(name).parts[-2:]), base_model=hub_id(name, output_dir))
    one = Path(os.path.abspath(folder))
    home = run_of(one)
    if home is None and (stored := read_json(one / FACTS)):  # away from its run: as its card says
        data = [DataSet(**{**data, "learner": who}) for data in stored["data"]]
        stages = [{**stage, "learner": who} for stage in stored["stages"]]
        return Lineage(data, stages, stored["origin"], stored["base_model"])
    arguments = None if one in seen else read_json((home or one) / "arguments.json")
    return read_lineage(one, arguments, who, seen) if arguments else Lineage(origin="/".join(one.parts[-2:]))
