import dataclasses
import io
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import HfArgumentParser

from modeling_fer.data import schema
from modeling_fer.data.prepare import prepare
from modeling_fer.data.schema import Example, Rejected, Remark
from modeling_fer.data.sources.frames import FramesOptions, examples
from modeling_fer.data.videos import recording
from modeling_fer.labels import CLASSES


def picture(shade):
    buffer = io.BytesIO()
    Image.new("L", (4, 4), shade % 256).save(buffer, "PNG")
    return buffer.getvalue()


def put(root, video, *names):
    (root / video).mkdir(parents=True, exist_ok=True)
    for shade, name in enumerate(names):
        (root / video / name).write_bytes(picture(shade))


def read(root, **options):
    return list(examples(FramesOptions(str(root), **options)))


def rows(items):
    return [
        (e.split, e.video, e.frame, CLASSES[e.expression] if e.expression >= 0 else None)
        for e in items
        if isinstance(e, Example)
    ]


def test_one_csv_for_all_videos(tmp_path):
    put(tmp_path / "clips", "a", "frame_2.png", "frame_10.png", "frame_11.png", "notes.txt", ".DS_Store")
    put(tmp_path / "clips", "b", "00001.png", "00002.png")
    put(tmp_path / "clips", "c", "1.png")
    put(tmp_path / "clips", "none")
    labels = tmp_path / "clips" / "labels.csv"
    labels.write_text(
        "video,frame,expression,split,subject\n"
        "b,1,angry,val,\na,10,happy,train,p1\na,2,-1,,\na,3,sad,,\nb,2,contempt,,\nghost,1,sad,,\nnone,4,sad,,\n"
    )
    items = read(tmp_path / "clips", labels=str(labels), name="mine")
    assert items == read(tmp_path / "clips", labels=str(labels), name="mine")
    assert rows(items) == [
        ("train", "a", 2, None), ("train", "a", 10, "Happiness"), ("train", "a", 11, None),
        ("validation", "b", 1, "Anger"), ("validation", "b", 2, None),
        ("unlabeled", "c", 1, None),
    ]  # fmt: skip
    first = next(item for item in items if isinstance(item, Example))
    assert dataclasses.asdict(first) == {
        "split": "train", "image": picture(0), "origin": "a/frame_2.png", "source": "mine", "expression": -1,
        "soft_label": None, "subject": "p1", "video": "a", "frame": 2,
    }  # fmt: skip
    assert [item for item in items if isinstance(item, Rejected)] == [
        Rejected("labels.csv: ghost", "no images of the video"),
        Rejected("a/notes.txt", "not an image file"),
        Rejected("labels.csv row 4", "no image of the frame"),
        Rejected("none", "no images of the video"),
    ]
    (remark,) = [item for item in items if isinstance(item, Remark)]
    assert remark.text.startswith("Rows of contempt, which is no class of ours: 1;")
    assert rows(read(tmp_path / "clips", labels=str(labels), contempt="other"))[4][-1] == "Other"


def test_a_csv_per_video_and_folders_of_splits(tmp_path):
    put(tmp_path, "train/a", "1.png", "2.png")
    put(tmp_path, "train/b", "1.png")
    put(tmp_path, "val/c", "7.png")
    put(tmp_path, "unlabeled/d", "1.png")
    (tmp_path / "train" / "a.csv").write_text("frame,expression\n2,surprised\n")
    (tmp_path / "val" / "c.csv").write_text("frame,expression,split\n7,fear,test\n")
    (tmp_path / "unlabeled" / "d.csv").write_text("frame,expression\n1,fear\n")
    (tmp_path / "train" / "lost.csv").write_text("frame,expression\n1,fear\n")
    (tmp_path / "readme.md").touch()
    items = read(tmp_path)
    assert rows(items) == [
        ("train", "a", 1, None), ("train", "a", 2, "Surprise"), ("train", "b", 1, None),
        ("unlabeled", "d", 1, None), ("validation", "c", 7, "Fear"),
    ]  # fmt: skip
    assert [item for item in items if isinstance(item, Rejected)] == [
        Rejected("readme.md", "not an image file"),
        Rejected("lost.csv: lost", "no images of the video"),
    ]


def test_one_row_may_label_a_whole_video(tmp_path):
    put(tmp_path, "a", "1.png", "5.png")
    (tmp_path / "all.csv").write_text("video,expression,split\na,joy,test\n")
    assert rows(read(tmp_path, labels=str(tmp_path / "all.csv"))) == [
        ("test", "a", 1, "Happiness"), ("test", "a", 5, "Happiness"),
    ]  # fmt: skip


def test_everything_unlabelled(tmp_path):
    put(tmp_path, "train/a", "1.png")
    put(tmp_path, "test/b", "1.png")
    (tmp_path / "train" / "a.csv").write_text("frame,expression\n1,no such\n")
    items = read(tmp_path, unlabeled=True, labels="nowhere.csv")
    assert rows(items) == [("unlabeled", "b", 1, None), ("unlabeled", "a", 1, None)]
    report = prepare(
        "frames", FramesOptions(str(tmp_path), unlabeled=True), tmp_path / "out", show_progress=False
    )
    assert report.counts["unlabeled"]["no label"] == 2


