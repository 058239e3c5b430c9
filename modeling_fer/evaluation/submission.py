"""ABAW submission files: read the organisers' template, write predictions in its order, check the result.

The template decides which frames are asked for: a video decoder can count one frame less than it, and frames
without a face are asked for like all others.
"""

import codecs
import dataclasses
import re
from array import array
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from modeling_fer.evaluation.metrics import Bools, Ints, write_whole
from modeling_fer.labels import CLASSES, IGNORE, NUM_CLASSES

# "file": one, with a row for each frame. "folder": a file for each video, with a line for each frame.
EDITIONS = {3: "folder", 6: "file", 8: "file"}
FOLDER_HEADER = ",".join(CLASSES)
FILE_HEADER = f"image_location,{FOLDER_HEADER}"
LOCATION = re.compile(r"([^/\\,]+)/([0-9]{1,9})\.(?:jpe?g|png|bmp)", re.IGNORECASE)
CLASS_TEXTS = frozenset(map(str, range(NUM_CLASSES)))
FAULTS_LISTED = 50


@dataclasses.dataclass(frozen=True)
class Template:
    """The N rows of a template, in its order.

    `path`: the file; `locations`: N texts such as `14-30-1920x1080/00001.jpg`; `videos`: names of the videos
    in order of appearance; `video` (N,): which of them a row belongs to; `frame` (N,): its frame number.
    """

    path: Path
    locations: list[str]
    videos: list[str]
    video: NDArray[np.int32]
    frame: Ints

    def __len__(self) -> int:
        return len(self.locations)

    def __iter__(self) -> Iterator[tuple[str, int, str]]:
        """Yield video, frame number and text of each row."""
        for i, location in enumerate(self.locations):
            yield self.videos[self.video[i]], int(self.frame[i]), location

    def rows_by_video(self) -> Iterator[tuple[str, Ints]]:
        """Yield each video and its rows, in order of frame number."""
        order = np.lexsort((self.frame, self.video))
        starts = np.searchsorted(self.video[order], np.arange(1, len(self.videos)))
        yield from zip(self.videos, np.split(order, starts), strict=True)


def read_template(path: str | Path) -> Template:
    """Read the list of frames to predict: a header, then `<video>/<frame>.jpg` a line.

    Trailing commas, blank lines, CRLF and a byte order mark, which some copies have, do no harm.

    Raises:
        ValueError: the text is not UTF-8, the header is another, a row is malformed or comes twice, or there
            is none. The message names the line.
    """
    path = Path(path)
    locations: list[str] = []
    videos: dict[str, int] = {}
    video, frame, line = array("i"), array("q"), array("q")
    header = False
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip().rstrip(",")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: line {number}: not UTF-8 ({error}); convert the file") from error
            if not text:
                continue
            if not header:
                if text not in (FILE_HEADER, "image_location"):
                    raise ValueError(
                        f"{path}: line {number}: expected the header {FILE_HEADER!r}, got {text[:200]!r}; "
                        "is this the template of the expression challenge?"
                    )
                header = True
                continue
            if not (match := LOCATION.fullmatch(text)):
                raise ValueError(
                    f"{path}: line {number}: expected <video>/<frame number>.jpg and nothing but commas "
                    f"behind it, got {text[:200]!r}"
                )
            locations.append(text)
            video.append(videos.setdefault(match[1], len(videos)))
            frame.append(int(match[2]))
            line.append(number)
    if not locations:
        raise ValueError(f"{path}: no frame is listed; expected {FILE_HEADER!r}, then one location a line")
    template = Template(path, locations, list(videos), np.array(video), np.array(frame))
    keys = _keys(template)
    order = np.argsort(keys, kind="stable")
    for i in np.flatnonzero(np.diff(keys[order]) == 0)[:1]:
        first, second = line[order[i]], line[order[i + 1]]
        raise ValueError(f"{path}: line {second}: {locations[order[i + 1]]} is on line {first} already")
    return template


