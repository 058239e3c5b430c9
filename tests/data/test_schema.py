import errno
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetGenerationError

from modeling_fer.data import schema
from modeling_fer.data.schema import FEATURES

AGAIN = r"fer data prepare SOURCE --out .*data --overwrite"


@pytest.fixture
def copy(prepared, tmp_path):
    """Return a copy of a prepared folder and the path of its training rows."""
    folder = tmp_path / "data"
    shutil.copytree(prepared, folder, ignore=shutil.ignore_patterns("cache"))
    return folder, folder / "data/train-00000-of-00001.parquet"


def test_a_prepared_folder_is_loaded_whole_or_by_split(copy):
    folder, _ = copy
    data = schema.load(folder)
    assert set(data) == {"train", "validation", "unlabeled"}
    assert all(rows.features == FEATURES for rows in data.values())
    assert set(schema.load(str(folder), "validation")) == {"validation"}
    with pytest.raises(FileNotFoundError, match=r"data holds no split 'test'; write it with"):
        schema.load(folder, "test")


@pytest.mark.parametrize("missing", [["expression"], ["soft_label", "subject"], list(FEATURES)])
def test_missing_columns_are_named_and_never_filled(copy, missing):
    folder, path = copy
    table = pq.read_table(path).append_column("extra", pa.array([0] * 24))
    pq.write_table(table.drop_columns(missing), path)
    with pytest.raises(ValueError, match=rf"{path.name} lacks {', '.join(missing)}: .*{AGAIN}"):
        schema.load(folder)
    assert len(schema.load(folder, "validation")["validation"]) == 16  # only what is asked for is looked at


@pytest.mark.parametrize("length", [0, 3, 1000, -1])
def test_a_truncated_file_is_named(copy, length):
    folder, path = copy
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read \(.*\): .*{AGAIN}") as caught:
        schema.load(folder)
    assert "\n" not in str(caught.value)


def test_damage_inside_a_file_is_told_in_one_line(copy):
    folder, path = copy
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)  # the end, which tells the columns, stays whole
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data cannot be loaded \(.*\): .*{AGAIN}") as caught:
        schema.load(folder)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_not_taken_for_damage(copy, monkeypatch):
    def full(*_, **__):
        raise DatasetGenerationError("no") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(schema, "load_dataset", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        schema.load(copy[0])
    assert caught.value.errno == errno.ENOSPC