def test_a_damaged_image_costs_one_frame(tmp_path):
    put(tmp_path / "clips", "a", *(f"{k}.png" for k in range(1, 6)))
    (tmp_path / "clips/a/3.png").write_bytes(picture(2)[:20])
    (tmp_path / "clips/a/4.png").unlink()
    (tmp_path / "clips/a/4.png").symlink_to("nowhere.png")
    (tmp_path / "clips/a.csv").write_text(
        "frame,expression,split\n" + "".join(f"{k},sad,train\n" for k in range(1, 6))
    )
    options = FramesOptions(str(tmp_path / "clips"))
    report = prepare("frames", options, tmp_path / "out", show_progress=False)
    assert schema.load(tmp_path / "out")["train"]["frame"][:] == [1, 2, 5]
    assert report.unreadable_origins == ["a/3.png"]
    assert report.rejected == {"missing file": 1}


def test_drawn_splits_keep_subjects_and_recordings_together(tmp_path):
    lines = ["video,frame,expression,subject"]
    for k in range(120):
        for track in ("", "_left", "_right"):
            put(tmp_path, f"v{k}{track}", "1.png")
            subject = f"p{k // 6}" if k < 60 else ""
            lines.append(f"v{k}{track},1,{CLASSES[k % 8]},{subject}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    options = {"labels": str(tmp_path / "labels.csv"), "validation_fraction": 0.3, "test_fraction": 0.2}
    found = [item for item in read(tmp_path, **options) if isinstance(item, Example)]
    splits = {}
    for e in found:
        who = e.subject or recording(e.video)
        assert splits.setdefault(who, e.split) == e.split
    shares = Counter(splits[f"v{k}"] for k in range(60, 120))
    assert 60 * 0.5 - 16 < shares["train"] < 60 * 0.5 + 16  # four standard deviations
    assert set(shares) == {"train", "validation", "test"}
    assert [e.split for e in found] != [
        item.split for item in read(tmp_path, seed=1, **options) if isinstance(item, Example)
    ]


def test_tracks_in_two_given_splits_are_warned_of(tmp_path):
    put(tmp_path, "train/a_left", "1.png")
    put(tmp_path, "test/a_right", "1.png")
    (tmp_path / "train/a_left.csv").write_text("frame,expression\n1,sad\n")
    (remark,) = [item for item in read(tmp_path) if isinstance(item, Remark)]
    assert "recordings with tracks in two splits: 1 " in remark.text


@given(
    st.dictionaries(st.integers(0, 30), st.booleans(), min_size=1, max_size=12),
    st.dictionaries(st.integers(0, 30), st.sampled_from(["-1", "", "happy", "sad"]), min_size=1, max_size=12),
)
def test_every_image_comes_once_and_every_label_is_used_or_rejected(tmp_path_factory, images, labels):
    root = tmp_path_factory.mktemp("clips")
    put(root, "a", *(f"{'x' * long}{frame:05d}.png" for frame, long in images.items()))
    lines = [f"{frame},{label},train" for frame, label in labels.items()]
    (root / "a.csv").write_text("\n".join(["frame,expression,split", *lines]))
    items = read(root)
    found = {item.frame: item.expression for item in items if isinstance(item, Example)}
    names = {"happy": 4, "sad": 5}
    assert list(found) == sorted(images)
    assert found == {frame: names.get(labels.get(frame, ""), -1) for frame in images}
    lost = sum(label in names and frame not in images for frame, label in labels.items())
    assert sum(getattr(item, "reason", "") == "no image of the frame" for item in items) == lost


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a/1.png"], r"no labels; give them with --labels FILE.csv, .*<video>.csv, or .*--unlabeled"),
        (["a/1.png", "b.png"], r"b.png: an image outside a video's folder: put it into one"),
        (["train/1.png"], r"train/1.png: an image outside a video's folder"),
        (["train/a/1.png", "clips/b/1.png"], r"clips: not a split, beside the splits train"),
        (["train/a/1.png", "test/a/1.png"], r"train/a and .*test/a are one video in two splits"),
    ],
)
def test_layouts_that_cannot_be_read_are_named(tmp_path, files, message):
    for name in files:
        put((tmp_path / name).parent, "", name.split("/")[-1])
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_options_are_checked_and_can_be_flags(tmp_path):
    with pytest.raises(ValueError, match=r"must leave a rest for train, got 0.5 and 0.5"):
        FramesOptions("x", validation_fraction=0.5, test_fraction=0.5)
    with pytest.raises(ValueError, match="contempt must be one of drop, other"):
        FramesOptions("x", contempt="keep")
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere.csv"):
        read(tmp_path, labels=str(tmp_path / "nowhere.csv"))
    (parsed,) = HfArgumentParser(FramesOptions).parse_args_into_dataclasses(["--root", "x", "--labels", "y"])
    assert parsed == FramesOptions("x", "y")
