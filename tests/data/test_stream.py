import gc
import io
import itertools
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDatasetDict, Value
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_fer.data import schema, stream
from modeling_fer.data.pixels import decode_split
from modeling_fer.data.stream import FaceStream
from modeling_fer.labels import CLASSES

SIZE = 4
BROKEN = b"no image at all"


def face(number):
    """A PNG in the colour of its number, which `numbers` reads back."""
    image = Image.new("RGB", (SIZE, SIZE), (number // 256, number % 256, 7))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def numbers(batch):
    return (batch["pixels"][:, 0, 0, 0].int() * 256 + batch["pixels"][:, 1, 0, 0].int()).tolist()


def write(folder, sizes, kind="parquet", broken=(), features=None):
    """Write shards of these sizes with faces 0, 1, 2, ... whose labels are their numbers modulo 9, less 1."""
    folder.mkdir(parents=True, exist_ok=True)
    features = features or Features({"image": ImageFeature(), "expression": ClassLabel(names=list(CLASSES))})
    count = itertools.count()
    for shard, size in enumerate(sizes):
        rows = [(n, BROKEN if n in broken else face(n)) for n in itertools.islice(count, size)]
        if kind == "tar":
            with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
                for n, image in rows:
                    for ending, data in (("png", image), ("expression", str(n % 9 - 1).encode())):
                        member = tarfile.TarInfo(f"{n:05d}.{ending}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
        else:
            cells = [
                {"image": {"bytes": image, "path": None}, "expression": n % 9 - 1, "source": "x"}
                for n, image in rows
            ]
            table = pa.Table.from_pylist(
                [{name: cell[name] for name in features} for cell in cells], schema=features.arrow_schema
            )
            pq.write_table(table, folder / f"{shard:03d}.parquet", row_group_size=3)
    return folder


def take(faces, count):
    return list(itertools.islice(faces, count))


def same(first, second):
    return all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Uneven shards in both forms, more of them than are open at a time, with a few broken images."""
    root = tmp_path_factory.mktemp("streams")
    sizes = [4, 7, 1, 3, 5, 8, 2, 6, 1, 3, 4, 4]  # 48 rows
    return {kind: write(root / kind, sizes, kind, broken=(5, 17, 40)) for kind in ("parquet", "tar")}


GOOD = sorted(set(range(48)) - {5, 17, 40})


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_every_pass_holds_each_face_once_with_its_label(folders, kind):
    with FaceStream(folders[kind], SIZE, batch_size=5, seed=3) as faces:
        batches = take(faces, 27)  # 3 passes of 9 batches
        assert faces.skipped == 9
    found = [n for batch in batches for n in numbers(batch)]
    passes = [found[i : i + 45] for i in (0, 45, 90)]
    assert all(sorted(one) == GOOD for one in passes)
    assert passes[0] != passes[1] != passes[2]
    labels = [label for batch in batches for label in batch["labels"].tolist()]
    assert labels == [n % 9 - 1 for n in found]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(135))
    for batch in batches:
        assert (batch["pixels"].dtype, batch["pixels"].shape) == (torch.uint8, (5, 3, SIZE, SIZE))
        assert (batch["labels"].dtype, batch["index"].dtype) == (torch.int64, torch.int64)
        assert (batch["pixels"][:, 2] == 7).all()


def test_tar_and_parquet_shards_give_the_same_batches(folders):
    with FaceStream(folders["tar"], SIZE, 7) as tar, FaceStream(folders["parquet"], SIZE, 7) as parquet:
        assert same(take(tar, 15), take(parquet, 15))


def test_shards_take_turns_and_rows_of_one_keep_their_order(folders):
    with FaceStream(folders["parquet"], SIZE, 45) as faces:
        order = numbers(next(faces))
    starts = np.cumsum([0, 4, 7, 1, 3, 5, 8, 2, 6, 1, 3, 4])
    shards = np.searchsorted(starts, order, side="right") - 1
    assert len(set(shards[:8].tolist())) == 8  # one row of each open shard
    for shard in range(12):
        rows = [n for n, s in zip(order, shards, strict=True) if s == shard]
        assert rows == sorted(rows)


def test_the_order_is_that_of_the_seed(folders):
    def run(seed):
        with FaceStream(folders["parquet"], SIZE, 9, seed) as faces:
            return [numbers(batch) for batch in take(faces, 6)]

    assert run(1) == run(1) != run(2)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("world_size", [2, 3, 5])  # 12 shards are dealt over 2 and 3, not over 5
def test_processes_share_out_each_pass(folders, kind, world_size):
    found, index = Counter(), []
    for rank in range(world_size):
        with FaceStream(folders[kind], SIZE, world_size, 1, rank, world_size) as faces:
            while True:  # one at a time, until the next pass begins
                batch = next(faces)
                if faces.state_dict()["place"]["pass"]:
                    break
                found.update(numbers(batch))
                index += batch["index"].tolist()
                assert (batch["index"] % world_size == rank).all()
    assert found == Counter(GOOD)
    assert len(set(index)) == len(index)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_resumed_equals_uninterrupted(folders, kind, data):
    world_size = data.draw(st.sampled_from([1, 2, 5]))
    rank = data.draw(st.integers(0, world_size - 1))
    batch_size = world_size * data.draw(st.integers(1, 7))
    options = (folders[kind], SIZE, batch_size, data.draw(st.integers(0, 3)), rank, world_size)
    stops = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=2))
    with FaceStream(*options) as faces:
        expected = take(faces, sum(stops) + 8)
        skipped = faces.skipped
    found, state = [], None
    for count in [*stops, 8]:
        with FaceStream(*options, prefetch=data.draw(st.integers(1, 4))) as faces:
            if state is not None:
                faces.load_state_dict(state)
            found += take(faces, count)
            state = faces.state_dict()
    assert same(found, expected)
    assert state["place"]["skipped"] == skipped


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_resumed_after_every_batch_equals_uninterrupted(folders, kind):
    with FaceStream(folders[kind], SIZE, 1) as faces:
        expected = take(faces, 12)
        state = None
    found = []
    for _ in expected:
        with FaceStream(folders[kind], SIZE, 1, prefetch=1) as faces:
            if state is not None:
                faces.load_state_dict(state)
            found.append(next(faces))  # most of the open shards were not read from since
            state = faces.state_dict()
    assert same(found, expected)


@pytest.mark.parametrize("count", [0, 8, 9, 10, 18])  # a pass is 9 batches
def test_a_place_at_the_end_of_a_pass_survives_saving_while_decoding_runs_ahead(folders, count, tmp_path):
    with FaceStream(folders["parquet"], SIZE, 5, prefetch=12) as faces:
        take(faces, count)
        if count:
            wait_for(faces._reader.queue.full)  # the thread has gone on into another pass
        torch.save(faces.state_dict(), tmp_path / "place.pt")
        expected = take(faces, 12)
    with FaceStream(folders["parquet"], SIZE, 5) as faces:
        faces.load_state_dict(torch.load(tmp_path / "place.pt", weights_only=True))
        assert same(take(faces, 12), expected)


def test_loading_an_older_place_goes_back_to_it(folders):
    with FaceStream(folders["parquet"], SIZE, 5) as faces:
        take(faces, 3)
        state = faces.state_dict()
        expected = take(faces, 10)
        faces.load_state_dict(state)
        assert same(take(faces, 10), expected)
        faces.load_state_dict(state)  # iterating did not change it
        assert same(take(faces, 10), expected)


def test_closing_and_leaving_a_loop_lose_nothing(folders):
    with FaceStream(folders["parquet"], SIZE, 5) as faces:
        expected = take(faces, 8)
    found = []
    faces = FaceStream(folders["parquet"], SIZE, 5, prefetch=4)
    for _ in range(4):
        for batch in faces:
            found.append(batch)
            if len(found) % 2 == 0:
                break
        if len(found) == 4:
            faces.close()
    faces.close()
    faces.close()
    assert same(found, expected)


@pytest.mark.parametrize("change", [{"seed": 1}, {"rank": 1}, {"world_size": 1, "rank": 0}])
def test_places_of_another_run_are_refused(folders, change):
    options = {"seed": 0, "rank": 0, "world_size": 2}
    state = FaceStream(folders["parquet"], SIZE, 4, **options).state_dict()
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"saved place is one of {name} "):
        FaceStream(folders["parquet"], SIZE, 4, **options | change).load_state_dict(state)


def test_a_place_in_other_shards_is_refused(folders, tmp_path):
    state = FaceStream(folders["parquet"], SIZE, 4).state_dict()
    with pytest.raises(ValueError, match="place is one of shards"):
        FaceStream(write(tmp_path / "other", [9]), SIZE, 4).load_state_dict(state)


def test_a_prepared_folder_gives_its_unlabelled_split(prepared):
    split = schema.load(prepared, "unlabeled")["unlabeled"]
    expected = decode_split(split, 16, show_progress=False)
    with FaceStream(prepared, 16, batch_size=len(split)) as faces:
        batch = next(faces)
    assert np.array_equal(batch["pixels"].numpy(), expected)
    assert batch["labels"].tolist() == [-1] * len(split)


def test_a_folder_smaller_than_a_batch_is_passed_over_again_and_again(tmp_path):
    with FaceStream(write(tmp_path, [2, 0, 1]), SIZE, batch_size=8) as faces:
        assert Counter(numbers(next(faces)) + numbers(next(faces))[:1]) == {0: 3, 1: 3, 2: 3}


def test_images_without_labels_are_unlabelled(tmp_path):
    with FaceStream(write(tmp_path, [3], features=Features({"image": ImageFeature()})), SIZE, 3) as faces:
        assert next(faces)["labels"].tolist() == [-1] * 3


def hub(monkeypatch, *splits):
    """Stand in for the Hub: one data set of the given splits."""
    rows = {"image": [{"bytes": face(n), "path": None} for n in range(6)]}
    data = Dataset.from_dict(rows, features=Features({"image": ImageFeature()}))
    streams = IterableDatasetDict({split: data.to_iterable_dataset(num_shards=3) for split in splits})

    def load(name, streaming):
        assert (name, streaming) == ("org/faces", True)
        return streams

    monkeypatch.setattr(stream, "load_dataset", load)


@pytest.mark.parametrize(
    ("source", "splits"),
    [
        ("org/faces", ["train"]),
        ("org/faces", ["train", "unlabeled"]),
        ("org/faces:extra", ["train", "extra"]),
    ],
)
def test_a_data_set_of_the_hub_is_streamed(monkeypatch, source, splits):
    hub(monkeypatch, *splits)
    with FaceStream(source, SIZE, 4) as faces:
        found = take(faces, 3)
        assert sorted(n for batch in found for n in numbers(batch)) == sorted([*range(6)] * 2)
        state = faces.state_dict()
        expected = take(faces, 2)
    with FaceStream(source, SIZE, 4) as faces:
        faces.load_state_dict(state)
        assert same(take(faces, 2), expected)


@pytest.mark.parametrize(("source", "named"), [("org/faces", "unlabeled"), ("org/faces:none", "none")])
def test_a_split_that_is_not_there_is_an_error(monkeypatch, source, named):
    hub(monkeypatch, "train", "test")
    with pytest.raises(ValueError, match=f"no split '{named}', only train, test"):
        FaceStream(source, SIZE, 4)


def test_unreadable_images_are_counted_and_warned_about_once(tmp_path, caplog):
    with FaceStream(write(tmp_path, [10], broken=(2, 3, 9)), SIZE, 7) as faces:
        assert faces.skipped == 0
        assert numbers(next(faces)) == [0, 1, 4, 5, 6, 7, 8]
        assert faces.skipped == 2
        take(faces, 2)
        state = faces.state_dict()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "000.parquet: no image of a known format" in caplog.text
    with FaceStream(tmp_path, SIZE, 7) as faces:
        faces.load_state_dict(state)
        assert faces.skipped == state["place"]["skipped"] == 8
        next(faces)
    assert len(caplog.records) == 1


def test_rows_without_an_image_are_skipped(tmp_path):
    features = Features({"image": ImageFeature()})
    cells = [
        {"image": None},
        {"image": {"bytes": face(1), "path": None}},
        {"image": {"bytes": None, "path": None}},
    ]
    cells.append({"image": {"bytes": None, "path": str(tmp_path / "gone.png")}})
    pq.write_table(pa.Table.from_pylist(cells, schema=features.arrow_schema), tmp_path / "a.parquet")
    with FaceStream(tmp_path, SIZE, 1) as faces:
        assert numbers(next(faces)) == [1]
        assert numbers(next(faces)) == [1]
        assert faces.skipped == 4  # of these, the first row twice


@pytest.mark.parametrize("sizes", [[3, 2], [0]])
def test_a_pass_without_a_readable_image_is_an_error(tmp_path, sizes):
    with (
        FaceStream(write(tmp_path / "bad", sizes, broken=range(5)), SIZE, 2) as faces,
        pytest.raises(ValueError, match="bad: in a whole pass, process 0 of 1 met no readable image"),
    ):
        next(faces)


def test_a_pass_is_judged_by_its_own_images(tmp_path, monkeypatch):
    decoded, original = itertools.count(), stream.decode

    def break_after_one_pass(*args):
        if next(decoded) >= 3:
            raise stream.UnreadableImageError("it broke meanwhile")
        return original(*args)

    monkeypatch.setattr(stream, "decode", break_after_one_pass)
    with FaceStream(write(tmp_path, [3]), SIZE, 3) as faces:
        next(faces)
        with pytest.raises(ValueError, match=r"no readable image \(the last one: .+: it broke meanwhile\)"):
            next(faces)


def test_a_pass_cut_in_two_is_judged_as_a_whole(tmp_path):
    write(tmp_path, [4], broken=(1, 2, 3))
    with FaceStream(tmp_path, SIZE, 1) as faces:
        next(faces)
        state = faces.state_dict()
    with FaceStream(tmp_path, SIZE, 1) as faces:
        faces.load_state_dict(state)  # nothing readable is left of this pass
        assert numbers(next(faces)) == [0]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_broken_shard_is_named_and_what_came_before_is_kept(tmp_path, kind):
    write(tmp_path, [6, 6], kind)
    last = sorted(tmp_path.iterdir())[-1]
    whole = last.read_bytes()
    with FaceStream(tmp_path, SIZE, 1, prefetch=1) as faces:
        last.write_bytes(whole[:700])
        with pytest.raises(ValueError, match=rf"{last.name} cannot be read \(.+\): write the shard again"):
            take(faces, 20)
        last.write_bytes(whole)  # mended: on it goes
        index = faces.state_dict()["place"]["given"]
        assert next(faces)["index"].tolist() == [index]


def test_errors_of_the_system_keep_their_kind_and_gain_the_shard(tmp_path):
    with FaceStream(write(tmp_path, [2]), SIZE, 1) as faces:
        (tmp_path / "000.parquet").unlink()
        with pytest.raises(FileNotFoundError) as caught:
            next(faces)
    assert caught.value.__notes__ == [f"while reading {tmp_path}/000.parquet"]


def test_any_error_in_the_background_reaches_the_consumer(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt("stop")

    monkeypatch.setattr(stream, "decode", interrupt)
    with FaceStream(write(tmp_path, [2]), SIZE, 1) as faces, pytest.raises(KeyboardInterrupt, match="stop"):
        next(faces)


def test_a_folder_without_shards_is_an_error(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").touch()
    with pytest.raises(ValueError, match=rf"{tmp_path} holds neither data/unlabeled-"):
        FaceStream(tmp_path, SIZE, 1)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_source_that_cannot_be_opened_is_an_error(tmp_path, kind):
    (tmp_path / f"a.{kind}").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=rf"a\.{kind} cannot be read"):
        FaceStream(tmp_path, SIZE, 1)


@pytest.mark.parametrize("source", ["no/such/folder", "org/faces", "file.txt", ""])
def test_a_source_that_is_not_there_is_an_error(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"(is no folder here|holds neither)"):
        FaceStream(source, SIZE, 1)


def test_a_source_without_images_is_an_error(tmp_path):
    write(tmp_path, [2], features=Features({"source": Value("string")}))
    with pytest.raises(ValueError, match="no image column, only source"):
        FaceStream(tmp_path, SIZE, 1)


def test_classes_in_another_order_are_an_error(tmp_path):
    names = ClassLabel(names=[*CLASSES[::-1]])
    write(tmp_path, [2], features=Features({"image": ImageFeature(), "expression": names}))
    with pytest.raises(ValueError, match="classes of its column 'expression' are Other, Surprise"):
        FaceStream(tmp_path, SIZE, 1)


@pytest.mark.parametrize("label", ["8", "-2", "happy"])
def test_labels_that_are_none_of_ours_are_an_error(tmp_path, label):
    features = Features({"image": ImageFeature(), "expression": Value("string")})
    row = {"image": {"bytes": face(0), "path": None}, "expression": label}
    pq.write_table(pa.Table.from_pylist([row], schema=features.arrow_schema), tmp_path / "a.parquet")
    with (
        FaceStream(tmp_path, SIZE, 1) as faces,
        pytest.raises(ValueError, match=f"a.parquet: expression must be -1 or 0 to 7, got '{label}'"),
    ):
        next(faces)


@pytest.mark.parametrize(("options", "said"), [((0,), "size 0"), ((3, 0, 0, 2), "2 processes")])
def test_batches_that_do_not_divide_are_an_error(folders, options, said):
    with pytest.raises(ValueError, match=said):
        FaceStream(folders["parquet"], SIZE, *options)


def test_a_queue_without_an_end_is_an_error(folders):
    with pytest.raises(ValueError, match="prefetch must be at least 1"):
        FaceStream(folders["parquet"], SIZE, 1, prefetch=0)


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "face-stream"]


def test_reading_ahead_is_bounded(folders, monkeypatch):
    decoded = itertools.count()
    original = stream.decode
    monkeypatch.setattr(stream, "decode", lambda *args: (next(decoded), original(*args))[1])
    with FaceStream(folders["parquet"], SIZE, 5, prefetch=3) as faces:
        take(faces, 2)
        time.sleep(0.3)
        # 2 batches consumed, 3 in the queue, 1 in the thread's hand, and the 3 broken images among them
        assert next(decoded) <= 6 * 5 + 3
    assert readers() == []


def test_threads_end_with_their_stream(folders):
    faces = FaceStream(folders["parquet"], SIZE, 5)
    assert readers() == []  # none is started before it is needed
    next(faces)
    assert len(readers()) == 1
    faces.close()
    assert readers() == []
    next(faces)
    del faces  # forgotten, not closed
    gc.collect()
    assert readers() == []


def test_a_program_ends_while_a_stream_is_open(folders):
    code = f"""
from modeling_fer.data.stream import FaceStream
faces = FaceStream({str(folders["parquet"])!r}, 4, 5)
next(faces)
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (3, "")
    assert "Traceback" not in done.stderr
