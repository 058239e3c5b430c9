"""FER2013 (one csv of 48x48 grey faces) with its own labels or with those of FER+ (ten votes a face).

FER2013: Goodfellow et al., "Challenges in Representation Learning", 2013. FER+: Barsoum et al., "Training
Deep Networks for Facial Expression Recognition with Crowd-Sourced Label Distribution", ICMI 2016 (arXiv
1608.01041).

Row numbers in messages count the rows below the header from 1.
"""

import csv
import dataclasses
import gzip
import io
import lzma
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modeling_fer.data.schema import Example, Item, Rejected, Remark
from modeling_fer.labels import CONTEMPT_RULES, FER2013_ORDER, FERPLUS_ORDER, NUM_CLASSES, class_id

SIDE = 48
SPLIT_OF_USAGE = {"Training": "train", "PublicTest": "validation", "PrivateTest": "test"}
COLUMNS = ("emotion", "pixels", "Usage")
VOTES = (*FERPLUS_ORDER, "unknown", "NF")  # FER+ columns in its own order; NF = not a face
UNKNOWN, NOT_A_FACE = VOTES.index("unknown"), VOTES.index("NF")

# Rows per label (in FER2013's own order) of each whole split. Copies of the csv with the classes in another
# order are about; they carry the same pixels and pass every other check. Training and PublicTest are counted
# from the csv, PrivateTest is what they leave of the published totals of all 35,887 rows: 4953, 547, 5121,
# 8989, 6077, 4002 and 6198.
WHOLE_SPLITS = {
    "Training": (3995, 436, 4097, 7215, 4830, 3171, 4965),
    "PublicTest": (467, 56, 496, 895, 653, 415, 607),
    "PrivateTest": (491, 55, 528, 879, 594, 416, 626),
}


def majority(votes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's top column and whether it is the majority.

    Single votes are outliers and do not count; the top column needs more than half of the votes that remain.
    This is the majority mode of the FER+ paper.
    """
    counted = np.where(votes == 1, 0, votes)
    return counted.argmax(axis=1), 2 * counted.max(axis=1) > counted.sum(axis=1)


def argmax(votes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's column with most votes, the first of them on a tie; any vote at all is enough."""
    return votes.argmax(axis=1), votes.max(axis=1) > 0


# From FER+ votes (N, 10) to the top column (N,) and whether the rule accepts it (N,) as the face's label.
RULES: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "majority": majority,
    "argmax": argmax,
}
ORIGINAL = "fer2013"  # the rule that needs no votes: FER2013's own labels


@dataclasses.dataclass
class Fer2013Options:
    """Where FER2013 lies and which labels to give it."""

    csv: str = dataclasses.field(metadata={"help": "path of fer2013.csv, plain, .xz or .gz"})
    ferplus: str | None = dataclasses.field(
        default=None,
        metadata={"help": "path of FER+'s fer2013new.csv: votes for the same rows, in the same order"},
    )
    rule: str = dataclasses.field(
        default="majority",
        metadata={
            "help": "labels by the majority of FER+ votes, by their plain argmax, or fer2013's original ones",
            "choices": [*RULES, ORIGINAL],
        },
    )
    contempt: str = dataclasses.field(
        default="drop",
        metadata={
            "help": "FER+ contempt has no class of ours: drop such labels, or call them Other",
            "choices": list(CONTEMPT_RULES),
        },
    )
    own_weight: float = dataclasses.field(
        default=0.0,
        metadata={"help": "with rule fer2013 and votes: weight of FER2013's own label in the soft label"},
    )

    def __post_init__(self) -> None:
        if self.rule not in (*RULES, ORIGINAL):
            raise ValueError(f"rule must be one of {', '.join((*RULES, ORIGINAL))}, got {self.rule!r}")
        if self.contempt not in CONTEMPT_RULES:
            raise ValueError(f"contempt must be one of {', '.join(CONTEMPT_RULES)}, got {self.contempt!r}")
        if self.rule != ORIGINAL and self.ferplus is None:
            raise ValueError(
                f"rule {self.rule!r} counts FER+ votes: give the path of fer2013new.csv as ferplus, "
                f"or ask for FER2013's own labels with rule {ORIGINAL!r}"
            )
        if not 0 <= self.own_weight <= 1:
            raise ValueError(f"own_weight must lie between 0 and 1, got {self.own_weight}")
        if self.own_weight and (self.rule != ORIGINAL or self.ferplus is None):
            raise ValueError(
                f"own_weight {self.own_weight} blends FER2013's own label with FER+ votes: it needs rule "
                f"{ORIGINAL!r} and the path of fer2013new.csv as ferplus"
            )


