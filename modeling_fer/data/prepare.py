"""From a source to a prepared folder: parquet files of `FEATURES`, a report, a picture of samples, a dataset card.

    out/data/<split>-00000-of-0000N.parquet   what `schema.load` and `datasets.load_dataset(out)` read
    out/report.json  README.md  samples.png   what is in it, for programs, for the Hub, and to look at
    out/skipped.jsonl                         every row that was read and not written: origin and reason

Every image is decoded once on the way: a training run that starts can read all of its data.
"""

import dataclasses
import errno
import hashlib
import io
import json
import os
import random
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm.auto import tqdm

from modeling_fer.data.pixels import UNREADABLE, open_image
from modeling_fer.data.schema import FEATURES, SPLITS, Example, Item, Rejected, Remark
from modeling_fer.data.sources import SOURCES
from modeling_fer.labels import CLASSES, IGNORE, NUM_CLASSES

SHARD_ROWS, SHARD_BYTES = 50_000, 256 * 2**20
BATCH_ROWS, BATCH_BYTES = 1_000, 32 * 2**20  # what is held in memory per split, and the size of a parquet row group
HELD_OUT = ("validation", "test")
SAMPLES = 10  # pictures a class in samples.png
LISTED = 50  # unreadable files named in the report; skipped.jsonl names them all
NO_LABEL = "no label"


# ---------------------------------------------------------------------------------------------------- the report


@dataclasses.dataclass
class Report:
    """What a prepared folder holds and what was left out of it. Counts are of rows unless they say otherwise."""

    source: str
    options: dict[str, Any]  # paths cut to their last part: the report may be published
    counts: dict[str, dict[str, int]]  # split -> class name or "no label" -> rows
    repeats: dict[str, dict[str, int]]  # [a][b]: rows of a whose pixels occur in b; [a][a]: rows after the first of each
    conflicts: int  # groups of identical images, over all splits, whose labels differ
    blank: dict[str, int]  # split -> images of one colour
    sizes: dict[str, list[int]]  # "width" and "height" -> [smallest, largest]
    crossing_subjects: dict[str, int]  # "train/validation" -> people in both
    dropped: dict[str, int]  # "split: reason" -> rows that drop_duplicates took out
    rejected: dict[str, int]  # reason -> rows that the source or its rule left out
    unreadable: int
    unreadable_origins: list[str]  # the first `LISTED`
    remarks: list[str]  # the source's own words
    warnings: list[str]

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def text(self) -> str:
        """Return the report as a table of classes by splits and the rest in sentences."""
        splits = list(self.counts)
        options = ", ".join(f"{name} {value}" for name, value in self.options.items() if value is not None)
        total = {split: sum(self.counts[split].values()) for split in splits}
        lines = [f"{self.source} ({options})", ""]
        lines += _table(["class", *splits], [
            *([name, *(self.counts[split][name] for split in splits)] for name in (*CLASSES, NO_LABEL)),
            ["all", *total.values()],
        ])  # fmt: skip
        lines += ["", *self.remarks] if self.remarks else []
        lines += ["", "Identical images: rows of a line's split whose pixels also occur in a column's split"]
        lines += ["(in the same split: rows after the first of each image)"]
        lines += _table(["", *splits], [[a, *(self.repeats[a][b] for b in splits)] for a in splits])
        lines += ["", f"groups of identical images with conflicting labels: {self.conflicts:,}"]
        lines += ["blank images: " + ", ".join(f"{split} {self.blank[split]:,}" for split in splits)]
        lines += ["image size: " + ", ".join(f"{side} {low} to {high}" for side, (low, high) in self.sizes.items())]
        crossing = [f"{pair} {n:,}" for pair, n in self.crossing_subjects.items()]
        lines += ["subjects in two splits: " + (", ".join(crossing) or "none known")]
        for title, tally in (("dropped as duplicates", self.dropped), ("rejected", self.rejected)):
            lines += [f"{title}: {sum(tally.values()):,}", *(f"  {n:,} {reason}" for reason, n in tally.items())]
        lines += [f"unreadable: {self.unreadable:,}", *(f"  {origin}" for origin in self.unreadable_origins)]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines) + "\n"


