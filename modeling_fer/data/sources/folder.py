"""Images in folders: a folder per class, or a metadata.csv, or any tree of unlabelled faces.

    ROOT/<split>/<class name>/*.jpg     ROOT/<split>/metadata.csv
    ROOT/<class name>/*.jpg             ROOT/metadata.csv

metadata.csv has a column file_name (relative to its own folder), and any of expression, subject, split, video
and frame. Files are taken as they are, byte for byte. What else lies among the images is counted as rejected,
hidden files aside.
"""

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from modeling_fer.data.pixels import ENDINGS
from modeling_fer.data.schema import Example, Item, Rejected
from modeling_fer.data.splits import check_fractions, draw_split, split_folders, split_named
from modeling_fer.labels import CONTEMPT_RULES, IGNORE, class_id

METADATA = "metadata.csv"


@dataclasses.dataclass
class FolderOptions:
    """Where the images lie, and how to split them if they are not split yet."""

    root: str = dataclasses.field(metadata={"help": "folder of images, see the layouts above"})
    unlabeled: bool = dataclasses.field(
        default=False,
        metadata={"help": "take every image, at any depth, as an unlabelled face; ignore labels"},
    )
    validation_fraction: float = dataclasses.field(
        default=0.1,
        metadata={"help": "share for validation, by subject if known, where the folder has no splits"},
    )
    test_fraction: float = dataclasses.field(
        default=0.1, metadata={"help": "share for test, by subject if known, where the folder has no splits"}
    )
    seed: int = dataclasses.field(default=0, metadata={"help": "another seed draws another split"})
    contempt: str = dataclasses.field(
        default="drop",
        metadata={
            "help": "contempt has no class of ours: leave such images out, or call them Other",
            "choices": list(CONTEMPT_RULES),
        },
    )
    name: str | None = dataclasses.field(
        default=None,
        metadata={"help": "name of the data set in the source column; default: the folder's name"},
    )

    def __post_init__(self) -> None:
        check_fractions(self.validation_fraction, self.test_fraction)
        if self.contempt not in CONTEMPT_RULES:
            raise ValueError(f"contempt must be one of {', '.join(CONTEMPT_RULES)}, got {self.contempt!r}")


@dataclasses.dataclass(frozen=True)
class _Row:
    """One file as a folder or a metadata.csv lists it. `place` names where it is listed, for messages."""

    path: Path
    place: str
    split: str | None = None
    expression: str | None = None
    subject: str | None = None
    video: str | None = None
    frame: int | None = None
    is_image: bool = True  # by its name; what a metadata.csv lists always is