def soft_labels(votes: np.ndarray, contempt: str = "drop") -> list[tuple[float, ...] | None]:
    """Return each row's votes (N, 10) as a distribution over our 8 classes, None where no vote is for one."""
    ours = np.zeros((len(votes), NUM_CLASSES))
    for column, name in enumerate(FERPLUS_ORDER):
        label = class_id(name, contempt)
        if label is not None:
            ours[:, label] += votes[:, column]
    totals = ours.sum(axis=1)
    return [tuple((row / total).tolist()) if total else None for row, total in zip(ours, totals, strict=True)]


def blend(own: int, votes: tuple[float, ...] | None, weight: float) -> tuple[float, ...] | None:
    """Mix FER2013's own label, with a weight from 0 to 1, into a row's votes; None where there are none."""
    if votes is None:
        return None
    return tuple((1 - weight) * vote + weight * (label == own) for label, vote in enumerate(votes))


def examples(options: Fer2013Options) -> Iterator[Item]:
    """Yield every row of FER2013: Training as train, PublicTest as validation, PrivateTest as test.

    Under a FER+ rule, Training faces that are left without a label become `unlabeled` ones; rows that are not
    a face, and PublicTest and PrivateTest rows without a label, are rejected: what is held out is never
    trained on.

    Raises:
        ValueError: a file is not what it should be; the message names the file, the row and what to do.
        FileNotFoundError: a file is not there.
    """
    path = Path(options.csv)
    usages, votes = (
        _read_votes(Path(options.ferplus)) if options.ferplus else (None, np.zeros((0, len(VOTES))))
    )
    soft = soft_labels(votes, options.contempt)
    winners, accepted = RULES.get(options.rule, majority)(votes)
    ours = [class_id(name) for name in FER2013_ORDER]

    labels: dict[str, Counter[int]] = {usage: Counter() for usage in SPLIT_OF_USAGE}
    fates: dict[str, Counter[str]] = {usage: Counter() for usage in SPLIT_OF_USAGE}
    row = 0
    for row, cells in enumerate(_rows(path, COLUMNS), start=1):
        usage, label, pixels = _parse(path, row, cells)
        labels[usage][label] += 1
        if usages is not None and (row > len(usages) or usages[row - 1] != usage):
            found = "ends before it" if row > len(usages) else f"says {usages[row - 1]}"
            raise _mismatch(path, row, f"{path.name} says {usage}, {options.ferplus} {found}")
        expression: int | None
        if options.rule == ORIGINAL:
            expression, fate = ours[label], "labelled"
        else:
            expression, fate = _verdict(winners[row - 1], accepted[row - 1], options.contempt)
        fates[usage][fate] += 1

        origin = f"{path.name} row {row}"
        if expression is not None:
            distribution = soft[row - 1] if usages is not None else None
            distribution = blend(expression, distribution, options.own_weight)
            split = SPLIT_OF_USAGE[usage]
            yield Example(split, _png(pixels), origin, "fer2013", expression, soft_label=distribution)
        elif _is_unlabeled(usage, fate):
            yield Example("unlabeled", _png(pixels), origin, "fer2013")
        else:
            yield Rejected(origin, fate)

    if usages is not None and row != len(usages):
        raise _mismatch(path, row + 1, f"{path.name} has {row:,} rows, {options.ferplus} has {len(usages):,}")
    _check_order(path, labels)
    for usage, counts in fates.items():
        if counts and options.rule != ORIGINAL:
            yield Remark(_summary(usage, counts, options))


def _verdict(winner: int, accepted: bool, contempt: str) -> tuple[int | None, str]:
    """Turn a rule's answer for one row into our label or None, and what becomes of the row."""
    if winner == NOT_A_FACE:
        return None, "not a face"
    if not accepted:
        return None, "no majority"
    if winner == UNKNOWN:
        return None, "unknown expression"
    label = class_id(VOTES[winner], contempt)
    return (None, "contempt (no class of ours)") if label is None else (label, "labelled")


