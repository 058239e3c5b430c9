"""Sources of images: the same images from each of them, cut into units, and what damage does."""

import errno
import gzip
import io
import json
import os
import shutil
import tarfile
import tracemalloc
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from modeling_fer.data import images
from modeling_fer.data.images import Face, Skipped, batches, cut, decoded, find_source, read
from modeling_fer.data.pixels import decode
from tests.conftest import picture

COUNT = 23


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Return a tree of images, some in folders of folders, and other files among them."""
    root = tmp_path_factory.mktemp("tree")
    for i in range(COUNT):
        path = root / ("a", "b/c", "")[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i % 8, i).save(path)
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_bytes(b"no image")
    return root


def every(source, folder, wanted=None):
    """Return (unit, row) -> bytes or error of all images of a source, and their names."""
    folder.mkdir(exist_ok=True)
    found = {}
    for number, unit in enumerate(json.loads(json.dumps([*cut(source, folder)]))):
        for item in read(source, unit, folder, wanted):
            found[number, item.row] = item
    return found


def contents(found):
    return sorted(item.read() for item in found.values())


def parquet(path, data, rows_a_group=4):
    cells = [{"bytes": one, "path": None} for one in data]
    table = pa.table({"image": pa.array(cells), "other": list(range(len(data)))})
    pq.write_table(table, path, row_group_size=rows_a_group, compression="none")


def make_tar(path, data, mode="w"):
    with tarfile.open(path, mode) as tar:
        for i, one in enumerate(data):
            for name, content in ((f"{i}.png", one), (f"{i}.json", b"{}")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_every_kind_gives_the_same_images(tree, tmp_path):
    data = [path.read_bytes() for path in sorted(tree.rglob("*.png")) if path.name[0] != "."]
    assert len(data) == COUNT
    for name in ("tars", "parquets", "prepared/data"):
        (tmp_path / name).mkdir(parents=True)
    make_tar(tmp_path / "tars/0.tar", data[:10])
    make_tar(tmp_path / "tars/1.tar.gz", data[10:], "w:gz")
    parquet(tmp_path / "parquets/0.parquet", data[:15])
    parquet(tmp_path / "parquets/1.parquet", data[15:])
    shutil.copytree(tmp_path / "parquets", tmp_path / "stream")
    parquet(tmp_path / "prepared/data/unlabeled-00000-of-00001.parquet", data)
    parquet(tmp_path / "prepared/data/train-00000-of-00001.parquet", data[:3])
    kinds = {}
    for given in (tree, "tars", "parquets", "prepared", f"hub:{tmp_path / 'stream'}"):
        images = given if isinstance(given, str) and given.startswith("hub:") else str(tmp_path / given)
        split = "train" if images.startswith("hub:") else "unlabeled"
        source = find_source(images, split, "image", 5)
        found = every(source, tmp_path / source["kind"])
        kinds[source["kind"]] = len({unit for unit, _ in found})
        assert contents(found) == sorted(data), source
        assert len({item.name for item in found.values()}) == COUNT, "names tell the images apart"
        # Any unit can be read alone, in part.
        second = every(source, tmp_path / source["kind"], wanted={1})
        assert {place: item.read() for place, item in second.items()} == {
            place: item.read() for place, item in found.items() if place[1] == 1
        }
    assert kinds == {"tree": 5, "tar": 2, "parquet": 6, "prepared": 6, "hub": 2}
    train = find_source(str(tmp_path / "prepared"), "train", "image", 5)
    assert contents(every(train, tmp_path / "more")) == sorted(data[:3])
    assert len(every(find_source(str(tmp_path / "tars/0.tar"), "", "image", 5), tmp_path / "one")) == 10
    one = find_source(str(tmp_path / "parquets/1.parquet"), "", "image", 100)
    assert len(every(one, tmp_path / "one")) == COUNT - 15


def test_tree_is_listed_in_order_however_many_names_fit_into_memory(tree, tmp_path, monkeypatch):
    source = find_source(str(tree), "", "image", 5)
    whole = [item.name for item in every(source, tmp_path / "whole").values()]
    assert len(whole) == COUNT
    monkeypatch.setattr(images, "NAMES_AT_ONCE", 2)
    assert [item.name for item in every(source, tmp_path / "runs").values()] == whole
    files = [(tmp_path / name / "files.jsonl").read_bytes() for name in ("whole", "runs")]
    assert files[0] == files[1]


def test_names_that_are_no_text(tmp_path):
    (tmp_path / "tree").mkdir()
    for name in (b"line\nbreak.png", b"latin-\xe9.png"):
        path = os.path.join(os.fsencode(tmp_path / "tree"), name)
        with open(path, "wb") as file:
            file.write(name)
    source = find_source(str(tmp_path / "tree"), "", "image", 5)
    assert contents(every(source, tmp_path / "cut")) == [b"latin-\xe9.png", b"line\nbreak.png"]


def test_damaged_archives_give_what_stands_before_the_damage(tree, tmp_path):
    data = [path.read_bytes() for path in sorted(tree.glob("*.png")) if path.name[0] != "."]
    make_tar(tmp_path / "good.tar", data)
    whole = (tmp_path / "good.tar").read_bytes()
    header = whole.index(b"3.png")  # a name stands at the start of its header
    damages = {
        "cut inside an image": whole[: header + 700],
        "cut inside a header": whole[: header + 100],
        "header overwritten": whole[:header] + b"\xff" * 512 + whole[header + 512 :],
        "compressed and cut": gzip.compress(whole)[: len(gzip.compress(whole)) * 2 // 3],
    }
    for name, content in damages.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(content)
        *before, last = every(find_source(str(path), "", "image", 5), tmp_path / "x").values()
        assert [item.read() for item in before] == data[: len(before)], name
        assert name == "compressed and cut" or len(before) == 3, name
        with pytest.raises(ValueError, match="Error"):
            last.read()
    (tmp_path / "none.tar").write_bytes(b"this is no archive" * 100)
    (only,) = every(find_source(str(tmp_path / "none.tar"), "", "image", 5), tmp_path / "x").values()
    assert only.name == "none.tar from image 0 on"


def test_trouble_of_the_system_is_no_damage(tree, tmp_path, monkeypatch):
    """What may pass must not cost rows: it is raised, so that the unit is done again."""
    (tmp_path / "files").mkdir()
    make_tar(tmp_path / "files/x.tar", [b"one", b"two"])
    parquet(tmp_path / "x.parquet", [b"one", b"two"])
    sources = {
        kind: find_source(str(path), "", "image", 100)
        for kind, path in {"tree": tree, "tar": tmp_path / "files", "parquet": tmp_path / "x.parquet"}.items()
    }
    units = {kind: [*cut(source, tmp_path)] for kind, source in sources.items()}

    def faces(kind):
        with ThreadPoolExecutor(1) as pool:
            return [*decoded(read(sources[kind], units[kind][0], tmp_path), 16, pool, ahead=4)]

    assert all(faces(kind) for kind in sources)
    (tmp_path / "files/x.tar").unlink()
    with pytest.raises(FileNotFoundError):
        faces("tar")
    make_tar(tmp_path / "files/x.tar", [b"one", b"two"])
    for number in (errno.EIO, errno.ESTALE):

        def fail(*_, number=number, **__):
            raise OSError(number, os.strerror(number))

        for kind, place in {
            "tree": (Path, "read_bytes"),
            "tar": (tarfile.TarFile, "next"),
            "parquet": (pq.ParquetFile, "iter_batches"),
        }.items():
            with monkeypatch.context() as patch:
                patch.setattr(*place, fail)
                with pytest.raises(OSError, match=os.strerror(number)):
                    faces(kind)


def test_one_file_may_be_gone_but_not_all(tree, tmp_path):
    root = tmp_path / "share/tree"
    shutil.copytree(tree, root)
    source = find_source(str(root), "", "image", 100)
    (unit,) = cut(source, tmp_path)
    shutil.rmtree(root / "a")
    with ThreadPoolExecutor(1) as pool:
        found = [*decoded(read(source, unit, tmp_path), 16, pool, ahead=4)]
        skipped = [one.name for one in found if isinstance(one, Skipped)]
        assert skipped == [f"a/{i:02d}.png" for i in range(0, COUNT, 3)]
        shutil.rmtree(root)
        for _ in ("no folder", "an empty one, as an unmounted share leaves it"):
            with pytest.raises(FileNotFoundError):
                [*decoded(read(source, unit, tmp_path), 16, pool, ahead=4)]
            root.mkdir(exist_ok=True)


def test_a_folder_of_more_than_one_kind_is_refused(tree, tmp_path):
    make_tar(tmp_path / "x.tar", [b"x"])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/x.txt").write_text("no image")
    assert find_source(str(tmp_path), "", "image", 5)["kind"] == "tar"
    shutil.copytree(tree, tmp_path / "notes/tree")
    with pytest.raises(ValueError, match="holds image and tar files: pass one file, or a folder of one kind"):
        find_source(str(tmp_path), "", "image", 5)
    shutil.rmtree(tmp_path / "notes")
    parquet(tmp_path / "x.parquet", [b"x"])
    with pytest.raises(ValueError, match="holds parquet and tar files"):
        find_source(str(tmp_path), "", "image", 5)
    assert find_source(str(tmp_path / "x.tar"), "", "image", 5)["kind"] == "tar"


def test_a_known_revision_of_the_hub_is_kept(monkeypatch):
    class Newer:
        def dataset_info(self, name):
            return types.SimpleNamespace(sha="newer")

    monkeypatch.setattr(images, "HfApi", Newer)
    assert find_source("hub:a/b", "train", "image", 5)["revision"] == "newer"
    assert find_source("hub:a/b", "train", "image", 5, "known")["revision"] == "known"


def test_damaged_parquet(tree, tmp_path):
    data = [path.read_bytes() for path in sorted(tree.glob("*.png")) if path.name[0] != "."]
    parquet(tmp_path / "x.parquet", data)
    source = find_source(str(tmp_path / "x.parquet"), "", "image", 4)
    units = [*cut(source, tmp_path)]
    whole = (tmp_path / "x.parquet").read_bytes()
    middle = whole.index(data[5])
    (tmp_path / "x.parquet").write_bytes(whole[: middle - 200] + b"\xff" * 300 + whole[middle + 100 :])
    bad = [
        item for unit in units for item in read(source, unit, tmp_path) if isinstance(item.data, Exception)
    ]
    assert [item.name.split(" ")[0] for item in bad] == ["x.parquet"]
    (tmp_path / "x.parquet").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"x\.parquet cannot be read"):
        [*cut(source, tmp_path)]


def test_wrong_sources_are_told(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_source(str(tmp_path / "nothing"), "", "image", 5)
    with pytest.raises(ValueError, match="no parquet or tar file"):
        find_source(str(tree / "02.png"), "", "image", 5)
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data/train-00000-of-00001.parquet", [b"x"])
    with pytest.raises(FileNotFoundError, match="no split 'unlabeled': choose --split from train"):
        find_source(str(tmp_path), "unlabeled", "image", 5)
    with pytest.raises(ValueError, match="no column face: choose --column from image, other"):
        [*cut(find_source(str(tmp_path), "train", "face", 5), tmp_path)]
    with pytest.raises(ValueError, match="no column face"):
        [*cut(find_source(f"hub:{tmp_path}", "train", "face", 5), tmp_path)]


def test_decoding_keeps_the_order_and_names_what_is_damaged(tree, tmp_path):
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    good = (root / "02.png").read_bytes()
    (root / "a/00.png").write_bytes(b"")
    (root / "a/03.png").write_bytes(good[: len(good) // 2])
    (root / "b/c/01.png").write_text("no image at all")
    (root / "b/c/04.png").unlink()
    (root / "b/c/04.png").symlink_to("nowhere")
    source = find_source(str(root), "", "image", 100)
    (unit,) = cut(source, tmp_path)
    with ThreadPoolExecutor(3) as pool:
        found = [*decoded(read(source, unit, tmp_path), 16, pool, ahead=32)]
    skipped = {one.name: one.reason for one in found if isinstance(one, Skipped)}
    assert skipped.keys() == {"a/00.png", "a/03.png", "b/c/01.png", "b/c/04.png"}
    assert all(skipped.values())
    assert "No such file" in skipped["b/c/04.png"]
    faces = [one for one in found if isinstance(one, Face)]
    assert [face.row for face in faces] == sorted(face.row for face in faces)
    assert len(faces) == COUNT - 4
    assert len({face.content_hash for face in faces}) == len(faces)
    for face in faces:
        assert (face.pixels == decode((root / face.name).read_bytes(), 16)).all()
        assert (face.width, face.height, face.is_blank) == (20, 20, False)
    out: list[Skipped] = []
    grouped = [*batches(found, 4, out.append)]
    assert [len(batch) for batch in grouped] == [4] * 4 + [3]
    assert {one.name for one in out} == skipped.keys()


def test_memory_does_not_grow_with_the_images(tree, tmp_path):
    """Many times the images go through in the memory of a few."""
    source = find_source(str(tree), "", "image", 10**6)
    (unit,) = cut(source, tmp_path)
    names = (tmp_path / "files.jsonl").read_bytes()
    (tmp_path / "files.jsonl").write_bytes(names * 80)
    tracemalloc.start()
    count = size = 0
    with ThreadPoolExecutor(2) as pool:
        for face in decoded(read(source, unit, tmp_path), 16, pool, ahead=32):
            count, size = count + 1, size + face.pixels.nbytes + face.small.nbytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == COUNT * 80
    assert peak < size / 4, (peak, size)


def test_blank_images_are_noticed(tmp_path):
    picture(0, 0).save(tmp_path / "0.png")
    Image.new("RGB", (30, 20), (9, 8, 7)).save(tmp_path / "1.png")
    source = find_source(str(tmp_path), "", "image", 5)
    (unit,) = cut(source, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        first, second = decoded(read(source, unit, tmp_path), 16, pool, 1)
    assert (first.is_blank, second.is_blank, second.width, second.height) == (False, True, 30, 20)
