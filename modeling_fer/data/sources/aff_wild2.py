"""Aff-Wild2, the set of the expression (EXPR) track of the ABAW competitions: videos, a label per frame.

    IMAGES/<video>/00001.jpg                            cropped_aligned, cropped_aligned_new_50_vids, ...
    ANNOTATIONS/EXPR_.../{Train,Validation}_Set/<video>.txt

Kollias et al., "The 6th Affective Behavior Analysis in-the-wild (ABAW) Competition", 2024 (arXiv 2402.19344).
Line i below the header of a label file is the class of frame i, which is the image of that number; -1 is no
label. Frames without a detected face have no image. The data is given out by its authors, under an agreement.
"""

import dataclasses
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from modeling_fer.data.schema import Example, Item, Rejected, Remark
from modeling_fer.data.sources.folder import read_image
from modeling_fer.data.splits import visible_folders
from modeling_fer.data.videos import crossing_recordings, list_frames
from modeling_fer.labels import CLASSES, IGNORE

CHALLENGE = "expr"  # EXPR_Recognition_Challenge, EXPR_Classification_Challenge, EXPR_Set: by edition
# Train_Set or Training_Set by edition, Validation_Set; compared without underscores, spaces and case.
SETS = {
    "trainset": "train", "trainingset": "train", "train": "train",
    "validationset": "validation", "valset": "validation", "validation": "validation",
}  # fmt: skip
HEADERS = (CLASSES, CLASSES[:-1])  # the editions of 2020 and 2021 had no Other
TEMPLATE = "image_location"  # what the header of a submission template starts with
NAME_ENDINGS = (".txt", ".mp4", ".avi")  # of videos in a test list, sometimes

# Label files of the validation split, and labelled frames with an image by class id, as users of the 6th
# edition's label files and aligned images have counted them.
KNOWN_VIDEOS = {"validation": 70}
KNOWN_FRAMES = {
    "train": (177198, 16573, 10771, 9080, 95463, 78751, 31615, 165866),
    "validation": (82258, 6126, 5296, 8408, 34511, 25157, 12332, 106444),
}


@dataclasses.dataclass
class AffWild2Options:
    """Where the images, the labels and the list of the test videos lie."""

    images: str = dataclasses.field(
        metadata={"help": "folder of a folder of images per video, or several, separated by commas"}
    )
    annotations: str | None = dataclasses.field(
        default=None,
        metadata={"help": "folder with Train_Set and Validation_Set, or with the EXPR_... folder of them"},
    )
    test_list: str | None = dataclasses.field(
        default=None,
        metadata={"help": "videos without labels for the test split: their names, or a submission template"},
    )
    frame_step: int = dataclasses.field(
        default=1, metadata={"help": "take the first of every so many frames, and leave the others out"}
    )

    def __post_init__(self) -> None:
        if self.annotations is None and self.test_list is None:
            raise ValueError("give annotations, the folder with the labels, or test_list, or both")
        if self.frame_step < 1:
            raise ValueError(f"frame_step must be at least 1, got {self.frame_step}")


@dataclasses.dataclass
class _Found:
    """What there is of one split."""

    videos: int = 0
    without_images: int = 0  # videos
    images: int = 0
    labelled: Counter[int] = dataclasses.field(default_factory=Counter)  # frames with an image, by class id
    missing: int = 0  # images of labelled frames
    shorter: int = 0  # label files that end before the last image
    after_labels: int = 0  # images after the end of their label file
    longer: int = 0  # label files that go on after the last image
    not_found: int = 0  # images of frames that the template lists

    def add(self, frames: Mapping[int, str], labels: array | None, listed: Iterable[int]) -> None:
        """Count one video by its images, its labels if it has a file of them, and the template's frames."""
        self.videos += 1
        self.without_images += not frames
        self.images += len(frames)
        self.not_found += len(set(listed) - frames.keys())
        if labels is None:
            return
        for number, label in enumerate(labels, start=1):
            if label != IGNORE and number in frames:
                self.labelled[label] += 1
            self.missing += label != IGNORE and number not in frames
        after = sum(number > len(labels) for number in frames)
        self.after_labels += after
        self.shorter += after > 0
        self.longer += len(labels) > max(frames, default=len(labels))


