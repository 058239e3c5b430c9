"""Video files of face crops, decoded frame by frame, with labels in a csv.

    ROOT/**/<video>.mp4     ROOT/<split>/**/<video>.mp4

A video's name is its path below ROOT (or below the split) without the ending. The csv has the columns video
and expression, and with them frame (a row a frame, counted from 1), or start and end (a row an interval, in
seconds from the first frame on, the end not included), or neither (a row a video, whose frames all carry the
label). Frames are stored whole: a video must show one face, cropped; none is looked for. They are stored with
their numbers and without their times: the videos should all have one frame rate, which training is told.
"""

import dataclasses
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modeling_fer.data.schema import Example, Item, Rejected, Remark
from modeling_fer.data.sources.frames import FramesOptions, place, unknown_videos
from modeling_fer.data.splits import video_folders
from modeling_fer.data.videos import VideoLabels, contempt_remark, crossing_recordings, read_labels
from modeling_fer.labels import IGNORE

ENDINGS = (".mp4", ".avi", ".mkv", ".mov", ".webm")
QUALITY = 95  # of the JPEGs


class UnreadableVideoError(ValueError):
    """A video that FFmpeg cannot read, or not to its end; the message says why, `reason` in short."""

    reason = "unreadable video"


class MissingFramesError(UnreadableVideoError):
    """A video of which fewer frames came than its file announces: it is damaged, or was cut in place."""

    reason = "fewer frames than the file announces"


