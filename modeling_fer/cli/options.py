"""What several commands take."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from modeling_fer.data.pixels import ENDINGS

SHIPPED = "checkpoints/abaw-fer-small"  # comes with the repository
DEFAULT_MODEL = str(Path(__file__).parents[2] / SHIPPED)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add `--model`."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"model folder (default: {SHIPPED} of the repository, a small model of stills)",
    )


def add_mirror(parser: argparse.ArgumentParser) -> None:
    """Add `--mirror`; None where it is not given, so that the model's configuration decides."""
    parser.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        help="classify each face together with its mirror image: a little more accurate, twice the time, and "
        "calibrated only if the model was so (default: as the model's configuration says)",
    )


def at_least_one(text: str) -> int:
    """A whole number from 1 up, as a command-line value."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def find_files(
    paths: Sequence[str], endings: tuple[str, ...] = ENDINGS, what: str = "images"
) -> Iterator[Path]:
    """Files among the paths, folders searched whole for files of these endings, in a stable order.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no such file.
    """
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings and p.is_file())
            if not found:
                raise FileNotFoundError(f"{path} holds no {what} ({', '.join(endings)})")
            yield from found
        elif path.exists():
            yield path
        else:
            raise FileNotFoundError(f"no such file or folder: {path}")
