"""Splits by the names that people give them, and drawn ones for data that has none."""

import hashlib
from pathlib import Path

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "val": "validation", "valid": "validation",
    "test": "test",
    "unlabeled": "unlabeled", "unlabelled": "unlabeled",
}  # fmt: skip


def split_named(name: str, place: str) -> str:
    """Return the split that a cell of a csv names; `place` is where, for the message.

    Raises:
        ValueError: it is none of the known names.
    """
    if name.lower() not in SPLIT_NAMES:
        raise ValueError(f"{place}: unknown split {name!r}, known: {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[name.lower()]


def visible_folders(root: Path) -> list[Path]:
    """Return the folders in a folder, sorted, hidden ones left out."""
    return [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]


def split_folders(root: Path) -> dict[Path, str]:
    """Return the folders in `root` that are splits by their names, none if none is.

    Raises:
        ValueError: some are and others are not.
    """
    folders = visible_folders(root)
    splits = {path: SPLIT_NAMES[path.name.lower()] for path in folders if path.name.lower() in SPLIT_NAMES}
    if splits and len(splits) < len(folders):
        other = next(path for path in folders if path not in splits)
        raise ValueError(
            f"{other}: not a split, beside the splits {', '.join(path.name for path in splits)}; "
            f"splits are {', '.join(SPLIT_NAMES)}: rename it or move it away"
        )
    return splits


def video_folders(root: Path) -> tuple[dict[Path, str | None], list[Path]]:
    """Return the folders to look for videos in, each with its split if it is one, and files beside them."""
    splits = split_folders(root)
    beside = [path for path in sorted(root.iterdir()) if path.is_file() and not path.name.startswith(".")]
    return ({**splits}, beside) if splits else ({root: None}, [])


def check_fractions(validation: float, test: float) -> None:
    """Raise a ValueError unless the shares for validation and test leave a rest for train."""
    if min(validation, test) < 0 or validation + test >= 1:
        raise ValueError(
            "validation_fraction and test_fraction must not be negative and must leave a rest for train, "
            f"got {validation} and {test}"
        )


def draw_split(who: str, validation: float, test: float, seed: int) -> str:
    """Draw train, validation or test by a hash of `who` to [0, 1): the same for the same name, always.

    Every class keeps its share on average, and new data moves none that was there.
    """
    digest = hashlib.blake2b(f"{seed} {who}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"
