"""Prepared folders that a run learns from, by role: `labelled=A,pseudo=B,unlabelled=C`, or just `A`."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets

from modeling_fer.data import schema
from modeling_fer.labels import IGNORE

ROLES = ("labelled", "pseudo", "unlabelled")


def expressions_of(rows: Dataset) -> np.ndarray:
    """Class ids `(N,)`, -1 where there is no label."""
    return np.asarray(rows.with_format("numpy")["expression"][:], dtype=np.int64).reshape(-1)


@dataclass
class Collection:
    """Prepared folders by role, loaded.

    - `labelled`: labels of their train split are learnt, their validation split judges; their unlabeled
      split counts as unlabelled.
    - `pseudo`: labels of their pseudo split are learnt as well (written by `pseudo_label.py select`).
    - `unlabelled`: their train and unlabeled splits, labels ignored.
    """

    text: str
    folders: dict[str, list[tuple[str, DatasetDict]]] = field(init=False)

    def __post_init__(self) -> None:
        self.folders = {
            role: [(path, schema.load(path)) for path in paths]
            for role, paths in parse_roles(self.text).items()
        }

    @property
    def cache_dir(self) -> Path:
        """Where decoded pixels are kept unless told otherwise: beside the first folder's data."""
        return Path(next(path for folders in self.folders.values() for path, _ in folders)) / "cache"

    def labelled(self, split: str) -> Dataset:
        """All rows of a split that carry a label; with `train`, those of the pseudo folders too.

        Raises:
            ValueError: no folder has such rows.
        """
        parts = [data[split] for _, data in self.folders["labelled"] if split in data]
        if split == "train":
            for path, data in self.folders["pseudo"]:
                if "pseudo" not in data:
                    raise ValueError(
                        f"{path} has no pseudo split (it has {', '.join(data)}); "
                        "write one with `python pseudo_label.py select`"
                    )
                parts.append(data["pseudo"])
        if not parts:
            found = "; ".join(f"{path} has {', '.join(data)}" for path, data in self.folders["labelled"])
            raise ValueError(f"{self.text} has no {split} split ({found}); prepare the data with one")
        rows = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
        carrying = np.flatnonzero(expressions_of(rows) != IGNORE)
        if not len(carrying):
            raise ValueError(
                f"{self.text}: no row of the {split} split has a label; training needs labelled faces there"
            )
        return rows if len(carrying) == len(rows) else rows.select(carrying)

    def frames(self, split: str) -> Dataset:
        """All rows of a split of the labelled folders, with a label or without: what a video consists of.

        Raises:
            ValueError: no labelled folder has such a split.
        """
        parts = [data[split] for _, data in self.folders["labelled"] if split in data]
        if not parts:
            found = "; ".join(f"{path} has {', '.join(data)}" for path, data in self.folders["labelled"])
            raise ValueError(f"{self.text} has no {split} split ({found}); prepare the data with one")
        return concatenate_datasets(parts) if len(parts) > 1 else parts[0]

    def true_labels(self) -> int:
        """How many rows of `labelled("train")`, the first ones, have a label that no model gave."""
        parts = [data["train"] for _, data in self.folders["labelled"] if "train" in data]
        return sum(int((expressions_of(part) != IGNORE).sum()) for part in parts)

    def unlabelled(self) -> Dataset | None:
        """All faces to learn from without labels, or None. A label that they carry is only for measuring."""
        parts = [data["unlabeled"] for _, data in self.folders["labelled"] if "unlabeled" in data]
        parts += [
            data[split]
            for _, data in self.folders["unlabelled"]
            for split in ("train", "unlabeled")
            if split in data
        ]
        return concatenate_datasets(parts) if len(parts) > 1 else next(iter(parts), None)

    def faces(self) -> Dataset:
        """Every face that may be trained on, labelled or not."""
        parts = [
            data[split]
            for role in ("labelled", "unlabelled")
            for _, data in self.folders[role]
            for split in ("train", "unlabeled")
            if split in data
        ]
        if not parts:
            raise ValueError(f"{self.text} has no train or unlabeled split to learn from")
        return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def parse_roles(text: str) -> dict[str, list[str]]:
    """`"labelled=A,unlabelled=B,unlabelled=C"` to folders by role; a bare path is labelled.

    Raises:
        ValueError: an unknown role, or no folder.
    """
    roles: dict[str, list[str]] = {role: [] for role in ROLES}
    for part in filter(None, text.split(",")):
        role, equals, path = part.partition("=")
        if not equals:
            role, path = "labelled", part
        if role not in roles or not path:
            raise ValueError(
                f"--data {part}: expected a folder, or {', '.join(f'{r}=FOLDER' for r in ROLES)}"
            )
        roles[role].append(path)
    if not any(roles.values()):
        raise ValueError(f"--data {text!r} names no folder")
    return roles
