"""What video data sets share: names of recordings and frames, images listed by frame, csv files of labels."""

import csv
import dataclasses
import itertools
import math
import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from modeling_fer.data.pixels import ENDINGS
from modeling_fer.data.report import HELD_OUT
from modeling_fer.data.schema import Rejected, Remark
from modeling_fer.data.splits import split_named
from modeling_fer.labels import IGNORE, class_id

TRACKS = ("_left", "_right")  # the names of two people's tracks in one recording end so
LAST_FRAME = 2**31 - 1  # what the column holds
NO_LABEL = ("", str(IGNORE))


def recording(video: str) -> str:
    """Return the recording that a video is of: its name without a final `_left` or `_right`.

    Two tracks of one recording share the place, the time and often the mood: keep them in one split and one
    fold, and resample them together.
    """
    for track in TRACKS:
        if video.endswith(track):
            return video.removesuffix(track) or video
    return video


def groups_of(videos: Sequence[str], subjects: Sequence[str | None]) -> dict[str, str]:
    """What must not be parted, by video: its recording, with all that show a person of it, and so on.

    A group is named by the first of its recordings, in the order of the alphabet.

    Args:
        videos, subjects: of each row; None: not known who it is.
    """
    above: dict[str, str] = {}  # of a recording another one of its group, further up in the alphabet

    def first(name: str) -> str:
        while (other := above.setdefault(name, name)) != name:
            name = other
        return name

    met: dict[str, str] = {}  # of a subject one of the recordings
    for video, subject in dict.fromkeys(zip(videos, subjects, strict=True)):
        own = first(recording(video))
        if subject is not None:
            other = first(met.setdefault(subject, own))
            above[max(own, other)] = min(own, other)
    return {video: first(recording(video)) for video in dict.fromkeys(videos)}


def crossing_recordings(splits: Mapping[str, str]) -> Iterator[Remark]:
    """Warn of recordings with tracks in two splits, one of them held out; `splits` is by video."""
    tracks: dict[str, dict[str, str]] = {}
    for video, split in splits.items():
        tracks.setdefault(recording(video), {})[video] = split
    met = [found for found in tracks.values() if len(set(found.values())) > 1]
    crossing = [found for found in met if not set(HELD_OUT).isdisjoint(found.values())]
    if crossing:
        first = ", ".join(f"{video} in {split}" for video, split in crossing[0].items())
        yield Remark(
            f"warning: recordings with tracks in two splits: {len(crossing):,} (one of them: {first}); "
            "scores there flatter the model"
        )


def list_frames(
    folder: Path, video: str, first: int = 0, digits_only: bool = False
) -> tuple[dict[int, str], list[Rejected]]:
    """List the images of one video's folder: file names by frame number, in order, and what is no frame.

    The frame number is what the name ends in before the dot, as in 00012.jpg or frame_12.png. Hidden files
    are passed over.

    Args:
        folder: where the images lie.
        video: the video's name, for the origin of what is rejected.
        first: the number of a first frame; lower ones are no frames.
        digits_only: the name before the dot is the number and nothing else.
    """
    frames: dict[int, str] = {}
    rejected = []
    for name in sorted(os.listdir(folder)):
        stem, ending = os.path.splitext(name)
        if name.startswith("."):
            continue
        found = re.search("^[0-9]+$" if digits_only else "[0-9]+$", stem)
        number = int(found[0]) if found else -1
        if ending.lower() not in ENDINGS:
            rejected.append(Rejected(f"{video}/{name}", "not an image file"))
        elif not first <= number <= LAST_FRAME:
            rejected.append(Rejected(f"{video}/{name}", "no frame number in the name"))
        elif number in frames:
            rejected.append(Rejected(f"{video}/{name}", "a second image of the frame"))
        else:
            frames[number] = name
    return dict(sorted(frames.items())), rejected


@dataclasses.dataclass
class VideoLabels:
    """What a csv says of one video: its split, its subject, and the class of each labelled span of it.

    A span holds frames or times from `start` up to and not with `end`, in the csv's unit: a frame number n is
    the span from n to n + 1, a row for the whole video goes from minus to plus infinity.
    """

    file: str
    unit: str  # frame, second or video
    split: str | None = None
    subject: str | None = None
    contempt: int = 0  # rows of contempt without a class of ours
    starts: array = dataclasses.field(default_factory=lambda: array("d"))
    ends: array = dataclasses.field(default_factory=lambda: array("d"))
    classes: array = dataclasses.field(default_factory=lambda: array("b"))
    rows: array = dataclasses.field(default_factory=lambda: array("i"))
    met: bytearray = dataclasses.field(default_factory=bytearray)  # spans that some frame was in

    def add(self, row: int, start: float, end: float, label: int) -> None:
        """Add the span of one row."""
        self.starts.append(start)
        self.ends.append(end)
        self.classes.append(label)
        self.rows.append(row)
        self.met.append(0)

    def sort(self) -> None:
        """Put the spans in order.

        Raises:
            ValueError: two of them overlap; the message names the rows.
        """
        order = sorted(range(len(self.starts)), key=self.starts.__getitem__)
        for before, after in itertools.pairwise(order):
            if self.starts[after] < self.ends[before]:
                raise ValueError(
                    f"{self.file} row {self.rows[after]} labels what row {self.rows[before]} labels already: "
                    "keep one of them"
                )
        for name in ("starts", "ends", "classes", "rows"):
            values = getattr(self, name)
            setattr(self, name, array(values.typecode, (values[index] for index in order)))

    def at(self, frame: int, time: float = 0.0) -> int:
        """Return the class of a frame by its number or its time in seconds, -1 without one."""
        place = time if self.unit == "second" else frame
        index = bisect_right(self.starts, place) - 1
        if index < 0 or place >= self.ends[index]:
            return IGNORE
        self.met[index] = 1
        return self.classes[index]

    def unmet(self) -> Iterator[Rejected]:
        """Yield the rows that `at` was never asked about."""
        for row, met in zip(self.rows, self.met, strict=True):
            if not met:
                yield Rejected(f"{Path(self.file).name} row {row}", "no image of the frame")


