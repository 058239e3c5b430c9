"""Features of the frames of a split by a frozen image model: computed once, kept on the disk."""

import hashlib
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from tqdm import tqdm

from modeling_fer.data.augment import Normalize
from modeling_fer.data.pixels import decoded_batches
from modeling_fer.data.windows import Frames

VERSION = 1  # part of every key: raise it when features come out otherwise than before
SHARD = 8192  # rows of one file


class FrameFeatures:
    """Features `(N, D)` in float16 of the rows of a split, memory-mapped from a folder of shards."""

    dtype = np.float16

    def __init__(self, folder: Path, rows: int) -> None:
        self.parts = [np.load(shard_path(folder, i), mmap_mode="r") for i in range(-(-rows // SHARD))]
        self.shape = (rows, self.parts[0].shape[1])

    def __getitem__(self, rows: Any) -> np.ndarray:
        wanted = np.arange(self.shape[0])[rows] if isinstance(rows, slice) else np.asarray(rows)
        found = np.empty((len(wanted), self.shape[1]), self.dtype)
        shards, places = np.divmod(wanted, SHARD)
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = self.parts[shard][places[here]]
        return found


class EncodedFrames:
    """Features `(N, D)` in float16 of pixels, computed whenever they are asked for.

    Args:
        model: a `FerModel`.
        pixels: uint8 `(N, 3, H, W)`.
        normalize: what the model's pixels go through.
        batch_size: frames that the device encodes at once.
    """

    dtype = np.float16

    def __init__(self, model: nn.Module, pixels: np.ndarray, normalize: Normalize, batch_size: int) -> None:
        self.model, self.pixels, self.normalize = model, pixels, normalize
        self.batch_size = batch_size
        config: Any = model.config
        self.shape = (len(pixels), config.feature_size)

    def __getitem__(self, rows: Any) -> np.ndarray:
        wanted = np.arange(self.shape[0])[rows]
        starts = range(0, len(wanted), self.batch_size)
        parts = (self.pixels[wanted[start : start + self.batch_size]] for start in starts)
        return np.concatenate([encode(self.model, part, self.normalize) for part in parts])


class SomeFrames:
    """Features of some rows, in their order, as if there were no others; read when they are asked for.

    Args:
        features: of all rows.
        rows: `(n,)` numbers of those wanted.
    """

    def __init__(self, features: Frames, rows: np.ndarray) -> None:
        self.features, self.rows, self.dtype = features, rows, features.dtype
        self.shape = (len(rows), *features.shape[1:])

    def __getitem__(self, places: Any) -> np.ndarray:
        return self.features[self.rows[places]]


@torch.inference_mode()
def encode(model: nn.Module, pixels: np.ndarray, normalize: Normalize) -> np.ndarray:
    """Features `(n, D)` in float16 of uint8 frames `(n, 3, H, W)` by a `FerModel`, on its device.

    They are computed in float32 whatever training is done in: temporal heads and what is fitted on them see
    the same features everywhere.

    Raises:
        ValueError: a feature is not finite.
    """
    device = next(model.parameters()).device
    images = normalize.to(device)(torch.from_numpy(np.ascontiguousarray(pixels)).to(device))
    features = model(pixel_values=images).pooler_output.half().cpu().numpy()
    if not np.isfinite(features).all():
        raise ValueError("features of the image model are not finite in float16: its weights are damaged")
    return features


def shard_path(folder: Path, number: int) -> Path:
    """File of one shard."""
    return folder / f"{number:05d}.npy"


def model_digest(model: nn.Module, normalize: Normalize, size: int) -> str:
    """A short text that changes with weights, architecture or what is done to pixels."""
    state = hashlib.blake2b(digest_size=12)
    config: Any = model.config
    state.update(f"{VERSION} {size} {config.pooling} {config.encoder_config.to_json_string()}".encode())
    given = {**model.state_dict(), "scale": normalize.scale, "shift": normalize.shift}
    for name, values in sorted(given.items()):
        state.update(
            name.encode() + values.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        )
    return state.hexdigest()


def images_digest(rows: Dataset) -> str:
    """A short text that changes with the encoded images of a split or their order, and with nothing else."""
    state = hashlib.blake2b(digest_size=12)
    for batch in rows.select_columns(["image"]).with_format("arrow").iter(1000):
        for cell in batch.column("image").to_pylist():
            data = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
            state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def frame_features(
    model: nn.Module,
    rows: Dataset,
    normalize: Normalize,
    size: int,
    cache_dir: Path,
    accelerator: Accelerator,
    batch_size: int = 256,
) -> FrameFeatures:
    """Features of every row by an image model, from the disk where they are there.

    The folder's name is made of the model's weights, what is done to pixels, and the images, so that another
    model or other data never meet old features. Files are written whole, one a shard: a run that
    was interrupted goes on with the next, and processes share the shards.

    Args:
        model: a `FerModel`.
        rows: split with a column `image`.
        normalize: what the model's pixels go through.
        size: side of its images.
        cache_dir: where the folder lies.
        accelerator: the processes that share the work.
        batch_size: frames that a device encodes at once.

    Raises:
        ValueError: an image cannot be decoded, or a feature is not finite.
    """
    key = hashlib.blake2b(
        f"{model_digest(model, normalize, size)} {images_digest(rows)}".encode(), digest_size=12
    ).hexdigest()
    folder = cache_dir / f"features-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    model.to(accelerator.device)
    was_training = model.training
    model.eval()
    count = -(-len(rows) // SHARD)
    missing = [i for i in range(count) if not shard_path(folder, i).exists()]
    accelerator.wait_for_everyone()  # all have looked before any writes
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    bar = tqdm(
        total=sum(min(SHARD, len(rows) - i * SHARD) for i in mine),
        desc="features",
        unit="frame",
        disable=None if accelerator.is_main_process and mine else True,
    )
    for shard in mine:
        part = rows.select(range(shard * SHARD, min((shard + 1) * SHARD, len(rows))))
        found = []
        for _, pixels in decoded_batches(part, size, False, batch_size, shard * SHARD):
            found.append(encode(model, pixels, normalize))
            bar.update(len(pixels))
        beside = folder / f".{shard}.{uuid.uuid4().hex}"
        try:
            with beside.open("wb") as file:
                np.save(file, np.concatenate(found), allow_pickle=False)
            os.replace(beside, shard_path(folder, shard))
        finally:
            beside.unlink(missing_ok=True)
    bar.close()
    model.train(was_training)
    accelerator.wait_for_everyone()
    return FrameFeatures(folder, len(rows))
