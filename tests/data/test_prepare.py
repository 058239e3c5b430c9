import errno
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image, ImageOps

from modeling_fer.data.prepare import prepare
from modeling_fer.data.report import Report, show
from modeling_fer.data.schema import FEATURES, Example, Rejected, Remark
from modeling_fer.data.sources import SOURCES, Source
from modeling_fer.data.sources.folder import FolderOptions
from modeling_fer.labels import CLASSES

HAPPY, SAD = CLASSES.index("Happiness"), CLASSES.index("Sadness")


def picture(seed, size=(6, 5), kind="PNG"):
    """A small image of noise, the same for the same seed whatever the format; seed None is blank."""
    pixels = np.full(size, 7) if seed is None else np.random.default_rng(seed).integers(0, 256, size)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format=kind)
    return buffer.getvalue()


def example(split, expression, seed, **fields):
    origin = f"{split} {expression} {seed}"
    return Example(split, picture(seed), origin, "made", expression, **fields)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Prepare a list of items, given as the rows of a source of its own."""

    def prepare_items(items, out="out", **options):
        monkeypatch.setitem(SOURCES, "made", Source(FolderOptions, lambda _: iter(items)))
        unlabeled = options.pop("unlabeled", False)
        return prepare("made", FolderOptions("x", unlabeled), tmp_path / out, show_progress=False, **options)

    return prepare_items


def rows(folder, split):
    tables = [pq.read_table(path) for path in sorted(Path(folder).glob(f"data/{split}-*.parquet"))]
    return [row for table in tables for row in table.to_pylist()]


# Letters are images. Train: A three times with one label; B with two labels; C is in validation too, twice.
MIXED = [
    example("train", HAPPY, 1), example("train", HAPPY, 1), example("train", HAPPY, 1),  # A
    example("train", HAPPY, 2), example("train", SAD, 2), example("train", SAD, 2),  # B
    example("train", SAD, 3), example("train", SAD, 3),  # C
    example("train", SAD, 4),
    example("train", SAD, None),
    example("validation", SAD, 3), example("validation", HAPPY, 5), example("validation", SAD, 5),
    example("unlabeled", -1, 3), example("unlabeled", -1, 4), example("unlabeled", -1, 6),
    example("unlabeled", -1, 6),
]  # fmt: skip


def test_what_was_given_is_what_is_written(run, tmp_path):
    items = [
        example("train", HAPPY, 1, soft_label=(0, 0, 0, 0, 0.75, 0.25, 0, 0), subject="p1"),
        example("train", SAD, 2, video="clip", frame=12),
        example("test", SAD, 3),
    ]
    report = run(items)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "data", "report.json", "samples.png", "skipped.jsonl",
    ]  # fmt: skip
    assert sorted(path.name for path in (out / "data").iterdir()) == [
        "test-00000-of-00001.parquet", "train-00000-of-00001.parquet",
    ]  # fmt: skip
    data = load_dataset(str(out), cache_dir=str(tmp_path / "hf"))  # the card at its head says what is where
    assert set(data) == {"train", "test"}
    assert data["train"].features == data["test"].features == FEATURES
    assert data["train"][0]["soft_label"] == [0, 0, 0, 0, 0.75, 0.25, 0, 0]
    assert [row["subject"] for row in data["train"]] == ["p1", None]
    assert [(row["video"], row["frame"]) for row in data["train"]] == [(None, None), ("clip", 12)]
    assert rows(out, "train")[1]["image"] == {"bytes": items[1].image, "path": None}
    assert rows(out, "train")[1]["soft_label"] is None
    assert report.counts["train"] == {name: 1 if name in ("Happiness", "Sadness") else 0
                                      for name in (*CLASSES, "no label")}  # fmt: skip


def test_repeats_conflicts_and_blanks_are_counted(run, tmp_path):
    report = run(MIXED)
    assert report.repeats == {
        "train": {"train": 5, "validation": 2, "unlabeled": 3},
        "validation": {"train": 1, "validation": 1, "unlabeled": 1},
        "unlabeled": {"train": 2, "validation": 1, "unlabeled": 1},
    }
    assert report.conflicts == {
        "train": 1, "validation": 1, "unlabeled": 0, "all splits together": 2,
    }  # fmt: skip
    assert report.blank == {"train": 1, "validation": 0, "unlabeled": 0}
    assert report.dropped == {}
    assert "2 train rows are images of validation too: --drop-duplicates removes them" in report.warnings
    assert "1 unlabeled rows are images of validation too: --drop-duplicates removes them" in report.warnings
    assert "blank images in train: 1" in report.warnings
    assert len(rows(tmp_path / "out", "train")) == 10


def test_images_are_compared_by_their_pixels_and_shape(run):
    flat = np.arange(12, dtype=np.uint8)
    images = []
    for shape, kind in (((3, 4), "PNG"), ((3, 4), "BMP"), ((4, 3), "PNG")):
        buffer = io.BytesIO()
        Image.fromarray(flat.reshape(shape)).save(buffer, format=kind)
        images.append(Example("train", buffer.getvalue(), kind, "made", HAPPY))
    assert run(images).repeats == {"train": {"train": 1}}


def test_drop_duplicates(run, tmp_path):
    report = run(MIXED, drop_duplicates=True)
    kept = {split: [(row["expression"], row["image"]["bytes"]) for row in rows(tmp_path / "out", split)]
            for split in ("train", "validation", "unlabeled")}  # fmt: skip
    assert kept == {
        "train": [(HAPPY, picture(1)), (SAD, picture(4)), (SAD, picture(None))],
        "validation": [
            (SAD, picture(3)),
            (HAPPY, picture(5)),
            (SAD, picture(5)),
        ],  # held-out data stays as it is
        "unlabeled": [(-1, picture(4)), (-1, picture(6))],
    }
    assert report.dropped == {
        "train: identical images with conflicting labels": 3,
        "train: a copy of an image before it": 2,
        "train: the image is also in validation or test": 2,
        "unlabeled: the image is also in validation or test": 1,
        "unlabeled: a copy of an image before it": 1,
    }
    assert report.repeats["train"] == {"train": 0, "validation": 0, "unlabeled": 1}
    skipped = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    assert len(skipped) == 9
    assert "dropped as duplicates: 9" in show(tmp_path / "out")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ([1, 3], "train 5 3 changed between two readings of made"),
        ([1, 2, 3], "train 5 3 changed between two readings of made"),
        ([1], "made gave fewer rows when read again"),
    ],
)
def test_a_source_that_changes_between_the_passes_is_found(tmp_path, monkeypatch, second, message):
    readings = iter([[1, 2], second])
    source = Source(FolderOptions, lambda _: (example("train", SAD, seed) for seed in next(readings)))
    monkeypatch.setitem(SOURCES, "made", source)
    with pytest.raises(ValueError, match=message):
        prepare("made", FolderOptions("x"), tmp_path / "out", drop_duplicates=True, show_progress=False)
    assert os.listdir(tmp_path) == []


def test_unreadable_and_rejected_rows_are_listed_and_skipped(run, tmp_path):
    whole = picture(9, (40, 40))
    items = [
        example("train", HAPPY, 1),
        Example("train", whole[: len(whole) // 2], "cut.png", "made", SAD),
        Example("train", b"<html>", "page.png", "made", SAD),
        Example("train", b"", "empty.png", "made", SAD),
        Rejected("gone.png", "unreadable"),
        Rejected("row 8", "no majority"),
        Rejected("row 9", "no majority"),
        Remark("Eight rows; kept by the rule: six."),
    ]
    report = run(items)
    assert len(rows(tmp_path / "out", "train")) == 1
    assert report.unreadable == 4
    assert report.unreadable_origins == ["cut.png", "page.png", "empty.png", "gone.png"]
    assert report.rejected == {"no majority": 2}
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert skipped[0] == {"origin": "cut.png", "reason": "unreadable"}
    assert [entry["reason"] for entry in skipped] == ["unreadable"] * 4 + ["no majority"] * 2
    text = show(tmp_path / "out")
    for part in ("unreadable: 4", "  cut.png", "  2 no majority", "Eight rows; kept by the rule: six."):
        assert part in text


def test_an_error_inside_pil_costs_one_image(run, monkeypatch):
    upright = ImageOps.exif_transpose

    def fail(image):
        if image.size == (9, 3):
            raise struct.error("unpack requires a buffer of 4 bytes")
        return upright(image)

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    bad = Example("train", picture(5, (3, 9)), "bad.png", "made", SAD)
    report = run([example("train", HAPPY, 1), bad, example("train", SAD, 2)])
    assert report.unreadable_origins == ["bad.png"]
    assert report.counts["train"]["Sadness"] == 1


def test_subjects_in_two_splits_and_empty_classes_are_warned_of(run):
    people = [
        ("train", HAPPY, "p1"),
        ("train", HAPPY, "p2"),
        ("validation", SAD, "p1"),
        ("unlabeled", -1, "p2"),
    ]
    report = run([example(split, label, n, subject=who) for n, (split, label, who) in enumerate(people)])
    assert report.crossing_subjects == {"train/validation": 1, "train/unlabeled": 1}
    assert "subjects in both train and validation: 1; scores there flatter the model" in report.warnings
    assert not any("unlabeled" in warning for warning in report.warnings)
    assert any(warning.startswith("train has no example of Neutral, Anger") for warning in report.warnings)


def test_the_report_is_written_for_programs_people_and_the_hub(run, tmp_path):
    report = run([Example("train", picture(n, (3 + n, 9)), "", "made", HAPPY) for n in range(3)])
    assert report.sizes == {"width": [9, 9], "height": [3, 5]}
    assert Report.read(tmp_path / "out/report.json") == report
    assert report.text() == show(tmp_path / "out")
    assert report.card() == (tmp_path / "out/README.md").read_text()
    first = (tmp_path / "out/samples.png").read_bytes()
    run([Example("train", picture(n, (3 + n, 9)), "", "made", HAPPY) for n in range(3)], overwrite=True)
    assert (tmp_path / "out/samples.png").read_bytes() == first


def test_options_are_published_without_folders(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "made", Source(FolderOptions, lambda _: iter([example("train", SAD, 1)])))
    report = prepare("made", FolderOptions(f"{tmp_path}/my faces"), tmp_path / "out", show_progress=False)
    assert report.options["root"] == "my faces"
    written = [path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".md", ".json")]
    assert not any(str(tmp_path) in text for text in written)


def test_existing_folders_are_kept_unless_told(run, tmp_path):
    run([example("train", HAPPY, 1)])
    with pytest.raises(
        FileExistsError, match=r"out exists: choose another name, or replace it with --overwrite"
    ):
        run([example("train", SAD, 2)])
    assert rows(tmp_path / "out", "train")[0]["expression"] == HAPPY
    run([example("train", SAD, 2)], overwrite=True)
    assert rows(tmp_path / "out", "train")[0]["expression"] == SAD
    assert os.listdir(tmp_path) == ["out"]

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").touch()
    with pytest.raises(FileExistsError, match="thesis exists and is no prepared folder"):
        run([example("train", SAD, 2)], out="thesis", overwrite=True)
    assert os.listdir(tmp_path / "thesis") == ["chapter.txt"]


def interrupted(kind):
    yield from (example("train", HAPPY, n) for n in range(5))
    raise kind


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError, MemoryError])
def test_an_interrupted_run_leaves_nothing_and_keeps_what_was_there(run, tmp_path, kind):
    with pytest.raises(kind):
        run(interrupted(kind))
    assert os.listdir(tmp_path) == []
    run([example("train", SAD, 2)])
    with pytest.raises(kind):
        run(interrupted(kind), overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert rows(tmp_path / "out", "train")[0]["expression"] == SAD


@pytest.fixture
def dead():
    """Return the id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_runs_left_is_removed_and_what_others_write_stays(run, tmp_path, dead):
    run([example("train", HAPPY, 1)], "o.t")
    stale = {f".o.t.{state}-{pid}" for state in ("partial", "old") for pid in (dead, os.getpid())}
    others = {f".{name}-{dead}" for name in ("out.partial", "o.t.x.partial", "o.t", "o.t.older")}
    others |= {f".o.t.partial-{os.getppid()}", f".o.t.old-{os.getppid()}", ".o.t.partial-notes"}
    for name in stale | others:
        (tmp_path / name / "data").mkdir(parents=True)
    run([example("train", SAD, 1)], "o.t", overwrite=True)
    assert set(os.listdir(tmp_path)) == {"o.t", *others}
    assert rows(tmp_path / "o.t", "train")[0]["expression"] == SAD


