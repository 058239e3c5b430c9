"""The `fer` command: a thin face over the package's wings."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

from modeling_fer import FerForVideoClassification
from modeling_fer.data import schema
from modeling_fer.data.augment import Normalize
from modeling_fer.data.pixels import ENDINGS, UnreadableImageError, decode, decode_split
from modeling_fer.data.prepare import prepare
from modeling_fer.data.report import show
from modeling_fer.data.sources import SOURCES
from modeling_fer.data.splits import visible_folders
from modeling_fer.data.tally import digest
from modeling_fer.data.videos import recording
from modeling_fer.evaluation import plots, submission
from modeling_fer.evaluation.comparison import compare, write_comparison
from modeling_fer.evaluation.metrics import write_whole
from modeling_fer.evaluation.report import summary, write_report
from modeling_fer.hub.card import write_card
from modeling_fer.hub.push import push
from modeling_fer.hub.push import summary as summary_of_push
from modeling_fer.labels import CLASSES, IGNORE
from modeling_fer.learning.inference import (
    class_names,
    load_classifier,
    load_model,
    over_all_classes,
    predict_probabilities,
)
from modeling_fer.learning.timelines import predict_folder, predict_split, tracks_of

DEFAULT_MODEL = "runs/demo/round-1/run/model"
TIMELINES = 4  # videos that an evaluation draws
COPY_SIZE = 48  # pixels at which copies of training images are looked for


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


def submission_template(args: argparse.Namespace) -> int:
    """Write a template that lists the frames of a split, those without a face between them included."""
    rows = schema.load(args.data, args.split)[args.split]
    lines = [submission.FILE_HEADER]
    for track in tracks_of(rows, f"{args.data}, {args.split}"):
        numbers = range(int(track.frames[0]), int(track.frames[-1]) + 1)
        lines += [f"{track.video}/{number:05d}.jpg," for number in numbers]
    write_whole(args.out, ("\n".join(lines) + "\n").encode())
    print(f"written: {args.out}")
    return 0


def predict_videos(args: argparse.Namespace, videos: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Frame numbers and probabilities of videos, from a prepared split or from folders of images."""
    if args.data:
        rows = schema.load(args.data, args.split)[args.split]
        probabilities = predict_rows(args.model, rows, args)
        found = tracks_of(rows, f"{args.data}, {args.split}")
        return {track.video: (track.frames, probabilities[track.rows]) for track in found}
    folders: dict[str, Path] = {}
    for path in (p for root in args.frames for p in visible_folders(Path(root))):
        if path.name in folders:
            raise ValueError(f"{folders[path.name]} and {path} are of one video: leave out one of the roots")
        folders[path.name] = path
    model, processor = load_model(args.model)

    def skip(name: str, reason: str) -> None:
        print(f"skipped {name}: {reason}", file=sys.stderr)

    there = [video for video in videos if video in folders]
    predict_one = partial(predict_folder, model, processor, skip=skip, batch_size=args.batch_size)
    return {video: predict_one(folders[video]) for video in tqdm(there, desc="videos", disable=None)}


def submission_make(args: argparse.Namespace) -> int:
    """Predict every frame that a template lists; exit status 1 where a video of it is unknown."""
    if bool(args.data) == bool(args.frames):
        raise ValueError("pass either --frames, folders of images, or --data, a prepared data set")
    template = submission.read_template(args.template)
    submission.layout(args.edition, template)  # before hours of work
    if not Path(args.out).absolute().parent.is_dir():
        raise FileNotFoundError(
            f"no folder {Path(args.out).absolute().parent} to write {args.out} into: make it"
        )
    predictions = predict_videos(args, template.videos)
    report = submission.make(template, predictions, args.out, args.edition, args.fill)
    print(f"{report['rows']} frames of {report['videos']} videos; {report['filled']} filled ({args.fill})")
    for what, told in {
        "unknown_videos": "not among the videos given",
        "videos_without_frames": "without a readable face",
    }.items():
        for video in report[what]:
            print(f"{video} is {told}: filled", file=sys.stderr)
    print(f"written: {args.out}")
    return 1 if report["unknown_videos"] else 0


