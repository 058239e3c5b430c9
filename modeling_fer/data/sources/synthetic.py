"""Faces that the package draws itself: stills or videos with exact labels, and nothing to download.

`drawing.face` says what a face is made of, `drawing.acting` what an expression is, `drawing.render` paints
it; here they make up a data set. A subject belongs to one split, and its still or video number i depends on
nothing but the seed, the subject, i, and the expressions dealt to it.
"""

import dataclasses
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from modeling_fer.data.drawing.acting import NEUTRAL, SHORTEST, act, film, timeline, video_labels
from modeling_fer.data.drawing.face import Face, Identity, View
from modeling_fer.data.drawing.render import SMALLEST, render
from modeling_fer.data.schema import Example
from modeling_fer.labels import CLASSES, IGNORE

# Every split gets one subject (and video, while they last), the rest is dealt out in these shares.
SUBJECT_SHARES = {"train": 0.4, "validation": 0.15, "test": 0.15, "unlabeled": 0.3}
SKEWED = ("train", "unlabeled")  # the other splits have even classes
# From the most to the least frequent class where classes are skewed: the order found in the wild, roughly.
BY_FREQUENCY = ("Neutral", "Happiness", "Other", "Sadness", "Surprise", "Anger", "Disgust", "Fear")
FAINTEST = 0.6  # intensity of stills: from this to 1
FRAMES_PER_EXPRESSION = 40  # of a video
DRAWN_AT_ONCE = 64
LONGEST_BURST = 4  # spoilt frames in a row
SPOILT: dict[str, Any] = {"blur": 1.0, "brightness": 0.4, "noise": 0.2}  # how a spoilt frame is seen

# What a random stream is for: the second number of its seed.
IDENTITY, STILL, VIDEO, DECK, NOISE = range(5)


@dataclasses.dataclass(frozen=True)
class SyntheticOptions:
    """How much to draw, and how."""

    seed: int = dataclasses.field(default=0, metadata={"help": "same seed and options: same bytes"})
    image_size: int = dataclasses.field(
        default=64, metadata={"help": "side of the square images in pixels, 16 or more"}
    )
    subjects: int = dataclasses.field(
        default=200,
        metadata={"help": "people, split 0.4 train, 0.15 validation, 0.15 test, 0.3 unlabeled; 4 or more"},
    )
    train: int = dataclasses.field(default=4800, metadata={"help": "stills in the train split"})
    validation: int = dataclasses.field(default=800, metadata={"help": "stills in the validation split"})
    test: int = dataclasses.field(default=800, metadata={"help": "stills in the test split"})
    unlabeled: int = dataclasses.field(default=4000, metadata={"help": "stills in the unlabeled split"})
    imbalance: float = dataclasses.field(
        default=10.0,
        metadata={"help": "largest over smallest class in train and unlabeled; validation and test are even"},
    )
    videos: int = dataclasses.field(
        default=0,
        metadata={"help": "videos to draw instead of stills, split like the subjects; 0 draws stills"},
    )
    frames: int = dataclasses.field(default=120, metadata={"help": "frames in each video"})
    frame_noise: float = dataclasses.field(
        default=0.0,
        metadata={"help": "share of video frames that are spoilt, in bursts of 1 to 4; at most 0.7"},
    )
    reveal_unlabeled: bool = dataclasses.field(
        default=False,
        metadata={"help": "write true labels into the unlabeled split, to measure pseudo-labels by"},
    )

    def __post_init__(self) -> None:
        least = dict.fromkeys(("seed", "train", "validation", "test", "unlabeled", "videos"), 0)
        least |= {"image_size": SMALLEST, "subjects": len(SUBJECT_SHARES), "imbalance": 1, "frames": SHORTEST}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0 <= self.frame_noise <= 0.7:
            raise ValueError(f"frame_noise must be from 0 to 0.7, got {self.frame_noise}")


def examples(options: SyntheticOptions) -> Iterator[Example]:
    """Draw the data set: rows of one split after the other, of videos frame by frame, images as PNG.

    The unlabeled split has expression -1 unless `reveal_unlabeled` is set; all else is the same either way.
    """
    rows = _videos(options) if options.videos else _stills(options)
    while batch := list(itertools.islice(rows, DRAWN_AT_ONCE)):
        images = render([face for _, face in batch], options.image_size)
        for (example, _), image in zip(batch, images, strict=True):
            hidden = example.split == "unlabeled" and not options.reveal_unlabeled
            label = IGNORE if hidden else example.expression
            yield dataclasses.replace(example, image=_png(image), expression=label)


def identity(options: SyntheticOptions, subject: int) -> Identity:
    """Return what subject number `subject` looks like."""
    return Identity.sample(np.random.default_rng([options.seed, IDENTITY, subject]))


