"""Streams simulated from stills: segments of one expression after another, each frame another still of it.

Not videos: a stream's frames show different people, so it tests gathering evidence over frames, and no more.
Splits are made of different pictures, and of none of the train split of the stills, which the image model
will have learnt from.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from datasets import Dataset, Image

from modeling_fer.data import schema
from modeling_fer.data.pixels import decode_split
from modeling_fer.data.schema import Example, Item, Remark
from modeling_fer.data.tally import digest
from modeling_fer.labels import CLASSES, IGNORE

SHARES = {"train": 0.5, "validation": 0.2, "test": 0.3}  # of the stills
SPREAD = 0.8  # deviation of the logarithm of a segment's length
SHORTEST, LONGEST = 15, 400  # frames of a segment


@dataclasses.dataclass(frozen=True)
class StreamsOptions:
    """Which stills to put together, and to how many streams."""

    stills: str = dataclasses.field(metadata={"help": "folder written by `fer data prepare`"})
    stills_split: str = dataclasses.field(
        default="validation", metadata={"help": "its split that is used; the image model must not know it"}
    )
    train: int = dataclasses.field(default=40, metadata={"help": "streams in the train split"})
    validation: int = dataclasses.field(default=12, metadata={"help": "streams in the validation split"})
    test: int = dataclasses.field(default=16, metadata={"help": "streams in the test split"})
    frames: int = dataclasses.field(default=1500, metadata={"help": "frames in each stream"})
    segment: int = dataclasses.field(
        default=60, metadata={"help": "median frames of a segment, log-normal, cut to 15 to 400"}
    )
    seed: int = dataclasses.field(default=0, metadata={"help": "same seed, stills and options: same streams"})

    def __post_init__(self) -> None:
        least = {"train": 1, "validation": 0, "test": 0, "frames": 1, "segment": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.stills_split not in schema.SPLITS:
            raise ValueError(f"stills_split must be one of {', '.join(schema.SPLITS)}")


def distinct_stills(options: StreamsOptions) -> Dataset:
    """The labelled stills to use: of a picture that is there several times the last, none that is in train.

    Raises:
        FileNotFoundError: the folder holds no such split.
        ValueError: nothing is left.
    """
    data = schema.load(options.stills)
    if options.stills_split not in data:
        raise FileNotFoundError(f"{options.stills} has no split {options.stills_split}")
    split = data[options.stills_split].filter(lambda label: label != IGNORE, input_columns="expression")
    if not len(split):
        raise ValueError(f"{options.stills}: no still of {options.stills_split} has a label")
    size = split[0]["image"].width
    held_out = options.stills_split != "train" and "train" in data
    known = set(map(digest, decode_split(data["train"], size))) if held_out else set()
    found = {digest(face): row for row, face in enumerate(decode_split(split, size))}
    rows = sorted(row for mark, row in found.items() if mark not in known)
    if not rows:
        raise ValueError(f"{options.stills}: no labelled still of {options.stills_split} is not in train too")
    return split.select(rows).cast_column("image", Image(decode=False))


def segments(pools: dict[int, np.ndarray], options: StreamsOptions, rng: np.random.Generator) -> np.ndarray:
    """Stills of one stream's frames: rows `(frames,)` out of `pools`, the rows of each class.

    Which expression comes next is drawn by how often it has a still, the same never twice in a row.
    """
    classes, shares = list(pools), np.array([len(pool) for pool in pools.values()], float)
    rows: list[int] = []
    last = -1
    while len(rows) < options.frames:
        odds = shares * (np.array(classes) != last)
        last = int(rng.choice(classes, p=odds / odds.sum()))
        length = int(np.clip(rng.lognormal(np.log(options.segment), SPREAD), SHORTEST, LONGEST))
        rows += rng.choice(pools[last], length).tolist()
    return np.array(rows[: options.frames])


def examples(options: StreamsOptions) -> Iterator[Item]:
    """Yield the frames of every stream in order, one stream after the other.

    Raises:
        FileNotFoundError: the folder holds no such split.
        ValueError: the stills of a split are of fewer than two expressions.
    """
    stills = distinct_stills(options)
    images, labels = stills["image"][:], np.asarray(stills["expression"][:])
    rng = np.random.default_rng(options.seed)
    part = rng.choice(len(SHARES), size=len(stills), p=list(SHARES.values()))
    for number, split in enumerate(SHARES):
        pools = {c: np.flatnonzero((labels == c) & (part == number)) for c in range(len(CLASSES))}
        pools = {c: pool for c, pool in pools.items() if len(pool)}
        if len(pools) < 2:
            raise ValueError(f"{options.stills}: the stills for {split} are of fewer than two expressions")
        counts = ", ".join(f"{CLASSES[c]} {len(pool)}" for c, pool in pools.items())
        yield Remark(
            f"Streams of {split} are simulated from {sum(map(len, pools.values()))} stills: {counts}."
        )
        for stream in range(getattr(options, split)):
            for frame, row in enumerate(segments(pools, options, rng)):
                name = f"{split}{stream:03d}"
                origin = f"{options.stills}, {options.stills_split}, labelled still {row} of those used"
                yield Example(
                    split, images[row]["bytes"], origin, "streams", int(labels[row]), video=name, frame=frame
                )
