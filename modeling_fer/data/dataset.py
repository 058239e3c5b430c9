"""A split as arrays: decoded pixels, class ids and soft labels, fetched a batch at a time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from modeling_fer.labels import CLASSES, IGNORE


class FaceDataset(Dataset):
    """Faces of one split for training.

    Pixels stay uint8, in memory or memory-mapped; views of them are made on the device later.

    Args:
        pixels: uint8 `(N, 3, H, W)`.
        expressions: our class ids `(N,)`, -1 where unlabelled.
        soft_labels: per example a distribution over the 8 classes, or None.
        classes: names of the model's classes in the order of its logits; ids are translated to that order,
            and examples of other classes count as unlabelled.

    Raises:
        ValueError: arrays of different lengths, or an id or a class that is none of ours.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        expressions: Sequence[int] | np.ndarray,
        soft_labels: Sequence[Sequence[float] | None] | None = None,
        classes: Sequence[str] = CLASSES,
    ) -> None:
        if len(pixels) != len(expressions) or (soft_labels is not None and len(soft_labels) != len(pixels)):
            votes = "" if soft_labels is None else f" and {len(soft_labels)} soft labels"
            raise ValueError(f"{len(pixels)} images, but {len(expressions)} labels{votes}")
        ids = np.asarray(expressions, dtype=np.int64)
        if outside := sorted({*ids.tolist()} - {IGNORE, *range(len(CLASSES))}):
            raise ValueError(f"labels must be {IGNORE} or 0 to {len(CLASSES) - 1}, got {outside[:5]}")
        self.pixels = pixels
        self.labels = class_translation(classes).numpy()[ids]
        ours = [CLASSES.index(name) for name in classes]
        # One-hot where there are no votes for the model's classes; all zero where there is no label either.
        onehot = np.append(np.eye(len(ours), dtype=np.float32), np.zeros((1, len(ours)), np.float32), axis=0)
        self.targets = onehot[self.labels]
        for i, given in enumerate(soft_labels if soft_labels is not None else ()):
            if given is not None and self.labels[i] != IGNORE:
                kept = np.asarray(given, dtype=np.float32)[ours]
                if kept.sum() > 0:
                    self.targets[i] = kept / kept.sum()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Fetch a batch: `pixels` uint8 `(B, 3, H, W)`, `labels` and `index` `(B,)`, `targets` `(B, C)`."""
        rows = np.asarray(indices)
        return {
            "pixels": torch.from_numpy(self.pixels[rows]),
            "labels": torch.from_numpy(self.labels[rows]),
            "targets": torch.from_numpy(self.targets[rows]),
            "index": torch.from_numpy(rows),
        }


def class_translation(classes: Sequence[str]) -> torch.Tensor:
    """Ids of a model's classes by our class id, `(9,)`; -1 for what it does not know, and for id -1.

    Raises:
        ValueError: a class that is none of ours.
    """
    if unknown := [name for name in classes if name not in CLASSES]:
        raise ValueError(f"classes {unknown} are not among ours: {', '.join(CLASSES)}")
    translate = torch.full((len(CLASSES) + 1,), IGNORE)  # its last place is where id -1 looks
    translate[[CLASSES.index(name) for name in classes]] = torch.arange(len(classes))
    return translate


def as_batch(fetched: Any) -> Any:
    """Collate function for data sets that fetch whole batches."""
    return fetched