@dataclasses.dataclass
class VideosOptions(FramesOptions):
    """Where the videos of face crops and their labels lie, and how to split them if they are not yet."""

    root: str = dataclasses.field(
        metadata={"help": "folder of videos, at any depth, of one cropped face each"}
    )
    labels: str | None = dataclasses.field(
        default=None,
        metadata={"help": "csv: video, expression; frame or start, end in seconds; split, subject"},
    )
    frame_step: int = dataclasses.field(
        default=1, metadata={"help": "take the first of every so many frames, and leave the others out"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frame_step < 1:
            raise ValueError(f"frame_step must be at least 1, got {self.frame_step}")


def examples(options: VideosOptions) -> Iterator[Item]:
    """Yield every video's frames in order, one video after the other by name, as JPEG.

    Splits are found as by `frames.examples`. Of a damaged video the frames before the damage are there; it is
    rejected then, and the rest goes on.

    Raises:
        ValueError: PyAV is not installed, or the layout or the csv is wrong; the message says what to do.
        FileNotFoundError: the folder or the csv is not there.
    """
    root = Path(options.root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: give the folder that holds the videos")
    videos, rejected = _layout(root)
    yield from rejected
    labels: dict[str, VideoLabels] = {}
    if not options.unlabeled:
        if options.labels is None:
            raise ValueError(
                f"{root}: no labels; give them with --labels FILE.csv, or take every frame as unlabelled "
                "with --unlabeled"
            )
        labels = read_labels(Path(options.labels), options.contempt, endings=ENDINGS, seconds=True)
    yield from unknown_videos(labels, videos, "no video of this name")
    splits = {}
    rates: Counter[float] = Counter()
    for video, (path, given) in videos.items():
        of_video = labels.get(video)
        splits[video] = split = place(video, given, of_video, options)
        origin = path.relative_to(root).as_posix()
        number, time = 0, 0.0
        try:
            for number, (time, frame) in enumerate(decode(path), start=1):
                expression = of_video.at(number, time) if of_video is not None else IGNORE
                if (number - 1) % options.frame_step:
                    continue
                if frame.is_corrupt:
                    yield Rejected(f"{origin} frame {number}", "unreadable")
                    continue
                yield Example(
                    split=split,
                    image=_jpeg(frame),
                    origin=f"{origin} frame {number}",
                    source=options.source,
                    expression=IGNORE if split == "unlabeled" else expression,
                    subject=of_video.subject if of_video is not None else None,
                    video=video,
                    frame=number,
                )
        except UnreadableVideoError as error:
            after = f" after frame {number}" if number else ""
            yield Rejected(f"{origin}{after} ({error})", error.reason)
        if time > 0:
            rates[round((number - 1) / time, 1)] += 1  # 29.97 is 30: nothing depends on so little
        if of_video is not None and number:
            yield from of_video.unmet()
    yield from rates_remark(rates)
    yield from contempt_remark(labels)
    yield from crossing_recordings(splits)


def rates_remark(rates: Counter[float]) -> Iterator[Remark]:
    """Say how many frames a second the videos have, and what follows; `rates` counts videos by rate."""
    if len(rates) == 1:
        (rate,) = rates
        videos = f"{rates.total():,} video{'s' if rates.total() > 1 else ''}"
        yield Remark(
            f"Frames a second, of {videos}: {rate:g}. Train with --frame_rate {rate:g} (30 is the default)."
        )
    elif rates:
        found = ", ".join(f"{rate:g} ({count:,} videos)" for rate, count in sorted(rates.items()))
        yield Remark(
            f"warning: frames a second differ: {found}; models learn from frame numbers, as if all had one "
            f"rate: encode the videos again at one rate (ffmpeg -i IN -r {max(rates):g} OUT), which changes "
            "the numbers of frames in labels, and not the seconds"
        )


def decode(path: Path) -> Iterator[tuple[float, Any]]:
    """Yield every frame of a video (an `av.VideoFrame`) with its time in seconds, the first one's being 0.

    Raises:
        UnreadableVideoError: the file is no video, or damaged from here on, or frames are missing.
        ValueError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError(f'{path}: reading videos needs PyAV: pip install "abaw-fer[video]"') from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UnreadableVideoError("it has no pictures")
            # Not by several threads: frames before a damage would be lost then, more or fewer by machine.
            stream = container.streams.video[0]
            count, first = 0, 0.0
            for frame in container.decode(stream):
                time = frame.time if frame.time is not None else count / float(stream.average_rate or 25)
                first = first if count else time
                count += 1
                yield time - first, frame
            if not count:
                raise UnreadableVideoError("it has no frame")
            if count < stream.frames:  # 0 where the container does not say
                raise MissingFramesError(f"{stream.frames:,} announced")
    except (av.FFmpegError, UnicodeDecodeError) as error:  # the latter: its titles are in an old encoding
        raise UnreadableVideoError(getattr(error, "strerror", None) or str(error)) from error


def _jpeg(frame: Any) -> bytes:
    """Return a frame as JPEG, upright: what phones film on their side is marked, not turned."""
    image = frame.to_image()
    if frame.rotation:
        image = image.rotate(frame.rotation, expand=True)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _layout(root: Path) -> tuple[dict[str, tuple[Path, str | None]], list[Rejected]]:
    """List the video files by name, each with the split that it lies in, and what is none but a csv."""
    videos: dict[str, tuple[Path, str | None]] = {}
    bases, beside = video_folders(root)
    others = [path for path in beside if path.suffix.lower() != ".csv"]
    for base, split in bases.items():
        for path in sorted(base.rglob("*")):
            inside = path.relative_to(base)
            hidden = any(part.startswith(".") for part in inside.parts)
            if hidden or path.suffix.lower() == ".csv" or not path.is_file():
                continue
            video = inside.with_suffix("").as_posix()
            if path.suffix.lower() not in ENDINGS:
                others.append(path)
            elif video in videos:
                other = videos[video][0]
                raise ValueError(f"{path} and {other} are two videos of one name: rename one of them")
            else:
                videos[video] = path, split
    rejected = [
        Rejected(path.relative_to(root).as_posix(), "not a video file")
        if path.suffix.lower() not in ENDINGS
        else Rejected(path.name, "outside the folders of the splits")
        for path in others
    ]
    return videos, rejected