def submission_check(args: argparse.Namespace) -> int:
    """Compare a submission with its template; exit status 1 where it would be rejected."""
    faults = submission.check(args.file, submission.read_template(args.template), args.edition)
    print("\n".join(faults) if faults else f"{args.file}: good")
    return 1 if faults else 0


def card(args: argparse.Namespace) -> int:
    """Write the model card of a run."""
    print(f"written: {write_card(args.folder, args.repo, args.eval, args.example, args.licence)}")
    return 0


def push_model(args: argparse.Namespace) -> int:
    """Push a model folder to the Hub."""
    options = {
        "adapter_repo": args.adapter_repo,
        "base_model": args.base_model,
        "adapter": not args.no_adapter,
    }
    print(summary_of_push(push(args.folder, args.repo, args.private, args.revision, **options)))
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

    submitting = commands.add_parser("submission", help="challenge submissions").add_subparsers(
        dest="action", required=True
    )
    making = submitting.add_parser("make", help="predict every frame of a template")
    making.add_argument("--model", required=True, help="model folder, of videos or of stills")
    making.add_argument("--frames", nargs="+", help="folders of <video>/<frame>.jpg, cropped and aligned")
    making.add_argument("--data", help="in place of --frames: folder written by `fer data prepare`")
    making.add_argument("--split", default="test", choices=schema.SPLITS, help="of --data")
    making.add_argument("--template", required=True, help="the organisers' list of frames")
    making.add_argument("--out", required=True, help="file to write; a folder for edition 3")
    making.add_argument(
        "--fill",
        default="nearest",
        choices=("nearest", *CLASSES),
        help="for frames without a face: nearest, the class of the nearest predicted frame, or a class",
    )
    making.add_argument("--batch-size", type=at_least_one, default=256)
    making.set_defaults(run=submission_make)
    checking = submitting.add_parser("check", help="compare a submission with its template")
    checking.add_argument("file", help="submission; a folder for edition 3")
    checking.add_argument("--template", required=True, help="the organisers' list of frames")
    checking.set_defaults(run=submission_check)
    listing = submitting.add_parser("template", help="list the frames of a split, to rehearse a submission")
    listing.add_argument("--data", required=True, help="folder written by `fer data prepare`")
    listing.add_argument("--split", default="test", choices=schema.SPLITS)
    listing.add_argument("--out", required=True, help="file to write")
    listing.set_defaults(run=submission_template)
    for one in (making, checking):
        one.add_argument(
            "--edition", type=int, default=8, choices=submission.EDITIONS, help="of the challenge"
        )

    carding = commands.add_parser("card", help="write the card of a model from its run's files")
    carding.add_argument("folder", help="run folder, or model folder")
    carding.add_argument("--repo", help="org/name on the Hub, for the snippets")
    carding.add_argument(
        "--eval", nargs="+", default=[], help="folders of `fer eval` (default: the run's own)"
    )
    carding.add_argument("--example", nargs="+", default=[], help="images for the Hub's widget")
    carding.add_argument("--licence", help="of the weights (default: what the training data leave)")
    carding.set_defaults(run=card)

    pushing = commands.add_parser("push", help="push a model folder to the Hub, in one commit")
    pushing.add_argument("folder", help="model folder (RUN/model)")
    pushing.add_argument("repo", help="org/name")
    pushing.add_argument("--private", action="store_true", help="make it private")
    pushing.add_argument("--revision", help="branch, made if it is not there (default: main)")
    pushing.add_argument("--adapter-repo", help="own repository of the LoRA adapter (default: its folder)")
    pushing.add_argument("--base-model", help="Hub id of what the adapter was trained on")
    pushing.add_argument("--no-adapter", action="store_true", help="leave the adapter out")
    pushing.set_defaults(run=push_model)

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