def _summary(usage: str, fates: Counter[str], options: Fer2013Options) -> str:
    """Say how many rows of a split the rule keeps, with and without contempt, and where the others go."""
    labelled, contempt = fates["labelled"], fates["contempt (no class of ours)"]
    kept = f"{usage}: {fates.total():,} rows; kept by the {options.rule} rule {labelled + contempt:,}"
    if options.contempt == "drop":
        kept += f", of which contempt without a class of ours {contempt:,} dropped"
    rejected = {fate: n for fate, n in sorted(fates.items()) if fate != "labelled"}
    unlabeled = {fate: rejected.pop(fate) for fate in list(rejected) if _is_unlabeled(usage, fate)}
    kept += f" -> {labelled:,} labelled"
    for where, reasons in (("to unlabeled", unlabeled), ("rejected", rejected)):
        listed = ", ".join(f"{n:,} {fate}" for fate, n in reasons.items())
        kept += f"; {where} {sum(reasons.values()):,}" + (f" ({listed})" if listed else "")
    return kept


def _is_unlabeled(usage: str, fate: str) -> bool:
    """Say whether a row without a label may be trained on as an unlabelled face."""
    return usage == "Training" and fate != "not a face"


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Read a csv by column name, decompressing by its ending."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give the path of the csv (.csv, .csv.xz or .csv.gz)")
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]  # one public copy has spaces in its header
            missing = [name for name in columns if name not in header]
            if missing:
                raise ValueError(
                    f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; its header is "
                    f"{','.join(header)[:200]!r}: get the file from its publisher, with its header line"
                )
            for number, cells in enumerate(filter(None, reader), start=1):  # blank lines are no rows
                if len(cells) != len(header):
                    raise ValueError(
                        f"{path} row {number}: {len(cells)} cells, not the header's {len(header)}: "
                        "get the file again"
                    )
                yield dict(zip(header, cells, strict=True))
    except (lzma.LZMAError, EOFError, UnicodeDecodeError, gzip.BadGzipFile, csv.Error) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): it is cut short or damaged, get it again"
        ) from error


def _parse(path: Path, row: int, cells: dict[str, str]) -> tuple[str, int, np.ndarray]:
    """Check one row of FER2013 and return its usage, its own label and its pixels (48, 48) uint8."""
    usage, label = cells["Usage"].strip(), cells["emotion"].strip()
    if usage not in SPLIT_OF_USAGE:
        raise ValueError(
            f"{path} row {row}: unknown Usage {usage!r}, expected one of {', '.join(SPLIT_OF_USAGE)}"
        )
    if label not in ("0", "1", "2", "3", "4", "5", "6"):
        raise ValueError(
            f"{path} row {row}: emotion {label!r} is not a label from 0 to 6 "
            f"({', '.join(FER2013_ORDER)}): restore the original file"
        )
    try:
        pixels = np.array(cells["pixels"].split(), dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{path} row {row}: pixels are not integers ({error}): restore the original file"
        ) from error
    if pixels.size != SIDE * SIDE:
        raise ValueError(
            f"{path} row {row}: {pixels.size} pixels, expected {SIDE * SIDE}: restore the original file"
        )
    if pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(
            f"{path} row {row}: pixels from {pixels.min()} to {pixels.max()}, expected 0 to 255: "
            "restore the original file"
        )
    return usage, int(label), pixels.astype(np.uint8).reshape(SIDE, SIDE)


def _read_votes(path: Path) -> tuple[list[str], np.ndarray]:
    """Read FER+ by column name: the usage of every row, and its votes (N, 10) in the order of `VOTES`."""
    usages, votes = [], []
    for row, cells in enumerate(_rows(path, ("Usage", *VOTES)), start=1):
        counts = [cells[name].strip() for name in VOTES]
        if not all(count.isdecimal() for count in counts):
            raise ValueError(
                f"{path} row {row}: votes {counts} are not all whole numbers: get the file again"
            )
        usages.append(cells["Usage"].strip())
        votes.append([int(count) for count in counts])
    return usages, np.array(votes, dtype=np.int64).reshape(-1, len(VOTES))


def _mismatch(path: Path, row: int, what: str) -> ValueError:
    return ValueError(
        f"{path} row {row}: FER+ is not aligned with FER2013 ({what}); the two must list the same rows in "
        "the same order: take both files as published, or cut both alike"
    )


def _check_order(path: Path, labels: dict[str, Counter[int]]) -> None:
    """Compare the class totals of every split that is there as a whole with the published ones."""
    for usage, expected in WHOLE_SPLITS.items():
        found = tuple(labels[usage][label] for label in range(len(FER2013_ORDER)))
        if sum(found) == sum(expected) and found != expected:
            raise ValueError(
                f"{path}: the {sum(found):,} {usage} rows have {found} rows of class 0 to 6, the "
                f"original has {expected} ({', '.join(FER2013_ORDER)}): the classes are in an unknown order, "
                "take the original file"
            )


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
