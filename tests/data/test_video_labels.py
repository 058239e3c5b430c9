import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_fer.data.schema import Rejected
from modeling_fer.data.splits import draw_split, split_folders
from modeling_fer.data.videos import crossing_recordings, list_frames, read_labels, recording
from modeling_fer.labels import CLASSES


def table(folder, *lines, name="labels.csv"):
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("video", "name"),
    [
        ("14-30-1920x1080", "14-30-1920x1080"),
        ("14-30-1920x1080_left", "14-30-1920x1080"),
        ("14-30-1920x1080_right", "14-30-1920x1080"),
        ("a_left_right", "a_left"),
        ("a_LEFT", "a_LEFT"),
        ("left", "left"),
        ("_left", "_left"),
        ("a_left.mp4", "a_left.mp4"),
    ],
)
def test_tracks_are_of_one_recording(video, name):
    assert recording(video) == name


def test_recordings_in_two_splits_are_told_where_one_is_held_out():
    (remark,) = crossing_recordings(
        {"a": "train", "b_left": "train", "a_left": "validation", "b_right": "train", "c": "test"}
    )
    assert "recordings with tracks in two splits: 1 " in remark.text
    assert "a in train, a_left in validation" in remark.text
    assert not list(crossing_recordings({"a": "train", "a_left": "unlabeled", "b_right": "test"}))


def test_images_are_listed_by_frame_number(tmp_path):
    names = ["00010.jpg", "frame_9.PNG", "x2_003.jpeg", "7.jpg", "0007.png", "notes.txt", "face.jpg",
             ".8.jpg", "9999999999.jpg", "0.jpg"]  # fmt: skip
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "11").mkdir()
    frames, rejected = list_frames(tmp_path, "clip")
    assert list(frames.items()) == [
        (0, "0.jpg"), (3, "x2_003.jpeg"), (7, "0007.png"), (9, "frame_9.PNG"), (10, "00010.jpg"),
    ]  # fmt: skip
    assert {item.origin: item.reason for item in rejected} == {
        "clip/7.jpg": "a second image of the frame",
        "clip/notes.txt": "not an image file",
        "clip/11": "not an image file",
        "clip/face.jpg": "no frame number in the name",
        "clip/9999999999.jpg": "no frame number in the name",
    }
    strict, rejected = list_frames(tmp_path, "clip", first=1, digits_only=True)
    assert list(strict) == [7, 10]
    assert {"clip/0.jpg", "clip/frame_9.PNG"} <= {item.origin for item in rejected}


def test_labels_of_frames_with_splits_and_subjects(tmp_path):
    labels = read_labels(
        table(
            tmp_path,
            "\ufeffvideo, frame,expression ,split,subject",
            "a,3,happy,train,p1",
            "b.mp4,1,Sadness,val,",
            "a,1,-1,,",
            "a,2,,,p1",
            "a,7,Others,Training,",
            "c,5,-1,,",
        ),
        endings=(".mp4",),
    )
    a, b, c = (labels[name] for name in "abc")
    assert [CLASSES[a.at(k)] if a.at(k) >= 0 else None for k in (1, 2, 3, 4, 7, 8)] == [
        None, None, "Happiness", None, "Other", None,
    ]  # fmt: skip
    assert (a.split, a.subject, b.split, b.subject, c.split) == ("train", "p1", "validation", None, None)
    assert not list(a.unmet())
    assert list(b.unmet()) == [Rejected("labels.csv row 2", "no image of the frame")]
    assert not c.classes


def test_labels_of_intervals_and_of_whole_videos(tmp_path):
    timed = table(tmp_path, "video,start,end,expression", "a,1.5,2,fear", "a,0,1.5,joy", "a,4,inf,sad")
    (a,) = read_labels(timed, seconds=True).values()
    times = (-0.1, 0, 1.49, 1.5, 1.99, 2, 3.9, 4, 1e9)
    assert [a.at(1, time) for time in times] == [-1, 4, 4, 3, 3, -1, -1, 5, 5]
    with pytest.raises(ValueError, match=r"labels intervals in seconds, .*: give a column frame"):
        read_labels(timed)
    whole = read_labels(table(tmp_path, "video,expression", "a,fear", "b,-1"))
    assert [whole["a"].at(frame) for frame in (0, 1, 10**6)] == [3, 3, 3]
    assert whole["b"].at(1) == -1


def test_contempt_is_no_label_or_other(tmp_path):
    path = table(tmp_path, "video,frame,expression", "a,1,contempt", "a,2,happy")
    labels = read_labels(path)["a"]
    assert (labels.at(1), labels.at(2), labels.contempt) == (-1, 4, 1)
    assert read_labels(path, contempt="other")["a"].at(1) == 7


