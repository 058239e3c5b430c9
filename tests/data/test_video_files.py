import io
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from transformers import HfArgumentParser

from modeling_fer.data import schema
from modeling_fer.data.prepare import prepare
from modeling_fer.data.schema import Example, Rejected, Remark
from modeling_fer.data.sources.videos import VideosOptions, examples
from modeling_fer.labels import CLASSES

av = pytest.importorskip("av")
WIDTH, HEIGHT = 48, 32


def shade(number):
    """Grey of frame `number`: far enough from the next one to survive two lossy codecs."""
    return 20 + 10 * (number % 22)


def film(path, frames, codec="mpeg4", rate=10):
    """Write a video whose frames are grey, each of its own shade, with a white left half in the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", 2_000_000
        for number in range(1, frames + 1):
            pixels = np.full((HEIGHT, WIDTH, 3), shade(number), np.uint8)
            if number == 1:
                pixels[:, : WIDTH // 2] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def read(root, **options):
    return list(examples(VideosOptions(str(root), **options)))


def found(items):
    return [item for item in items if isinstance(item, Example)]


def rejected(items):
    return [item for item in items if isinstance(item, Rejected)]


def pixels(example):
    image = Image.open(io.BytesIO(example.image))
    assert image.format == "JPEG"
    return np.asarray(image).astype(int)


def table(folder, text):
    path = folder / "labels.csv"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("ending", ["mp4", "avi", "mkv", "mov", "webm"])
def test_every_frame_of_every_container(tmp_path, ending):
    film(tmp_path / f"clip.{ending}", 25, "libvpx" if ending == "webm" else "mpeg4")
    items = read(tmp_path, labels=table(tmp_path, "video,expression,split,subject\nclip,happy,train,p1\n"))
    *items, remark = items
    assert remark.text.startswith("Frames a second, of 1 video: 10.")
    assert items == found(items)
    assert [e.frame for e in items] == list(range(1, 26))
    assert {(e.split, e.video, e.subject, e.expression) for e in items} == {("train", "clip", "p1", 4)}
    assert {e.source for e in items} == {tmp_path.name}
    for e in items:
        assert pixels(e).shape == (HEIGHT, WIDTH, 3)
        assert pixels(e)[:, WIDTH * 3 // 4 :].mean() == pytest.approx(shade(e.frame), abs=4)
    assert pixels(items[0])[:, : WIDTH // 4].mean() > 245
    assert items[2].origin == f"clip.{ending} frame 3"


def test_frames_intervals_and_whole_videos_have_labels(tmp_path):
    film(tmp_path / "deep" / "a.mp4", 12)  # ten frames a second
    by_frame = "video,frame,expression\ndeep/a,2,sad\ndeep/a.mp4,3,joy\ndeep/a,13,joy\nb,1,sad\n"
    items = read(tmp_path, labels=table(tmp_path, by_frame), validation_fraction=0, test_fraction=0)
    assert [e.expression for e in found(items)] == [-1, 5, 4, *[-1] * 9]
    assert {(e.video, e.split) for e in found(items)} == {("deep/a", "train")}
    assert rejected(items) == [
        Rejected("labels.csv: b", "no video of this name"),
        Rejected("labels.csv row 3", "no image of the frame"),
    ]
    timed = "video,start,end,expression\ndeep/a,0,0.3,sad\ndeep/a,0.5,0.8,fear\ndeep/a,1.2,9,joy\n"
    items = read(tmp_path, labels=table(tmp_path, timed))
    assert [e.expression for e in found(items)] == [5, 5, 5, -1, -1, 3, 3, 3, -1, -1, -1, -1]
    assert rejected(items) == [Rejected("labels.csv row 3", "no image of the frame")]


def test_the_frame_rates_are_told(tmp_path):
    """One for all is to be passed on; a model learns from frame numbers, so that mixed ones mislead it."""

    def rates(**options):
        (remark,) = [item for item in read(tmp_path, unlabeled=True, **options) if isinstance(item, Remark)]
        return remark.text

    film(tmp_path / "a.mp4", 13, rate=25)
    film(tmp_path / "b.mkv", 26, rate=25)
    film(tmp_path / "still.mp4", 1)  # says nothing
    once = "Frames a second, of 2 videos: 25. Train with --frame_rate 25 (30 is the default)."
    assert rates() == rates(frame_step=4) == once
    film(tmp_path / "c.mp4", 40, rate=Fraction(30_000, 1001))
    film(tmp_path / "d.mp4", 40, rate=30)
    mixed = rates()
    assert mixed.startswith("warning: frames a second differ: 25 (2 videos), 30 (2 videos); models learn ")
    assert "encode the videos again at one rate (ffmpeg -i IN -r 30 OUT)" in mixed


def test_only_some_frames(tmp_path):
    film(tmp_path / "a.mp4", 12)
    labels = table(
        tmp_path, "video,frame,expression,split\n" + "".join(f"a,{k},sad,test\n" for k in range(1, 13))
    )
    everything = found(read(tmp_path, labels=labels))
    items = found(read(tmp_path, labels=labels, frame_step=5))
    assert items == [everything[0], everything[5], everything[10]]


def test_splits_of_folders_of_the_csv_and_of_neither(tmp_path):
    for name in ("train/x/a.mp4", "val/b.mp4", "unlabelled/c.mp4"):
        film(tmp_path / "split" / name, 2)
    film(tmp_path / "split" / "d.mp4", 2)
    labels = table(tmp_path, "video,expression\nx/a,sad\nb,fear\nc,joy\n")
    items = read(tmp_path / "split", labels=labels)
    assert [(e.split, e.video, e.expression) for e in found(items)[::2]] == [
        ("train", "x/a", 5), ("unlabeled", "c", -1), ("validation", "b", 3),
    ]  # fmt: skip
    assert rejected(items) == [Rejected("d.mp4", "outside the folders of the splits")]

    film(tmp_path / "flat" / "a.mp4", 2)
    film(tmp_path / "flat" / "b_left.mp4", 2)
    film(tmp_path / "flat" / "b_right.mp4", 2)
    (tmp_path / "flat" / "notes.txt").touch()
    (tmp_path / "flat" / ".b.mp4").touch()
    labels = table(tmp_path, "video,expression,split\nb_left,sad,test\nb_right,sad,train\n")
    items = read(tmp_path / "flat", labels=labels)
    assert [(e.split, e.video) for e in found(items)[::2]] == [
        ("unlabeled", "a"), ("test", "b_left"), ("train", "b_right"),
    ]  # fmt: skip
    assert rejected(items) == [Rejected("notes.txt", "not a video file")]
    rates, remark = [item for item in items if isinstance(item, Remark)]
    assert rates.text.startswith("Frames a second, of 3 videos: 10.")
    assert "tracks in two splits: 1 " in remark.text
    assert {e.split for e in found(read(tmp_path / "flat", unlabeled=True))} == {"unlabeled"}


def test_damaged_videos_are_told_and_the_rest_goes_on(tmp_path):
    film(tmp_path / "a.mp4", 3)
    film(tmp_path / "z.mp4", 3)
    whole = film(tmp_path / "cut.mp4", 60).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "page.mkv").write_bytes(b"<html>" * 1000)
    damaged = bytearray(film(tmp_path / "damaged.avi", 60).read_bytes())
    rng = np.random.default_rng(0)
    damaged[len(damaged) // 3 : len(damaged) // 2] = rng.bytes(len(damaged) // 2 - len(damaged) // 3)
    (tmp_path / "damaged.avi").write_bytes(damaged)
    names = ("a", "cut", "damaged", "empty", "page", "z")
    labels = table(tmp_path, "video,expression,split\n" + "".join(f"{name},sad,train\n" for name in names))
    items = read(tmp_path, labels=labels)
    counts = {name: sum(e.video == name for e in found(items)) for name in names}
    assert (counts["a"], counts["z"], counts["cut"], counts["empty"], counts["page"]) == (3, 3, 0, 0, 0)
    assert 0 < counts["damaged"] < 60
    reasons = {}
    for item in rejected(items):
        reasons.setdefault(item.reason, []).append(item.origin)
    assert [origin.split(".")[0] for origin in reasons.pop("unreadable video")] == ["cut", "empty", "page"]
    (lost,) = reasons.pop("fewer frames than the file announces")
    assert lost == f"damaged.avi after frame {counts['damaged']} (60 announced)"
    assert not reasons
    report = prepare("videos", VideosOptions(str(tmp_path), labels), tmp_path / "out", show_progress=False)
    assert report.counts["train"]["Sadness"] == len(found(items))


def packets(path):
    """Where the data of every frame lies in a file: first byte and size."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def test_a_frame_that_is_damaged_is_told_by_its_number(tmp_path):
    whole = film(tmp_path / "a.avi", 30).read_bytes()
    start, size = packets(tmp_path / "a.avi")[19]
    outcomes = []
    for place in range(start + 8 + size // 2, start + 8 + size, 3):  # after the packet's name and size
        content = bytearray(whole)
        content[place] ^= 0xFF
        (tmp_path / "a.avi").write_bytes(content)
        items = read(tmp_path, unlabeled=True)
        outcomes.append((rejected(items), [e.frame for e in found(items)]))
    # Which bytes the decoder notices is its own affair.
    assert ([Rejected("a.avi frame 20", "unreadable")], [k for k in range(1, 31) if k != 20]) in outcomes


def test_what_comes_before_a_damage_is_kept(tmp_path):
    path = film(tmp_path / "a.avi", 30)
    content = bytearray(path.read_bytes())
    start, size = packets(path)[19]
    content[start + 8 : start + 8 + size] = np.random.default_rng(0).bytes(size)
    path.write_bytes(content)
    items = read(tmp_path, unlabeled=True)
    assert [e.frame for e in found(items)] == list(range(1, 20))
    (item,) = rejected(items)
    assert item.reason == "unreadable video"
    assert item.origin.startswith("a.avi after frame 19 (")


def test_a_video_filmed_on_its_side_is_turned_upright(tmp_path):
    path = film(tmp_path / "clip.mp4", 1)
    content = bytearray(path.read_bytes())
    # The track header's matrix, 40 bytes after its box's version: turn a quarter clockwise to show.
    place = content.index(b"tkhd") + 4 + 40
    turn = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
    content[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turn)
    path.write_bytes(content)
    (example,) = read(tmp_path, unlabeled=True)
    upright = pixels(example)
    assert upright.shape == (WIDTH, HEIGHT, 3)
    assert upright[: WIDTH // 4].mean() > 245  # what was on the left is at the top
    assert upright[WIDTH * 3 // 4 :].mean() < 100


def test_a_data_set_of_videos_can_be_prepared_and_loaded(tmp_path):
    lines = ["video,expression,split"]
    for k, split in enumerate(("train", "train", "validation")):
        film(tmp_path / "clips" / f"{k}.mp4", 4 + k)
        lines.append(f"{k},{CLASSES[k]},{split}")
    options = VideosOptions(str(tmp_path / "clips"), table(tmp_path, "\n".join(lines)))
    prepare("videos", options, tmp_path / "out", drop_duplicates=False, show_progress=False)
    data = schema.load(tmp_path / "out")
    assert data["train"]["video"][:] == ["0"] * 4 + ["1"] * 5
    assert data["train"]["frame"][:] == [1, 2, 3, 4, 1, 2, 3, 4, 5]
    assert data["validation"]["expression"][:] == [2] * 6


def test_without_pyav_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        ValueError, match=r'a.mp4: reading videos needs PyAV: pip install "abaw-fer\[video\]"'
    ):
        read(tmp_path, unlabeled=True)


def test_options_are_checked_and_can_be_flags(tmp_path):
    with pytest.raises(ValueError, match="frame_step must be at least 1, got 0"):
        VideosOptions("x", frame_step=0)
    with pytest.raises(ValueError, match="must leave a rest for train"):
        VideosOptions("x", test_fraction=1)
    with pytest.raises(ValueError, match=r"no labels; give them with --labels FILE.csv, or .*--unlabeled"):
        read(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"no folder .*nowhere: give the folder that holds the videos"
    ):
        read(tmp_path / "nowhere")
    for name in ("a.mp4", "a.avi"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"a.mp4 and .*a.avi are two videos of one name: rename one"):
        read(tmp_path, unlabeled=True)
    flags = ["--root", "x", "--labels", "y", "--frame_step", "3"]
    (parsed,) = HfArgumentParser(VideosOptions).parse_args_into_dataclasses(flags)
    assert parsed == VideosOptions("x", "y", frame_step=3)
