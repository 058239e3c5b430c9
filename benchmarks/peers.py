"""Our stills model against other packages on the same faces: scores, time, size. Writes benchmarks/peers.md.

Every classifier gets the same face crops; nobody's detector runs. `benchmarks/peers/run.sh` does it all: it
makes the peers' environments, has `benchmarks/peers/predict.py` and `predict.mjs` write what each says, and
ends with the report. For another model of ours alone, while the peers' rows stay as they are:

    python -m benchmarks.peers report --model runs/release/model --keep-peers

The two steps are `faces`, which writes the crops where the peers read them, and `report`.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import transformers
import yaml
from datasets import Image as ImageFeature

from modeling_fer.data import schema
from modeling_fer.data.collection import expressions_of
from modeling_fer.data.pixels import open_image
from modeling_fer.evaluation.metrics import compute_metrics, write_whole
from modeling_fer.labels import CLASSES, IGNORE, class_id

HERE = Path(__file__).parent
NOTES, TEMPLATE = HERE / "peers" / "notes.yaml", HERE / "peers" / "template.md"
PREDICT, REPORT = HERE / "peers" / "predict.py", HERE / "peers.md"
RESULTS = HERE / "results" / "peers_cpu.json"
OURS = "abaw_fer"
SEVEN = CLASSES[:7]  # what every peer knows: ours without Other
SCORES = ["", "FER2013 accuracy", "FER2013 macro F1", "cross-set accuracy", "cross-set macro F1"]
COSTS = ["", "batch of 1", "batch of 64", "cores, threads", "parameters", "weights", "input", "runtime"]
SPLITS = {"fer2013": "validation", "faces": "train"}  # by set; FER2013's PublicTest is its validation split


@dataclass
class Faces:
    """A labelled set: grey crops `(N, side, side)` uint8, class ids `(N,)`, and whose faces they are."""

    crops: np.ndarray
    references: np.ndarray
    subjects: np.ndarray | None


def read_set(folder: Path, split: str) -> Faces:
    """The labelled faces of a prepared folder at their own size.

    Raises:
        ValueError: no labels, several sizes, or faces in colour.
    """
    rows = schema.load(folder, split)[split]
    rows = rows.select(np.flatnonzero(expressions_of(rows) != IGNORE))
    if not len(rows):
        raise ValueError(f"{folder}: its {split} split has no labels; prepare it without --unlabeled")
    cells = rows.cast_column("image", ImageFeature(decode=False))["image"]
    images = [np.asarray(open_image(cell["bytes"])) for cell in cells]
    if len({image.shape for image in images}) > 1 or images[0].shape[0] != images[0].shape[1]:
        raise ValueError(f"{folder}: expected square faces of one size; prepare crops of one size")
    crops = np.stack(images)
    if (crops != crops[..., :1]).any():
        raise ValueError(f"{folder}: expected grey faces, since the peers are handed grey bytes")
    subjects = None
    if any(known := [subject is not None for subject in rows["subject"]]):
        names = [
            f"of {s}" if k else f"face {i}"
            for i, (s, k) in enumerate(zip(rows["subject"], known, strict=True))
        ]
        subjects = np.array(names)
    return Faces(np.ascontiguousarray(crops[..., 0]), expressions_of(rows), subjects)


def write_faces(crops: np.ndarray, path: Path) -> None:
    """Raw bytes at `path`.bin, number and side at `path`.json: readable from any language."""
    path.parent.mkdir(parents=True, exist_ok=True)
    crops.tofile(path.with_suffix(".bin"))
    path.with_suffix(".json").write_text(json.dumps({"faces": len(crops), "side": crops.shape[1]}) + "\n")


def seven_classes(names: list[str], values: np.ndarray) -> np.ndarray:
    """Probabilities of a peer's classes `(N, len(names))` as `(N, 7)` in our order, rows summing to 1.

    Raises:
        ValueError: a name is unknown, or our seven are not there, each once. Contempt and Other are left out.
    """
    columns = {i: found for i, name in enumerate(names) if (found := class_id(name)) in range(len(SEVEN))}
    if sorted(columns.values()) != list(range(len(SEVEN))):
        raise ValueError(f"expected each of {', '.join(SEVEN)} once, got {', '.join(names)}")
    ours = np.empty((len(values), len(SEVEN)))
    ours[:, list(columns.values())] = values[:, list(columns)]
    return ours / ours.sum(1, keepdims=True)


def read_predictions(path: Path, count: int) -> np.ndarray:
    """Probabilities `(count, 7)` in our order from a file that a peer's script wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not of these faces, or of other classes.
    """
    if not path.exists():
        raise FileNotFoundError(f"no {path}: run `sh benchmarks/peers/run.sh MODEL`, or pass --keep-peers")
    with path.open(newline="") as file:
        header, *rows = list(csv.reader(file))
    values = np.array(rows, dtype=np.float64)
    if header[0] != "row" or not np.array_equal(values[:, 0], np.arange(count)):
        raise ValueError(
            f"{path}: expected rows 0 to {count - 1} in order; run benchmarks/peers/run.sh again"
        )
    try:
        return seven_classes(header[1:], values[:, 1:])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def score(faces: Faces, probabilities: np.ndarray) -> dict[str, Any]:
    """Accuracy and macro F1 with 95 % intervals, of subjects where they are known; F1 of each class."""
    found = compute_metrics(
        faces.references, probabilities.argmax(1), class_names=SEVEN, groups=faces.subjects
    )
    return {
        "accuracy": found["accuracy"],
        "accuracy_interval": found["interval"]["accuracy"],
        "macro_f1": found["macro_f1"],
        "macro_f1_interval": found["interval"]["macro_f1"],
        "f1": {name: scores["f1"] for name, scores in found["per_class"].items()},
        "confusion_matrix": found["confusion_matrix"],
    }


def row_of(peer: str, sets: dict[str, Faces], folder: Path) -> dict[str, Any]:
    """Everything that the report says of one of them."""
    scores = {
        name: score(faces, read_predictions(folder / peer / f"{name}.csv", len(faces.crops)))
        for name, faces in sets.items()
    }
    return json.loads((folder / peer / "about.json").read_text()) | {"scores": scores}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def percent(scores: dict[str, Any], name: str) -> str:
    """A score and its interval."""
    low, high = scores[f"{name}_interval"]
    return f"{100 * scores[name]:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def render(result: dict[str, Any]) -> str:
    """The report; every figure comes from the result."""
    rows, notes = result["measured"], result["notes"]
    names = {peer: note["name"] for peer, note in notes["measured"].items()}
    scores = [
        [names[peer], *(percent(row["scores"][s], n) for s in SPLITS for n in ("accuracy", "macro_f1"))]
        for peer, row in rows.items()
    ]
    classes = [
        [names[peer], *(f"{100 * row['scores']['fer2013']['f1'][name]:.0f}" for name in SEVEN)]
        for peer, row in rows.items()
    ]
    costs = [
        [
            names[peer],
            f"{row['ms_per_face']['1']:.2f}",
            f"{row['ms_per_face']['64']:.2f}" + (" \\*" if row["one_by_one"] else ""),
            f"{row['cores']}, {row['threads']}",
            f"{row['parameters']:,}",
            f"{row['bytes'] / 1e6:.2f} MB",
            row["input"],
            row["runtime"],
        ]
        for peer, row in rows.items()
    ]
    published = [
        [row["name"], f"{row['accuracy']:.1f}", row["set"], row["parameters"], row["source"]]
        for row in notes["published"]
    ]
    text = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined).render(
        model=result["model"],
        notes=notes,
        load=max(row["load"] for row in rows.values()),
        busy=any(row["load"] > row["cores"] + 0.5 for row in rows.values()),
        **result["sets"],
        scores=table(SCORES, scores),
        classes=table(["", *SEVEN], classes),
        costs=table(COSTS, costs),
        published=table(["", "accuracy", "on", "parameters", "source"], published),
    )
    return text.rstrip() + "\n"


def report(args: argparse.Namespace, sets: dict[str, Faces], notes: dict[str, Any]) -> dict[str, Any]:
    """Predict with our model, score all, and return what the JSON holds."""
    folders = ["--faces", str(args.out / "faces"), "--out", str(args.out)]
    subprocess.run([sys.executable, str(PREDICT), OURS, "--model", args.model, *folders], check=True)
    kept = json.loads(RESULTS.read_text())["measured"] if args.keep_peers else {}
    measured = {
        peer: kept[peer] if args.keep_peers and peer != OURS else row_of(peer, sets, args.out)
        for peer in notes["measured"]
    }
    return {
        "command": "sh benchmarks/peers/run.sh " + args.model,
        "model": args.model,
        "sets": {
            name: {
                "faces": len(faces.crops),
                "side": faces.crops.shape[1],
                "majority": float(np.bincount(faces.references).max() / len(faces.references)),
                "rarest": int(np.bincount(faces.references, minlength=len(SEVEN)).min()),
            }
            for name, faces in sets.items()
        },
        "measured": measured,
        "notes": notes,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def main() -> None:
    """Write the faces, or measure ours, print and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("faces", "report"))
    parser.add_argument("--fer2013", type=Path, default=Path("data/fer2013"), help="prepared folder")
    parser.add_argument("--faces", type=Path, default=Path("data/faces_labelled"), help="prepared too")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"), help="faces and predictions")
    parser.add_argument("--model", help="folder of our model, for report")
    parser.add_argument("--keep-peers", action="store_true", help="take their rows from the JSON")
    args = parser.parse_args()
    if args.step == "report" and args.model is None:
        parser.error("report needs --model FOLDER")
    sets = {name: read_set(getattr(args, name), split) for name, split in SPLITS.items()}
    for name, faces in sets.items():
        write_faces(faces.crops, args.out / "faces" / name)
    if args.step == "report":
        result = report(args, sets, yaml.safe_load(NOTES.read_text(encoding="utf-8")))
        write_whole(RESULTS, (json.dumps(result, indent=2) + "\n").encode())
        write_whole(REPORT, render(result).encode())
        print(render(result).split("### How")[0], f"written {RESULTS} and {REPORT}", sep="\n")


if __name__ == "__main__":
    main()
