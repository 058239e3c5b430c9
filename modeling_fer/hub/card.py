"""Model cards: what a model is, what it learnt from and how it scores, told from the files of its run.

Nothing is told that no file says: what is missing is called unknown, or not evaluated. Here the facts are
read; the words and tables are in `card_template.md`.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from transformers import pipeline

from modeling_fer.evaluation.metrics import write_whole
from modeling_fer.labels import CLASSES

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,  # a name that is mistyped is an error, not a gap
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["number"] = lambda value: f"{value:.3f}"
TEMPLATES.filters["cell"] = lambda value: str(value).replace("|", "/").replace("\n", " ")
TASKS = {
    "FerForImageClassification": "image-classification",
    "FerForVideoClassification": "video-classification",
}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# Of a run folder, and of its main evaluation: what goes beside the card.
KEPT = ("arguments.json", "environment.json", "learning_curve.png")
KEPT_OF_EVALUATION = ("metrics.json", "confusion_matrix.png", "reliability.png")
PRIVATE = ("data", "output_dir", "cache_dir", "encoder", "stream", "resume", "tracker")  # paths and habits

# Key in metrics.json -> the Hub's name of the metric, and ours.
SCORES = {
    "macro_f1": ("f1", "Macro F1, all classes"),
    "macro_f1_present": ("f1", "Macro F1, classes present"),
    "accuracy": ("accuracy", "Accuracy"),
    "balanced_accuracy": ("balanced_accuracy", "Balanced accuracy"),
    "ece": ("ece", "Expected calibration error"),
    "nll": ("nll", "Negative log-likelihood (nats)"),
}

# Of weights that learnt from a source, by its name in the report.json of a prepared folder; else unknown.
OURS, RESEARCH, UNKNOWN = "apache-2.0", "research-only", "unknown"
LICENCES = {"synthetic": OURS, "fer2013": RESEARCH, "aff_wild2": RESEARCH}
TAGS = {"fer2013": "fer2013", "aff_wild2": "aff-wild2"}  # what the Hub calls it

Evaluation = tuple[Path, dict[str, Any]]  # the folder that `fer eval` wrote, and its metrics


class DataSet(NamedTuple):
    """What a run learnt from: a prepared folder, or a stream."""

    role: str  # labelled, pseudo or unlabelled
    name: str  # last part of its path
    report: dict[str, Any] | None  # its report.json
    hub_id: str | None = None  # of a stream from the Hub

    @property
    def source(self) -> str:
        """Name of the source that `fer data prepare` read; empty: unknown."""
        return self.report["source"] if self.report else ""


class Training(NamedTuple):
    """A run: its arguments, what it learnt from, and the folder in which its paths begin."""

    arguments: dict[str, Any]
    data: list[DataSet]
    start: Path


@dataclass(frozen=True)
class Facts:
    """What the files of a run and of its evaluations say."""

    model: Path  # folder
    config: dict[str, Any]
    trainings: list[Training]  # this model's, then those of the encoders that it came from
    origin: str  # what the earliest of them started from: a Hub id or a folder; empty: random weights
    base_model: str | None  # that, if it is a Hub id
    history: list[dict[str, Any]]
    evaluations: list[Evaluation]  # the main one first
    cross_validation: dict[str, Any] | None
    environment: dict[str, Any]

    @property
    def task(self) -> str:
        """What the Hub calls the model's task."""
        return TASKS[self.config["architectures"][0]]

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the logits."""
        return [self.config["id2label"][str(i)] for i in range(len(self.config["id2label"]))]

    @property
    def data(self) -> list[DataSet]:
        """All data sets that this model or an encoder before it learnt from."""
        return [one for training in self.trainings for one in training.data]

    @property
    def licence(self) -> str:
        """Of the weights: the narrowest that their data leave, ours for drawn faces alone."""
        found = [LICENCES.get(one.source, UNKNOWN) for one in self.data] + [UNKNOWN] * bool(self.origin)
        return next((one for one in (RESEARCH, UNKNOWN, OURS) if one in found), UNKNOWN)

    @property
    def best(self) -> dict[str, Any] | None:
        """The validation that chose the weights, the first with the highest macro F1; None: not recorded."""
        judged = [row for row in self.history if "validation/macro_f1" in row]
        return max(judged, key=lambda row: row["validation/macro_f1"], default=None)

    @property
    def training_seconds(self) -> float | None:
        """Time of the training steps alone, from the speeds that the history has; None: it has none."""
        if not self.trainings:
            return None
        size = self.trainings[0].arguments["batch_size"]
        rows = [row for row in self.history if "images_per_second" in row]
        starts = [0, *(row["step"] for row in rows)]
        pairs = zip(starts, rows, strict=False)
        return sum((row["step"] - n) * size / row["images_per_second"] for n, row in pairs) or None


# --- Reading ---


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
    return told if HUB_ID.fullmatch(told) and Path(told).parts[0] != Path(output_dir).parts[0] else None


def read_training(model: Path) -> Training | None:
    """The run that made a model; None: not recorded."""
    run = run_of(model)
    arguments = read_json((run or model) / "arguments.json")
    if arguments is None:
        return None
    start = start_of(run, arguments["output_dir"])
    data = []
    for part in arguments["data"].split(","):
        role, path = part.split("=", 1) if "=" in part else ("labelled", part)
        folder = reach(path, start)
        data.append(DataSet(role, Path(path).name, read_json(folder / "report.json") if folder else None))
    if stream := arguments.get("stream"):
        page = None if reach(stream, start) else hub_id(stream, arguments["output_dir"])
        data.append(DataSet("unlabelled", Path(stream).name, None, page))
    return Training(arguments, data, start)


def read_trainings(model: Path) -> tuple[list[Training], str, str | None]:
    """The runs behind a model, its own first; what the earliest started from; that, if it is a Hub id."""
    found: list[Training] = []
    while one := read_training(model):
        found.append(one)
        told = one.arguments["encoder"]
        if not told:
            return found, "", None
        folder = reach(told, one.start)
        if folder is None:
            return found, told, hub_id(told, one.arguments["output_dir"])
        model = Path(os.path.abspath(folder))
    return found, "/".join(model.parts[-2:]) if found else "", None


def title_of(metrics: dict[str, Any]) -> str:
    """Which images an evaluation is of."""
    name = f"{metrics['split']} split of {Path(metrics['data']).name}"
    return f"{name}, without {metrics['dropped']}" if metrics.get("dropped") else name


def read_evaluations(model: Path, start: Path, asked: Sequence[str | Path]) -> list[Evaluation]:
    """Evaluations of a model: those asked for; else those in its run folder; else the one kept beside it."""
    folders = [Path(os.path.abspath(one)) for one in asked]
    found: list[Evaluation] = []
    for folder in folders or [path.parent for path in inside(model, "metrics.json")]:
        if (metrics := read_json(folder / "metrics.json")) is None:
            raise FileNotFoundError(f"{folder} has no metrics.json: pass what `fer eval --out` wrote")
        told = metrics.get("model", "")
        if told and any((base / told).resolve() == model.resolve() for base in (start, Path())):
            found.append((folder, metrics))
        elif asked:
            raise ValueError(
                f"{folder / 'metrics.json'} is of {told or 'a model without a name'}, not of {model}: "
                f"write one with `fer eval --model {model}`"
            )
    if not found and (kept := read_json(model / "metrics.json")):
        found = [(model, kept)]
    if wrong := [folder for folder, metrics in found if not {"data", "split"} <= metrics.keys()]:
        raise ValueError(
            f"{wrong[0]}/metrics.json does not say of which data it is: write it with `fer eval`"
        )
    if not asked:
        found.sort(key=lambda one: [one[1]["split"] != split for split in ("test", "validation")])
    seen: dict[str, Path] = {}
    for folder, metrics in found:
        if (other := seen.setdefault(title_of(metrics), folder)) != folder:
            raise ValueError(f"{other} and {folder} are both of the {title_of(metrics)}: name those to show")
    return found


def inside(model: Path, name: str) -> list[Path]:
    """Files of a name in the folder of a model's run and in the folders in it, but for the model's own."""
    run = run_of(model)
    found = [*run.glob(name), *run.glob(f"*/{name}")] if run else []
    return sorted(path for path in found if path.parent != model)


def read_facts(folder: str | Path, evaluations: Sequence[str | Path] = ()) -> Facts:
    """Read what the files of a run say, or those beside a model away from its run.

    Args:
        folder: a run folder of `train.py`, its model folder, or a copy of that.
        evaluations: folders that `fer eval` wrote, the main one first. None: those in the run folder.

    Raises:
        FileNotFoundError: no model there, or no evaluation where one was named.
        ValueError: no facial-expression classifier, a damaged file, or an evaluation of another model.
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
    trainings, origin, base_model = read_trainings(model)
    folds = inside(model, "cross_validation.json")
    if len(folds) > 1:
        raise ValueError(f"{' and '.join(map(str, folds))} are of one model: keep the one that counts")
    home = run_of(model) or model
    history = home / "history.jsonl"
    lines = history.read_text(encoding="utf-8").splitlines() if history.is_file() else []
    return Facts(
        model=model,
        config=config,
        trainings=trainings,
        origin=origin,
        base_model=base_model,
        history=[json.loads(line) for line in lines if line.endswith("}")],  # a kill cuts the last one short
        evaluations=read_evaluations(model, trainings[0].start if trainings else Path(), evaluations),
        cross_validation=read_json(folds[0]) if folds else None,
        environment=read_json(home / "environment.json") or {},
    )


