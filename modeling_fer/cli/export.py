"""`fer export`: a model in other formats, once it agrees with torch on faces."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modeling_fer.cli.options import find_files
from modeling_fer.data import schema
from modeling_fer.data.drawing.render import SMALLEST
from modeling_fer.data.pixels import UnreadableImageError, decode, decode_split
from modeling_fer.data.sources.synthetic import SyntheticOptions, examples
from modeling_fer.hub.export import FORMATS, export
from modeling_fer.learning.inference import load_model

DRAWN = 64  # faces to compare on, where none are given
MOST = 1000  # of those that are given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grammar."""
    parser.add_argument("model", help="model folder (RUN/model); where it has a card, the export has one")
    parser.add_argument(
        "--format",
        required=True,
        nargs="+",
        choices=FORMATS,
        help="stock ViT, ONNX graphs, or both in one folder. Of videos, the temporal graph is for windows of "
        "the model's num_frames: time and memory grow with the square of the frames, 1.6 GB at 10,000",
    )
    parser.add_argument("--int8", action="store_true", help="onnx, stills: also a graph with int8 weights")
    parser.add_argument("--out", required=True, help="folder to write; it must not be there yet")
    parser.add_argument(
        "--check",
        nargs="+",
        metavar="FACES",
        help="face crops to compare on, up to 1000: images, folders, or a prepared data set (default: drawn)",
    )
    parser.set_defaults(run=export_model)


def export_model(args: argparse.Namespace) -> int:
    """Export a model, and print how far it agrees with torch."""
    model, processor = load_model(args.model)
    faces, told = faces_to_compare(args.check, processor.size["height"])
    agreements = export(model, processor, faces, args.out, args.format, args.int8, args.model)
    print(f"compared on {told}", *agreements, sep="\n")
    if (Path(args.out) / "README.md").exists():
        print(f"card: {args.out}/README.md")
    else:
        print(f"no card: {args.model} has none; write one with `fer card {args.model}`, then export again")
    print(f"written: {args.out}")
    return 0


def faces_to_compare(given: Sequence[str] | None, size: int) -> tuple[np.ndarray, str]:
    """Faces uint8 `(N, 3, size, size)`: of image files or a prepared data set, or drawn where none are given.

    Also says in words which they are.

    A data set's are those of validation, else of test, else of its first split; of more than `MOST` it is
    every second, or every third, ...

    Raises:
        FileNotFoundError: a path does not exist, or holds no images.
        ValueError: an image cannot be read.
    """
    if given is None:
        counts: dict[str, Any] = {"train": DRAWN, "validation": 0, "test": 0, "unlabeled": 0}
        drawn = SyntheticOptions(image_size=max(size, SMALLEST), subjects=DRAWN, imbalance=1, **counts)
        found = np.stack([decode(example.image, size) for example in examples(drawn)])
        return found, f"{len(found)} drawn faces; real ones: --check FACES"
    if len(given) == 1 and any(Path(given[0]).glob("data/*.parquet")):
        splits = schema.load(given[0])
        split = next(name for name in ("validation", "test", *splits) if name in splits)
        count = len(splits[split])
        found = decode_split(splits[split].select(some_of(count)), size, show_progress=False)
        return found, f"{len(found)} of the {count} faces of {given[0]}, {split}"
    paths = list(find_files(given))
    found = np.stack([read_face(paths[place], size) for place in some_of(len(paths))])
    return found, f"{len(found)} of the {len(paths)} faces of {', '.join(given)}"


def some_of(count: int) -> range:
    """Places of at most `MOST` of so many, spread evenly."""
    return range(0, count, -(-count // MOST))


def read_face(path: Path, size: int) -> np.ndarray:
    """Read one face crop."""
    try:
        return decode(path.read_bytes(), size)
    except UnreadableImageError as error:
        raise ValueError(f"{path} cannot be read ({error}): pass readable face crops to --check") from error
