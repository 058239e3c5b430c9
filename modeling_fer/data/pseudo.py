"""A labelling job in a folder that any number of processes and machines work on, come and go as they may.

    out/job/       job.json: what is labelled, by which model; units.jsonl: the cut of the source
    out/claims/    a folder for every unit that a worker has in hand: host, process, and a heartbeat
    out/labels/    unit-000123.parquet, a finished unit: a row an image; unit-000123.skipped.jsonl beside it
    out/skipped.jsonl    every image that could not be read, once all units are finished

A unit's labels appear whole, by one rename, and a finished unit is never done again. Nothing else is needed
for correctness: claims only spare work. Where one is wrongly taken for dead, a unit is labelled twice and
written once.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import shutil
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modeling_fer.data.images import HASH_BYTES, Encoded, Face, Skipped, Source, Unit, cut, read
from modeling_fer.data.similar import BYTES, perceptual_hashes
from modeling_fer.labels import NUM_CLASSES

ROWS_AT_ONCE = 4096  # held in memory by a writer; also the row groups of the label files
HEARTBEAT_S = 10.0
LITTER = ("claims/*", "partial/*", ".job.*")  # what killed workers leave

# What is known of an image after inference; data/selection.py makes its debiased label from these.
LABELS = pa.schema(
    {
        "row": pa.int32(),  # number in its unit
        "file": pa.string(),  # path in the tree, or archive or shard and place in it
        "content_hash": pa.binary(HASH_BYTES),
        "perceptual_hash": pa.binary(BYTES),
        "width": pa.int32(),
        "height": pa.int32(),
        "is_blank": pa.bool_(),
        "probabilities": pa.list_(pa.float32(), NUM_CLASSES),  # mean over the image and its mirror image
        "raw_label": pa.int8(),  # the most probable class, before debiasing
        "confidence": pa.float32(),  # its probability
        "margin": pa.float32(),  # confidence less the second largest probability
        "agreement": pa.float32(),  # 1 less the total variation between the two views' probabilities
    }
)


def option(help: str, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field with its help text; without a default, it must be given."""
    return dataclasses.field(default=default, metadata={"help": help})


def flags(options: Any) -> list[str]:
    """Options as they are written on a command line."""
    given = {name: value if isinstance(value, list) else [value] for name, value in vars(options).items()}
    return [word for name, values in given.items() if values for word in (f"--{name}", *map(str, values))]


def changes(then: dict[str, Any], now: dict[str, Any], inside: str = "") -> str:
    """What differs between kept options and these, as "name: theirs -> ours; ..."."""
    told = []
    for key in sorted(then.keys() | now.keys()):
        old, new = then.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            told.append(changes(old, new, f"{inside}{key}."))
        elif old != new:
            told.append(f"{inside}{key}: {old} -> {new}")
    return "; ".join(filter(None, told))


