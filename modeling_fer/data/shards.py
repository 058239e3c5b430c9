"""Parquet files of rows, in shards: `<split>-00000-of-0000N.parquet`."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from modeling_fer.data.schema import FEATURES, Example

SHARD_ROWS, SHARD_BYTES = 50_000, 256 * 2**20
BATCH_ROWS, BATCH_BYTES = 1_000, 32 * 2**20  # held in memory per split; also the row groups of the files


class Shards:
    """Parquet files of one new folder, written row by row; they get their names when all is written."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.rows: dict[str, list[dict[str, Any]]] = {}  # split -> rows that wait
        self.bytes: Counter[str] = Counter()  # split -> image bytes that wait
        self.writers: dict[str, pq.ParquetWriter] = {}
        self.sizes: dict[str, list[list[int]]] = {}  # split -> [rows, image bytes] of each shard

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for split in list(self.rows):
                self._flush(split)
        for writer in self.writers.values():
            writer.close()
        if kind is None:
            for split, sizes in self.sizes.items():
                for index in range(len(sizes)):
                    final = f"{split}-{index:05d}-of-{len(sizes):05d}.parquet"
                    self._path(split, index).rename(self.folder / final)

    def add(self, example: Example) -> None:
        """Add one row to the files of its split."""
        row = {name: getattr(example, name) for name in FEATURES}
        row["image"] = {"bytes": example.image, "path": None}
        self.rows.setdefault(example.split, []).append(row)
        self.bytes[example.split] += len(example.image)
        if len(self.rows[example.split]) >= BATCH_ROWS or self.bytes[example.split] >= BATCH_BYTES:
            self._flush(example.split)

    def _flush(self, split: str) -> None:
        rows, size = self.rows.pop(split), self.bytes.pop(split)
        sizes = self.sizes.setdefault(split, [])
        if not sizes or sizes[-1][0] + len(rows) > SHARD_ROWS or sizes[-1][1] + size > SHARD_BYTES:
            if split in self.writers:
                self.writers[split].close()
            sizes.append([0, 0])
            # The schema carries the features: whoever reads the file gets images and class names back.
            self.writers[split] = pq.ParquetWriter(self._path(split, len(sizes) - 1), FEATURES.arrow_schema)
        self.writers[split].write_table(pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema))
        sizes[-1][0] += len(rows)
        sizes[-1][1] += size

    def _path(self, split: str, index: int) -> Path:
        return self.folder / f"{split}-{index:05d}.partial"
