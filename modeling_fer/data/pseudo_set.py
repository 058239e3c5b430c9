"""A finished labelling job becomes a data set: the selected images with their labels, a report, a card.

out/data/pseudo-00000-of-0000N.parquet   `schema.load(out)["pseudo"]` and `datasets.load_dataset(out)`
out/report.json  README.md               what is in it, for programs (`fer data show`), for the Hub
"""

import itertools
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import ClassLabel, Features, List, Value

from modeling_fer.data.images import HUB, Face, content_hash, cut, decoded, find_source, read
from modeling_fer.data.pseudo import Job, option
from modeling_fer.data.report import HELD_OUT, NO_LABEL, TOGETHER, Report
from modeling_fer.data.schema import FEATURES
from modeling_fer.data.selection import COPY, Candidates, Selection, SelectOptions
from modeling_fer.data.selection import HELD_OUT as LOOK_ALIKE
from modeling_fer.data.shards import BATCH_BYTES, BATCH_ROWS, SHARD_BYTES, SHARD_ROWS
from modeling_fer.data.similar import BYTES, SIDE, perceptual_hashes
from modeling_fer.labels import CLASSES

SPLIT = "pseudo"
# Options that do not decide what a round of labelling and training ends with.
FREE = {"batch_size", "threads", "stale_minutes", "rounds", "launch"}
LISTED = 50  # unreadable files named in the report; skipped.jsonl names them all
DROPPED = {
    COPY: f"{SPLIT}: a copy of an image before it",
    LOOK_ALIKE: f"{SPLIT}: looks like a validation or test image",
}
COLUMNS = Features(
    {
        **FEATURES,  # soft_label has the debiased probabilities
        "file": Value("string"),  # path in the tree, or archive or shard and place in it
        "probabilities": List(Value("float32")),  # as the model gave them, mean of the two views
        "raw_label": ClassLabel(names=list(CLASSES)),  # the most probable class before debiasing
        "confidence": Value("float32"),  # debiased probability of `expression`
        "margin": Value("float32"),  # that, less the second largest
        "agreement": Value("float32"),  # 1 less the total variation between image and mirror image
        "rule": Value("string"),
        "threshold": Value("float32"),  # least confidence of its class; 0: the class had no more rows
        "model_revision": Value("string"),
        "content_hash": Value("string"),
    }
)
CARD = """---
{head}
---

# Pseudo-labelled faces

Faces whose expressions a model named, not people: labels can be wrong, and share the model's bias. Written by
`pseudo_label.py`.

```python
from datasets import load_dataset

faces = load_dataset("path/of/this/folder")
```

Columns: `image`; `expression`, the label, one of {classes}; `soft_label`, debiased probabilities of these
classes, and `probabilities`, those of the model; `raw_label`, the label without debiasing; `confidence` and
`margin` of the label; `agreement` of the image's and its mirror image's probabilities; `rule` and `threshold`
by which the row was kept; `file`, `content_hash` and `model_revision`, where it all is from.

The terms of whoever published the images and the model hold for this copy too: check them before you share
it.

## What is in it

```
{report}
```
"""


@dataclass
class RoundOptions:
    """How models are trained on labels of their own."""

    labelled: str = option("prepared folder with labels; look-alikes of its held-out faces are left out")
    config: str = option(
        "configuration of train.py, for each round; where its encoder or teacher is --model, later rounds "
        "have the model of the round before"
    )
    rounds: int = option("how often to label, select and train", 3)
    launch: str = option('what runs label and train: python, "accelerate launch", ...', sys.executable)
    train_args: str = option('more for train.py, as --train_args="--encoder DIR --max_steps 500"', "")


def followed(config: Mapping[str, Any], first: str, newest: str) -> dict[str, str]:
    """What a round changes of its configuration: the newest model where that has the one labels began with.

    Args:
        config: of train.py; its `encoder` and `teacher` are looked at.
        first: the model that was given, a folder, however it is written, or hub:OWNER/NAME.
        newest: the model of the round before; in the first round, `first`.
    """
    if newest == first:
        return {}
    same = os.path.abspath(first.removeprefix(HUB))
    names = ("encoder", "teacher")
    return {name: newest for name in names if config.get(name) and os.path.abspath(config[name]) == same}