def examples(options: AffWild2Options) -> Iterator[Item]:
    """Yield train, validation and test, video by video, frame by frame, with or without a label.

    A labelled frame without an image is rejected, as is a video without any. Remarks count what was found in
    each split, and compare a whole split with the published counts.

    Raises:
        ValueError: a file or a folder is not what it should be; the message names it, and the remedy.
        FileNotFoundError: a file or a folder is not there.
    """
    folders = _image_folders(options.images)
    files: dict[str, tuple[Path, str]] = {}
    for path, split in _label_files(options.annotations):
        if path.suffix != ".txt":
            yield Rejected(f"{path.parent.name}/{path.name}", "not a label file")
        elif path.stem in files:
            raise ValueError(f"{files[path.stem][0]} and {path} label one video: remove one of them")
        else:
            files[path.stem] = path, split
    labels = {video: _labels(path) for video, (path, _) in files.items()}  # all are read before any image
    listed = _test_list(Path(options.test_list)) if options.test_list else {}
    if both := sorted(files.keys() & listed.keys()):
        raise ValueError(
            f"{options.test_list} lists {both[0]}, but {files[both[0]][0]} labels it: remove one"
        )
    splits = {video: split for video, (_, split) in files.items()} | dict.fromkeys(listed, "test")

    found = {split: _Found() for split in ("train", "validation", "test")}
    for video, split in splits.items():
        frames: dict[int, str] = {}
        if video in folders:
            frames, stray = list_frames(folders[video], video, first=1, digits_only=True)
            yield from stray
        found[split].add(frames, labels.get(video), listed.get(video, ()))
        if not frames:
            yield Rejected(video, "no images of the video")
            continue
        classes = dict(enumerate(labels.get(video, ()), start=1))
        labelled = {number for number, label in classes.items() if label != IGNORE}
        for number in sorted(frames.keys() | labelled):
            if (number - 1) % options.frame_step:
                continue
            if number not in frames:
                yield Rejected(f"{video} frame {number}", "no image of the frame")
                continue
            origin = f"{video}/{frames[number]}"
            image = read_image(folders[video] / frames[number], origin)
            if isinstance(image, Rejected):
                yield image
                continue
            label = classes.get(number, IGNORE)
            yield Example(split, image, origin, "aff_wild2", label, video=video, frame=number)
    for split, count in found.items():
        yield from _remarks(split, count)
    if unnamed := folders.keys() - splits.keys():
        yield Remark(f"Image folders without a label file, not in the test list, left out: {len(unnamed):,}.")
    yield from crossing_recordings(splits)


def _remarks(split: str, count: _Found) -> Iterator[Remark]:
    """Say what was found of a split, as sentences."""
    if not count.videos:
        return
    counts = tuple(count.labelled[label] for label in range(len(CLASSES)))
    text = f"{split}: {count.videos:,} videos ({count.without_images:,} without images), "
    text += f"{count.images:,} images"
    if split != "test":
        text += f"; labelled frames with an image: {_by_class(counts)}; without: {count.missing:,}"
    yield Remark(f"{text}.")
    if counts == KNOWN_FRAMES.get(split):
        yield Remark(f"{split}: these are the known counts of the whole set, class by class.")
    elif count.videos == KNOWN_VIDEOS.get(split):
        yield Remark(
            f"warning: {split} has all {count.videos:,} videos, but not the known labelled frames with an "
            f"image, {_by_class(KNOWN_FRAMES[split])}: images are missing, or the labels are of another "
            "edition"
        )
    if count.shorter:
        yield Remark(
            f"{split}: label files that end before the images: {count.shorter:,}; the {count.after_labels:,} "
            "images after their ends are there without a label."
        )
    if count.longer:
        yield Remark(f"{split}: label files that go on after the last image: {count.longer:,}.")
    if count.not_found:
        yield Remark(
            f"{split}: frames that the template lists and that have no image: {count.not_found:,}; "
            "a submission needs a prediction for them too."
        )


def _by_class(counts: Sequence[int]) -> str:
    named = ", ".join(f"{name} {n:,}" for name, n in zip(CLASSES, counts, strict=True))
    return f"{sum(counts):,} ({named})"


