import pyarrow.parquet as pq
import pytest

from modeling_fer.data import shards as module
from modeling_fer.data.schema import Example
from modeling_fer.data.shards import Shards
from modeling_fer.labels import CLASSES

HAPPY = CLASSES.index("Happiness")


def write(folder, train, test=0):
    """Write rows of four bytes; the two splits take turns, as sources do not sort."""
    with Shards(folder) as shards:
        for n in range(max(train, test)):
            for split, number in (("train", train), ("test", test)):
                if n < number:
                    shards.add(Example(split, b"%4d" % n, "", "made", HAPPY))
    return sorted(path.name for path in folder.iterdir())


def images(folder, split):
    tables = [pq.read_table(path) for path in sorted(folder.glob(f"{split}-*.parquet"))]
    return [int(row["image"]["bytes"]) for table in tables for row in table.to_pylist()]


def test_large_splits_go_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_ROWS", 3)
    monkeypatch.setattr(module, "SHARD_ROWS", 6)
    names = write(tmp_path / "a", 14, 1)
    assert names == ["test-00000-of-00001.parquet", *(f"train-0000{n}-of-00003.parquet" for n in range(3))]
    assert images(tmp_path / "a", "train") == list(range(14))
    assert images(tmp_path / "a", "test") == [0]
    sizes = [pq.read_metadata(tmp_path / "a" / name).num_rows for name in names]
    assert sizes == [1, 6, 6, 2]


def test_shards_and_batches_are_limited_in_bytes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 40)
    monkeypatch.setattr(module, "BATCH_BYTES", 16)
    names = write(tmp_path / "a", 14)
    files = [pq.read_metadata(tmp_path / "a" / name) for name in names]
    assert [[file.row_group(n).num_rows for n in range(file.num_row_groups)] for file in files] == [
        [4, 4],
        [4, 2],
    ]
    assert images(tmp_path / "a", "train") == list(range(14))


def test_files_of_a_failed_run_bear_no_final_name(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_ROWS", 1)

    def fail():
        with Shards(tmp_path / "a") as shards:
            shards.add(Example("train", b"", "", "made", HAPPY))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.suffix for path in (tmp_path / "a").iterdir()] == [".partial"]
