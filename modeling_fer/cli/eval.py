"""`fer eval`: a model judged on a prepared data set."""

import argparse
import csv
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset

from modeling_fer import FerForVideoClassification
from modeling_fer.cli.options import add_mirror, add_model, at_least_one
from modeling_fer.data import schema
from modeling_fer.data.augment import Normalize
from modeling_fer.data.pixels import decode_split
from modeling_fer.data.tally import digest
from modeling_fer.evaluation import plots
from modeling_fer.evaluation.comparison import compare, write_comparison
from modeling_fer.evaluation.report import summary, write_report
from modeling_fer.labels import CLASSES, IGNORE
from modeling_fer.learning.inference import (
    class_names,
    load_model,
    over_all_classes,
    predict_probabilities,
)
from modeling_fer.learning.stage import resampling_groups
from modeling_fer.learning.timelines import predict_split, tracks_of

TIMELINES = 4  # videos that are drawn
UNKNOWN = "not stated"  # group of those of whom it is not known
COPY_SIZE = 48  # pixels at which copies of training images are looked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grammar."""
    add_model(parser)
    add_mirror(parser)
    parser.add_argument("--data", required=True, help="folder written by `fer data prepare`")
    parser.add_argument("--split", default="validation", choices=schema.SPLITS)
    parser.add_argument("--out", required=True, help="folder for metrics.json and pictures")
    parser.add_argument(
        "--drop-train-copies", action="store_true", help="leave out images that are also in the train split"
    )
    parser.add_argument(
        "--groups",
        type=Path,
        metavar="CSV",
        help="table of people: a column subject or video, and further ones (age, say) to score by",
    )
    parser.add_argument(
        "--against",
        help="an earlier model, judged as its configuration says, to say by how much this one is better",
    )
    parser.add_argument("--batch-size", type=at_least_one, default=256)
    parser.set_defaults(run=evaluate)


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate a classifier on one split of a prepared data set."""
    split = schema.load(args.data, args.split)[args.split]
    references = np.asarray(split.with_format("numpy")["expression"][:])
    probabilities, mirrored = predict_rows(args.model, split, args, args.mirror)
    about = {"model": args.model, "data": args.data, "split": args.split}
    name = args.model
    if mirrored:
        about["mirror"], name = True, f"{args.model} (with mirror images)"
    if args.drop_train_copies:
        decoded = partial(decode_split, size=COPY_SIZE, cache_dir=Path(args.data) / "cache")
        trained = set(map(digest, decoded(schema.load(args.data, "train")["train"])))
        copies = np.array([digest(face) in trained for face in decoded(split)])
        references = np.where(copies, IGNORE, references)
        about["dropped"] = f"{copies.sum()} images whose pixels are also in train"
        print(about["dropped"])
    groups, unit = resampling_groups(split)
    people = read_groups(args.groups, split) if args.groups else None
    metrics = write_report(Path(args.out), references, probabilities, CLASSES, about, groups, unit, people)
    print(f"{name} on {args.split} of {args.data}\n{summary(metrics)}")
    if args.against:
        first = predict_rows(args.against, split, args)[0].argmax(-1)
        result = compare(references, first, probabilities.argmax(-1), groups=groups)
        print(f"from {args.against} to {name}, paired over {unit}:")
        print(write_comparison(Path(args.out), result, (args.against, name)))
    draw_timelines(split, probabilities, f"{args.data}, {args.split}", Path(args.out))
    print(f"written: {args.out}")
    return 0


def read_groups(path: Path, split: Dataset) -> dict[str, np.ndarray]:
    """Values `(N,)` of each grouping of a table of people, by the grouping's name.

    Args:
        path: csv with a column `subject` or `video`, whose ids are those of the data, and further columns.
        split: rows of a prepared data set.

    Raises:
        ValueError: no such columns, an id twice, or none of the split's.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0]) if rows else []
    key = next((name for name in ("subject", "video") if name in columns), None)
    if key is None or len(columns) < 2:
        raise ValueError(
            f"{path}: expected a row a person, a column subject or video, and one column or more of groups; "
            f"found {', '.join(columns) or 'nothing'}"
        )
    table = {row[key]: row for row in rows}
    if len(table) < len(rows):
        raise ValueError(f"{path}: some {key} has several rows: leave one of each")
    ids = split[key][:]
    if not table.keys() & set(ids):
        raise ValueError(f"{path}: no {key} of the data is in it; its ids must be those of the data")
    names = [name for name in columns if name and name != key]
    return {
        name: np.array([(table.get(i, {}).get(name) or "").strip() or UNKNOWN for i in ids]) for name in names
    }


def predict_rows(
    folder: str, split: Dataset, args: argparse.Namespace, mirror: bool | None = None
) -> tuple[np.ndarray, bool]:
    """Probabilities `(N, 8)` of a split by a model of stills or of videos, and whether mirrored."""
    model, processor = load_model(folder, mirror)
    cache = Path(args.data) / "cache"
    if isinstance(model, FerForVideoClassification):
        where = f"{args.data}, {args.split}"
        return predict_split(model, processor, split, where, cache, args.batch_size), False
    pixels = decode_split(split, processor.size["height"], cache)
    normalize = Normalize(processor.image_mean, processor.image_std)
    found = predict_probabilities(model, pixels, normalize, args.batch_size, show_progress=True)
    return over_all_classes(found, class_names(model)), getattr(model.config, "mirror", False)


def draw_timelines(split: Dataset, probabilities: np.ndarray, where: str, out: Path) -> None:
    """Draw the longest videos of a split, if it is one of videos."""
    try:
        found = tracks_of(split, where)
    except ValueError:  # stills, or several faces a frame: there is no timeline to draw
        return
    found = sorted(found, key=lambda track: (-len(track.frames), track.video))
    for number, track in enumerate(found[:TIMELINES]):
        shown = (probabilities[track.rows], track.labels, track.frames)
        plots.save(plots.timeline_figure(*shown, CLASSES, track.video), out / f"timeline_{number}.png")
