"""Unlabelled faces streamed from shards: any number of them, split by process, resumable to the image."""

import hashlib
import logging
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from datasets import ClassLabel, IterableDataset, load_dataset
from datasets import Image as ImageFeature
from datasets.distributed import split_dataset_by_node

from modeling_fer.data.pixels import UnreadableImageError, decode
from modeling_fer.labels import CLASSES, IGNORE

IMAGE_COLUMNS = ("image", "png", "jpg", "jpeg")  # the first that is there
LABEL_COLUMN = "expression"
OPEN_SHARDS = 8  # read in turn, a row of each; each holds one row group in memory
READ_ROWS = 256  # turned into Python objects at a time
THREADS = 4  # that decode
PATIENCE = 10.0  # seconds to wait at most for the thread to stop: it may hang on a dead network

logger = logging.getLogger(__name__)


class FaceStream(Iterator[dict[str, torch.Tensor]]):
    """Endless batches of faces for one process, decoded in the background, without a copy on the disk.

    The order of a pass is a pure function of `(seed, pass)`: shards come in random order and up to 8 of them
    are read in turn, a row of each. Rows of one shard keep their order, for a shuffle buffer could not be
    resumed without its content: shuffle the rows when shards are written. Shards are dealt over the processes
    when they come out even; else every process reads all of them and keeps its own rows. Together the
    processes see each example once a pass; a batch may hold the end of a pass and the start of the next.
    Images that cannot be read are left out and counted in `skipped`; the first one is logged.

    A batch of `b = batch_size / world_size` is a dict of `pixels` uint8 `(b, 3, size, size)`, `labels` int64
    `(b,)` (our class ids where there is a column `expression`, else -1: for measuring, not for training) and
    `index` int64 `(b,)`: the i-th example that process r got is `i * world_size + r`, never used twice.

    Memory holds `prefetch + 2` batches and one row group of each open shard. `close`, the end of a `with`
    block and the end of the program stop the thread in the background; iterating again goes on after the
    last batch that was returned.

    Args:
        source: a prepared folder (its split `unlabeled`), a folder of parquet shards with a column `image` or
            of tar shards (members `NAME.png`, `.jpg` or `.jpeg`, as webdataset writes them), or `org/name` or
            `org/name:split` on the Hub.
        size: side of the decoded images in pixels.
        batch_size: examples of one global batch, over all processes.
        seed: any non-negative integer.
        rank, world_size: this process and how many there are.
        prefetch: batches that wait decoded.

    Raises:
        ValueError: a source without shards or without an image column, or a batch that does not divide by the
            processes; while iterating, a shard that cannot be read, or a pass without any readable image.
    """

    def __init__(
        self,
        source: str | Path,
        size: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"global batch size {batch_size} must be a positive multiple of the {world_size} processes"
            )
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1 batch, got {prefetch}")
        self.shards = _Shards(str(source), seed, rank, world_size)
        self.size, self.batch_size, self.prefetch = size, batch_size // world_size, prefetch
        self._place: dict[str, Any] = {"pass": 0, "given": 0, "readable": 0, "skipped": 0, "lanes": None}
        self._reader: _Background | None = None

    @property
    def skipped(self) -> int:
        """Unreadable images that were left out before the end of the last batch."""
        return self._place["skipped"]

    def __next__(self) -> dict[str, torch.Tensor]:
        if self._reader is None:
            batches = _batches(self.shards, self.size, self.batch_size, self._place)
            self._reader = _Background(batches, self.prefetch)
            # Runs when the stream is forgotten and at the end of the program, whichever is first.
            self._stop = weakref.finalize(self, self._reader.stop)
        item = self._reader.queue.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        batch, self._place = item
        return batch

    def close(self) -> None:
        """Stop the background thread and forget what it decoded ahead."""
        if self._reader is not None:
            self._stop()
            self._reader = None

    def __enter__(self) -> "FaceStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Place after the last batch that was returned; it is this process's own, so each saves its own."""
        return {**self.shards.identity, "place": self._place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place that `state_dict` described; batches go on as if there had been no break.

        Raises:
            ValueError: the place is one of other shards, another seed or another process.
        """
        for name, now in self.shards.identity.items():
            if (before := state.get(name)) != now:
                raise ValueError(
                    f"{self.shards.source}: the saved place is one of {name} {before}, but here {name} is "
                    f"{now}; resume with the same shards, seed and number of processes, or start anew"
                )
        self.close()
        self._place = state["place"]


class _Shards:
    """The shards of a source, of which only the image and the label column are read."""

    def __init__(self, source: str, seed: int, rank: int, world_size: int) -> None:
        self.source, self.seed, self.rank, self.world_size = source, seed, rank, world_size
        data, files = _open(source)
        columns = data.column_names or []
        if not (images := [name for name in IMAGE_COLUMNS if name in columns]):
            raise ValueError(
                f"{source} has no image column, only {', '.join(columns) or 'unknown ones'}: "
                f"name the images' column one of {', '.join(IMAGE_COLUMNS)}"
            )
        self.image, labelled = images[0], LABEL_COLUMN in columns
        feature = data.features[LABEL_COLUMN] if labelled else None
        if isinstance(feature, ClassLabel) and tuple(feature.names) != CLASSES:
            raise ValueError(
                f"{source}: the classes of its column {LABEL_COLUMN!r} are {', '.join(feature.names)}, "
                f"expected {', '.join(CLASSES)}; translate the column or leave it out"
            )
        self.data = data.select_columns([self.image, *([LABEL_COLUMN] if labelled else [])])
        self.data = self.data.cast_column(self.image, ImageFeature(decode=False))
        self.count = data.n_shards
        self.names = files or [f"shard {i} of {source}" for i in range(self.count)]
        sizes = [(Path(file).name, Path(file).stat().st_size) for file in files]
        digest = hashlib.blake2b(repr(sizes or (source, self.count)).encode(), digest_size=8).hexdigest()
        self.identity = {"shards": digest, "seed": seed, "rank": rank, "world_size": world_size}

    def order(self, number: int) -> list[int]:
        """Shards of this process in one pass."""
        order = np.random.default_rng([self.seed, number]).permutation(self.count).tolist()
        return order if self.count % self.world_size else order[self.rank :: self.world_size]

    def open(self, index: int) -> IterableDataset:
        """Return one shard, or this process's rows of it."""
        # One at a time, in an order of ours: `IterableDataset.shuffle` has no mode without a buffer of rows,
        # even a buffer of one makes reading many times slower, and it does not tell which shard is broken.
        shard = self.data.shard(self.count, index)
        if self.count % self.world_size:
            shard = split_dataset_by_node(shard, self.rank, self.world_size)
        return shard


def _open(source: str) -> tuple[IterableDataset, list[str]]:
    """Return all shards of a source as one data set, and their files where it is a folder."""
    if (folder := Path(source)).is_dir():
        for pattern in ("data/unlabeled-*.parquet", "*.parquet", "*.tar"):
            if files := sorted(str(file) for file in folder.glob(pattern)):
                # By itself the parquet reader takes the size of the first row group; it fails at 0.
                parquet = pattern.endswith("parquet")
                kind, options = ("parquet", {"batch_size": READ_ROWS}) if parquet else ("webdataset", {})
                try:
                    data = load_dataset(kind, data_files=files, split="train", streaming=True, **options)
                except Exception as error:
                    _give_up(files[0], error)
                return data, files
        raise ValueError(
            f"{source} holds neither data/unlabeled-*.parquet nor shards *.parquet or *.tar; "
            "write shards there, with `fer data prepare` say"
        )
    name, _, split = source.partition(":")
    try:
        splits = load_dataset(name, streaming=True)
    except Exception as error:  # of many kinds, by what is at that place
        raise ValueError(
            f"{source} is no folder here, and no data set of the Hub that can be opened ({_line(error)}): "
            "give a folder of shards, org/name or org/name:split"
        ) from error
    wanted = split or ("unlabeled" if "unlabeled" in splits or len(splits) > 1 else next(iter(splits)))
    if wanted not in splits:
        raise ValueError(
            f"{name} has no split {wanted!r}, only {', '.join(splits)}: name one as {name}:SPLIT"
        )
    return splits[wanted], []


class _Lane:
    """One open shard: its number, and the place in it."""

    def __init__(self, shards: _Shards, index: int, state: dict[str, Any] | None = None) -> None:
        self.index, self.data = index, shards.open(index)
        # `datasets` tells a loaded place only once a row after it was read: until then it is kept here.
        self.loaded = state
        if state is not None:
            self.data.load_state_dict(state)
        self.rows = iter(self.data)

    def take(self) -> dict[str, Any] | None:
        """Next row, or None at the end."""
        row = next(self.rows, None)
        self.loaded = None
        return row

    def state_dict(self) -> dict[str, Any]:
        """Place after the last row taken."""
        return self.data.state_dict() if self.loaded is None else self.loaded


class _Rows:
    """The rows of one process, pass after pass; up to `OPEN_SHARDS` shards take turns, a row each."""

    def __init__(self, shards: _Shards, place: dict[str, Any]) -> None:
        self.shards = shards
        if place["lanes"] is None:
            self.start(place["pass"])
        else:
            self.number, self.opened = place["pass"], place["opened"]
            self.order = shards.order(self.number)
            self.lanes = deque(_Lane(shards, index, state) for index, state in place["lanes"])

    def start(self, number: int) -> None:
        """Begin a pass."""
        self.number, self.order = number, self.shards.order(number)
        self.lanes = deque(_Lane(self.shards, index) for index in self.order[:OPEN_SHARDS])
        self.opened = len(self.lanes)

    def take(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        """Next rows with their shard's name: fewer than `count` at the end of the pass, none after it."""
        taken: list[tuple[str, dict[str, Any]]] = []
        while len(taken) < count and self.lanes:
            lane = self.lanes.popleft()
            name = self.shards.names[lane.index]
            try:
                row = lane.take()
            except Exception as error:
                _give_up(name, error)
            if row is not None:
                taken.append((name, row))
                self.lanes.append(lane)
            elif self.opened < len(self.order):
                self.lanes.append(_Lane(self.shards, self.order[self.opened]))
                self.opened += 1
        return taken

    def place(self) -> dict[str, Any]:
        """Place after the last row taken, in plain containers."""
        lanes = [[lane.index, lane.state_dict()] for lane in self.lanes]
        return {"pass": self.number, "opened": self.opened, "lanes": lanes}


def _batches(
    shards: _Shards, size: int, batch_size: int, place: dict[str, Any]
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Yield batch after batch, each with the place behind it.

    Rows are taken as they are missing in the batch, never more: what was read ends where the batch ends.
    """
    rows = _Rows(shards, place)
    given, readable, skipped = place["given"], place["readable"], place["skipped"]
    reason = ""

    def work(item: tuple[str, dict[str, Any]]) -> np.ndarray | str:
        try:
            cell = item[1][shards.image]
            data = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
            return decode(data, size)
        except TypeError:  # None in the row, or for both
            return "the row has no image"
        except (OSError, UnreadableImageError) as error:
            return _line(error)

    with ThreadPoolExecutor(THREADS) as pool:
        while True:
            pixels: list[np.ndarray] = []
            labels: list[int] = []
            while len(pixels) < batch_size:
                taken = rows.take(batch_size - len(pixels))
                for (name, row), image in zip(taken, pool.map(work, taken), strict=True):
                    if isinstance(image, str):
                        reason = f"{name}: {image}"
                        if not skipped:
                            logger.warning(
                                "skipped an unreadable image (%s); others are only counted", reason
                            )
                        skipped += 1
                    else:
                        pixels.append(image)
                        labels.append(_label(name, row))
                        readable += 1
                if not taken:  # the pass is over
                    if not readable:
                        last = f" (the last one: {reason})" if reason else ""
                        raise ValueError(
                            f"{shards.source}: in a whole pass, process {shards.rank} of {shards.world_size} "
                            f"met no readable image{last}; check the images, and that there are enough"
                        )
                    readable = 0
                    rows.start(rows.number + 1)
            index = np.arange(given, given + batch_size) * shards.world_size + shards.rank
            given += batch_size
            batch = {
                "pixels": torch.from_numpy(np.stack(pixels)),
                "labels": torch.tensor(labels),
                "index": torch.from_numpy(index),
            }
            yield batch, {**rows.place(), "given": given, "readable": readable, "skipped": skipped}


def _label(name: str, row: dict[str, Any]) -> int:
    label = row.get(LABEL_COLUMN)
    if label is None:
        return IGNORE
    try:
        number = int(label)
    except (TypeError, ValueError):
        number = len(CLASSES)
    if not (number == IGNORE or 0 <= number < len(CLASSES)):
        raise ValueError(
            f"{name}: {LABEL_COLUMN} must be {IGNORE} or 0 to {len(CLASSES) - 1}, got {label!r}; "
            "translate the column or leave it out"
        )
    return number


class _Background:
    """A thread that runs ahead of who reads `queue`: it holds the items, or the error that ended them.

    It knows nothing of the stream it works for, so that a forgotten stream is collected, and then stops it.
    """

    def __init__(self, items: Iterator[Any], ahead: int) -> None:
        self.queue: queue.Queue[Any] = queue.Queue(ahead)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(items,), name="face-stream", daemon=True)
        self.thread.start()

    def _run(self, items: Iterator[Any]) -> None:
        try:
            for item in items:
                self._put(item)
                if self.stopped.is_set():
                    return
        except BaseException as error:  # whatever it is: the consumer would wait for ever
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self.stopped.is_set():
            with suppress(queue.Full):
                self.queue.put(item, timeout=0.05)
                break

    def stop(self) -> None:
        """End the thread; what it holds is lost."""
        self.stopped.set()
        if threading.current_thread() is not self.thread:  # as it is where a collection starts there
            self.thread.join(PATIENCE)


def _give_up(shard: str, error: Exception) -> NoReturn:
    # A kind of its own or a number comes from the network or the disk: the shard may be whole. pyarrow raises
    # a bare OSError on damaged data.
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        error.add_note(f"while reading {shard}")
        raise error
    raise ValueError(
        f"{shard} cannot be read ({_line(error)}): write the shard again or take it out of its folder"
    ) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
