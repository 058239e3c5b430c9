"""The folder of a labelling job: claims, whole files, joining, tidying."""

import json
import multiprocessing
import os
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_fer.data.images import Face, Skipped, find_source
from modeling_fer.data.pseudo import LABELS, Job, LabelOptions, open_job, put_once
from tests.conftest import picture

SETTINGS = {"model_revision": "abc", "precision": "no"}


@pytest.fixture
def job(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(5):
        picture(i, i).save(tmp_path / f"images/{i}.png")
    source = find_source(str(tmp_path / "images"), "", "image", 2)
    return open_job(tmp_path / "out", source, SETTINGS, {"model": "m"})


def face(row):
    rng = np.random.default_rng(row)
    small = rng.integers(0, 256, (32, 32), np.uint8)
    return Face(row, f"{row}.png", rng.bytes(16), np.zeros((3, 8, 8), np.uint8), small, 20, 10, False)


def finish(job, unit, skips=0):
    with job.writer(unit) as writer:
        writer.add([face(unit)], np.full((2, 1, 8), 0.125, np.float32))
        for i in range(skips):
            writer.skip(Skipped(f"{unit}-{i}", "bad"))


def test_one_worker_holds_a_unit_and_gives_it_back(job):
    with job.claimed(0, 60) as mine:
        assert mine is not None
        mine()
        with job.claimed(0, 60) as again, job.claimed(1, 60) as other:
            assert again is None
            assert other is not None
    with job.claimed(0, 60) as free:
        assert free is not None
        finish(job, 0)
    with job.claimed(0, 60) as done:
        assert done is None, "a finished unit is never claimed again"
    assert not [*(job.out / "claims").iterdir()]


def test_a_claim_is_given_back_when_its_holder_fails(job):
    with pytest.raises(ZeroDivisionError), job.claimed(0, 60), job.writer(0):
        1 / 0  # noqa: B018
    assert not [*(job.out / "claims").iterdir()]
    assert not [*(job.out / "partial").iterdir()]
    assert job.unfinished() == [0, 1, 2], "and nothing of it counts as labels"


def owner(job, **changes):
    """Leave a claim on unit 0 as another process would."""
    with job.claimed(0, 60):
        told = json.loads((job.out / "claims/unit-000000/owner.json").read_text())
    folder = job.out / "claims/unit-000000"
    folder.mkdir()
    (folder / "owner.json").write_text(json.dumps(told | changes))
    return folder / "owner.json"


def test_claims_of_the_dead_are_taken_over(job):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1, check=True)
    owner(job, pid=int(ended.stdout))
    with job.claimed(0, 3600) as taken:
        assert taken is not None, "its process has ended"
    owner(job, born="1")
    with job.claimed(0, 3600) as taken:
        assert taken is not None, "a process with its number, but a younger one"
    owner(job, host="elsewhere", pid=1, born="1")
    with job.claimed(0, 3600) as taken:
        assert taken is None, "nothing is known of another host's processes"
    path = job.out / "claims/unit-000000/owner.json"
    os.utime(path, (time.time() - 100,) * 2)
    with job.claimed(0, 101 + 60) as taken:
        assert taken is None
    with job.claimed(0, 99) as taken:
        assert taken is not None, "its heart has stopped"


def test_heartbeat_renews_a_claim(job, monkeypatch):
    monkeypatch.setattr("modeling_fer.data.pseudo.HEARTBEAT_S", 0.0)
    with job.claimed(0, 60) as beat:
        path = job.out / "claims/unit-000000/owner.json"
        os.utime(path, (1, 1))
        beat()
        assert time.time() - path.stat().st_mtime < 50
        path.unlink()
        beat()  # who was wrongly taken for dead goes on, and changes nothing
    finish(job, 0)
    before = job.labels_path(0).read_bytes()
    with job.writer(0) as writer:
        writer.add([face(7)], np.full((2, 1, 8), 0.125, np.float32))
    assert job.labels_path(0).read_bytes() == before


def grab(job, unit, barrier, found):
    barrier.wait()
    with job.claimed(unit, 60) as mine:
        found.put(mine is not None)
        barrier.wait()