def select(out: str | Path, options: SelectOptions) -> Report:
    """Choose among the labels of a finished job and write the split `pseudo` of its folder, anew each time.

    A kill leaves the data set of before or the new one, or the next call, failed or not, brings back the old.
    The card, written last, tells that a data set is whole. One call at a time.

    Raises:
        FileNotFoundError: there is no job, or a folder of `options.against` has no held-out faces.
        ValueError: the job is not finished, no row is left, a file is damaged, or an image has changed.
    """
    job = Job(out)
    if left := job.finish():
        raise ValueError(
            f"{left} of {len(job.units)} units of {out} are not labelled: run `pseudo_label.py label` again"
        )
    data, old = job.out / "data", job.out / ".old-data"
    if old.exists() and not data.exists():
        old.rename(data)  # killed between the two renames below
    for litter in (old, *job.out.glob(".select-*")):
        shutil.rmtree(litter, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".select-", dir=job.out) as name:
        folder = Path(name)
        held_out = held_out_hashes(options.against)
        selection, tally = Selection(job, options, held_out, folder), _Tally()
        _write_shards(_rows(selection, tally), folder / "data")
        if not tally.kept:
            why = {**tally.rejected, **tally.dropped}
            raise ValueError(f"no row is left ({why}): select with a lower --threshold or --agreement")
        report = _report(selection, tally, len(held_out))
        report.save(folder / "report.json")
        (folder / "README.md").write_text(_card(report), encoding="utf-8")
        if data.exists():
            data.rename(old)
        for part in ("data", "report.json", "README.md"):
            (folder / part).replace(job.out / part)
    shutil.rmtree(old, ignore_errors=True)
    return report


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that whoever looks finds all of it or what was there before."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def held_out_hashes(folders: Sequence[str]) -> np.ndarray:
    """Hash the validation and test faces of prepared folders: `(M, 32)` bytes.

    Raises:
        FileNotFoundError: a folder has neither split.
    """
    found = [np.empty((0, BYTES), np.uint8)]
    with ThreadPoolExecutor() as pool, tempfile.TemporaryDirectory() as nowhere:
        for folder in folders:
            splits = [split for split in HELD_OUT if [*Path(folder).glob(f"data/{split}-*.parquet")]]
            if not splits:
                raise FileNotFoundError(
                    f"{folder} is no prepared folder with faces of {' or '.join(HELD_OUT)}"
                )
            for split in splits:
                source = find_source(folder, split, "image", BATCH_ROWS)
                for unit in cut(source, Path(nowhere)):
                    faces = decoded(read(source, unit, Path(nowhere)), SIDE, pool, BATCH_ROWS)
                    small = [face.small for face in faces if isinstance(face, Face)]
                    found.append(perceptual_hashes(np.array(small).reshape(-1, SIDE, SIDE)))
    return np.concatenate(found)


class _Tally:
    """What was kept and what was not, and why."""

    def __init__(self) -> None:
        self.kept: Counter[int] = Counter()
        self.raw: Counter[int] = Counter()
        self.dropped: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.blank = 0
        self.sizes: dict[str, list[int]] = {}

    def add(self, rows: Candidates) -> None:
        """Count the candidates of one unit."""
        eligible = rows.marks == 0
        for mark, reason in DROPPED.items():
            self.dropped[reason] += int((rows.marks == mark).sum())
        self.rejected["the views do not agree"] += int((eligible & ~rows.agree).sum())
        self.rejected["not confident enough"] += int((eligible & rows.agree & ~rows.keep).sum())
        self.raw.update(rows.shard["raw_label"].to_pylist())
        self.kept.update(rows.labels[rows.keep].tolist())
        kept = rows.shard.filter(pa.array(rows.keep))
        self.blank += kept["is_blank"].to_numpy().sum()
        for side in ("width", "height") if len(kept) else ():
            found = [*self.sizes.get(side, []), *kept[side].to_pylist()]
            self.sizes[side] = [min(found), max(found)]