def make(
    template: Template,
    predictions: Mapping[str, tuple[ArrayLike, ArrayLike]],
    out: str | Path,
    edition: int,
    fill: str = "nearest",
) -> dict[str, Any]:
    """Write a submission: every row of the template once, in its order.

    Args:
        template: the frames asked for.
        predictions: video -> frame numbers (n,), in any order, and the classes (n,) or probabilities (n, 8)
            of these frames.
        out: the file to write, for edition 3 the folder; each file appears whole or not at all.
        edition: of the competition, a key of `EDITIONS`.
        fill: what a frame without a prediction gets: `nearest`, the class of the nearest predicted frame of
            its video (of two the earlier), or the name of a class. A video without any prediction gets
            Neutral under `nearest`.

    Returns:
        `edition`, `fill`, `rows`, `videos`; `predicted` and `filled`, rows with a prediction of their own and
        without; `unknown_videos`, of the template but not of `predictions`: a reason not to submit;
        `videos_without_frames`, predicted but for no frame; `unused_videos` and `unused_frames`, predicted
        but not asked for; `classes`: name -> rows.

    Raises:
        ValueError: unknown edition or fill, predictions that do not fit together, or, for edition 3, a
            template that leaves frames out.
    """
    kind = layout(edition, template)
    if fill not in ("nearest", *CLASSES):
        raise ValueError(f"fill must be nearest or one of {', '.join(CLASSES)}, got {fill!r}")
    constant = None if fill == "nearest" else CLASSES.index(fill)
    classes = np.full(len(template), constant or 0)
    unknown, without, predicted, unused = [], [], 0, 0
    for video, rows in template.rows_by_video():
        if video not in predictions:
            unknown.append(video)
            continue
        frames, own = _sorted_classes(video, *predictions[video])
        if not len(frames):
            without.append(video)
            continue
        place, exact = _nearest(frames, template.frame[rows])
        classes[rows] = own[place] if constant is None else np.where(exact, own[place], constant)
        predicted += int(exact.sum())
        unused += len(frames) - int(exact.sum())
    if kind == "file":
        lines = [FILE_HEADER, *map("{},{}".format, template.locations, classes.tolist()), ""]
        write_whole(out, "\n".join(lines).encode())
    else:
        for video, rows in template.rows_by_video():
            lines = [FOLDER_HEADER, *map(str, classes[rows].tolist()), ""]
            write_whole(Path(out) / f"{video}.txt", "\n".join(lines).encode())
    counts = np.bincount(classes, minlength=NUM_CLASSES).tolist()
    return {
        "edition": edition,
        "fill": fill,
        "rows": len(template),
        "videos": len(template.videos),
        "predicted": predicted,
        "filled": len(template) - predicted,
        "unknown_videos": unknown,
        "videos_without_frames": without,
        "unused_videos": sorted(set(predictions) - set(template.videos)),
        "unused_frames": unused,
        "classes": dict(zip(CLASSES, counts, strict=True)),
    }


def check(path: str | Path, template: Template, edition: int) -> list[str]:
    """Find what is wrong with a submission, by reading it back.

    Args:
        path: the file, for edition 3 the folder.
        template: the frames asked for.
        edition: of the competition, a key of `EDITIONS`.

    Returns:
        Faults, each with file, line and remedy; the first 50, then how many more there are. Empty: none.

    Raises:
        ValueError: unknown edition, or, for edition 3, a template that leaves frames out.
    """
    path = Path(path)
    if layout(edition, template) == "file":
        faults = _file_faults(path, template)
    else:
        faults = _folder_faults(path, template)
    listed = list(islice(faults, FAULTS_LISTED))
    more = sum(1 for _ in faults)
    return listed + ([f"{path}: {more} more faults"] if more else [])


