"""Videos as tracks of frames, and the windows of them that a temporal model learns from."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from modeling_fer.data.dataset import class_translation
from modeling_fer.data.videos import groups_of
from modeling_fer.labels import IGNORE


class Frames(Protocol):
    """Features or pixels of the rows of a split, in memory or on the disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows, then the shape of one."""

    @property
    def dtype(self) -> Any:
        """Type of the numbers."""

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Those of some rows, `(n, ...)`."""


@dataclass(frozen=True)
class Track:
    """One video of one face.

    Attributes:
        video: its name.
        frames: numbers `(n,)` of the frames that there are, rising.
        rows: `(n,)`, where each stands in the split.
        labels: class ids `(n,)`, -1 where a frame has none.
        group: what folds and resampling keep together, see `videos.groups_of`.
    """

    video: str
    frames: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    group: str


def tracks(
    videos: Sequence[str | None],
    frames: Sequence[int | None],
    labels: np.ndarray,
    where: str,
    subjects: Sequence[str | None] | None = None,
) -> list[Track]:
    """Sort the rows of a split into tracks, by name of the video and number of the frame.

    Args:
        videos, frames: of each row.
        labels: class ids `(N,)`, -1 where a row has none.
        where: the data set, for messages.
        subjects: of each row, None where not known; None: nowhere.

    Raises:
        ValueError: a row without video or frame number, or a frame that is there twice.
    """
    if any(video is None for video in videos) or any(frame is None for frame in frames):
        raise ValueError(
            f"{where} has rows without video and frame number: they are stills. Temporal models learn from "
            "videos; prepare some (`fer data prepare aff_wild2`, `frames` or `videos`)"
        )
    groups = groups_of([str(video) for video in videos], subjects or [None] * len(videos))
    names, inverse = np.unique(np.asarray(videos, dtype=str), return_inverse=True)
    numbers = np.asarray(frames, dtype=np.int64)
    order = np.lexsort((numbers, inverse))
    ends = np.searchsorted(inverse[order], np.arange(1, len(names) + 1))
    found = []
    for name, rows in zip(names.tolist(), np.split(order, ends[:-1]), strict=True):
        own = numbers[rows]
        if (np.diff(own) == 0).any():
            twice = own[:-1][np.diff(own) == 0][0]
            raise ValueError(
                f"{where}: frame {twice} of video {name} is there twice; give videos of different people or "
                "data sets different names"
            )
        found.append(Track(name, own, rows, labels[rows], groups[name]))
    return found


@dataclass(frozen=True)
class Pieces:
    """Stretches of one class in the tracks, each an example to draw windows around.

    Attributes:
        track: `(P,)` number of the track.
        anchor: `(P,)` frame number of the middle.
        label: `(P,)` class id of the model.
    """

    track: np.ndarray
    anchor: np.ndarray
    label: np.ndarray


def pieces(found: Sequence[Track], classes: Sequence[str], longest: int) -> Pieces:
    """Cut the labelled frames of tracks into stretches of one class, at most `longest` frame numbers long.

    Raises:
        ValueError: no frame has a label of these classes.
    """
    translate = class_translation(classes).numpy()
    columns: list[tuple[int, int, int]] = []
    for number, track in enumerate(found):
        labels = translate[track.labels]
        changes = np.flatnonzero((np.diff(labels) != 0) | (np.diff(track.frames) > longest)) + 1
        for run in np.split(np.arange(len(labels)), changes):
            if labels[run[0]] == IGNORE:
                continue
            frames = track.frames[run]
            span = int(frames[-1] - frames[0]) + 1
            edges = frames[0] + span * np.arange(1, -(-span // longest)) / -(-span // longest)
            for part in np.split(frames, np.searchsorted(frames, edges)):
                if len(part):
                    columns.append((number, int(part[len(part) // 2]), int(labels[run[0]])))
    if not columns:
        raise ValueError("no frame of any video has a label to learn from")
    return Pieces(*np.array(columns, dtype=np.int64).T)


class WindowDataset(Dataset):
    """Stretches of video around labelled frames: a slot for each frame number, empty where none is.

    Args:
        values: features `(N, D)` or uint8 pixels `(N, 3, H, W)` of the split's rows.
        found: its tracks.
        classes: names of the model's classes; other labels count as none.
        slots: frame numbers of a stretch; the anchor stands in the middle.
        longest: most frames of one class that one example stands for.
    """

    def __init__(
        self, values: Frames, found: Sequence[Track], classes: Sequence[str], slots: int, longest: int
    ) -> None:
        self.values, self.tracks, self.slots = values, list(found), slots
        self.pieces = pieces(found, classes, longest)
        self.translate = class_translation(classes).numpy()

    def __len__(self) -> int:
        return len(self.pieces.anchor)

    def digest(self) -> str:
        """A short text that changes with videos, frames or labels."""
        state = hashlib.blake2b(digest_size=8)
        for track in self.tracks:
            state.update(track.video.encode() + b"\0" + track.frames.tobytes() + track.labels.tobytes())
        return state.hexdigest()

    def labels_around(self, window: int) -> np.ndarray:
        """Expected frames of each class, `(P, C)`, in a window of `window` frames around each example.

        The anchor stands anywhere in the window, so that a frame at a distance d from it is in there with
        probability `1 - d / window`.
        """
        counts = np.zeros((len(self), int(self.translate.max()) + 1))
        for piece in range(len(self)):
            track, inside = self._inside(piece)
            labels = self.translate[track.labels[inside]]
            distance = np.abs(track.frames[inside] - self.pieces.anchor[piece])
            chance = np.maximum(0, 1 - distance / window) * (labels != IGNORE)
            counts[piece] = np.bincount(labels.clip(min=0), chance, minlength=counts.shape[1])
        return counts

    def _inside(self, piece: int) -> tuple[Track, slice]:
        track = self.tracks[self.pieces.track[piece]]
        first = self.pieces.anchor[piece] - self.slots // 2
        return track, slice(*np.searchsorted(track.frames, [first, first + self.slots]))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Fetch a batch: `values` `(B, S, ...)`, `mask` bool and `labels` `(B, S)`, `index` `(B,)`."""
        shape = (len(indices), self.slots)
        values = np.zeros((*shape, *self.values.shape[1:]), dtype=self.values.dtype)
        mask, labels = np.zeros(shape, dtype=bool), np.full(shape, IGNORE)
        for place, piece in enumerate(indices):
            track, inside = self._inside(piece)
            slots = track.frames[inside] - (self.pieces.anchor[piece] - self.slots // 2)
            values[place, slots] = self.values[track.rows[inside]]
            mask[place, slots] = True
            labels[place, slots] = self.translate[track.labels[inside]]
        return {
            "values": torch.from_numpy(values),
            "mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
            "index": torch.as_tensor(indices),
        }
