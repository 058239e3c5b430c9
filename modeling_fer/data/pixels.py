"""Images decoded once to uint8 arrays, so that training never waits for a decoder."""

import hashlib
import io
import itertools
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from datasets import Image as ImageFeature
from numpy.lib.format import write_array_header_1_0
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

VERSION = 1  # part of every cache key: raise it when `decode` gives other pixels than before
BATCH = 256
# Of the files that are images, wherever a folder is searched for them.
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class UnreadableImageError(ValueError):
    """An image that PIL cannot read; the message is the reason."""


def open_image(image: bytes | Image.Image) -> Image.Image:
    """Return an image as RGB and upright, as `datasets` and transformers hand it to a processor.

    Raises:
        UnreadableImageError: PIL cannot read the bytes.
    """
    try:
        opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        return ImageOps.exif_transpose(opened).convert("RGB")
    except UnidentifiedImageError as error:  # its own words hold a memory address
        raise UnreadableImageError("no image of a known format") from error
    except Exception as error:  # damaged EXIF raises nearly any kind: struct.error, KeyError, TypeError, ...
        kind = type(error)
        name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        raise UnreadableImageError(f"{error} ({name})") from error


def decode(image: bytes | Image.Image, size: int) -> np.ndarray:
    """Decode one image to uint8 (3, size, size), with the pixels of the stock transformers processor.

    That is a bilinear resize by PIL (`resample=2`) to a square, before any rescaling or normalisation.

    Raises:
        UnreadableImageError: PIL cannot read the image.
    """
    rgb = open_image(image)
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(rgb).transpose(2, 0, 1)


def decode_split(
    dataset: Dataset, size: int, cache_dir: str | Path | None = None, show_progress: bool = True
) -> np.ndarray:
    """Decode the `image` column of a split to uint8 (N, 3, size, size).

    With a `cache_dir` the array is a read-only memory map of a file there, found again by a later run on the
    same data. The key is the data set's own fingerprint (stable between processes; it changes with the files
    and with every `select` or `filter`). Processes that start together may each write the file; each puts a
    whole one in place, and the last one stays.

    Raises:
        ValueError: an image cannot be decoded; the message names its row.
    """
    shape = (len(dataset), 3, size, size)
    if cache_dir is None or not len(dataset):  # no memory map can be empty
        pixels = np.empty(shape, np.uint8)
        for start, batch in decoded_batches(dataset, size, show_progress):
            pixels[start : start + len(batch)] = batch
        return pixels
    key = hashlib.blake2b(f"{VERSION} {size} {dataset._fingerprint}".encode(), digest_size=12).hexdigest()
    path = Path(cache_dir) / f"pixels-{size}-{key}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            # Plain writes, not writes into a memory map: on a full disk these raise, those kill the process.
            with beside.open("wb") as file:
                header = {"descr": np.dtype(np.uint8).str, "fortran_order": False, "shape": shape}
                write_array_header_1_0(file, header)
                for _, batch in decoded_batches(dataset, size, show_progress):
                    file.write(batch.tobytes())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")


def decoded_batches(
    dataset: Dataset, size: int, show_progress: bool, batch_size: int = BATCH, first_row: int = 0
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first row and the pixels uint8 (n, 3, size, size) of batch after batch.

    `first_row` is the number of the first row in the split that the rows are a part of, for messages.

    Threads help because PIL decodes and resizes outside Python's lock.

    Raises:
        ValueError: an image cannot be decoded; the message names its row.
    """
    encoded = (
        dataset.select_columns(["image"]).cast_column("image", ImageFeature(decode=False)).with_format(None)
    )

    def work(row: int, cell: dict[str, Any]) -> np.ndarray:
        try:
            data = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
            return decode(data, size)
        except (OSError, TypeError, UnreadableImageError) as error:  # TypeError: a row without an image
            raise ValueError(
                f"row {row}: the image cannot be decoded ({error}); "
                "`fer data prepare` writes readable images only: prepare the data again"
            ) from error

    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(
            total=len(encoded), desc="decoding", unit="image", disable=None if show_progress else True
        ) as progress,
    ):
        for start in range(0, len(encoded), batch_size):
            cells = encoded[start : start + batch_size]["image"]
            yield start, np.stack(list(pool.map(work, itertools.count(first_row + start), cells)))
            progress.update(len(cells))