def test_a_run_killed_while_it_replaced_a_folder_loses_nothing(run, tmp_path, dead):
    run([example("train", HAPPY, 1)])
    (tmp_path / "out").rename(tmp_path / f".out.old-{dead}")
    (tmp_path / f".out.partial-{dead}").mkdir()
    with pytest.raises(FileExistsError, match="replace it with --overwrite"):
        run([example("train", SAD, 2)])
    assert os.listdir(tmp_path) == ["out"]
    assert rows(tmp_path / "out", "train")[0]["expression"] == HAPPY


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(run, tmp_path, monkeypatch):
    run([example("train", HAPPY, 1)])
    rename = Path.rename

    def fail(path, target):
        if path.name.startswith(".out.partial-"):
            raise PermissionError(errno.EACCES, "no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError):
        run([example("train", SAD, 2)], overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert rows(tmp_path / "out", "train")[0]["expression"] == HAPPY


def test_a_full_disk_is_said_plainly(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match=r"disk full while writing .*out: free space or choose another folder"):
        run([example("train", SAD, 2)])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("drop_duplicates", [False, True])
def test_nothing_to_train_on_is_an_error(run, tmp_path, drop_duplicates):
    with pytest.raises(ValueError, match=r"made gave no rows \(1 rejected, 0 unreadable\): check its paths"):
        run([Rejected("row 1", "no majority")], drop_duplicates=drop_duplicates)
    with pytest.raises(ValueError, match=r"made gave no labelled training rows .*--unlabeled"):
        run([example("unlabeled", -1, 1), example("validation", SAD, 2)], drop_duplicates=drop_duplicates)
    assert os.listdir(tmp_path) == []
    assert run([example("unlabeled", -1, 1)], "faces", unlabeled=True).counts["unlabeled"]["no label"] == 1
    assert set(run([example("test", SAD, 1)], "benchmark").counts) == {"test"}  # a set to evaluate on


def test_unknown_names_are_named(run, tmp_path):
    with pytest.raises(ValueError, match="unknown source 'fer2014', known: fer2013, folder, synthetic"):
        prepare("fer2014", None, tmp_path / "out")
    with pytest.raises(ValueError, match=r"dev 4 1: unknown split 'dev', known: train"):
        run([example("dev", HAPPY, 1)])
    with pytest.raises(ValueError, match=r"train 8 1: expression 8 is not a class id"):
        run([example("train", 8, 1)])