# --- Writing ---


def metadata(facts: Facts, name: str, licence: str | None, widget: list[dict[str, Any]]) -> ModelCardData:
    """The card's head, which the Hub reads."""
    results = [
        EvalResult(
            task_type=facts.task,
            dataset_type=Path(metrics["data"]).name,
            dataset_name=title_of(metrics),
            dataset_config=metrics.get("dropped") and f"without {metrics['dropped']}",
            dataset_split=metrics["split"],
            metric_type=kind,
            metric_name=title,
            metric_value=metrics[key],
        )
        for _, metrics in facts.evaluations
        for key, (kind, title) in SCORES.items()
        if key in metrics
    ]
    tags = [TAGS.get(one.source, one.hub_id) for one in facts.data]
    licence = licence or facts.licence
    own_terms: dict[str, Any] = {}
    if licence == RESEARCH:  # not a licence that the Hub knows
        own_terms = {"license_name": licence, "license_link": "README.md"}
    return ModelCardData(
        license="other" if own_terms else licence,
        **own_terms,
        library_name="transformers",
        pipeline_tag=facts.task,
        tags=["facial-expression-recognition", "affective-computing"],
        datasets=list(dict.fromkeys(filter(None, tags))) or None,
        base_model=facts.base_model,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        eval_results=results or None,
        model_name=name if results else None,
        widget=widget or None,
    )


