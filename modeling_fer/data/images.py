"""Images by the million: sources are cut into units of work that any process can read alone.

    --images DIR        a prepared folder (`--split` of it), a folder of parquet or tar files, an image tree
    --images FILE       one parquet or tar file
    --images hub:NAME   a data set of the Hub (`--split` of it), streamed, never stored

The cut is made once and written down. What is damaged is told and passed over; trouble of the file system is
raised, as it may end. Nothing here holds more than a few hundred images, or a run of file
names, in memory.
"""

import hashlib
import heapq
import itertools
import json
import os
import tarfile
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Image as ImageFeature
from datasets import IterableDataset, load_dataset
from huggingface_hub import HfApi
from PIL import Image

from modeling_fer.data.pixels import ENDINGS, UnreadableImageError, open_image
from modeling_fer.data.similar import thumbnail

HUB = "hub:"
TARS = (".tar", ".tar.gz", ".tgz")
MANIFEST = "files.jsonl"
NAMES_AT_ONCE = 100_000  # sorted in memory; larger folders are sorted in runs on disk
HASH_BYTES = 16
CHUNK = 32  # images a thread decodes at once

Source = dict[str, Any]  # kind, root, split, column, unit_rows; for the Hub also the revision
Unit = dict[str, Any]  # what one reader needs to find its part of the source


@dataclass(frozen=True)
class Encoded:
    """An image as its source stores it: bytes, or where they are, or why there are none."""

    row: int  # number in its unit
    name: str
    data: bytes | str | Exception
    root: str = ""  # for files: a folder that must be there before one of them is taken for gone

    def read(self) -> bytes:
        """Return the bytes, from a file or an address where need be.

        Raises:
            OSError: the file or address cannot be read, and perhaps could be later.
            UnreadableImageError: the source itself is damaged here, or this one file is gone.
        """
        if isinstance(self.data, Exception):
            raise UnreadableImageError(f"{self.data} ({type(self.data).__name__})")
        if isinstance(self.data, bytes):
            return self.data
        try:
            if "://" in self.data:
                with fsspec.open(self.data) as file:
                    return file.read()
            return Path(self.data).read_bytes()
        except FileNotFoundError as error:
            if "://" not in self.data and not _holds_something(
                self.root or os.path.dirname(self.data) or "."
            ):
                raise
            raise UnreadableImageError(error.strerror or "no such file") from error