@given(st.data())
def test_labels_equal_a_search_through_all_rows(tmp_path_factory, data):
    marks = data.draw(st.lists(st.integers(0, 60), min_size=2, max_size=24, unique=True).map(sorted))
    spans = list(zip(marks[::2], marks[1::2], strict=False))
    classes = data.draw(st.lists(st.integers(0, 7), min_size=len(spans), max_size=len(spans)))
    rows = data.draw(st.permutations(list(zip(spans, classes, strict=True))))
    lines = [f"v,{a / 4},{b / 4},{CLASSES[label]}" for (a, b), label in rows]
    path = table(tmp_path_factory.mktemp("labels"), "video,start,end,expression", *lines)
    labels = read_labels(path, seconds=True)["v"]
    asked = data.draw(st.lists(st.integers(-1, 62)))
    for place in asked:
        inside = [label for (a, b), label in rows if a <= place < b]
        assert labels.at(0, place / 4) == (inside[0] if inside else -1)
    unmet = [k for k, ((a, b), _) in enumerate(rows, 1) if not any(a <= place < b for place in asked)]
    assert sorted(item.origin for item in labels.unmet()) == sorted(f"labels.csv row {k}" for k in unmet)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["video,frame", "a,1"], r"labels.csv lacks the column expression, it has video, frame: name it"),
        (["frame,expression"], "lacks the column video"),
        ([""], "lacks the column video, it has none"),
        (["video,start,expression"], "lacks the column end"),
        (["video,frame,start,end,expression"], "label frames or intervals, not both"),
        (["video,frame,expression", "a,1,happy", "a,2,bored"], "row 2: unknown expression 'bored'; known"),
        (["video,frame,expression", "a,1,4"], r"row 1: unknown expression '4'.*Name the class"),
        (["video,frame,expression", "a,one,sad"], "row 1: frame 'one' is not a frame number"),
        (["video,frame,expression", "a,-2,sad"], "row 1: frame '-2' is not a frame number"),
        (["video,frame,expression", "a,2147483648,sad"], "is not a frame number"),
        (["video,frame,expression", "a,,sad"], "row 1: frame '' is not a frame number"),
        (["video,frame,expression", ",1,sad"], "row 1: no video: fill it in"),
        (["video,frame,expression", "a,1,sad", "b,1,sad", "a,1,happy"], "row 3 labels what row 1 labels"),
        (["video,expression", "a,sad", "a,sad"], "row 2 labels what row 1 labels already: keep one"),
        (["video,start,end,expression", "a,0,2,sad", "a,1.9,3,joy"], "row 2 labels what row 1 labels"),
        (["video,start,end,expression", "a,2,2,sad"], "row 1: the interval from 2.0 to 2.0 is empty"),
        (["video,start,end,expression", "a,nan,2,sad"], "row 1: the interval from nan to 2.0 is empty"),
        (["video,start,end,expression", "a,x,2,sad"], "row 1: start and end must be seconds"),
        (["video,expression,split", "a,sad,dev"], "row 1: unknown split 'dev', known: train"),
        (["video,frame,expression,split", "a,1,sad,train", "a,2,sad,test"], "row 2: split 'test', but"),
        (["video,frame,expression,subject", "a,1,sad,p", "a,2,sad,q"], "row 2: subject 'q', but"),
    ],
)  # fmt: skip
def test_bad_labels_are_named_by_file_and_row(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_labels(table(tmp_path, *lines), seconds=True)
    assert str(tmp_path / "labels.csv") in str(caught.value)


def test_a_csv_of_one_video_needs_no_column_for_it(tmp_path):
    labels = read_labels(table(tmp_path, "frame,expression", "3,fear"), video="clip")
    assert labels["clip"].at(3) == 3
    with pytest.raises(ValueError, match="lacks the column frame, it has expression"):
        read_labels(table(tmp_path, "expression", "fear"), video="clip")
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere.csv: give the path of the csv"):
        read_labels(tmp_path / "nowhere.csv")
    (tmp_path / "old.csv").write_bytes("video,expression\nä,happy\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"old.csv cannot be read .*UTF-8"):
        read_labels(tmp_path / "old.csv")


def test_drawn_splits_have_their_shares_and_stay():
    drawn = [draw_split(f"recording {k}", 0.2, 0.1, seed=0) for k in range(4000)]
    for split, share in (("validation", 0.2), ("test", 0.1), ("train", 0.7)):
        deviation = math.sqrt(share * (1 - share) / len(drawn))
        assert drawn.count(split) / len(drawn) == pytest.approx(share, abs=4 * deviation)
    assert drawn != [draw_split(f"recording {k}", 0.2, 0.1, seed=1) for k in range(4000)]
    assert {draw_split(f"{k}", 0, 0, 0) for k in range(100)} == {"train"}


def test_folders_of_splits(tmp_path):
    assert split_folders(tmp_path) == {}
    for name in ("Val", "train", ".git"):
        (tmp_path / name).mkdir()
    assert split_folders(tmp_path) == {tmp_path / "Val": "validation", tmp_path / "train": "train"}
    (tmp_path / "extra").mkdir()
    with pytest.raises(ValueError, match="extra: not a split, beside the splits Val, train"):
        split_folders(Path(tmp_path))
