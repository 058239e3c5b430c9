"""A split as arrays: decoded pixels, class ids and soft labels, fetched a batch at a time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from modeling_fer.labels import CLASSES, IGNORE


class FaceDataset(Dataset):
    """Faces of one split for training: pixels stay uint8 (memory or memory-mapped), views are made on the device later.

    Args:
        pixels: uint8 `(N, 3, H, W)`.
        expressions: our class ids `(N,)`, -1 where unlabelled.
        soft_labels: per example a distribution over the 8 classes, or None.
        classes: names of the model's classes in the order of its logits; ids are translated to that order, and examples of
            other classes count as unlabelled.

    Raises:
        ValueError: arrays of different lengths.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        expressions: Sequence[int] | np.ndarray,
        soft_labels: Sequence[Sequence[float] | None] | None = None,
        classes: Sequence[str] = CLASSES,
    ) -> None:
        if len(pixels) != len(expressions) or (soft_labels is not None and len(soft_labels) != len(pixels)):
            raise ValueError(f"{len(pixels)} images, but {len(expressions)} labels")
        ours = [CLASSES.index(name) for name in classes]
        translate = np.full(len(CLASSES) + 1, IGNORE)  # its last place is where id -1 looks
        translate[ours] = np.arange(len(ours))
        self.pixels = pixels
        self.labels = translate[np.asarray(expressions, dtype=np.int64)]
        # One-hot where there are no votes, or none for the model's classes; all zero where there is no label either.
        onehot = np.append(np.eye(len(ours), dtype=np.float32), np.zeros((1, len(ours)), np.float32), axis=0)
        self.targets = onehot[self.labels]
        for i, votes in enumerate(soft_labels or ()):
            if votes is not None and self.labels[i] != IGNORE:
                kept = np.asarray(votes, dtype=np.float32)[ours]
                if kept.sum() > 0:
                    self.targets[i] = kept / kept.sum()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A whole batch at once: `pixels` uint8 `(B, 3, H, W)`, `labels` `(B,)`, `targets` `(B, C)`, `index` `(B,)`."""
        rows = np.asarray(indices)
        return {
            "pixels": torch.from_numpy(self.pixels[rows]),
            "labels": torch.from_numpy(self.labels[rows]),
            "targets": torch.from_numpy(self.targets[rows]),
            "index": torch.from_numpy(rows),
        }


def as_batch(fetched: dict[str, Any]) -> dict[str, Any]:
    """Collate function for data sets that fetch whole batches."""
    return fetched