def subjects_of(options: SyntheticOptions) -> dict[str, range]:
    """Return the subject numbers of each split."""
    ends = np.cumsum([0, *_shares(options.subjects)]).tolist()
    return {split: range(ends[k], ends[k + 1]) for k, split in enumerate(SUBJECT_SHARES)}


def class_counts(total: int, imbalance: float) -> list[int]:
    """Split `total` into 8 class counts by class id: geometric from the first of `BY_FREQUENCY` to the last.

    The first is `imbalance` times the last, up to rounding; 1 gives even counts.
    """
    return apportion(total, _class_weights(imbalance))


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` into whole parts proportional to `weights`, by largest remainders."""
    exact = total * np.asarray(weights, float) / np.sum(weights)
    parts = np.floor(exact).astype(int)
    most = np.argsort(parts - exact, kind="stable")[: total - parts.sum()]
    parts[most] += 1
    return parts.tolist()


def _class_weights(imbalance: float) -> list[float]:
    last = len(CLASSES) - 1
    return [imbalance ** (-BY_FREQUENCY.index(name) / last) for name in CLASSES]


def _shares(total: int) -> list[int]:
    one_each = [int(k < total) for k in range(len(SUBJECT_SHARES))]
    rest = apportion(total - sum(one_each), list(SUBJECT_SHARES.values()))
    return [first + more for first, more in zip(one_each, rest, strict=True)]


def _deck(options: SyntheticOptions, split: str, total: int, expressive: bool) -> list[int]:
    """Class ids in random order, with the split's class counts; without Neutral if `expressive`."""
    weights = _class_weights(options.imbalance if split in SKEWED else 1)
    if expressive:
        weights[NEUTRAL] = 0
    deck = np.repeat(np.arange(len(CLASSES)), apportion(total, weights))
    rng = np.random.default_rng([options.seed, DECK, list(SUBJECT_SHARES).index(split)])
    return rng.permutation(deck).tolist()


def _stills(options: SyntheticOptions) -> Iterator[tuple[Example, Face]]:
    for split, people in subjects_of(options).items():
        known = {subject: identity(options, subject) for subject in people}
        for k, expression in enumerate(_deck(options, split, getattr(options, split), expressive=False)):
            subject, index = people[k % len(people)], k // len(people)
            rng = np.random.default_rng([options.seed, STILL, subject, index])
            actions = act(expression, rng.uniform(FAINTEST, 1), rng)
            origin = f"synthetic subject {subject} still {index}"
            yield _row(split, origin, expression, subject), Face(known[subject], actions, View.sample(rng))


def _videos(options: SyntheticOptions) -> Iterator[tuple[Example, Face]]:
    number = 0
    each = max(1, options.frames // FRAMES_PER_EXPRESSION)
    for (split, people), count in zip(subjects_of(options).items(), _shares(options.videos), strict=True):
        deck = _deck(options, split, count * each, expressive=True)
        for k in range(count):
            subject, index = people[k % len(people)], k // len(people)
            rng = np.random.default_rng([options.seed, VIDEO, subject, index])
            segments = timeline(options.frames, deck[k * each : (k + 1) * each], rng)
            faces = film(identity(options, subject), options.frames, segments, rng)
            spoilt = np.random.default_rng([options.seed, NOISE, subject, index])
            for frame in bursts(options.frames, options.frame_noise, spoilt):
                view = dataclasses.replace(faces[frame].view, **SPOILT)
                faces[frame] = dataclasses.replace(faces[frame], view=view)
            for frame, label in enumerate(video_labels(options.frames, segments).tolist()):
                origin = f"synthetic subject {subject} video {index} frame {frame}"
                row = _row(split, origin, label, subject)
                yield dataclasses.replace(row, video=f"v{number:04d}", frame=frame), faces[frame]
            number += 1


def bursts(frames: int, share: float, rng: np.random.Generator) -> list[int]:
    """Draw which of a video's frames are spoilt: bursts of 1 to 4, at least one good frame between them.

    They are `share` of the frames on average, wherever in the video.
    """
    if share == 0:
        return []
    starts = share / (1 - share) / ((1 + LONGEST_BURST) / 2)  # chance of a burst after each good frame
    place = -4 * LONGEST_BURST  # that it began with a gap is forgotten by frame 0
    found: list[int] = []
    while place < frames:
        place += int(rng.geometric(starts))
        length = int(rng.integers(1, LONGEST_BURST + 1))
        found += range(max(place, 0), min(place + length, frames))
        place += length
    return found


def _row(split: str, origin: str, expression: int, subject: int) -> Example:
    return Example(split, b"", origin, "synthetic", expression, subject=f"s{subject:03d}")


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)  # noise does not compress: do not try hard
    return buffer.getvalue()