@dataclasses.dataclass
class LabelOptions:
    """What is labelled, by which model, and how a worker goes about it."""

    model: str = option("folder of a still-image model, or hub:OWNER/NAME")
    images: str = option(
        "prepared folder, image tree, parquet or tar file, folder of such files, or hub:OWNER/NAME"
    )
    split: str = option("of a prepared folder or a data set of the Hub", "unlabeled")
    column: str = option("that holds the images of parquet files or of a data set of the Hub", "image")
    unit_rows: int = option(
        "images a worker takes on at once; what a killed one has to do again "
        "(tar files and shards of the Hub are not cut: each is taken on whole)",
        8192,
    )
    batch_size: int = option("images that the model sees at once; 0: 64 on a CPU, else 256", 0)
    precision: str = option(
        "auto: that of the job, or of a new one bf16 where the device computes in it; or no, bf16", "auto"
    )
    threads: int = option("that read and decode images; 0: one a core", 0)
    stale_minutes: float = option("a worker not heard of for so long is taken for dead", 10.0)

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "no", "bf16"):
            raise ValueError(f"--precision must be one of auto, no, bf16, got {self.precision!r}")
        for name, least in {"unit_rows": 1, "batch_size": 0, "threads": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")


class Job:
    """The folder of a job. Made by `open_job`, or read from a folder that has one.

    Raises:
        FileNotFoundError: the folder holds no job.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.folder = self.out / "job"
        if not (self.folder / "job.json").is_file():
            raise FileNotFoundError(
                f"{out} holds no labelling job; start one with `pseudo_label.py label --out {out}`"
            )
        told = json.loads((self.folder / "job.json").read_text())
        self.source: Source = told["source"]
        self.settings: dict[str, Any] = told["settings"]
        self.about: dict[str, Any] = told["about"]
        self.units: list[Unit] = [
            json.loads(line) for line in (self.folder / "units.jsonl").read_text().splitlines()
        ]

    def labels_path(self, number: int) -> Path:
        """Return where the labels of a unit are once it is finished."""
        return self.out / "labels" / f"unit-{number:06d}.parquet"

    def unfinished(self, first: int = 0) -> list[int]:
        """Return the units without labels, from number `first` on and round to its start."""
        done = {entry.name for entry in os.scandir(self.out / "labels")} if self.units else set()
        numbers = [*range(first, len(self.units)), *range(first)]
        return [number for number in numbers if self.labels_path(number).name not in done]

    @contextlib.contextmanager
    def claimed(self, number: int, stale_s: float) -> Iterator[Callable[[], None] | None]:
        """Hold a unit: yields a function to call now and then as a heartbeat, or None if it is not to be had.

        A claim is taken over where its process is dead (as far as this host can tell) or its heart has not
        beaten for `stale_s` seconds.
        """
        claim = self.out / "claims" / f"unit-{number:06d}"
        if self.labels_path(number).exists() or not self._take(claim, stale_s):
            yield None
            return
        beaten = time.monotonic()

        def beat() -> None:
            nonlocal beaten
            if time.monotonic() - beaten > HEARTBEAT_S:
                beaten = time.monotonic()
                with contextlib.suppress(FileNotFoundError):  # taken for dead, wrongly
                    os.utime(claim / "owner.json")

        try:
            # Its owner may have finished it between our look at its labels and our claim.
            yield None if self.labels_path(number).exists() else beat
        finally:
            shutil.rmtree(claim, ignore_errors=True)

    def _take(self, claim: Path, stale_s: float) -> bool:
        owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())})

        def write(folder: Path) -> None:
            (folder / "owner.json").write_text(owner)

        if put_once(claim, write):
            return True
        if not _is_stale(claim / "owner.json", stale_s):
            return False
        shutil.rmtree(claim, ignore_errors=True)
        return put_once(claim, write)

    @contextlib.contextmanager
    def writer(self, number: int) -> Iterator["LabelWriter"]:
        """Write the labels of a unit; they are in place, whole, when the block ends without an error."""
        name = f"{self.labels_path(number).stem}.{uuid.uuid4().hex}"
        beside = self.out / "partial"
        labels, skipped = beside / f"{name}.parquet", beside / f"{name}.skipped.jsonl"
        try:
            with labels.open("wb") as file, skipped.open("w", encoding="utf-8") as skips:
                with pq.ParquetWriter(file, LABELS) as parquet:
                    writer = LabelWriter(parquet, skips.write)
                    yield writer
                    writer.flush()
                for opened in (file, skips):
                    opened.flush()
                    os.fsync(opened.fileno())
            final = self.labels_path(number)
            if not final.exists():
                skipped.replace(final.with_suffix(".skipped.jsonl"))
                labels.replace(final)  # from here on the unit counts as finished
        finally:
            for path in (labels, skipped):
                path.unlink(missing_ok=True)

    def read_labels(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the labels of a finished unit.

        Raises:
            ValueError: the file is missing or damaged.
        """
        path = self.labels_path(number)
        try:
            return pq.read_table(path, columns=columns and list(columns))
        except (pa.ArrowException, OSError) as error:
            remedy = "delete it if it is there, and run `pseudo_label.py label` again"
            raise ValueError(f"{path} cannot be read ({error}): {remedy}") from error

    def read_images(self, number: int, rows: set[int]) -> Iterator[Encoded]:
        """Yield some images of a unit as they are stored."""
        return read(self.source, self.units[number], self.folder, rows)

    def finish(self) -> int:
        """Gather the skipped images and tidy, once every unit is finished; return how many are not."""
        if left := len(self.unfinished()):
            return left
        beside = self.out / f".skipped.{uuid.uuid4().hex}"
        with beside.open("wb") as file:
            for number in range(len(self.units)):
                file.write(self.labels_path(number).with_suffix(".skipped.jsonl").read_bytes())
        beside.replace(self.out / "skipped.jsonl")
        for path in itertools.chain(*map(self.out.glob, LITTER)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        return 0


class LabelWriter:
    """Rows of one unit, on their way into its files."""

    def __init__(self, parquet: pq.ParquetWriter, write_skip: Callable[[str], Any]) -> None:
        self.parquet, self.write_skip = parquet, write_skip
        self.waiting: list[pa.RecordBatch] = []

    def skip(self, skipped: Skipped) -> None:
        """Note an image that could not be read."""
        line = {"file": storable(skipped.name), "reason": storable(skipped.reason)}
        self.write_skip(json.dumps(line, ensure_ascii=False) + "\n")

    def add(self, faces: Sequence[Face], views: np.ndarray) -> None:
        """Add a batch of faces with the probabilities of their views, float32 `(2, B, 8)`.

        Raises:
            ValueError: a probability is not finite.
        """
        if not np.isfinite(views).all():
            raise ValueError(
                "the model's output is not finite: its weights are damaged, or training diverged"
            )
        probabilities = views.mean(axis=0)
        second, first = np.sort(probabilities, axis=1)[:, -2:].T
        hashes = perceptual_hashes(np.stack([face.small for face in faces]))
        columns = {
            "row": [face.row for face in faces],
            "file": [storable(face.name) for face in faces],
            "content_hash": [face.content_hash for face in faces],
            "perceptual_hash": [row.tobytes() for row in hashes],
            "width": [face.width for face in faces],
            "height": [face.height for face in faces],
            "is_blank": [face.is_blank for face in faces],
            "probabilities": pa.FixedSizeListArray.from_arrays(probabilities.ravel(), NUM_CLASSES),
            "raw_label": probabilities.argmax(axis=1),
            "confidence": first,
            "margin": first - second,
            "agreement": 1 - np.abs(views[0] - views[1]).sum(axis=1) / 2,
        }
        self.waiting.append(pa.RecordBatch.from_pydict(columns, schema=LABELS))
        if sum(batch.num_rows for batch in self.waiting) >= ROWS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one row group."""
        if self.waiting:
            self.parquet.write_table(pa.Table.from_batches(self.waiting).combine_chunks())
            self.waiting = []


def predicted(
    found: Iterable[list[Face]], predict: Callable[[list[Face]], Any], pool: Executor, ahead: int
) -> Iterator[tuple[list[Face], Any]]:
    """Yield batches with predictions, in order; the pool works at the next `ahead` while one is handled."""
    waiting: deque[tuple[list[Face], Future]] = deque()
    for batch in found:
        waiting.append((batch, pool.submit(predict, batch)))
        if len(waiting) > ahead:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()


def open_job(out: str | Path, source: Source, settings: dict[str, Any], about: dict[str, Any]) -> Job:
    """Start a job in a folder, or join the one that is there.

    Processes that start together may each cut the source; the first to finish has its cut put in place.

    Args:
        out: the job's folder.
        source: what `find_source` returned.
        settings: whatever decides what a label is: at least `model_revision`.
        about: what else is to be remembered of whoever started the job: at least `model`, its name.

    Raises:
        ValueError: the folder holds a job with another source or other settings, or there are no images.
    """
    out = Path(out)
    given = {"source": source, "settings": settings, "about": about}

    def write(folder: Path) -> None:
        with (folder / "units.jsonl").open("w", encoding="utf-8") as units:
            units.writelines(json.dumps(unit) + "\n" for unit in cut(source, folder))
            if not units.tell():
                raise ValueError(f"{source['root']} holds no images")
        (folder / "job.json").write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")

    if not (out / "job").exists():
        put_once(out / "job", write)
    for name in ("labels", "claims", "partial"):
        (out / name).mkdir(exist_ok=True)
    job = Job(out)
    then, now = {**job.source, **job.settings}, {**source, **settings}
    if other := changes(then, now):
        raise ValueError(f"{out} is of another job ({other}); label with the same, or into another --out")
    return job


def put_once(target: Path, write: Callable[[Path], None]) -> bool:
    """Let `write` fill a folder and rename it to `target` unless that is there; tell whether it was done.

    A folder cannot be renamed to one that holds something, so of many processes exactly one succeeds.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        beside.mkdir()
        write(beside)
        beside.rename(target)
        return True
    except OSError as error:
        # Gone: whoever finished the job took it for a dead worker's.
        gone = error.errno == errno.ENOENT and not beside.exists()
        if gone or error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def revision_of(folder: Path) -> str:
    """Hash what decides a model's answers: its weights, configuration and image processor."""
    hashed = hashlib.blake2b(digest_size=16)
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        with path.open("rb") as file:
            hashed.update(hashlib.file_digest(file, "blake2b").digest())
    return hashed.hexdigest()


def storable(text: str) -> str:
    """Return a text, a file name most often, with what is no valid Unicode in it escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def _born(pid: int) -> str | None:
    """Return when a process of this host started, in clock ticks; None where it is dead, or not Linux."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]  # a zombie is dead


def _is_stale(owner: Path, stale_s: float) -> bool:
    try:
        told = json.loads(owner.read_text())
        age = time.time() - owner.stat().st_mtime
    except (FileNotFoundError, ValueError):  # just given back
        return True
    is_ours = told["host"] == socket.gethostname() and told["born"] is not None
    return age > stale_s or (is_ours and _born(told["pid"]) != told["born"])
