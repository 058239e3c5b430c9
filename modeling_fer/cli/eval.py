"""`fer eval`: a model judged on a prepared data set."""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset

from modeling_fer import FerForVideoClassification
from modeling_fer.cli.options import add_model, at_least_one
from modeling_fer.data import schema
from modeling_fer.data.augment import Normalize
from modeling_fer.data.pixels import decode_split
from modeling_fer.data.tally import digest
from modeling_fer.data.videos import recording
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
from modeling_fer.learning.timelines import predict_split, tracks_of

TIMELINES = 4  # videos that are drawn
COPY_SIZE = 48  # pixels at which copies of training images are looked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grammar."""
    add_model(parser)
    parser.add_argument("--data", required=True, help="folder written by `fer data prepare`")
    parser.add_argument("--split", default="validation", choices=schema.SPLITS)
    parser.add_argument("--out", required=True, help="folder for metrics.json and pictures")
    parser.add_argument(
        "--drop-train-copies", action="store_true", help="leave out images that are also in the train split"
    )
    parser.add_argument("--against", help="an earlier model, to say by how much this one is better")
    parser.add_argument("--batch-size", type=at_least_one, default=256)
    parser.set_defaults(run=evaluate)


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate a classifier on one split of a prepared data set."""
    split = schema.load(args.data, args.split)[args.split]
    references = np.asarray(split.with_format("numpy")["expression"][:])
    probabilities = predict_rows(args.model, split, args)
    about = {"model": args.model, "data": args.data, "split": args.split}
    if args.drop_train_copies:
        decoded = partial(decode_split, size=COPY_SIZE, cache_dir=Path(args.data) / "cache")
        trained = set(map(digest, decoded(schema.load(args.data, "train")["train"])))
        copies = np.array([digest(face) in trained for face in decoded(split)])
        references = np.where(copies, IGNORE, references)
        about["dropped"] = f"{copies.sum()} images whose pixels are also in train"
        print(about["dropped"])
    groups, unit = resampling_groups(split)
    metrics = write_report(Path(args.out), references, probabilities, CLASSES, about, groups, unit)
    print(f"{args.model} on {args.split} of {args.data}\n{summary(metrics)}")
    if args.against:
        first = predict_rows(args.against, split, args).argmax(-1)
        result = compare(references, first, probabilities.argmax(-1), groups=groups)
        print(f"from {args.against} to {args.model}, paired over {unit}:")
        print(write_comparison(Path(args.out), result, (args.against, args.model)))
    draw_timelines(split, probabilities, f"{args.data}, {args.split}", Path(args.out))
    print(f"written: {args.out}")
    return 0


def resampling_groups(split: Dataset) -> tuple[np.ndarray | None, str]:
    """Ids of what the intervals resample, a row each, and its name: videos, else subjects, else images.

    A column counts where every labelled row has an id and the ids are two at least.
    """
    labelled = np.flatnonzero(np.asarray(split.with_format("numpy")["expression"][:]) != IGNORE)
    for column in ("video", "subject"):
        ids = split[column][:]
        if column == "video":  # two people's tracks of one recording are resampled together
            ids = [None if video is None else recording(video) for video in ids]
        found = {ids[row] for row in labelled}
        if None not in found and len(found) > 1:
            return np.asarray(ids, dtype=object), f"{column}s"
    return None, "images"


def predict_rows(folder: str, split: Dataset, args: argparse.Namespace) -> np.ndarray:
    """Probabilities `(N, 8)` of a split by a model of stills or of videos."""
    model, processor = load_model(folder)
    cache = Path(args.data) / "cache"
    if isinstance(model, FerForVideoClassification):
        where = f"{args.data}, {args.split}"
        return predict_split(model, processor, split, where, cache, args.batch_size)
    pixels = decode_split(split, processor.size["height"], cache)
    normalize = Normalize(processor.image_mean, processor.image_std)
    found = predict_probabilities(model, pixels, normalize, args.batch_size, show_progress=True)
    return over_all_classes(found, class_names(model))


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
