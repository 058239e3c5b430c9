"""Rows counted as they go by: classes, identical images, labels that contradict each other, sizes, people."""

import hashlib
import itertools
from array import array
from collections import Counter

import numpy as np

from modeling_fer.data.report import HELD_OUT, NO_LABEL, TOGETHER
from modeling_fer.data.schema import SPLITS, Example
from modeling_fer.labels import CLASSES, IGNORE, NUM_CLASSES


class Tally:
    """Fills a `Report` from rows: some ten bytes a row, however large the images."""

    def __init__(self) -> None:
        self.digests, self.splits, self.labels = array("Q"), array("b"), array("b")
        self.rows: Counter[tuple[str, int]] = Counter()  # (split, class id)
        self.blank: Counter[str] = Counter()
        self.sizes: dict[str, list[int]] = {}
        self.subjects: dict[str, set[str]] = {}  # subject -> splits

    def add(self, example: Example, rgb: np.ndarray) -> None:
        """Count one row with its decoded pixels (H, W, 3)."""
        self.digests.append(digest(rgb))
        self.splits.append(SPLITS.index(example.split))
        self.labels.append(example.expression)
        self.rows[example.split, example.expression] += 1
        self.blank[example.split] += bool((rgb == rgb[0, 0]).all())
        for side, length in (("width", rgb.shape[1]), ("height", rgb.shape[0])):
            low, high = self.sizes.get(side, (length, length))
            self.sizes[side] = [min(low, length), max(high, length)]
        if example.subject is not None:
            self.subjects.setdefault(example.subject, set()).add(example.split)

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the rows of every split that has any, by class name or "no label"."""
        names = {**dict(enumerate(CLASSES)), IGNORE: NO_LABEL}
        return {
            split: {name: self.rows[split, label] for label, name in names.items()}
            for split in SPLITS
            if split in self.blank
        }

    def crossing_subjects(self) -> dict[str, int]:
        """Return how many people are in two splits, for each pair with any."""
        both = {
            f"{a}/{b}": sum(a in splits and b in splits for splits in self.subjects.values())
            for a, b in itertools.combinations(SPLITS, 2)
        }
        return {pair: n for pair, n in both.items() if n}

    def repeats(self) -> dict[str, dict[str, int]]:
        """Return rows whose pixels recur, by split and split (see `Report`)."""
        _, copies = self._groups()
        met = copies > 0
        rows = copies.T @ met - np.diag(met.sum(axis=0))
        found = [(index, split) for index, split in enumerate(SPLITS) if split in self.blank]
        return {a: {b: int(rows[i, j]) for j, b in found} for i, a in found}

    def conflicts(self) -> dict[str, int]:
        """Return the groups of identical images whose labels differ, in each split and over all."""
        group, _ = self._groups()
        splits = np.frombuffer(self.splits, np.int8)
        within = {name: splits == index for index, name in enumerate(SPLITS) if name in self.blank}
        within[TOGETHER] = np.ones(len(splits), bool)
        return {name: int(self._conflicting(group, rows).sum()) for name, rows in within.items()}

    def surplus(self) -> list[str | None]:
        """Return for every row why `drop_duplicates` takes it out, or None."""
        group, copies = self._groups()
        splits = np.frombuffer(self.splits, np.int8)
        train: np.ndarray = splits == SPLITS.index("train")
        droppable = train | (splits == SPLITS.index("unlabeled"))
        held_out = np.any(copies[:, [SPLITS.index(split) for split in HELD_OUT]], axis=1)
        later = np.ones(len(group), bool)
        later[np.unique(group * len(SPLITS) + splits, return_index=True)[1]] = False
        reasons = {
            "the image is also in validation or test": held_out[group] & droppable,
            "identical images with conflicting labels": self._conflicting(group, train)[group] & train,
            "a copy of an image before it": later & droppable,
        }
        first = np.select(list(reasons.values()), range(len(reasons)), len(reasons))
        names = (*reasons, None)
        return [names[index] for index in first]

    def _groups(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each row's group of identical images (N,), and the copies by group and split (G, splits)."""
        groups, group = np.unique(np.frombuffer(self.digests, np.uint64), return_inverse=True)
        cells = group * len(SPLITS) + np.frombuffer(self.splits, np.int8)
        return group, np.bincount(cells, minlength=groups.size * len(SPLITS)).reshape(-1, len(SPLITS))

    def _conflicting(self, group: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return which groups (G,) have more than one label among the given rows (N,)."""
        labels = np.frombuffer(self.labels, np.int8)
        rows = rows & (labels != IGNORE)
        cells = group[rows] * NUM_CLASSES + labels[rows]
        met = np.bincount(cells, minlength=(group.max(initial=-1) + 1) * NUM_CLASSES)
        return np.count_nonzero(met.reshape(-1, NUM_CLASSES), axis=1) > 1


def digest(rgb: np.ndarray) -> int:
    """Hash shape and pixels to 64 bits; ten million images collide with a chance of 3 in a million."""
    hashed = hashlib.blake2b(repr(rgb.shape).encode(), digest_size=8)
    hashed.update(rgb.tobytes())
    return int.from_bytes(hashed.digest(), "little")