def _image_folders(images: str) -> dict[str, Path]:
    """Return the folder of every video in the image roots, by the video's name."""
    folders: dict[str, Path] = {}
    for root in (Path(part.strip()) for part in images.split(",") if part.strip()):
        if not root.is_dir():
            raise FileNotFoundError(
                f"no folder {root}: give the folder that holds a folder of images per video"
            )
        if not (inside := visible_folders(root)):
            raise ValueError(
                f"{root} holds no folders: give the folder that holds a folder of images per video"
            )
        for path in inside:
            if path.name in folders:
                raise ValueError(
                    f"{folders[path.name]} and {path} are of one video: remove one, or leave out its root"
                )
            folders[path.name] = path
    return folders


def _label_files(annotations: str | None) -> list[tuple[Path, str]]:
    """Return the files in the label folders, each with its split, by split and name; hidden ones left out."""
    if annotations is None:
        return []
    root = Path(annotations)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: give the folder that holds Train_Set and Validation_Set")
    inside = visible_folders(root)
    places = [root, *(path for path in inside if path.name.lower().startswith(CHALLENGE))]
    sets = {place: found for place in places if (found := _sets(place))}
    if not sets:
        names = ", ".join(path.name for path in inside) or "no folder"
        raise ValueError(
            f"{root} holds {names}: expected Train_Set and Validation_Set, or a folder EXPR_... with them"
        )
    if len(sets) > 1:
        raise ValueError(f"{' and '.join(map(str, sets))} both hold labels: give one of them as annotations")
    (found,) = sets.values()
    files = [
        (path, split)
        for split, folder in sorted(found.items())
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".")
    ]
    if not files:
        raise ValueError(f"{' and '.join(map(str, found.values()))}: no label files (<video>.txt)")
    return files


def _sets(place: Path) -> dict[str, Path]:
    """Return the folder of each split's labels in a folder."""
    found: dict[str, Path] = {}
    for path in visible_folders(place):
        split = SETS.get(path.name.lower().replace("_", "").replace(" ", ""))
        if split in found:
            raise ValueError(f"{found[split]} and {path} are both for {split}: remove one of them")
        if split:
            found[split] = path
    return found


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file, stripped, without empty ones at its end."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give the path of the test list")
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read ({error}): restore the original file") from error


def _labels(path: Path) -> array:
    """Return the class id of every line of a label file, -1 where there is none."""
    header, *lines = _lines(path)
    names = [name.strip().lower() for name in header.rstrip(", ").split(",")]
    known = next((classes for classes in HEADERS if names == [name.lower() for name in classes]), None)
    if known is None:
        raise ValueError(
            f"{path}: its first line is {header[:100]!r}, expected {','.join(CLASSES)!r}; the order of the "
            "classes is not known without it: restore the original file"
        )
    values = {str(label): label for label in range(IGNORE, len(known))}
    try:
        return array("b", (values[line] for line in lines))
    except KeyError:
        wrong = next(number for number, line in enumerate(lines, start=2) if line not in values)
        raise ValueError(
            f"{path} line {wrong}: {lines[wrong - 2]!r} is not a class from {IGNORE} to {len(known) - 1}: "
            "restore the original file"
        ) from None


def _test_list(path: Path) -> dict[str, array]:
    """Return the videos of a list, or of a submission template, which also has the frames of each."""
    lines = _lines(path)
    is_template = lines[0].startswith(TEMPLATE)
    videos: dict[str, array] = {}
    for number, line in enumerate(lines, start=1):
        name = line.split(",")[0].strip()
        if not name or (is_template and number == 1):
            continue
        video, slash, image = name.rpartition("/")
        stem, ending = os.path.splitext(image)
        if is_template:
            if not video or not re.fullmatch("[0-9]{1,9}", stem):
                raise ValueError(
                    f"{path} line {number}: {name!r} is not <video>/<frame>.jpg: restore the template"
                )
            videos.setdefault(video, array("i")).append(int(stem))
        elif slash:
            raise ValueError(
                f"{path} line {number}: {name!r} is not the name of a video; a list of frames starts with "
                f"the line {TEMPLATE},..."
            )
        else:
            videos.setdefault(stem if ending.lower() in NAME_ENDINGS else name, array("i"))
    if not videos:
        raise ValueError(f"{path} names no video: give a line per video, or a submission template")
    return videos