@dataclass(frozen=True)
class Face:
    """A decoded image: uint8 `pixels` (3, size, size), `small` (32, 32) for its perceptual hash."""

    row: int
    name: str
    content_hash: bytes  # of the encoded bytes
    pixels: np.ndarray
    small: np.ndarray
    width: int
    height: int
    is_blank: bool


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, and why."""

    name: str
    reason: str


# --- Sources ---


def find_source(images: str, split: str, column: str, unit_rows: int, revision: str | None = None) -> Source:
    """Look what is there and describe it; the description and a unit are all that a reader needs.

    Args:
        images: see the module's head.
        split: of a prepared folder or a data set of the Hub; others have none.
        column: that holds the images of parquet files and of the Hub's data sets.
        unit_rows: images in a unit, where units can be cut freely.
        revision: of a data set of the Hub; without it, the newest.

    Raises:
        FileNotFoundError: nothing is there, or not that split.
        ValueError: a file of no known kind, or a folder of more than one kind.
    """
    source: Source = {
        "kind": "tree",
        "root": images,
        "split": split,
        "column": column,
        "unit_rows": unit_rows,
    }
    if images.startswith(HUB):
        name = images.removeprefix(HUB)
        if not revision and not Path(name).exists():
            revision = HfApi().dataset_info(name).sha
        return source | {"kind": "hub", "root": name, "revision": revision}
    path = Path(os.path.abspath(images))
    if not path.exists():
        raise FileNotFoundError(
            f"no such file or folder: {images} (a data set of the Hub is {HUB}OWNER/NAME)"
        )
    source |= {"root": str(path)}
    if path.is_file():
        if not path.name.endswith((*TARS, ".parquet")):
            raise ValueError(f"{images} is no parquet or tar file: pass such a file, or a folder of images")
        return source | {"kind": "tar" if path.name.endswith(TARS) else "parquet"}
    if next((path / "data").glob("*.parquet"), None):
        if not next((path / "data").glob(f"{split}-*.parquet"), None):
            known = sorted({file.name.split("-")[0] for file in (path / "data").glob("*.parquet")})
            raise FileNotFoundError(
                f"{images} holds no split {split!r}: choose --split from {', '.join(known)}"
            )
        return source | {"kind": "prepared"}
    with os.scandir(path) as entries:
        archives = [e.name for e in entries if e.name.endswith((*TARS, ".parquet")) and e.is_file()]
    found = {"parquet" if name.endswith(".parquet") else "tar" for name in archives}
    if archives and any(_walk(str(path))):
        found.add("image")
    if len(found) > 1:
        kinds = " and ".join(sorted(found))
        raise ValueError(f"{images} holds {kinds} files: pass one file, or a folder of one kind")
    return source | {"kind": found.pop() if found else "tree"}


def cut(source: Source, folder: Path) -> Iterator[Unit]:
    """Yield the units of a source, always the same for the same files; names of a tree go to `folder`.

    Raises:
        ValueError: a parquet file cannot be read or lacks the column.
    """
    root = Path(source["root"])
    if source["kind"] == "tree":
        with (folder / MANIFEST).open("wb") as manifest:
            for number, name in enumerate(_walk(str(root))):
                if number % source["unit_rows"] == 0:
                    yield {"offset": manifest.tell()}
                manifest.write(json.dumps(name).encode() + b"\n")
    elif source["kind"] == "hub":
        yield from ({"shard": number} for number in range(_stream(source).num_shards))
    elif source["kind"] == "tar":
        files = [root] if root.is_file() else sorted(p for p in root.iterdir() if p.name.endswith(TARS))
        yield from ({"file": file.name if file != root else ""} for file in files)
    else:
        pattern = f"data/{source['split']}-*.parquet" if source["kind"] == "prepared" else "*.parquet"
        for file in [root] if root.is_file() else sorted(root.glob(pattern)):
            yield from _row_groups(file, source)


def read(source: Source, unit: Unit, folder: Path, wanted: Container[int] | None = None) -> Iterator[Encoded]:
    """Yield the images of one unit, or those of its rows that are wanted; damage is yielded, not raised."""
    readers = {"tree": _read_tree, "hub": _read_stream, "tar": _read_tar}
    reader = readers.get(source["kind"], _read_parquet)
    return reader(source, unit, folder, range(2**62) if wanted is None else wanted)


def _walk(folder: str, inside: str = "") -> Iterator[str]:
    """Yield the names of all image files below a folder in a stable order; hidden ones are left out."""
    for line in _in_order(_entries(folder)):
        name, is_folder = json.loads(line)
        if is_folder:
            yield from _walk(os.path.join(folder, name), f"{inside}{name}/")
        else:
            yield inside + name


def _entries(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            is_folder = entry.is_dir(follow_symlinks=False)
            if not entry.name.startswith(".") and (is_folder or entry.name.lower().endswith(ENDINGS)):
                yield json.dumps([entry.name, is_folder]) + "\n"


def _in_order(lines: Iterator[str]) -> Iterator[str]:
    """Sort lines in bounded memory: sorted runs on disk, merged."""
    run = sorted(itertools.islice(lines, NAMES_AT_ONCE))
    if len(run) < NAMES_AT_ONCE:
        yield from run
        return
    with ExitStack() as stack:
        runs = []
        while run:
            runs.append(stack.enter_context(tempfile.TemporaryFile("w+")))
            runs[-1].writelines(run)
            runs[-1].seek(0)
            run = sorted(itertools.islice(lines, NAMES_AT_ONCE))
        yield from heapq.merge(*runs)


def _read_tree(source: Source, unit: Unit, folder: Path, wanted: Container[int]) -> Iterator[Encoded]:
    with (folder / MANIFEST).open("rb") as manifest:
        manifest.seek(unit["offset"])
        for row, line in enumerate(itertools.islice(manifest, source["unit_rows"])):
            if row in wanted:
                name = json.loads(line)
                yield Encoded(row, name, os.path.join(source["root"], name), source["root"])


def _read_tar(source: Source, unit: Unit, folder: Path, wanted: Container[int]) -> Iterator[Encoded]:
    path = Path(source["root"], unit["file"])
    row = 0
    try:
        with tarfile.open(path) as tar:
            while member := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile remembers every member it has met
                if member.isfile() and member.name.lower().endswith(ENDINGS):
                    if row in wanted:
                        yield Encoded(row, f"{path.name}/{member.name}", tar.extractfile(member).read())  # type: ignore[union-attr]
                    row += 1
            # tarfile takes a damaged header for the end; the true end is a block of zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError("damaged header")
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        if not _is_damage(error):
            raise
        if row in wanted:
            yield Encoded(row, f"{path.name} from image {row} on", error)


def _row_groups(file: Path, source: Source) -> Iterator[Unit]:
    """Yield units of whole row groups; at least one each, and no more than fit into `unit_rows`."""
    try:
        with pq.ParquetFile(file) as opened:
            names, metadata = opened.schema_arrow.names, opened.metadata
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}): replace it or take it away") from error
    if source["column"] not in names:
        raise ValueError(f"{file} has no column {source['column']}: choose --column from {', '.join(names)}")
    groups: list[int] = []
    rows = first = 0
    for group in range(metadata.num_row_groups):
        more = metadata.row_group(group).num_rows
        if groups and rows + more > source["unit_rows"]:
            yield {"file": os.path.relpath(file, source["root"]), "groups": groups, "first": first}
            first, groups, rows = first + rows, [], 0
        groups, rows = [*groups, group], rows + more
    if groups:
        yield {"file": os.path.relpath(file, source["root"]), "groups": groups, "first": first}


def _read_parquet(source: Source, unit: Unit, folder: Path, wanted: Container[int]) -> Iterator[Encoded]:
    path = Path(os.path.normpath(os.path.join(source["root"], unit["file"])))
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(CHUNK, unit["groups"], [source["column"]]):
                for cell in batch.column(0):
                    if row in wanted:
                        yield _cell(row, f"{path.name}:{unit['first'] + row}", cell.as_py())
                    row += 1
    except (pa.ArrowException, OSError) as error:
        if not _is_damage(error):
            raise
        if row in wanted:
            yield Encoded(row, f"{path.name} from row {unit['first'] + row} on", error)


def _is_damage(error: Exception) -> bool:
    """Tell a file's bad content from trouble of the system, which numbers its errors and may end."""
    return getattr(error, "errno", None) is None and not isinstance(error, MemoryError)