def make_card(
    facts: Facts, repo_id: str | None = None, licence: str | None = None, widget: Sequence[Any] = ()
) -> ModelCard:
    """The card of a model; the same facts always make the same card.

    Args:
        facts: what `read_facts` found.
        repo_id: where the model is, or will be, on the Hub; the snippets load it from there.
        licence: of the weights, as the Hub calls it. None: what the terms of the training data leave.
        widget: examples for the Hub's widget, as it wants them.
    """
    if repo_id:
        validate_repo_id(repo_id)
    name = repo_id.split("/")[-1] if repo_id else (run_of(facts.model) or facts.model).name
    head = metadata(facts, name, licence, list(widget))
    text = TEMPLATES.get_template("card_template.md").render(
        facts=facts,
        name=name,
        source=repo_id or "path/of/this/folder",
        licence=licence or facts.licence,
        scores=SCORES,
        title_of=title_of,
        companions={path.name for path in companions(facts)},
        private=PRIVATE,
        all_classes=CLASSES,
    )
    text = re.sub(r"\n{3,}", "\n\n", text)  # what the template left out
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n{text}\n")


def companions(facts: Facts) -> list[Path]:
    """Files that belong beside the card: of the run, and of the main evaluation."""
    found = [(run_of(facts.model) or facts.model) / name for name in KEPT]
    found += [facts.evaluations[0][0] / name for name in KEPT_OF_EVALUATION] if facts.evaluations else []
    return [path for path in found if path.is_file()]


def show_example(path: Path, facts: Facts) -> dict[str, Any]:
    """What the Hub's widget shows of a file, put beside the model: all classes, the likeliest first."""
    classify: Any = pipeline(facts.task, model=str(facts.model), top_k=len(facts.classes))  # type: ignore
    found = [{"label": one["label"], "score": round(one["score"], 4)} for one in classify(str(path))]
    return {"src": f"example_{path.name}", "example_title": path.stem, "output": found}


def write_card(
    folder: str | Path,
    repo_id: str | None = None,
    evaluations: Sequence[str | Path] = (),
    examples: Sequence[str | Path] = (),
    licence: str | None = None,
) -> Path:
    """Write README.md into a model's folder, in place of an older one, and beside it what it shows.

    That is: the arguments, metrics and pictures of the run, and the examples, so that the folder can be
    published as it is. Nothing else in it is changed.

    Args:
        folder, evaluations: as in `read_facts`.
        repo_id, licence: as in `make_card`.
        examples: images of one face, or videos for a model of videos; the model is run on them.

    Raises:
        FileNotFoundError, ValueError: as `read_facts`; also an example that is not there.
    """
    facts = read_facts(folder, evaluations)
    if missing := [str(path) for path in examples if not Path(path).is_file()]:
        raise FileNotFoundError(f"no such example: {', '.join(missing)}")
    widget = [show_example(Path(path), facts) for path in examples]
    card = make_card(facts, repo_id, licence, widget)
    copies = {path: path.name for path in companions(facts)}
    copies |= {Path(path): f"example_{Path(path).name}" for path in examples}
    for path, name in copies.items():
        if path.parent != facts.model:
            write_whole(facts.model / name, path.read_bytes())
    write_whole(facts.model / "README.md", str(card).encode())
    return facts.model / "README.md"
