"""One schema for every split of every source, and the folder layout that holds a prepared data set."""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, DatasetDict, Features, Image, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from modeling_fer.labels import CLASSES, IGNORE

SPLITS = ("train", "validation", "test", "unlabeled", "pseudo")

FEATURES = Features(
    {
        "image": Image(),  # a face crop, encoded (PNG or JPEG)
        "expression": ClassLabel(names=list(CLASSES)),  # -1: no label
        "soft_label": List(Value("float32")),  # votes over the 8 classes, sum 1; null where unknown
        "source": Value("string"),  # name of the data set
        "subject": Value("string"),  # anonymous person id; null where unknown
        "video": Value("string"),  # video id; null for stills
        "frame": Value("int32"),  # frame number in the video; null for stills
    }
)


@dataclasses.dataclass(frozen=True)
class Example:
    """One face crop on its way from a source into a split.

    `image` is encoded bytes (PNG, JPEG, ...) exactly as they are to be stored. `origin` says where it is from
    ("fer2013.csv row 17", a file path) and is used in messages and reports, never stored in the data.
    """

    split: str
    image: bytes
    origin: str
    source: str
    expression: int = IGNORE
    soft_label: tuple[float, ...] | None = None
    subject: str | None = None
    video: str | None = None
    frame: int | None = None


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A row that a source read but did not use, with the reason; counted and listed in the report.

    Sources reject what a stated rule leaves out ("contempt", "no majority"). `reason="unreadable"` is
    reserved for images that cannot be decoded.
    """

    origin: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Remark:
    """A sentence of a source about its own rows (what a rule kept, say), put into the report as it is."""

    text: str


Item = Example | Rejected | Remark  # what a source's `examples(options)` yields


def load(path: str | Path, split: str | None = None) -> DatasetDict:
    """Load a prepared folder as a `DatasetDict`, all splits or one.

    Raises:
        FileNotFoundError: the folder does not hold prepared parquet files, or not the wanted split.
        ValueError: a file cannot be read or lacks a column; the message names it, and what to do.
    """
    folder = Path(path)
    files = {s: sorted(str(f) for f in folder.glob(f"data/{s}-*.parquet")) for s in SPLITS}
    files = {s: found for s, found in files.items() if found and split in (None, s)}
    if not files:
        what = f"split {split!r}" if split else "data/<split>-*.parquet"
        raise FileNotFoundError(
            f"{folder} holds no {what}; write it with `fer data prepare SOURCE --out {folder}`"
        )
    again = f"write it again with `fer data prepare SOURCE --out {folder} --overwrite`"
    for file in (file for found in files.values() for file in found):
        try:
            columns = pq.read_schema(file).names
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} cannot be read ({_line(error)}): {again}") from error
        # `load_dataset` would fill them with nulls.
        if missing := [name for name in FEATURES if name not in columns]:
            raise ValueError(f"{file} lacks {', '.join(missing)}: {again}")
    try:
        # Files of pseudo-labels have columns of their own besides these.
        return load_dataset("parquet", data_files=files, features=FEATURES, columns=list(FEATURES))
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno is not None:  # a full disk, say: the data may be whole
            raise cause from None
        raise ValueError(f"{folder} cannot be loaded ({_line(cause or error)}): {again}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
