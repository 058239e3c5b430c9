"""`fer submission`: the files that challenges ask for."""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from modeling_fer.cli.eval import predict_rows
from modeling_fer.cli.options import at_least_one
from modeling_fer.data import schema
from modeling_fer.data.splits import visible_folders
from modeling_fer.evaluation import submission
from modeling_fer.evaluation.metrics import write_whole
from modeling_fer.labels import CLASSES
from modeling_fer.learning.inference import load_model
from modeling_fer.learning.timelines import predict_folder, tracks_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grammar."""
    actions = parser.add_subparsers(dest="action", required=True)
    about = (
        "Exit status 1: a video has no prediction at all, as it is not there or shows no face; it is filled."
    )
    making = actions.add_parser("make", help="predict every frame of a template", description=about)
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
        help="for frames without a face: nearest, the class of the nearest predicted frame of the video, or "
        "a class; a video without any prediction is Neutral under nearest",
    )
    making.add_argument("--batch-size", type=at_least_one, default=256)
    making.set_defaults(run=make)
    checking = actions.add_parser("check", help="compare a submission with its template")
    checking.add_argument("file", help="submission; a folder for edition 3")
    checking.add_argument("--template", required=True, help="the organisers' list of frames")
    checking.set_defaults(run=check)
    listing = actions.add_parser("template", help="list the frames of a split, to rehearse a submission")
    listing.add_argument("--data", required=True, help="folder written by `fer data prepare`")
    listing.add_argument("--split", default="test", choices=schema.SPLITS)
    listing.add_argument("--out", required=True, help="file to write")
    listing.set_defaults(run=list_template)
    for one in (making, checking):
        one.add_argument(
            "--edition", type=int, default=8, choices=submission.EDITIONS, help="of the challenge"
        )


def list_template(args: argparse.Namespace) -> int:
    """Write a template that lists the frames of a split, those without a face between them included."""
    rows = schema.load(args.data, args.split)[args.split]
    lines = [submission.FILE_HEADER]
    for track in tracks_of(rows, f"{args.data}, {args.split}"):
        numbers = range(int(track.frames[0]), int(track.frames[-1]) + 1)
        lines += [f"{track.video}/{number:05d}.jpg," for number in numbers]
    write_whole(args.out, ("\n".join(lines) + "\n").encode())
    print(f"written: {args.out}")
    return 0


def make(args: argparse.Namespace) -> int:
    """Predict every frame that a template lists; exit status 1 where a video of it has no prediction at all.

    Such a video is not there, or shows no face: prepared data has neither.
    """
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
    unknown = "not in the data, or without a face" if args.data else "not among the videos given"
    missing = dict.fromkeys(report["unknown_videos"], unknown)
    missing |= dict.fromkeys(report["videos_without_frames"], "without a readable face")
    filled = "Neutral" if args.fill == "nearest" else args.fill
    for video, told in missing.items():
        print(f"{video} is {told}: filled with {filled}", file=sys.stderr)
    print(f"written: {args.out}")
    return 1 if missing else 0


def predict_videos(args: argparse.Namespace, videos: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Frame numbers and probabilities of videos, from a prepared split or from folders of images."""
    if args.data:
        rows = schema.load(args.data, args.split)[args.split]
        probabilities, _ = predict_rows(args.model, rows, args)
        found = tracks_of(rows, f"{args.data}, {args.split}")
        return {track.video: (track.frames, probabilities[track.rows]) for track in found}
    folders: dict[str, Path] = {}
    for root in map(Path, args.frames):
        if not root.is_dir():
            raise FileNotFoundError(
                f"no folder {root}: give --frames folders that hold a folder of images per video"
            )
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


def check(args: argparse.Namespace) -> int:
    """Compare a submission with its template; exit status 1 where it would be rejected."""
    faults = submission.check(args.file, submission.read_template(args.template), args.edition)
    print("\n".join(faults) if faults else f"{args.file}: good")
    return 1 if faults else 0
