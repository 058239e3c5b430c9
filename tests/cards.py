"""Runs and evaluations to tell cards of, as training and `fer eval` leave them, and readers of cards."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modeling_fer.data.report import Report
from modeling_fer.evaluation.metrics import compute_metrics
from modeling_fer.evaluation.report import stored_postprocess, weights_digest
from modeling_fer.evaluation.selective import risk_coverage
from modeling_fer.hub.card import SCORES
from modeling_fer.labels import CLASSES
from modeling_fer.learning.arguments import FerTrainingArguments

HISTORY = [
    {"step": 20, "epoch": 0, "loss": 1.5, "images_per_second": 100.0},
    {"step": 20, "validation/macro_f1": 0.4125, "validation/accuracy": 0.5},
    {"step": 30, "epoch": 1, "loss": 1.0, "images_per_second": 50.0},
    {"step": 30, "validation/macro_f1": 0.3975, "validation/accuracy": 0.6},
]


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def report(folder, source="synthetic", splits=("train", "validation"), **options):
    """Write what `fer data prepare` reports, with other counts for every class and split."""
    counts = {
        split: {**{name: 100 * j + i for i, name in enumerate(CLASSES)}, "no label": 7}
        for j, split in enumerate(splits, start=1)
    }
    repeats = {a: {b: 3 if (a, b) == ("train", "validation") else 0 for b in splits} for a in splits}
    folder.mkdir(parents=True)
    Report(source, options, counts, repeats, {}, {}, {}, {}, {}, {}, 0, [], []).save(folder / "report.json")
    return counts


def save_run(project, model, name="best", data="data/faces", **arguments):
    """Lay a model folder into a run folder as `train.py` leaves it."""
    home = project / "runs" / name
    shutil.copytree(model, home / "model")
    FerTrainingArguments(data=data, output_dir=f"runs/{name}", **arguments).save(home / "arguments.json")
    (home / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HISTORY) + '{"step": 4')
    (home / "learning_curve.png").write_bytes(b"curve")
    return home


def evaluate(home, split="test", data="data/faces", seed=0, absent=(), **more):
    """Write an evaluation of a run's model as `fer eval` does, without its pictures."""
    rng = np.random.default_rng(seed)
    kept = [i for i, name in enumerate(CLASSES) if name not in absent]
    references = rng.choice(kept, 50)
    probabilities = rng.dirichlet(np.ones(8), 50)
    scores = compute_metrics(references, probabilities.argmax(1), probabilities, bootstrap_samples=50)
    scores["bootstrap"]["unit"] = "images"
    scores["selective"] = risk_coverage(references, probabilities).summary()
    about: dict[str, Any] = {"model": f"runs/{home.name}/model", "data": data, "split": split}
    model = home / "model"
    about |= {"weights": weights_digest(model), "postprocess": stored_postprocess(model)}
    write_json(home / split / "metrics.json", {**about, **scores, **more})
    return json.loads((home / split / "metrics.json").read_text())


def section(text, title):
    """Text below a heading, up to the next one of its level."""
    level = title.split(" ")[0]
    found = re.search(rf"^{re.escape(title)}\n(.*?)(?=^{level} |\Z)", text, re.M | re.S)
    assert found, f"no section {title}"
    return found[1]


def tables(text):
    """Tables in Markdown, by the name of their first column: header and rows, each a tuple of cells."""
    found = {}
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        lines = [tuple(cell.strip() for cell in line[1:-1].split("|")) for line in block.splitlines()]
        assert set(lines[1]) == {"---"}
        assert {len(line) for line in lines} == {len(lines[0])}, block
        assert lines[0][0] not in found
        found[lines[0][0]] = lines[:1] + lines[2:]
    return found


def shown(value):
    return f"{value:.3f}"


def between(bounds):
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def with_bounds(row, key):
    bounds = row.get(f"{key}_interval")
    return shown(row[key]) + (f" ({between(bounds)})" if bounds else "")


def expected_tables(metrics):
    """The tables of an evaluation, straight from its JSON."""
    overall = ["macro_f1", "macro_f1_present", "accuracy", "balanced_accuracy"]
    sure = metrics["selective"]
    return {
        "score": [
            ("score", "value", "95 % interval"),
            *((SCORES[key][1], shown(metrics[key]), between(metrics["interval"][key])) for key in overall),
        ],
        "class": [
            ("class", "precision", "recall", "F1", "labelled"),
            *(
                (name, *(with_bounds(row, key) for key in ("precision", "recall", "f1")), str(row["support"]))
                for name, row in metrics["per_class"].items()
            ),
        ],
        "calibration": [
            ("calibration", "value"),
            *((SCORES[key][1], shown(metrics[key])) for key in ("ece", "nll")),
        ],
        "share of the images answered": [
            ("share of the images answered", "threshold", "accuracy on those"),
            *(
                tuple(shown(sure[key][place]) for key in ("coverage", "threshold", "accuracy"))
                for place in range(len(sure["coverage"]))
            ),
        ],
    }


def leaves(value: Any) -> Iterator[Any]:
    """Numbers and words in what a file of JSON holds, keys too."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield key
            yield from leaves(one)
    elif isinstance(value, list):
        for one in value:
            yield from leaves(one)
    else:
        yield value


NUMBER = re.compile(r"(?<![\w.-])-?\d+(?:\.\d+)*(?:e-?\d+)?(?![\w.]*\w)")


def sums(counts: list[dict[str, dict[str, int]]]) -> list[float]:
    """What a card adds up of the rows of data sets: those of each split, and of each class in training."""
    training = [rows for found in counts for split, rows in found.items() if split in ("train", "pseudo")]
    by_class = [sum(rows.get(name, 0) for rows in training) for name in CLASSES]
    return [*by_class, *(sum(rows.values()) for found in counts for rows in found.values())]


def number_faults(text: str, files: list[Path], derived: Sequence[float] = ()) -> list[str]:
    """Numbers in the tables of a card that are in no file of its run and not derived, with their rows."""
    values: list[Any] = list(derived)
    for path in files:
        told = path.read_text()
        for one in told.splitlines() if path.suffix == ".jsonl" else [told]:
            values += leaves(json.loads(one))
    words = {token for value in values if isinstance(value, str) for token in NUMBER.findall(value)}
    numbers = [value for value in values if isinstance(value, int | float)]
    held = words | {str(value) for value in numbers}

    def is_held(token: str) -> bool:
        decimals = len(token.partition(".")[2])
        return token in held or (decimals > 0 and any(f"{value:.{decimals}f}" == token for value in numbers))

    faults = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        header, _, *rows = block.splitlines()
        for row in rows:
            cells = row[1:-1].split("|")[: 4 if header.startswith("| learnt by") else None]
            found = [token for cell in cells for token in NUMBER.findall(cell)]  # beyond 4: our own words
            faults += [f"{token} in {row}" for token in found if not is_held(token)]
    return faults
