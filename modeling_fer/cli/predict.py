"""`fer predict`: the expression of faces in images and videos."""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from modeling_fer import FerForVideoClassification
from modeling_fer.cli.options import add_mirror, add_model, at_least_one, find_files
from modeling_fer.cli.videos import predict_video, read_frames
from modeling_fer.data.augment import Normalize
from modeling_fer.data.pixels import ENDINGS, UnreadableImageError, decode
from modeling_fer.data.sources.videos import ENDINGS as VIDEO_ENDINGS
from modeling_fer.learning.inference import class_names, load_model, predict_probabilities
from modeling_fer.video import faces

Box = tuple[float, float, float, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grammar."""
    parser.add_argument("paths", nargs="+", help="images or videos, or folders of them")
    add_model(parser)
    add_mirror(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with all probabilities")
    parser.add_argument(
        "--detect",
        action="store_true",
        help="find the faces first; a face of a video has a number that it keeps from frame to frame "
        "(default: all are crops)",
    )
    parser.add_argument("--detector", help="ONNX file of YuNet (default: that of the Hub's cache)")
    parser.add_argument("--batch-size", type=at_least_one, default=64)
    parser.epilog = (
        "What cannot be read is named and left out. Exit status 1: of some files, nothing could be read."
    )
    parser.set_defaults(run=predict)


def predict(args: argparse.Namespace) -> int:
    """Print a line or a JSON object for each face; name and skip what cannot be read."""
    if args.detector and not args.detect:
        raise ValueError("--detector names the face detector's file: pass --detect as well")
    model, processor = load_model(args.model, args.mirror)
    paths = list(find_files(args.paths, (*ENDINGS, *VIDEO_ENDINGS), "images or videos"))
    stills = [path for path in paths if not is_video(path)]
    if stills and isinstance(model, FerForVideoClassification):
        raise ValueError(
            f"{args.model} is a model of videos, {stills[0]} is none: pass videos "
            f"({', '.join(VIDEO_ENDINGS)}), or the image model that it was made from"
        )
    detector = None
    if args.detect:
        faces.Crop.from_dict(model.config.crop)  # before a detector is fetched
        detector = faces.Detector(faces.find_detector(args.detector))
    damaged: set[str] = set()
    told: set[str] = set()  # of which there is something to say

    def skip(path: Path, what: str, reason: str) -> None:
        print(f"skipped {what}: {reason}", file=sys.stderr)
        damaged.add(str(path))

    for films, group in itertools.groupby(paths, is_video):
        tell = partial(of_videos if films else of_images, model, processor, group, detector, skip)
        for said in tell(args.batch_size):
            print(json.dumps(said) if args.json else as_text(said), flush=True)
            told.add(said["file"])
    if in_part := damaged & told:
        print(f"{len(in_part)} of {len(paths)} files could be read in part only", file=sys.stderr)
    if unread := damaged - told:
        print(f"{len(unread)} of {len(paths)} files could not be read", file=sys.stderr)
    return 1 if unread else 0


def is_video(path: Path) -> bool:
    """Whether a file is one of a video, by its name."""
    return path.suffix.lower() in VIDEO_ENDINGS


def of_videos(
    model: Any,
    processor: Any,
    paths: Iterable[Path],
    detector: faces.Detector | None,
    skip: Callable[[Path, str, str], None],
    batch_size: int,
) -> Iterator[dict[str, Any]]:
    """Yield what is said of each face of each frame of video files, or that there is none."""
    for path in paths:
        frames = tqdm(read_frames(path, partial(skip, path)), desc=path.name, unit="frame", disable=None)
        for row in predict_video(model, processor, frames, detector, batch_size, every_face=True):
            face = {"face": row.face, "box": whole(row.box)} if detector else {}
            place = {"file": str(path), "frame": row.frame, "seconds": round(row.seconds, 3)}
            yield place | face | scored(row.probabilities)


def of_images(
    model: Any,
    processor: Any,
    paths: Iterable[Path],
    detector: faces.Detector | None,
    skip: Callable[[Path, str, str], None],
    batch_size: int,
) -> Iterator[dict[str, Any]]:
    """Yield what is said of each face of image files, or that there is none."""
    names, size = class_names(model), processor.size["height"]
    normalize = Normalize(processor.image_mean, processor.image_std)
    results = read_crops(paths, size)
    if detector:
        results = faces.crops(paths, detector, size, faces.Crop.from_dict(model.config.crop))
    while batch := list(itertools.islice(results, batch_size)):
        pixels = [result.pixels for result in batch if result.pixels is not None]
        rows = iter(predict_probabilities(model, np.stack(pixels), normalize) if pixels else ())
        for result in batch:
            file = str(result.image)
            if result.pixels is None and result.reason != faces.NO_FACE:
                skip(Path(file), file, str(result.reason))
                continue
            scores = dict(zip(names, next(rows).tolist(), strict=True)) if result.pixels is not None else {}
            box = {"box": whole(result.face.box if result.face else None)} if detector else {}
            yield {"file": file, **box, **scored(scores)}


def read_crops(paths: Iterable[Path], size: int) -> Iterator[faces.Result]:
    """Yield what each image file gives as the crop of a face."""
    for path in paths:
        try:
            yield faces.Result(path, pixels=decode(path.read_bytes(), size))
        except (OSError, UnreadableImageError) as error:
            yield faces.Result(path, reason=str(error))


def whole(box: Box | None) -> list[int] | None:
    """A box in whole pixels."""
    return None if box is None else [round(value) for value in box]


def scored(probabilities: dict[str, float]) -> dict[str, Any]:
    """The most probable class and all probabilities, of JSON's types; None where there is no face."""
    best = max(probabilities, key=probabilities.__getitem__, default=None)
    rounded = {name: round(value, 4) for name, value in probabilities.items()}
    return {"expression": best, "probabilities": rounded or None}


def as_text(said: dict[str, Any]) -> str:
    """A result as file, class and its probability; of a video with seconds, of found faces number and box."""
    cells = [said["file"]]
    if "seconds" in said:
        cells.append(f"{said['seconds']:.3f}")
    if said["expression"] is None:
        return "\t".join([*cells, faces.NO_FACE])
    if "face" in said:
        cells.append(str(said["face"]))
    if "box" in said:
        cells.append(",".join(map(str, said["box"])))
    return "\t".join([*cells, said["expression"], f"{said['probabilities'][said['expression']]:.2f}"])