def layout(edition: int, template: Template) -> str:
    """How an edition wants its submission; looks whether the template allows it."""
    if edition not in EDITIONS:
        raise ValueError(f"edition must be one of {', '.join(map(str, EDITIONS))}, got {edition}")
    if EDITIONS[edition] == "folder":
        for video, rows in template.rows_by_video():
            if wrong := np.flatnonzero(template.frame[rows] != np.arange(1, len(rows) + 1))[:1].tolist():
                raise ValueError(
                    f"{template.path}: edition {edition} has line i for frame i, but frame {wrong[0] + 1} of "
                    f"{video} is not in the template; give one that lists every frame from 1 on"
                )
    return EDITIONS[edition]


def _sorted_classes(video: str, frames: ArrayLike, values: ArrayLike) -> tuple[Ints, Ints]:
    """Frame numbers, rising, and the class of each, (n,) both."""
    numbers, found = np.asarray(frames), np.asarray(values)
    if numbers.ndim != 1 or found.shape[:1] != numbers.shape or found.shape[1:] not in ((), (NUM_CLASSES,)):
        raise ValueError(
            f"predictions of {video}: expected frame numbers (n,) and classes (n,) or probabilities "
            f"(n, {NUM_CLASSES}), got shapes {numbers.shape} and {found.shape}"
        )
    if found.ndim == 2:
        if not np.isfinite(found).all():
            raise ValueError(f"predictions of {video}: probabilities are NaN or infinite; predict again")
        found = found.argmax(1)
    for what, array_ in (("frame numbers", numbers), ("classes", found)):
        if len(array_) and not np.issubdtype(array_.dtype, np.integer):  # numpy makes an empty list float
            raise ValueError(f"predictions of {video}: {what} must be whole numbers, got {array_.dtype}")
    if len(wrong := np.unique(found[(found < 0) | (found >= NUM_CLASSES)])):
        raise ValueError(
            f"predictions of {video}: expected classes 0 to {NUM_CLASSES - 1}, got {wrong[:5].tolist()}"
        )
    order = np.argsort(numbers, kind="stable")
    numbers, found = numbers[order].astype(np.int64), found[order].astype(np.int64)
    if len(twice := numbers[1:][np.diff(numbers) == 0]):
        raise ValueError(f"predictions of {video}: frame {twice[0]} comes twice; give each frame once")
    return numbers, found


def _nearest(frames: Ints, wanted: Ints) -> tuple[Ints, Bools]:
    """Places (m,) of the nearest of rising `frames` (n,), of two the earlier, and if it is the very one."""
    after = np.searchsorted(frames, wanted).clip(max=len(frames) - 1)
    before = (after - 1).clip(min=0)
    place = np.where(np.abs(wanted - frames[before]) <= np.abs(frames[after] - wanted), before, after)
    return place, frames[place] == wanted


def _keys(template: Template) -> Ints:
    """One number for each pair of video and frame number, (N,)."""
    return template.video.astype(np.int64) * 10**9 + template.frame


def _byte_faults(path: Path) -> Iterator[str]:
    """Faults that show before the text is read: each kind once."""
    number, raw = 0, b""
    first: dict[str, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1 and raw.startswith(codecs.BOM_UTF8):
                first["begins with a byte order mark; save it as UTF-8 without one"] = number
            if raw.endswith(b"\r\n"):
                first.setdefault("ends in CRLF; save the file with line ends of Unix (LF)", number)
            try:
                raw.decode()
            except UnicodeDecodeError:
                first.setdefault("is not UTF-8; save the file as UTF-8", number)
    if not number:
        first["the file is empty; write it again"] = 1
    elif not raw.endswith(b"\n"):
        first["has no line end: the file may be cut off; write it again"] = number
    yield from (f"{path}: line {line}: {fault}" for fault, line in first.items())


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line, without what `_byte_faults` finds."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace")
            yield number, text.removesuffix("\n").removesuffix("\r")