def examples(options: FolderOptions) -> Iterator[Item]:
    """Yield every image of a folder, in the order of metadata.csv or of the names.

    Labelled images without a split are split by a hash of their subject, or of their name where the subject
    is not known: nobody is in two splits, every class keeps its share on average, and a new file moves no
    other. Images without a label are `unlabeled` ones where they are not held out; held-out images without a
    label are rejected.

    Raises:
        ValueError: an unknown class, split or layout; the message names the file, the row and the remedy.
        FileNotFoundError: the folder is not there.
    """
    root = Path(options.root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: give the folder that holds the images")
    for row in _rows(root, options):
        origin = row.path.relative_to(root).as_posix() if row.path.is_relative_to(root) else str(row.path)
        if not row.is_image:
            yield Rejected(origin, "not an image file")
            continue
        split, label = "unlabeled", IGNORE
        if not options.unlabeled and row.split != "unlabeled":
            split = row.split or _draw(row, origin, options)
            if row.expression is not None:
                try:
                    known = class_id(row.expression, options.contempt)
                except ValueError as error:
                    raise ValueError(
                        f"{row.place}: {error}. Rename it, or take all images as unlabelled with --unlabeled"
                    ) from error
                if known is None:
                    yield Rejected(origin, "contempt (no class of ours)")
                    continue
                label = known
            elif row.split in ("validation", "test"):
                yield Rejected(origin, f"no label in {split}")
                continue
            else:
                split = "unlabeled"
        image = read_image(row.path, origin)
        if isinstance(image, Rejected):
            yield image
            continue
        yield Example(
            split=split,
            image=image,
            origin=origin,
            source=options.name or root.resolve().name,
            expression=label,
            subject=row.subject,
            video=row.video,
            frame=row.frame,
        )


def read_image(path: Path, origin: str) -> bytes | Rejected:
    """Return the bytes of an image file, or why there are none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return Rejected(origin, "missing file")
    except OSError:
        return Rejected(origin, "unreadable")


def _draw(row: _Row, name: str, options: FolderOptions) -> str:
    """Return the split of an image, the same for all images of a subject."""
    who = f"subject {row.subject}" if row.subject is not None else f"file {name}"
    return draw_split(who, options.validation_fraction, options.test_fraction, options.seed)


def _rows(root: Path, options: FolderOptions) -> Iterator[_Row]:
    """List the images of a folder by whichever layout it has."""
    if (root / METADATA).is_file():
        yield from _metadata(root, None, options.unlabeled)
        return
    if options.unlabeled:
        yield from _tree(root, None)
        return
    splits = split_folders(root)
    if not splits:
        yield from _class_folders(root, None)
    for path, split in splits.items():
        if (path / METADATA).is_file():
            yield from _metadata(path, split, options.unlabeled)
        elif split == "unlabeled":
            yield from _tree(path, split)
        else:
            yield from _class_folders(path, split)


def _class_folders(folder: Path, split: str | None) -> Iterator[_Row]:
    """List the images of one folder per class."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _tree(path, split, path.name)
        elif path.suffix.lower() in ENDINGS:
            raise ValueError(
                f"{path}: an image outside a class folder: put it into one, list it in {folder / METADATA}, "
                "or take all images as unlabelled with --unlabeled"
            )


def _tree(folder: Path, split: str | None, expression: str | None = None) -> Iterator[_Row]:
    """List the files below a folder, sorted; hidden ones and any metadata.csv are left out."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.name != METADATA and path.is_file():
            is_image = path.suffix.lower() in ENDINGS
            yield _Row(path, str(folder), split, expression, is_image=is_image)


def _metadata(folder: Path, split: str | None, unlabeled: bool) -> Iterator[_Row]:
    """List the rows of a metadata.csv; `split` is the split of the folder that it lies in, if any."""
    path = folder / METADATA
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            needed = ["file_name"] if unlabeled or split == "unlabeled" else ["file_name", "expression"]
            missing = [name for name in needed if name not in reader.fieldnames]
            if missing:
                raise ValueError(
                    f"{path} lacks the column {missing[0]}, it has {', '.join(reader.fieldnames) or 'none'}: "
                    "name it in the first line"
                    + (", or take all images as unlabelled with --unlabeled" * (missing[0] == "expression"))
                )
            for number, cells in enumerate(reader, start=1):
                yield _metadata_row(folder, f"{path} row {number}", cells, split)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({error}): save it as csv in UTF-8") from error


def _metadata_row(folder: Path, place: str, cells: dict[str, str | None], split: str | None) -> _Row:
    filled = {
        name: value.strip() for name, value in cells.items() if isinstance(value, str) and value.strip()
    }
    if "file_name" not in filled:
        raise ValueError(f"{place}: no file_name: fill it in or remove the row")
    named = split_named(filled["split"], place) if "split" in filled else None
    frame = filled.get("frame")
    if frame is not None and not frame.isdecimal():
        raise ValueError(f"{place}: frame {frame!r} is not a whole number")
    return _Row(
        path=folder / filled["file_name"],
        place=place,
        split=split or named,
        expression=filled.get("expression"),
        subject=filled.get("subject"),
        video=filled.get("video"),
        frame=int(frame) if frame is not None else None,
    )
