"""The `fer` command: a thin face over the package's wings."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import HfArgumentParser
from transformers.utils import logging

from modeling_fer.data import schema
from modeling_fer.data.augment import Normalize
from modeling_fer.data.pixels import ENDINGS, UnreadableImageError, decode, decode_split
from modeling_fer.data.prepare import prepare
from modeling_fer.data.report import show
from modeling_fer.data.sources import SOURCES
from modeling_fer.data.tally import digest
from modeling_fer.evaluation.comparison import compare, write_comparison
from modeling_fer.evaluation.report import summary, write_report
from modeling_fer.labels import CLASSES, IGNORE
from modeling_fer.learning.inference import (
    class_names,
    load_classifier,
    over_all_classes,
    predict_probabilities,
)

DEFAULT_MODEL = "runs/demo/round-1/run/model"


def data_prepare(args: argparse.Namespace) -> int:
    """Write a prepared data set and print its report."""
    source = SOURCES[args.source]
    options = source.options(**{f.name: getattr(args, f.name) for f in dataclasses.fields(source.options)})
    prepare(args.source, options, args.out, args.drop_duplicates, args.overwrite)
    print(show(args.out))
    return 0


def data_show(args: argparse.Namespace) -> int:
    """Print the report of a prepared data set."""
    print(show(args.folder))
    return 0


def resampling_groups(split: Dataset) -> tuple[np.ndarray | None, str]:
    """Ids of what the intervals resample, a row each, and its name: videos, else subjects, else images.

    A column counts where every labelled row has an id and the ids are two at least.
    """
    labelled = np.flatnonzero(np.asarray(split.with_format("numpy")["expression"][:]) != IGNORE)
    for column in ("video", "subject"):
        ids = split[column][:]
        found = {ids[row] for row in labelled}
        if None not in found and len(found) > 1:
            return np.asarray(ids, dtype=object), f"{column}s"
    return None, "images"


def predict_split(folder: str, split: Dataset, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `(N, 8)` of a split by a model, and the pixels that it saw."""
    model, processor = load_classifier(folder)
    pixels = decode_split(split, processor.size["height"], Path(args.data) / "cache")
    normalize = Normalize(processor.image_mean, processor.image_std)
    found = predict_probabilities(model, pixels, normalize, args.batch_size, show_progress=True)
    return over_all_classes(found, class_names(model)), pixels


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate a classifier on one split of a prepared data set."""
    split = schema.load(args.data, args.split)[args.split]
    references = np.asarray(split.with_format("numpy")["expression"][:])
    probabilities, pixels = predict_split(args.model, split, args)
    about = {"model": args.model, "data": args.data, "split": args.split}
    if args.drop_train_copies:
        train = schema.load(args.data, "train")["train"]
        trained = set(map(digest, decode_split(train, pixels.shape[-1], Path(args.data) / "cache")))
        copies = np.array([digest(face) in trained for face in pixels])
        references = np.where(copies, IGNORE, references)
        about["dropped"] = f"{copies.sum()} images whose pixels are also in train"
        print(about["dropped"])
    groups, unit = resampling_groups(split)
    metrics = write_report(Path(args.out), references, probabilities, CLASSES, about, groups, unit)
    print(f"{args.model} on {args.split} of {args.data}\n{summary(metrics)}")
    if args.against:
        first = predict_split(args.against, split, args)[0].argmax(-1)
        result = compare(references, first, probabilities.argmax(-1), groups=groups)
        print(f"from {args.against} to {args.model}, paired over {unit}:")
        print(write_comparison(Path(args.out), result, (args.against, args.model)))
    print(f"written: {args.out}")
    return 0


def find_images(paths: list[str]) -> Iterator[Path]:
    """Image files among the paths, folders searched whole, in a stable order.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no image.
    """
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
            if not found:
                raise FileNotFoundError(f"{path} holds no images ({', '.join(ENDINGS)})")
            yield from found
        elif path.exists():
            yield path
        else:
            raise FileNotFoundError(f"no such file or folder: {path}")


def predict(args: argparse.Namespace) -> int:
    """Predict the expression of face crops, a line or a JSON object each; name and skip unreadable files."""
    model, processor = load_classifier(args.model)
    names = class_names(model)
    normalize = Normalize(processor.image_mean, processor.image_std)
    paths = list(find_images(args.paths))
    skipped = 0
    for start in range(0, len(paths), args.batch_size):
        readable, pixels = [], []
        for path in paths[start : start + args.batch_size]:
            try:
                pixels.append(decode(path.read_bytes(), processor.size["height"]))
                readable.append(path)
            except (OSError, UnreadableImageError) as error:
                print(f"skipped {path}: {error}", file=sys.stderr)
                skipped += 1
        if not readable:
            continue
        probabilities = predict_probabilities(model, np.stack(pixels), normalize)
        for path, row in zip(readable, probabilities, strict=True):
            scores = {name: round(float(p), 4) for name, p in zip(names, row, strict=True)}
            best = names[int(row.argmax())]
            if args.json:
                line = json.dumps({"file": str(path), "expression": best, "probabilities": scores})
            else:
                line = f"{path}\t{best}\t{scores[best]:.2f}"
            print(line, flush=True)
    if skipped:
        print(f"{skipped} of {len(paths)} files could not be read", file=sys.stderr)
    return 1 if skipped else 0


def at_least_one(text: str) -> int:
    """A whole number from 1 up, as a command-line value."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def build_parser() -> argparse.ArgumentParser:
    """The command's grammar; the flags of a source come from the fields of its options."""
    parser = argparse.ArgumentParser(prog="fer", description="Facial expression recognition.")
    commands = parser.add_subparsers(dest="command", required=True)

    data = commands.add_parser("data", help="prepare data sets and look at them").add_subparsers(
        dest="action", required=True
    )
    preparing = data.add_parser("prepare", help="write a data set as parquet, with a report of what is in it")
    sources = preparing.add_subparsers(dest="source", required=True, parser_class=HfArgumentParser)
    for name, source in SOURCES.items():
        one: Any = sources.add_parser(
            name, dataclass_types=source.options, help=(source.options.__doc__ or "").split("\n")[0]
        )
        one.add_argument("--out", required=True, help="folder to write")
        one.add_argument(
            "--drop-duplicates",
            action="store_true",
            help="remove training images that are repeated or held out elsewhere",
        )
        one.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")
        one.set_defaults(run=data_prepare)
    showing = data.add_parser("show", help="print the report again")
    showing.add_argument("folder", help="folder written by `fer data prepare`")
    showing.set_defaults(run=data_show)

    evaluating = commands.add_parser("eval", help="evaluate a model on a prepared data set")
    evaluating.add_argument("--model", default=DEFAULT_MODEL, help=f"model folder (default: {DEFAULT_MODEL})")
    evaluating.add_argument("--data", required=True, help="folder written by `fer data prepare`")
    evaluating.add_argument("--split", default="validation", choices=schema.SPLITS)
    evaluating.add_argument("--out", required=True, help="folder for metrics.json and pictures")
    evaluating.add_argument(
        "--drop-train-copies", action="store_true", help="leave out images that are also in the train split"
    )
    evaluating.add_argument("--against", help="an earlier model, to say by how much this one is better")
    evaluating.add_argument("--batch-size", type=at_least_one, default=256)
    evaluating.set_defaults(run=evaluate)

    predicting = commands.add_parser("predict", help="expression of face crops")
    predicting.add_argument("paths", nargs="+", help="images, or folders of them")
    predicting.add_argument("--model", default=DEFAULT_MODEL, help=f"model folder (default: {DEFAULT_MODEL})")
    predicting.add_argument(
        "--json", action="store_true", help="one JSON object a line, with all probabilities"
    )
    predicting.add_argument("--batch-size", type=at_least_one, default=64)
    predicting.set_defaults(run=predict)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; what the user can mend is told in one line."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"fer: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