def _rows(selection: Selection, tally: _Tally) -> Iterator[dict[str, Any]]:
    """Yield the selected rows with their images, read from the source again."""
    job = selection.job
    every_row = {
        "source": Path(job.source["root"]).name,
        "rule": selection.options.rule,
        "model_revision": job.settings["model_revision"],
    }
    for candidates in selection.units():
        tally.add(candidates)
        kept = np.flatnonzero(candidates.keep)
        scores, labels = candidates.scores[kept], candidates.labels[kept]
        second, first = np.sort(scores, axis=1)[:, -2:].T
        known = candidates.shard.take(kept).to_pylist()
        places = {row["row"]: place for place, row in enumerate(known)}
        for image in job.read_images(candidates.unit, set(places)) if places else ():
            place = places.pop(image.row)
            data = image.read()
            if content_hash(data) != known[place]["content_hash"]:
                raise ValueError(f"{image.name} is not what was labelled: label again, into another --out")
            yield {
                **every_row,
                **{name: value for name, value in known[place].items() if name in COLUMNS},
                "image": {"bytes": data, "path": None},
                "expression": labels[place],
                "soft_label": scores[place],
                "confidence": first[place],
                "margin": first[place] - second[place],
                "threshold": selection.thresholds[labels[place]],
                "content_hash": known[place]["content_hash"].hex(),
            }
        if places:
            raise ValueError(f"{known[min(places.values())]['file']} is not in {job.source['root']} any more")


def _write_shards(rows: Iterator[dict[str, Any]], folder: Path) -> None:
    """Write rows as parquet files of bounded size, with bounded memory."""
    folder.mkdir()
    schema = COLUMNS.arrow_schema
    partial: list[Path] = []
    writer: pq.ParquetWriter | None = None
    shard_rows = shard_bytes = 0
    while batch := _next_batch(rows):
        if writer is None or shard_rows >= SHARD_ROWS or shard_bytes >= SHARD_BYTES:
            if writer:
                writer.close()
            partial.append(folder / f"{len(partial)}.partial")
            writer, shard_rows, shard_bytes = pq.ParquetWriter(partial[-1], schema), 0, 0
        writer.write_table(pa.Table.from_pylist(batch, schema=schema))
        shard_rows += len(batch)
        shard_bytes += sum(len(row["image"]["bytes"]) for row in batch)
    if writer:
        writer.close()
    for number, path in enumerate(partial):
        path.rename(folder / f"{SPLIT}-{number:05d}-of-{len(partial):05d}.parquet")


def _next_batch(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    batch: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row["image"]["bytes"])
        if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
            break
    return batch


def _report(selection: Selection, tally: _Tally, held_out: int) -> Report:
    job, options = selection.job, selection.options
    with (job.out / "skipped.jsonl").open(encoding="utf-8") as lines:
        listed = [json.loads(line)["file"] for line in itertools.islice(lines, LISTED)]
        unreadable = len(listed) + sum(1 for _ in lines)
    chosen = {"threshold": options.threshold} if options.rule == "threshold" else {"quota": options.quota}
    return Report(
        source="pseudo-labels",
        options={
            "images": Path(job.source["root"]).name,
            "model": Path(job.about["model"]).name,
            "rule": options.rule,
            **chosen,
            "tau": options.tau,
            "agreement": options.agreement,
            "against": " ".join(Path(folder).name for folder in options.against) or None,
        },
        counts={SPLIT: {**{name: tally.kept[i] for i, name in enumerate(CLASSES)}, NO_LABEL: 0}},
        repeats={SPLIT: {SPLIT: 0}},
        conflicts={SPLIT: 0, TOGETHER: 0},
        blank={SPLIT: int(tally.blank)},
        sizes=tally.sizes,
        crossing_subjects={},
        dropped=dict(+tally.dropped),  # without zeros
        rejected=dict(+tally.rejected),
        unreadable=unreadable,
        unreadable_origins=listed,
        remarks=[
            f"{selection.starts[-1]:,} images labelled by model {job.settings['model_revision']}, "
            f"{tally.kept.total():,} kept",
            f"model's mean probabilities: {_by_class(selection.marginal)}",
            f"labels before debiasing: {_by_class([tally.raw[i] for i in range(len(CLASSES))])}",
            f"least confidence kept: {_by_class(selection.thresholds)}",
            f"compared with {held_out:,} held-out faces"
            if options.against
            else "look-alikes of held-out faces were not looked for: name prepared folders with --against",
        ],
    )


def _by_class(values: Iterable[float]) -> str:
    return ", ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.3f}"
        for name, value in zip(CLASSES, values, strict=True)
    )


def _card(report: Report) -> str:
    head = {
        "pretty_name": "Pseudo-labelled faces",
        "task_categories": ["image-classification"],
        "tags": ["facial-expression-recognition", "pseudo-labels"],
        "configs": [{"config_name": "default", "data_files": [{"split": SPLIT, "path": f"data/{SPLIT}-*"}]}],
    }
    return CARD.format(
        head=yaml.safe_dump(head, sort_keys=False).strip(),
        classes=", ".join(CLASSES),
        report=report.text().strip(),
    )