def _table(header: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [header, *([f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in cells
    ]


def show(folder: str | Path) -> str:
    """Return the report of a prepared folder as text.

    Raises:
        FileNotFoundError: there is no report.
    """
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: write a prepared folder with `fer data prepare SOURCE --out {folder}`")
    return Report.read(path).text()


# ---------------------------------------------------------------------------------------------------- counting


class _Tally:
    """What is counted while rows go by: some ten bytes a row, however large the images."""

    def __init__(self) -> None:
        self.digests, self.splits, self.labels = array("Q"), array("b"), array("b")
        self.blank: Counter[str] = Counter()
        self.widths, self.heights = [2**31, 0], [2**31, 0]
        self.subjects: dict[str, int] = {}  # subject -> bit mask of splits

    def add(self, example: Example, rgb: np.ndarray) -> None:
        """Count one row with its decoded pixels (H, W, 3)."""
        self.digests.append(_digest(rgb))
        self.splits.append(SPLITS.index(example.split))
        self.labels.append(example.expression)
        self.blank[example.split] += bool((rgb == rgb[0, 0]).all())
        for side, length in ((self.heights, rgb.shape[0]), (self.widths, rgb.shape[1])):
            side[:] = min(side[0], length), max(side[1], length)
        if example.subject is not None:
            self.subjects[example.subject] = self.subjects.get(example.subject, 0) | 1 << SPLITS.index(example.split)

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the rows of every split that has any, by class name or "no label"."""
        found = Counter(zip(self.splits, self.labels, strict=True))
        names = {**dict(enumerate(CLASSES)), IGNORE: NO_LABEL}
        return {
            split: {names[label]: found[s, label] for label in names}
            for s, split in enumerate(SPLITS)
            if any(found[s, label] for label in names)
        }

    def crossing_subjects(self) -> dict[str, int]:
        """Return how many people are in two splits, for each pair with any."""
        masks = Counter(self.subjects.values())
        pairs = [(a, b) for a in range(len(SPLITS)) for b in range(a + 1, len(SPLITS))]
        both = {
            f"{SPLITS[a]}/{SPLITS[b]}": sum(n for mask, n in masks.items() if mask >> a & 1 and mask >> b & 1)
            for a, b in pairs
        }
        return {pair: n for pair, n in both.items() if n}

    def repeats(self) -> tuple[dict[str, dict[str, int]], int]:
        """Return rows whose pixels recur, by split and split (see `Report`), and the number of conflicting groups."""
        group, copies = self._groups()
        repeats = {
            a: {
                b: int((copies[:, i] - (copies[:, i] > 0)).sum() if a == b else copies[copies[:, j] > 0, i].sum())
                for j, b in enumerate(SPLITS)
            }
            for i, a in enumerate(SPLITS)
        }
        return repeats, int(self._conflicting(group, len(copies), np.ones(len(group), bool)).sum())

    def surplus(self) -> list[str | None]:
        """Return for every row why `drop_duplicates` takes it out, or None."""
        group, copies = self._groups()
        splits = np.frombuffer(self.splits, np.int8).astype(np.int64)
        train, unlabeled = (splits == SPLITS.index(split) for split in ("train", "unlabeled"))
        held_out = copies[:, [SPLITS.index(split) for split in HELD_OUT]].any(axis=1)
        conflicting = self._conflicting(group, len(copies), train)
        first = np.zeros(len(group), bool)
        first[np.unique(group * len(SPLITS) + splits, return_index=True)[1]] = True
        reasons: list[str | None] = [None] * len(group)
        for mask, reason in (  # the last that fits is the one that is given
            (~first & (train | unlabeled), "a copy of an image before it"),
            (conflicting[group] & train, "identical images with conflicting labels"),
            (held_out[group] & (train | unlabeled), "the image is also in validation or test"),
        ):
            for row in np.flatnonzero(mask):
                reasons[row] = reason
        return reasons

    def _groups(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each row's group of identical images (N,), and the copies by group and split (G, splits)."""
        group = np.unique(np.frombuffer(self.digests, np.uint64), return_inverse=True)[1].reshape(-1)
        number, splits = int(group.max(initial=-1)) + 1, np.frombuffer(self.splits, np.int8)
        copies = np.bincount(group * len(SPLITS) + splits, minlength=number * len(SPLITS))
        return group, copies.reshape(number, len(SPLITS))

    def _conflicting(self, group: np.ndarray, number: int, rows: np.ndarray) -> np.ndarray:
        """Return which groups (G,) have more than one label among the given rows (N,)."""
        labels = np.frombuffer(self.labels, np.int8)
        rows = rows & (labels != IGNORE)
        met = np.bincount(group[rows] * NUM_CLASSES + labels[rows], minlength=number * NUM_CLASSES)
        return (met.reshape(number, NUM_CLASSES) > 0).sum(axis=1) > 1


def _digest(rgb: np.ndarray) -> int:
    """Hash shape and pixels to 64 bits: ten million images would collide with a chance of three in a million."""
    hashed = hashlib.blake2b(repr(rgb.shape).encode(), digest_size=8)
    hashed.update(np.ascontiguousarray(rgb))
    return int.from_bytes(hashed.digest(), "little")


# ---------------------------------------------------------------------------------------------------- preparing


def prepare(
    source: str,
    options: Any,
    out: str | Path,
    drop_duplicates: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Report:
    """Read a source and write a prepared folder; it appears whole or not at all.

    Args:
        source: a name in `SOURCES`.
        options: an instance of that source's options.
        out: the folder to write; it must not exist yet, unless `overwrite` and it is a prepared folder.
        drop_duplicates: read the source twice. Take out of train and unlabeled every image whose pixels also occur in
            validation or test, and all but the first copy of an image in each; take out of train every copy of an
            image whose training labels disagree. Validation and test stay as they are.
        overwrite: replace an existing prepared folder, once the new one is complete.
        show_progress: show a progress bar.

    Raises:
        ValueError: an unknown source, bad input, no rows, or no labelled training rows.
        FileExistsError: `out` is there.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown source {source!r}, known: {', '.join(SOURCES)}")
    out = Path(os.path.abspath(out))
    _check_free(out, overwrite)
    surplus = None
    if drop_duplicates:
        survey = _Tally()
        for item in _decoded(SOURCES[source].examples(options), f"{source}, first pass", show_progress):
            if isinstance(item, tuple):
                survey.add(*item)
        surplus = list(zip(survey.digests, survey.surplus(), strict=True))

    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        report = _write(source, options, partial, surplus, show_progress)
        _check_free(out, overwrite)  # another process may have been quicker
        old = out.with_name(f".{out.name}.old-{os.getpid()}")
        if out.exists():
            out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, f"disk full while writing {out}: free space or choose another folder") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "report.json").is_file():
        raise FileExistsError(f"{out} exists and is no prepared folder: choose another name (it is never overwritten)")
    if not overwrite:
        raise FileExistsError(f"{out} exists: choose another name, or replace it with --overwrite")


def _write(
    source: str, options: Any, folder: Path, surplus: list[tuple[int, str | None]] | None, show_progress: bool
) -> Report:
    """Write everything into `folder`; `surplus` holds each example's digest and the reason to drop it."""
    tally, samples = _Tally(), _Samples()
    dropped: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    unreadable: list[str] = []
    remarks: list[str] = []
    read = 0

    def skip(file: TextIO, origin: str, reason: str) -> None:
        file.write(json.dumps({"origin": origin, "reason": reason}, ensure_ascii=False) + "\n")

    with _Shards(folder / "data") as shards, (folder / "skipped.jsonl").open("w", encoding="utf-8") as skipped:
        for item in _decoded(SOURCES[source].examples(options), source, show_progress):
            if isinstance(item, Remark):
                remarks.append(item.text)
            elif isinstance(item, Rejected):
                skip(skipped, item.origin, item.reason)
                if item.reason == "unreadable":
                    unreadable.append(item.origin)
                else:
                    rejected[item.reason] += 1
            else:
                example, rgb = item
                reason = None
                if surplus is not None:
                    if read >= len(surplus) or surplus[read][0] != _digest(rgb):
                        raise ValueError(f"{example.origin} changed while {source} was read twice: leave it alone, try again")
                    reason = surplus[read][1]
                read += 1
                if reason:
                    dropped[f"{example.split}: {reason}"] += 1
                    skip(skipped, example.origin, reason)
                else:
                    tally.add(example, rgb)
                    samples.add(example)
                    shards.add(example)

    counts = tally.counts()
    _check_rows(source, options, counts, sum(rejected.values()), len(unreadable))
    repeats, conflicts = tally.repeats()
    report = Report(
        source=source,
        options=_publishable(options),
        counts=counts,
        repeats={a: {b: repeats[a][b] for b in counts} for a in counts},
        conflicts=conflicts,
        blank={split: tally.blank[split] for split in counts},
        sizes={"width": tally.widths, "height": tally.heights},
        crossing_subjects=tally.crossing_subjects(),
        dropped=dict(dropped.most_common()),
        rejected=dict(rejected.most_common()),
        unreadable=len(unreadable),
        unreadable_origins=unreadable[:LISTED],
        remarks=remarks,
        warnings=[],
    )
    report.warnings = _warnings(report)
    report.save(folder / "report.json")
    samples.draw(counts).save(folder / "samples.png")
    (folder / "README.md").write_text(_card(report), encoding="utf-8")
    return report


def _decoded(
    items: Iterable[Item], title: str, show_progress: bool
) -> Iterator[tuple[Example, np.ndarray] | Rejected | Remark]:
    """Pass a source's items on, examples with their pixels (H, W, 3), those that cannot be decoded as rejected."""
    for item in tqdm(items, desc=title, unit="row", disable=not show_progress):
        if not isinstance(item, Example):
            yield item
            continue
        if item.split not in SPLITS:
            raise ValueError(f"{item.origin}: unknown split {item.split!r}, known: {', '.join(SPLITS)}")
        if item.expression not in range(IGNORE, NUM_CLASSES):
            raise ValueError(f"{item.origin}: expression {item.expression} is not a class id from {IGNORE} to 7")
        try:
            rgb = np.asarray(open_image(item.image))
        except UNREADABLE:
            yield Rejected(item.origin, "unreadable")
        else:
            yield item, rgb


def _check_rows(source: str, options: Any, counts: dict[str, dict[str, int]], rejected: int, unreadable: int) -> None:
    """Raise if there is nothing to train on where there should be."""
    left_out = f"{rejected:,} rejected, {unreadable:,} unreadable"
    if not counts:
        raise ValueError(f"{source} gave no rows ({left_out}): check its paths and options: {options}")
    to_train_on = [split for split in ("train", "unlabeled") if split in counts]
    labelled = sum(counts.get("train", {}).get(name, 0) for name in CLASSES)
    if to_train_on and not labelled and not getattr(options, "unlabeled", False):
        raise ValueError(
            f"{source} gave no labelled training rows ({left_out}): check its labels and the rule for them, or ask for "
            f"faces without labels with --unlabeled where the source has it: {options}"
        )


def _warnings(report: Report) -> list[str]:
    warnings = []
    for split, counts in report.counts.items():
        empty = [name for name in CLASSES if not counts[name]]
        if empty and len(empty) < NUM_CLASSES:
            warnings.append(f"{split} has no example of {', '.join(empty)}")
    for split in ("train", "unlabeled"):
        for held in HELD_OUT:
            n = report.repeats.get(split, {}).get(held, 0)
            if n:
                warnings.append(f"{n:,} {split} rows are images of {held} too: --drop-duplicates removes them")
    for pair, n in report.crossing_subjects.items():
        if any(held in pair for held in HELD_OUT):
            warnings.append(f"{n:,} people are in both {' and '.join(pair.split('/'))}: scores there flatter the model")
    if report.unreadable:
        warnings.append(f"{report.unreadable:,} images could not be read: skipped.jsonl names them")
    return warnings


def _publishable(options: Any) -> dict[str, Any]:
    """Return the options with every path cut to its last part."""
    return {
        name: Path(value).name if isinstance(value, str) and os.sep in value else value
        for name, value in dataclasses.asdict(options).items()
    }


# ---------------------------------------------------------------------------------------------------- files


class _Shards:
    """Parquet files of one folder, written row by row, a batch of rows per split in memory."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.rows: dict[str, list[dict[str, Any]]] = {}  # split -> rows that wait
        self.bytes: Counter[str] = Counter()  # split -> image bytes that wait
        self.writers: dict[str, pq.ParquetWriter] = {}
        self.sizes: dict[str, list[list[int]]] = {}  # split -> [rows, image bytes] of each shard

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            for split in list(self.rows):
                self._flush(split)
        for writer in self.writers.values():
            writer.close()
        if kind is None:
            for split, sizes in self.sizes.items():
                for index in range(len(sizes)):
                    final = f"{split}-{index:05d}-of-{len(sizes):05d}.parquet"
                    self._path(split, index).rename(self.folder / final)

    def add(self, example: Example) -> None:
        """Add one row to the files of its split."""
        row = {name: getattr(example, name) for name in FEATURES}
        row["image"] = {"bytes": example.image, "path": None}
        self.rows.setdefault(example.split, []).append(row)
        self.bytes[example.split] += len(example.image)
        if len(self.rows[example.split]) >= BATCH_ROWS or self.bytes[example.split] >= BATCH_BYTES:
            self._flush(example.split)

    def _flush(self, split: str) -> None:
        rows, size = self.rows.pop(split), self.bytes.pop(split)
        sizes = self.sizes.setdefault(split, [])
        if not sizes or sizes[-1][0] + len(rows) > SHARD_ROWS or sizes[-1][1] + size > SHARD_BYTES:
            if split in self.writers:
                self.writers[split].close()
            sizes.append([0, 0])
            # The schema carries the features, so that whoever reads the file gets images and class names back.
            self.writers[split] = pq.ParquetWriter(self._path(split, len(sizes) - 1), FEATURES.arrow_schema)
        self.writers[split].write_table(pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema))
        sizes[-1][0] += len(rows)
        sizes[-1][1] += size

    def _path(self, split: str, index: int) -> Path:
        return self.folder / f"{split}-{index:05d}.partial"


class _Samples:
    """Some images of every class and split, drawn evenly from all rows, always the same for the same rows."""

    def __init__(self) -> None:
        self.random = random.Random(0)
        self.seen: Counter[tuple[str, int]] = Counter()
        self.kept: dict[tuple[str, int], list[bytes]] = {}

    def add(self, example: Example) -> None:
        """Offer one row (reservoir sampling: every row ends up among the kept ones with the same chance)."""
        key = (example.split, example.expression)
        kept = self.kept.setdefault(key, [])
        self.seen[key] += 1
        if len(kept) < SAMPLES:
            kept.append(example.image)
        elif (place := self.random.randrange(self.seen[key])) < SAMPLES:
            kept[place] = example.image

    def draw(self, counts: dict[str, dict[str, int]]) -> Image.Image:
        """Draw a line of images for each class of the first labelled split, or of all rows if none is labelled."""
        labelled = [split for split in counts if any(counts[split][name] for name in CLASSES)]
        split = (labelled or list(counts))[0]
        names = dict(enumerate(CLASSES)) if labelled else {IGNORE: NO_LABEL}
        cell, gap, left, top = 88, 4, 150, 34
        font = ImageFont.load_default(size=17)
        picture = Image.new("RGB", (left + SAMPLES * (cell + gap), top + len(names) * (cell + gap)), "white")
        pen = ImageDraw.Draw(picture)
        pen.text((10, 7), f"{split}: {sum(counts[split].values()):,} images", "black", font)
        for line, (label, name) in enumerate(names.items()):
            y = top + line * (cell + gap)
            pen.text((10, y + 20), f"{name}\n{counts[split][name]:,}", "black", font)
            for column, image in enumerate(self.kept.get((split, label), [])):
                face = ImageOps.contain(open_image(image), (cell, cell))
                picture.paste(face, (left + column * (cell + gap), y))
        return picture


def _card(report: Report) -> str:
    """Return a dataset card: `load_dataset` reads the splits from its head, people read the rest."""
    total = sum(sum(counts.values()) for counts in report.counts.values())
    sizes = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    head = {
        "pretty_name": f"{report.source} for facial expression recognition",
        "task_categories": ["image-classification"],
        "tags": ["facial-expression-recognition"],
        "size_categories": [next((name for bound, name in sizes if total < bound), "n>1M")],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*"} for split in report.counts],
            }
        ],
    }
    classes = "\n".join(f"- {index}: {name}" for index, name in enumerate(CLASSES))
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {report.source} for facial expression recognition

Faces from the source `{report.source}`, one image a row, written by `fer data prepare`.

```python
from datasets import load_dataset

faces = load_dataset("path/of/this/folder")
```

Columns: `image`; `expression`, the class below or -1 without a label; `soft_label`, the annotators' votes as a distribution
over the classes, where known; `source`; `subject`, `video` and `frame`, where known.

{classes}

Labels are the expression that annotators saw, not what a person felt. The terms of the source's publisher hold for this
copy too: check them before you share it.

## What is in it

```
{report.text().strip()}
```
"""