def read_labels(
    path: Path,
    contempt: str = "drop",
    video: str | None = None,
    endings: tuple[str, ...] = (),
    seconds: bool = False,
) -> dict[str, VideoLabels]:
    """Read labels of videos from a csv, by video.

    The columns are video and expression, and frame for a row a frame, start and end (in seconds) for a row an
    interval, or neither for a row a video; split and subject may stand beside them. Expressions are names; an
    empty one, or -1, is no label.

    Args:
        path: the csv.
        contempt: what to do with contempt; under "drop" its frames stay without a label.
        video: the video that all rows are of, where there is no column for it.
        endings: endings of files that are no part of a video's name.
        seconds: take intervals; otherwise they are an error.

    Raises:
        ValueError: something is missing or wrong; the message names the file, the row and the remedy.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give the path of the csv with the labels")
    found: dict[str, VideoLabels] = {}
    known: dict[str, int | None] = {}  # a spelling is looked up once
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            unit = _unit(path, reader.fieldnames, video is None, seconds)
            for row, cells in enumerate(reader, start=1):
                place = f"{path} row {row}"
                filled = {name: text.strip() for name, text in cells.items() if isinstance(text, str)}
                name = _video(filled.get("video", "") if video is None else video, endings, place)
                if name not in found:
                    found[name] = VideoLabels(str(path), unit)
                labels = found[name]
                _describe(labels, filled, place)
                text = filled.get("expression", "")
                if text in NO_LABEL:
                    continue
                if text not in known:
                    known[text] = _class(text, contempt, place)
                label = known[text]
                if label is None:
                    labels.contempt += 1
                else:
                    labels.add(row, *_span(unit, filled, place), label)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({error}): save it as csv in UTF-8") from error
    for labels in found.values():
        labels.sort()
    return found


def contempt_remark(labels: Mapping[str, VideoLabels]) -> Iterator[Remark]:
    """Say how many rows of contempt were left without a label."""
    if rows := sum(found.contempt for found in labels.values()):
        yield Remark(
            f"Rows of contempt, which is no class of ours: {rows:,}; their frames are there without a label "
            "(--contempt other calls them Other)."
        )


def _unit(path: Path, columns: list[str], with_video: bool, seconds: bool) -> str:
    """Return what a row of the csv is about, by its columns."""
    missing = [name for name in ("video", "expression") if name not in columns]
    if not with_video and "video" in missing:
        missing.remove("video")
    if not with_video and "frame" not in columns:
        missing.append("frame")
    timed = [name for name in ("start", "end") if name in columns]
    missing += [name for name in ("start", "end") if len(timed) == 1 and name not in timed]
    if missing:
        raise ValueError(
            f"{path} lacks the column {missing[0]}, it has {', '.join(columns) or 'none'}: "
            "name it in the first line"
        )
    if timed and "frame" in columns:
        raise ValueError(f"{path} has the columns frame, start and end: label frames or intervals, not both")
    if timed and not seconds:
        raise ValueError(f"{path} labels intervals in seconds, but images have no time: give a column frame")
    return "frame" if "frame" in columns else "second" if timed else "video"


def _video(text: str, endings: tuple[str, ...], place: str) -> str:
    name = text.replace("\\", "/")
    stem, ending = os.path.splitext(name)
    name = stem if ending.lower() in endings else name
    if not name:
        raise ValueError(f"{place}: no video: fill it in or remove the row")
    return name


def _describe(labels: VideoLabels, filled: dict[str, str], place: str) -> None:
    """Note the split and the subject of a row's video."""
    for column in ("split", "subject"):
        if not (text := filled.get(column)):
            continue
        value = split_named(text, place) if column == "split" else text
        if getattr(labels, column) not in (None, value):
            raise ValueError(
                f"{place}: {column} {value!r}, but {getattr(labels, column)!r} in a row before: a video has "
                f"one {column}"
            )
        setattr(labels, column, value)


def _class(text: str, contempt: str, place: str) -> int | None:
    try:
        return class_id(text, contempt)
    except ValueError as error:
        raise ValueError(
            f"{place}: {error}. Name the class (every data set numbers them differently), or give -1 for none"
        ) from error


def _span(unit: str, filled: dict[str, str], place: str) -> tuple[float, float]:
    """Return where the label of a row begins and ends, in the csv's unit."""
    if unit == "video":
        return -math.inf, math.inf
    if unit == "frame":
        text = filled.get("frame", "")
        if not re.fullmatch("[0-9]{1,10}", text) or int(text) > LAST_FRAME:
            raise ValueError(f"{place}: frame {text!r} is not a frame number")
        return int(text), int(text) + 1
    try:
        start, end = float(filled.get("start", "")), float(filled.get("end", ""))
    except ValueError as error:
        raise ValueError(f"{place}: start and end must be seconds ({error})") from error
    if not start < end or math.isinf(start):  # NaN is caught as well
        raise ValueError(f"{place}: the interval from {start} to {end} is empty: give seconds, start < end")
    return start, end
