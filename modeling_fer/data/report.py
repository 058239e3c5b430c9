"""What a prepared folder tells about itself: a report for programs and people, a dataset card, a picture."""

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw, ImageFont, ImageOps

from modeling_fer.data.pixels import open_image
from modeling_fer.data.schema import Example
from modeling_fer.labels import CLASSES, IGNORE, NUM_CLASSES

HELD_OUT = ("validation", "test")
NO_LABEL = "no label"
TOGETHER = "all splits together"
SAMPLES = 10  # pictures a class in samples.png

CARD = """---
{head}
---

# {title}

Faces from the source `{source}`, one image a row, written by `fer data prepare`.

```python
from datasets import load_dataset

faces = load_dataset("path/of/this/folder")
```

Columns: `image`; `expression`, the class below or -1 without a label; `soft_label`, the annotators' votes as
a distribution over the classes, where known; `source`; `subject`, `video` and `frame`, where known.

{classes}

Labels are the expression that annotators saw, not what a person felt. The terms of the source's publisher
hold for this copy too: check them before you share it.

## What is in it

```
{report}
```
"""


@dataclasses.dataclass
class Report:
    """What a prepared folder holds and what was left out of it; counts are of rows where not said."""

    source: str
    options: dict[str, Any]  # paths cut to their last part: the report may be published
    counts: dict[str, dict[str, int]]  # split -> class name or "no label" -> rows
    # [a][b]: rows of a whose pixels occur in b; [a][a]: rows after the first of each image
    repeats: dict[str, dict[str, int]]
    # split, or "all splits together" -> groups of identical images whose labels differ there
    conflicts: dict[str, int]
    blank: dict[str, int]  # split -> images of one colour
    sizes: dict[str, list[int]]  # "width" and "height" -> [smallest, largest]
    crossing_subjects: dict[str, int]  # "train/validation" -> people in both
    dropped: dict[str, int]  # "split: reason" -> rows that `drop_duplicates` took out
    rejected: dict[str, int]  # reason -> rows that the source or its rule left out
    unreadable: int
    unreadable_origins: list[str]  # the first of them
    remarks: list[str]  # the source's own words

    def save(self, path: Path) -> None:
        """Write the report and its warnings as JSON."""
        told = {**dataclasses.asdict(self), "warnings": self.warnings}
        text = json.dumps(told, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Read what `save` wrote."""
        told = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{field.name: told[field.name] for field in dataclasses.fields(cls)})

    @property
    def warnings(self) -> list[str]:
        """What a user should know before training on the data."""
        found = []
        for split, counts in self.counts.items():
            empty = [name for name in CLASSES if not counts[name]]
            if 0 < len(empty) < NUM_CLASSES:
                found.append(f"{split} has no example of {', '.join(empty)}")
        for split in ("train", "unlabeled"):
            for held in HELD_OUT:
                if n := self.repeats.get(split, {}).get(held, 0):
                    remedy = "--drop-duplicates removes them"
                    found.append(f"{n:,} {split} rows are images of {held} too: {remedy}")
        for pair, n in self.crossing_subjects.items():
            if any(held in pair for held in HELD_OUT):
                both = pair.replace("/", " and ")
                found.append(f"subjects in both {both}: {n:,}; scores there flatter the model")
        found += [f"blank images in {split}: {n:,}" for split, n in self.blank.items() if n]
        if self.unreadable:
            found.append(f"{self.unreadable:,} images could not be read: skipped.jsonl names them")
        return found

    def text(self) -> str:
        """Return the report as a table of classes by splits and the rest in sentences."""
        splits = list(self.counts)
        options = ", ".join(f"{name} {value}" for name, value in self.options.items() if value is not None)
        sizes = ", ".join(f"{side} {low} to {high}" for side, (low, high) in self.sizes.items())
        rows = {name: [self.counts[split][name] for split in splits] for name in (*CLASSES, NO_LABEL)}
        rows["all"] = [sum(self.counts[split].values()) for split in splits]
        lines = [f"{self.source} ({options})", "", *_table("class", splits, rows), ""]
        if self.remarks:
            lines += [*self.remarks, ""]
        lines += [
            "Identical images: rows of a line's split whose pixels also occur in a column's split",
            "(in the same split: rows after the first of each image)",
            *_table("", splits, {a: [self.repeats[a][b] for b in splits] for a in splits}),
            "",
            f"groups of identical images with conflicting labels: {_numbers(self.conflicts)}",
            f"blank images: {_numbers(self.blank)}",
            f"image size: {sizes}",
            f"subjects in two splits: {_numbers(self.crossing_subjects) or 'none known'}",
        ]
        for title, tally in (("dropped as duplicates", self.dropped), ("rejected", self.rejected)):
            lines.append(f"{title}: {sum(tally.values()):,}")
            lines += [f"  {n:,} {reason}" for reason, n in tally.items()]
        lines += [f"unreadable: {self.unreadable:,}", *(f"  {origin}" for origin in self.unreadable_origins)]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines) + "\n"

    def card(self) -> str:
        """Return a dataset card: `load_dataset` reads the splits from its head, people read the rest."""
        title = f"{self.source} for facial expression recognition"
        files = [{"split": split, "path": f"data/{split}-*"} for split in self.counts]
        head = {
            "pretty_name": title,
            "task_categories": ["image-classification"],
            "tags": ["facial-expression-recognition"],
            "configs": [{"config_name": "default", "data_files": files}],
        }
        return CARD.format(
            head=yaml.safe_dump(head, sort_keys=False).strip(),
            title=title,
            source=self.source,
            classes="\n".join(f"- {index}: {name}" for index, name in enumerate(CLASSES)),
            report=self.text().strip(),
        )


def show(folder: str | Path) -> str:
    """Return the report of a prepared folder as text.

    Raises:
        FileNotFoundError: there is no report.
        ValueError: the report is damaged, or another program's.
    """
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: write a prepared folder with `fer data prepare SOURCE --out {folder}`"
        )
    try:
        return Report.read(path).text()
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged, or not of `fer data prepare` ({type(error).__name__}: {error}): "
            "prepare the data again with `fer data prepare SOURCE --out NEW_FOLDER`"
        ) from error


def _numbers(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.items())


def _table(corner: str, header: list[str], rows: dict[str, list[int]]) -> list[str]:
    """Return lines with the names of the rows flush left and their numbers flush right."""
    cells = [[corner, *header], *([name, *(f"{n:,}" for n in rows[name])] for name in rows)]
    first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
    return [
        "  ".join([name.ljust(first), *map(str.rjust, numbers, others)]).rstrip() for name, *numbers in cells
    ]


class Samples:
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
        """Draw a line of images for each class of the first labelled split, or one if none is labelled."""
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
