"""Videos as folders of images, a folder per video, with labels in one csv or in one per video.

    ROOT/<video>/<frame>.jpg     ROOT/<split>/<video>/<frame>.jpg
    ROOT/<video>.csv             ROOT/<split>/<video>.csv

The name of an image ends in its frame number (00012.jpg, frame_12.png). A csv for all videos has the columns
video, frame and expression; without frame, a row labels its whole video. A csv of one video needs no column
video. Images are taken as they are, byte for byte; one without a label is a frame with expression -1.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from modeling_fer.data.pixels import ENDINGS
from modeling_fer.data.schema import Example, Item, Rejected
from modeling_fer.data.sources.folder import read_image
from modeling_fer.data.splits import check_fractions, draw_split, video_folders
from modeling_fer.data.videos import (
    VideoLabels,
    contempt_remark,
    crossing_recordings,
    list_frames,
    read_labels,
    recording,
)
from modeling_fer.labels import CONTEMPT_RULES, IGNORE


@dataclasses.dataclass
class FramesOptions:
    """Where the videos' images and labels lie, and how to split the videos if they are not split yet."""

    root: str = dataclasses.field(metadata={"help": "folder with a folder of images per video"})
    labels: str | None = dataclasses.field(
        default=None,
        metadata={"help": "csv: video, frame, expression, and split, subject; default: ROOT/<video>.csv"},
    )
    unlabeled: bool = dataclasses.field(
        default=False, metadata={"help": "take every frame as an unlabelled face; ignore labels"}
    )
    validation_fraction: float = dataclasses.field(
        default=0.1,
        metadata={"help": "share of videos for validation, by subject or recording, where no split is given"},
    )
    test_fraction: float = dataclasses.field(
        default=0.1,
        metadata={"help": "share of videos for test, by subject or recording, where no split is given"},
    )
    seed: int = dataclasses.field(default=0, metadata={"help": "another seed draws another split"})
    contempt: str = dataclasses.field(
        default="drop",
        metadata={
            "help": "contempt has no class of ours: leave such frames without a label, or call them Other",
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

    @property
    def source(self) -> str:
        """What the source column says."""
        return self.name or Path(self.root).resolve().name


def examples(options: FramesOptions) -> Iterator[Item]:
    """Yield every video's frames in order, one video after the other by name.

    A video's split is that of its folder or of the csv. Where there is none, a video without labels is
    `unlabeled`, and others are drawn by a hash of their subject, or of their recording where the subject is
    not known. Labels without an image are rejected.

    Raises:
        ValueError: the layout or a csv is wrong; the message names the file, the row and the remedy.
        FileNotFoundError: the folder or the csv is not there.
    """
    root = Path(options.root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: give the folder that holds a folder of images per video")
    folders, tables, rejected = _layout(root, by_video=not (options.labels or options.unlabeled))
    yield from rejected
    labels: dict[str, VideoLabels] = {}
    if options.labels and not options.unlabeled:
        labels = read_labels(Path(options.labels), options.contempt)
    for video, path in tables.items():
        labels |= read_labels(path, options.contempt, video)
    if not labels and not options.unlabeled:
        raise ValueError(
            f"{root}: no labels; give them with --labels FILE.csv, put them into {root / '<video>.csv'}, "
            "or take every frame as unlabelled with --unlabeled"
        )
    yield from unknown_videos(labels, folders, "no images of the video")
    splits = {}
    for video, (folder, given) in folders.items():
        of_video = labels.get(video)
        splits[video] = split = place(video, given, of_video, options)
        frames, stray = list_frames(folder, video)
        yield from stray or ([] if frames else [Rejected(video, "no images of the video")])
        for number, name in frames.items():
            expression = of_video.at(number) if of_video is not None else IGNORE
            image = read_image(folder / name, origin := f"{video}/{name}")
            if isinstance(image, Rejected):
                yield image
                continue
            yield Example(
                split=split,
                image=image,
                origin=origin,
                source=options.source,
                expression=IGNORE if split == "unlabeled" else expression,
                subject=of_video.subject if of_video is not None else None,
                video=video,
                frame=number,
            )
        if of_video is not None and frames:
            yield from of_video.unmet()
    yield from contempt_remark(labels)
    yield from crossing_recordings(splits)


def place(video: str, given: str | None, labels: VideoLabels | None, options: FramesOptions) -> str:
    """Return the split of a video: of its folder (`given`), of the csv, or drawn."""
    if options.unlabeled:
        return "unlabeled"
    if split := given or (labels.split if labels is not None else None):
        return split
    if labels is None or not labels.classes:
        return "unlabeled"
    who = f"subject {labels.subject}" if labels.subject is not None else f"recording {recording(video)}"
    return draw_split(who, options.validation_fraction, options.test_fraction, options.seed)


def unknown_videos(
    labels: dict[str, VideoLabels], videos: dict[str, tuple[Path, str | None]], reason: str
) -> Iterator[Rejected]:
    """Yield the videos that are labelled and not there."""
    for video, found in labels.items():
        if video not in videos:
            yield Rejected(f"{Path(found.file).name}: {video}", reason)


def _layout(
    root: Path, by_video: bool
) -> tuple[dict[str, tuple[Path, str | None]], dict[str, Path], list[Rejected]]:
    """List the videos' folders, each with the split that it lies in, their csv files, and what is neither.

    Without `by_video` no csv is looked at: the labels are in another, or not wanted.
    """
    folders: dict[str, tuple[Path, str | None]] = {}
    tables: dict[str, Path] = {}
    bases, files = video_folders(root)
    for base, split in bases.items():
        for path in sorted(base.iterdir()):
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                files.append(path)
                if by_video and path.suffix.lower() == ".csv":
                    tables[path.stem] = path
            elif path.name in folders:
                other = folders[path.name][0]
                raise ValueError(f"{path} and {other} are one video in two splits: rename one of them")
            else:
                folders[path.name] = path, split
    for path in files:
        if path.suffix.lower() in ENDINGS:
            raise ValueError(f"{path}: an image outside a video's folder: put it into one")
    others = [path for path in files if path.suffix.lower() != ".csv"]
    return (
        folders,
        tables,
        [Rejected(path.relative_to(root).as_posix(), "not an image file") for path in others],
    )