def test_of_many_processes_one_gets_a_unit(job):
    context = multiprocessing.get_context("fork")
    for unit in range(3):
        barrier, found = context.Barrier(6), context.Queue()
        workers = [context.Process(target=grab, args=(job, unit, barrier, found)) for _ in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert sorted(found.get() for _ in workers) == [False] * 5 + [True]


def test_put_once(tmp_path):
    def fill(text):
        return lambda folder: (folder / "x").write_text(text)

    assert put_once(tmp_path / "a", fill("first"))
    assert not put_once(tmp_path / "a", fill("second"))
    assert (tmp_path / "a/x").read_text() == "first"

    def fail(folder):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        put_once(tmp_path / "b", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]

    def swept(folder):  # by whoever finishes the job meanwhile
        folder.rmdir()
        (folder / "x").write_text("late")

    assert not put_once(tmp_path / "c", swept)
    with pytest.raises(FileNotFoundError, match="nothing"):
        put_once(tmp_path / "d", lambda folder: (tmp_path / "nothing").read_text())


def test_joining_asks_for_the_same_job(job, tmp_path):
    again = open_job(job.out, job.source, SETTINGS, {"model": "another name of it"})
    assert again.units == job.units
    with pytest.raises(ValueError, match="model_revision: abc -> xyz; precision: no -> bf16"):
        open_job(job.out, job.source, {"model_revision": "xyz", "precision": "bf16"}, {})
    other = find_source(str(tmp_path / "images"), "", "image", 3)
    with pytest.raises(ValueError, match="unit_rows: 2 -> 3"):
        open_job(job.out, other, SETTINGS, {})
    with pytest.raises(FileNotFoundError, match="holds no labelling job"):
        Job(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        open_job(tmp_path / "new", find_source(str(tmp_path / "empty"), "", "image", 3), SETTINGS, {})
    assert not [*(tmp_path / "new").glob("*")]


def test_units_are_offered_round_from_a_start(job):
    assert job.unfinished(2) == [2, 0, 1]
    finish(job, 0)
    assert job.unfinished(1) == [1, 2]


def test_end_gathers_the_skipped_and_tidies(job):
    for unit in (2, 0):
        finish(job, unit, skips=unit)
    assert job.finish() == 1
    assert not (job.out / "skipped.jsonl").exists()
    (job.out / "claims/unit-000000").mkdir()
    (job.out / "claims/.unit-000001.abc").mkdir()
    (job.out / ".job.abc").mkdir()
    (job.out / "partial/left by a killed worker").write_text("")
    finish(job, 1, skips=1)
    for _ in range(2):
        assert job.finish() == 0
        lines = [json.loads(line) for line in (job.out / "skipped.jsonl").read_text().splitlines()]
        assert [line["file"] for line in lines] == ["1-0", "2-0", "2-1"]
    assert not [*(job.out / "claims").iterdir(), *(job.out / "partial").iterdir(), *job.out.glob(".*")]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_rows_against_their_definitions(tmp_path_factory, seed, count):
    rng = np.random.default_rng(seed)
    views = rng.dirichlet(np.ones(8), (2, count)).astype(np.float32)
    out = tmp_path_factory.mktemp("job")
    picture(0, 0).save(out / "0.png")
    job = open_job(out / "out", find_source(str(out), "", "image", 1), SETTINGS, {})
    with job.writer(0) as writer:
        writer.add([face(i) for i in range(count)], views)
    table = job.read_labels(0)
    assert table.schema.equals(LABELS)
    mean = views.mean(axis=0)
    ordered = np.sort(mean, axis=1)
    assert (np.array(table["probabilities"].to_pylist(), np.float32) == mean).all()
    assert (table["raw_label"].to_numpy() == mean.argmax(axis=1)).all()
    assert (table["confidence"].to_numpy() == mean.max(axis=1)).all()
    assert np.allclose(table["margin"].to_numpy(), ordered[:, -1] - ordered[:, -2], atol=1e-7)
    overlap = np.minimum(views[0], views[1]).sum(axis=1)  # 1 less the total variation
    assert np.allclose(table["agreement"].to_numpy(), overlap, atol=1e-6)
    assert table["content_hash"].to_pylist() == [face(i).content_hash for i in range(count)]


def test_writer_refuses_nan_and_holds_few_rows(job, monkeypatch):
    with pytest.raises(ValueError, match="not finite"), job.writer(0) as writer:
        writer.add([face(0)], np.full((2, 1, 8), np.nan, np.float32))
    monkeypatch.setattr("modeling_fer.data.pseudo.ROWS_AT_ONCE", 4)
    with job.writer(0) as writer:
        for i in range(10):
            writer.add([face(i)], np.full((2, 1, 8), 0.125, np.float32))
            assert sum(batch.num_rows for batch in writer.waiting) < 4
    assert pq.read_metadata(job.labels_path(0)).num_row_groups == 3
    with job.writer(1):
        pass
    assert len(job.read_labels(1)) == 0, "all of a unit may be unreadable"
    job.labels_path(1).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"unit-000001\.parquet cannot be read .* delete it"):
        job.read_labels(1)


def test_names_without_valid_unicode_are_stored_escaped(job):
    name = os.fsdecode(b"caf\xe9.png")
    with job.writer(0) as writer:
        one = face(0)
        writer.add(
            [Face(0, name, one.content_hash, one.pixels, one.small, 1, 1, True)],
            np.full((2, 1, 8), 0.125, np.float32),
        )
        writer.skip(Skipped(name, "bad"))
    assert job.read_labels(0)["file"].to_pylist() == ["caf\\udce9.png"]


@pytest.mark.parametrize("options", [{"precision": "fp8"}, {"batch_size": -1}, {"unit_rows": 0}])
def test_wrong_options_are_told(options):
    with pytest.raises(ValueError, match=f"--{next(iter(options))} must be"):
        LabelOptions(model="m", images="i", **options)