def _class_fault(text: str) -> str | None:
    """What is wrong with a class as it is written."""
    if text in CLASS_TEXTS:
        return None
    if text == str(IGNORE):
        return f"class {IGNORE} stands for no label; a submission has a class for every frame, fill it"
    if re.fullmatch(r"-?[0-9]+", text):
        return f"class {text[:20]} is out of range or has leading zeros; write 0 to {NUM_CLASSES - 1}"
    return f"class {text[:20]!r} is not a whole number; write 0 to {NUM_CLASSES - 1}"


def _file_faults(path: Path, template: Template) -> Iterator[str]:
    """Faults of a submission in one file."""
    if not path.is_file():
        yield f"{path}: no such file; write the submission first"
        return
    yield from _byte_faults(path)
    rows = {location: row for row, location in enumerate(template.locations)}
    keys, videos = np.sort(_keys(template)), {video: i for i, video in enumerate(template.videos)}
    seen, previous = bytearray(len(template)), -1
    for number, text in _lines(path):
        start = f"{path}: line {number}: "
        if number == 1:
            if text != FILE_HEADER:
                yield f"{start}the header is {text[:200]!r}; write {FILE_HEADER!r}"
            continue
        location, *called = text.split(",")
        row = rows.get(location)
        if len(called) != 1:
            what = f"expected 2 columns, got {len(called) + 1}" if text else "the line is blank"
            yield f"{start}{what}; write <video>/<frame number>.jpg,<class>"
        else:
            if fault := _class_fault(called[0]):
                yield start + fault
            if row is None:
                yield start + _location_fault(location, videos, keys)
        if row is None:
            continue
        if seen[row]:
            yield f"{start}{location} comes a second time; remove one of its rows"
        else:
            if row < previous:
                yield f"{start}{location} is out of order; keep to the order of {template.path}"
            seen[row], previous = True, row
    for row, there in enumerate(seen):
        if not there:
            yield f"{path}: line {row + 2}: {template.locations[row]} should be here and is missing; add it"


def _location_fault(location: str, videos: dict[str, int], keys: Ints) -> str:
    """Why a location is not the template's; `keys` are sorted."""
    if not (match := LOCATION.fullmatch(location)):
        return f"{location[:200]!r} is no location; write <video>/<frame number>.jpg"
    if match[1] not in videos:
        return f"video {match[1]!r} is not in the template; remove the row or correct the name"
    key = videos[match[1]] * 10**9 + int(match[2])
    place = int(np.searchsorted(keys, key))
    if place < len(keys) and keys[place] == key:
        return f"{location!r} is spelled otherwise in the template; copy its digits and ending"
    return f"{location!r} is an extra row, the template does not have this frame; remove it"


def _folder_faults(folder: Path, template: Template) -> Iterator[str]:
    """Faults of a submission of one file for each video."""
    if not folder.is_dir():
        yield f"{folder}: no such folder; write the submission first"
        return
    wanted = {f"{video}.txt" for video in template.videos}
    for name in sorted(path.name for path in folder.iterdir() if path.name not in wanted):
        yield f"{folder / name}: is the file of no video in the template; remove it"
    for video, rows in template.rows_by_video():
        path = folder / f"{video}.txt"
        if not path.is_file():
            yield f"{path}: no such file; write one for each video in the template"
            continue
        yield from _byte_faults(path)
        number = 0
        for number, text in _lines(path):
            start = f"{path}: line {number}: "
            if number == 1:
                if text != FOLDER_HEADER:
                    yield f"{start}the header is {text[:200]!r}; write {FOLDER_HEADER!r}"
            elif number > len(rows) + 1:
                yield f"{start}an extra line, the template has {len(rows)} frames of {video}; remove it"
            elif not text:
                yield f"{start}the line is blank; write one class a line"
            elif fault := _class_fault(text):
                yield start + fault
        for frame in range(max(number, 1), len(rows) + 1):
            yield f"{path}: line {frame + 1}: the class of frame {frame} is missing; add it"