def _holds_something(folder: str) -> bool:
    """Tell whether files could be missing from a folder one by one: an unmounted share leaves it empty."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except FileNotFoundError:
        return False


def _stream(source: Source) -> IterableDataset:
    column = source["column"]
    data = load_dataset(source["root"], split=source["split"], revision=source["revision"], streaming=True)
    if data.features is not None and column not in data.features:
        known = ", ".join(data.features)
        raise ValueError(f"{source['root']} has no column {column}: choose --column from {known}")
    return data.select_columns([column]).cast_column(column, ImageFeature(decode=False))


def _read_stream(source: Source, unit: Unit, folder: Path, wanted: Container[int]) -> Iterator[Encoded]:
    data = _stream(source)
    for row, cells in enumerate(data.shard(data.num_shards, unit["shard"])):
        if row in wanted:
            yield _cell(row, f"shard {unit['shard']}:{row}", cells[source["column"]])


def _cell(row: int, place: str, cell: Any) -> Encoded:
    """Return what a cell holds: bytes, or a struct of bytes and path as `datasets` writes images."""
    if isinstance(cell, bytes):
        return Encoded(row, place, cell)
    cell = cell if isinstance(cell, dict) else {}
    name = f"{place} {cell['path']}" if cell.get("path") else place
    data = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    return Encoded(row, name, data if data else ValueError("a row without an image"))


# --- Decoding ---


def decoded(encoded: Iterable[Encoded], size: int, pool: Executor, ahead: int) -> Iterator[Face | Skipped]:
    """Read and decode in the pool's threads, in order, about `ahead` images before they are asked for."""
    waiting: deque[Future[list[Face | Skipped]]] = deque()
    images = iter(encoded)
    while chunk := list(itertools.islice(images, CHUNK)):
        waiting.append(pool.submit(_decode, chunk, size))
        if len(waiting) * CHUNK > ahead:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def batches(
    images: Iterable[Face | Skipped], size: int, skip: Callable[[Skipped], None]
) -> Iterator[list[Face]]:
    """Yield faces in lists of `size`, the last one shorter; what could not be read goes to `skip`."""
    batch: list[Face] = []
    for image in images:
        if isinstance(image, Skipped):
            skip(image)
        else:
            batch.append(image)
            if len(batch) == size:
                yield batch
                batch = []
    if batch:
        yield batch


def content_hash(data: bytes) -> bytes:
    """Hash a file's bytes to 128 bits."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def _decode(chunk: list[Encoded], size: int) -> list[Face | Skipped]:
    return [_decode_one(encoded, size) for encoded in chunk]


def _decode_one(encoded: Encoded, size: int) -> Face | Skipped:
    try:
        data = encoded.read()
        rgb = open_image(data)
    except UnreadableImageError as error:
        return Skipped(encoded.name, str(error))
    small = thumbnail(rgb)
    # As `decode` does it, without its copies of an image that is upright and RGB already.
    square = rgb if rgb.size == (size, size) else rgb.resize((size, size), Image.Resampling.BILINEAR)
    return Face(
        row=encoded.row,
        name=encoded.name,
        content_hash=content_hash(data),
        pixels=np.asarray(square).transpose(2, 0, 1),
        small=small,
        width=rgb.width,
        height=rgb.height,
        # Hardly any image is even in grey, and only such a one is worth a look at all of its pixels.
        is_blank=small.min() == small.max() and all(low == high for low, high in rgb.getextrema()),  # type: ignore[misc]
    )
