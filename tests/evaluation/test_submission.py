import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_fer.evaluation.submission import (
    EDITIONS,
    FILE_HEADER,
    FOLDER_HEADER,
    check,
    make,
    read_template,
)
from modeling_fer.labels import CLASSES

HEADER = "image_location,Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other"
VIDEOS = {"14-30-1920x1080": 4, "video59_left": 3, "video59_right": 1}


def template_text(videos=None, end=","):
    rows = [f"{video}/{i:05d}.jpg{end}" for video, n in (videos or VIDEOS).items() for i in range(1, n + 1)]
    return "\n".join([HEADER, *rows, ""])


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "template.txt"
    path.write_text(template_text())
    return read_template(path)


def predictions():
    return {
        "14-30-1920x1080": (np.array([4, 1]), np.array([7, 2])),
        "video59_left": (np.array([1, 2, 3]), np.eye(8)[[4, 5, 6]]),
        "video59_right": ([1], [3]),
    }


def test_the_headers_are_those_of_the_competition():
    assert HEADER == FILE_HEADER
    assert FOLDER_HEADER == "Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other"


def test_a_template_keeps_its_order_and_its_texts(tmp_path):
    path = tmp_path / "template.txt"
    path.write_bytes(
        "\ufeffimage_location,,\r\n\r\nb_right/00002.jpg,,,,\r\na/000123.JPG\r\n\r\nb_right/00001.jpg,\r\na/00007.png".encode()
    )
    template = read_template(path)
    assert list(template) == [
        ("b_right", 2, "b_right/00002.jpg"),
        ("a", 123, "a/000123.JPG"),
        ("b_right", 1, "b_right/00001.jpg"),
        ("a", 7, "a/00007.png"),
    ]
    assert len(template) == 4
    assert [(video, rows.tolist()) for video, rows in template.rows_by_video()] == [
        ("b_right", [2, 0]),
        ("a", [3, 1]),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "template.txt: no frame is listed"),
        (HEADER.encode(), "template.txt: no frame is listed"),
        (
            b"\nvalence,arousal\n",
            "line 2: expected the header 'image_location,Neutral,.*got 'valence,arousal'",
        ),
        (b"a/00001.jpg,\n", "line 1: expected the header"),
        (f"{HEADER}\n\na/00001.jpg,3\n".encode(), "line 3: expected <video>/<frame number>.jpg and nothing"),
        (f"{HEADER}\na/b/00001.jpg\n".encode(), "line 2: expected <video>"),
        (f"{HEADER}\na/x1.jpg\n".encode(), "line 2: expected <video>"),
        (f"{HEADER}\n00001.jpg\n".encode(), "line 2: expected <video>"),
        (f"{HEADER}\na/00001.txt\n".encode(), "line 2: expected <video>"),
        (f"{HEADER}\na/1.jpg\n".encode() + b"\xff/2.jpg\n", "line 3: not UTF-8 .*; convert the file"),
        (
            f"{HEADER}\na/00001.jpg\n\nb/00001.jpg\na/00001.jpg,\n".encode(),
            "line 5: a/00001.jpg is on line 2 already",
        ),
        (f"{HEADER}\na/1.jpg\na/00001.jpg\n".encode(), "line 3: a/00001.jpg is on line 2 already"),
    ],
)
def test_a_damaged_template_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "template.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message.removeprefix('template.txt')}"):
        read_template(path)


@pytest.mark.parametrize("edition", [6, 8])
def test_a_submission_as_the_organisers_want_it(template, tmp_path, edition):
    out = tmp_path / "new" / "predictions.txt"
    report = make(template, predictions(), out, edition)
    # Frame 2 is nearer to 1, frame 3 to 4.
    assert out.read_bytes().decode() == (
        f"{HEADER}\n"
        "14-30-1920x1080/00001.jpg,2\n14-30-1920x1080/00002.jpg,2\n"
        "14-30-1920x1080/00003.jpg,7\n14-30-1920x1080/00004.jpg,7\n"
        "video59_left/00001.jpg,4\nvideo59_left/00002.jpg,5\nvideo59_left/00003.jpg,6\n"
        "video59_right/00001.jpg,3\n"
    )
    assert report == {
        "edition": edition,
        "fill": "nearest",
        "rows": 8,
        "videos": 3,
        "predicted": 6,
        "filled": 2,
        "unknown_videos": [],
        "videos_without_frames": [],
        "unused_videos": [],
        "unused_frames": 0,
        "classes": dict(zip(CLASSES, [0, 0, 2, 1, 1, 1, 1, 2], strict=True)),
    }
    assert check(out, template, edition) == []


def test_edition_3_has_a_file_for_each_video(template, tmp_path):
    out = tmp_path / "predictions"
    make(template, predictions(), out, 3, fill="Surprise")
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "14-30-1920x1080.txt": f"{FOLDER_HEADER}\n2\n6\n6\n7\n",
        "video59_left.txt": f"{FOLDER_HEADER}\n4\n5\n6\n",
        "video59_right.txt": f"{FOLDER_HEADER}\n3\n",
    }
    assert check(out, template, 3) == []


def test_of_two_nearest_frames_the_earlier_counts(tmp_path):
    path = tmp_path / "template.txt"
    path.write_text(template_text({"a": 9}))
    out = tmp_path / "out.txt"
    report = make(read_template(path), {"a": ([7, 3, 20], [1, 2, 5])}, out, 8)
    classes = [line[-1] for line in out.read_text().splitlines()[1:]]
    assert "".join(classes) == "222221111"  # 5 lies between 3 and 7
    assert report["unused_frames"] == 1  # frame 20
    assert (report["predicted"], report["filled"]) == (2, 7)


@pytest.mark.parametrize(("fill", "filled"), [("nearest", 0), ("Other", 7), ("Neutral", 0)])
def test_videos_that_are_not_predicted_are_told(template, tmp_path, fill, filled):
    out = tmp_path / "out.txt"
    given = {"video59_left": ([], []), "stranger": ([1], [1]), "video59_right": ([1], [3])}
    report = make(template, given, out, 6, fill=fill)
    assert report["unknown_videos"] == ["14-30-1920x1080"]
    assert report["videos_without_frames"] == ["video59_left"]
    assert report["unused_videos"] == ["stranger"]
    assert [int(line[-1]) for line in out.read_text().splitlines()[1:]] == [filled] * 7 + [3]
    assert json.loads(json.dumps(report)) == report


@st.composite
def tasks(draw):
    """Frames of a template in any order, predictions of some of them and of others, and a fill rule."""
    counts = draw(
        st.dictionaries(st.from_regex(r"[\w.-]{1,8}", fullmatch=True), st.integers(1, 12), min_size=1)
    )
    rng = np.random.default_rng([51, draw(st.integers(0, 10**6))])
    rows = [f"{video}/{i:05d}.jpg" for video, n in counts.items() for i in range(1, n + 1)]
    given = {}
    for video, n in counts.items():
        frames = np.flatnonzero(rng.random(n + 3) < rng.choice([0, 0.3, 1])) + 1
        if rng.random() < 0.8:
            soft = rng.dirichlet(np.ones(8), len(frames))
            given[video] = (rng.permutation(frames), soft if rng.random() < 0.5 else soft.argmax(1))
    return rng.permutation(rows).tolist(), given, draw(st.sampled_from(["nearest", *CLASSES]))


@settings(max_examples=60, deadline=None)
@given(task=tasks(), edition=st.sampled_from(sorted(EDITIONS)))
def test_what_is_made_is_always_found_clean_and_says_what_was_predicted(task, edition, tmp_path_factory):
    rows, given_, fill = task
    folder = tmp_path_factory.mktemp("made")
    path, out = folder / "template.txt", folder / "out"
    path.write_bytes("\n".join([HEADER, *rows]).encode())
    template = read_template(path)
    report = make(template, given_, out, edition, fill)
    assert check(out, template, edition) == []
    if edition == 3:
        written = {
            (p.name.removesuffix(".txt"), i): int(text)
            for p in out.iterdir()
            for i, text in enumerate(p.read_text().splitlines()[1:], 1)
        }
    else:
        pairs = [line.split(",") for line in out.read_bytes().decode().splitlines()[1:]]
        assert [location for location, _ in pairs] == rows
        written = {(t.split("/")[0], int(t.split("/")[1][:-4])): int(called) for t, called in pairs}
    assert len(written) == len(rows) == report["rows"] == sum(report["classes"].values())
    constant = None if fill == "nearest" else CLASSES.index(fill)
    for (video, frame), called in written.items():
        frames, values = given_.get(video, ((), ()))
        own = {int(f): int(v.argmax()) if np.ndim(v) else int(v) for f, v in zip(frames, values, strict=True)}
        if frame not in own and constant is not None:
            assert called == constant
        elif own:
            assert called == own[min(own, key=lambda f: (abs(f - frame), f))]
        else:
            assert called == 0
    shutil.rmtree(folder)


def row(n, text):
    """Damage: put other text in the place of line n."""
    return lambda lines: [*lines[: n - 1], *text, *lines[n:]]


FIRST, SECOND = "14-30-1920x1080/00001.jpg", "14-30-1920x1080/00002.jpg"
DAMAGES = {
    "other class order": (row(1, [HEADER.replace("Anger,Disgust", "Disgust,Anger")]), "line 1: the header"),
    "header of another edition": (row(1, [FOLDER_HEADER]), "line 1: the header is"),
    "no header": (row(1, []), "line 1: the header is .*00001.jpg,2'; write 'image_location"),
    "missing row": (row(3, []), f"line 3: {SECOND} should be here and is missing; add it"),
    "missing last row": (row(9, []), "line 9: video59_right/00001.jpg should be here and is missing"),
    "extra row": (row(5, ["14-30-1920x1080/00004.jpg,7", "video59_left/9.jpg,7"]), "line 6: .*an extra row"),
    "duplicate row": (row(3, [f"{FIRST},2", f"{SECOND},2"]), f"line 3: {FIRST} comes a second time"),
    "rows swapped": (
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
        f"line 3: {FIRST} is out of order; keep to the order of .*template.txt",
    ),
    "last row first": (
        lambda lines: [lines[0], lines[-1], *lines[1:-1]],
        f"line 3: {FIRST} is out of order",
    ),
    "class 8": (row(2, [f"{FIRST},8"]), "line 2: class 8 is out of range"),
    "class -2": (row(2, [f"{FIRST},-2"]), "line 2: class -2 is out of range"),
    "class 07": (row(2, [f"{FIRST},07"]), "line 2: class 07 is out of range or has leading zeros"),
    "class 1.0": (row(2, [f"{FIRST},1.0"]), "line 2: class '1.0' is not a whole number; write 0 to 7"),
    "class by name": (row(2, [f"{FIRST},Anger"]), "line 2: class 'Anger' is not a whole number"),
    "class after a blank": (row(2, [f"{FIRST}, 1"]), "line 2: class ' 1' is not a whole number"),
    "foreign digit": (row(2, [f"{FIRST},\u0663"]), "line 2: class .* is not a whole number"),
    "no class": (row(2, [f"{FIRST},"]), "line 2: class '' is not a whole number"),
    "-1 left in": (row(2, [f"{FIRST},-1"]), "line 2: class -1 stands for no label; .* fill it"),
    "blank line": (row(3, [f"{SECOND},2", ""]), "line 4: the line is blank"),
    "one column": (row(2, [FIRST]), "line 2: expected 2 columns, got 1; write <video>/"),
    "three columns": (row(2, [f"{FIRST},2,"]), "line 2: expected 2 columns, got 3"),
    "unknown video": (row(9, ["video60/00001.jpg,3"]), "line 9: video 'video60' is not in the template"),
    "other padding": (row(9, ["video59_right/0001.jpg,3"]), "line 9: .*0001.jpg' is spelled otherwise"),
    "other ending": (row(9, ["video59_right/00001.png,3"]), "line 9: .* is spelled otherwise"),
    "no location": (row(9, ["video59_right,3"]), "line 9: 'video59_right' is no location"),
}  # fmt: skip
# What these leave out is told as well: the template's own row is missing.
MISSING_TOO = {"no header", "unknown video", "other padding", "other ending", "no location"}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_to_the_rows_is_found_and_told_with_its_line(template, tmp_path, name):
    out = tmp_path / "out.txt"
    make(template, predictions(), out, 8)
    damage, message = DAMAGES[name]
    out.write_text("\n".join([*damage(out.read_text().splitlines()), ""]))
    faults = check(out, template, 8)
    assert re.match(f"{re.escape(str(out))}: {message}", faults[0])
    assert [("is missing" in fault) for fault in faults[1:]] == [True] * (name in MISSING_TOO)
    assert all(";" in fault for fault in faults)  # what to do about it


BYTE_DAMAGES = {
    "empty file": (lambda content: b"", "line 1: the file is empty; write it again"),
    "byte order mark": (lambda content: b"\xef\xbb\xbf" + content, "line 1: begins with a byte order mark"),
    "CRLF": (lambda content: content.replace(b"\n", b"\r\n"), "line 1: ends in CRLF"),
    "one CRLF": (lambda content: content.replace(b"2\n", b"2\r\n", 1), "line 2: ends in CRLF"),
    "not UTF-8": (lambda content: content.replace(b"7\n", b"\xff\n"), "line 4: is not UTF-8"),
    "no line end": (lambda content: content[:-1], "line 9: has no line end: the file may be cut off"),
}


@pytest.mark.parametrize("name", BYTE_DAMAGES)
@pytest.mark.parametrize("edition", [3, 8])
def test_each_damage_to_the_bytes_is_found_once(tmp_path, name, edition):
    path = tmp_path / "template.txt"
    path.write_text(template_text({"a": 8}))
    template = read_template(path)
    out = tmp_path / "out"
    make(template, {"a": (np.arange(1, 9), [2, 2, 7, 7, 1, 1, 1, 1])}, out, edition)
    file = out / "a.txt" if edition == 3 else out
    damage, message = BYTE_DAMAGES[name]
    file.write_bytes(damage(file.read_bytes()))
    faults = check(out, template, edition)
    assert faults[0].startswith(f"{file}: {message}")
    assert sum(message in fault for fault in faults) == 1


def test_a_file_that_was_cut_off_within_a_row(template, tmp_path):
    out = tmp_path / "out.txt"
    make(template, predictions(), out, 8)
    out.write_bytes(out.read_bytes()[:-29])  # the last row, and the one before from its comma on
    faults = check(out, template, 8)
    assert faults == [
        f"{out}: line 8: has no line end: the file may be cut off; write it again",
        f"{out}: line 8: expected 2 columns, got 1; write <video>/<frame number>.jpg,<class>",
        f"{out}: line 9: video59_right/00001.jpg should be here and is missing; add it",
    ]


FOLDER_DAMAGES = {
    "header of another edition": (row(1, [HEADER]), "line 1: the header is"),
    "missing line": (row(5, []), "line 5: the class of frame 4 is missing; add it"),
    "extra line": (row(5, ["7", "7"]), "line 6: an extra line, the template has 4 frames"),
    "blank line": (row(5, [""]), "line 5: the line is blank"),
    "out of range": (row(3, ["8"]), "line 3: class 8 is out of range"),
    "not an integer": (row(3, ["x"]), "line 3: class 'x' is not a whole number"),
    "two columns": (row(3, ["3,"]), "line 3: class '3,' is not a whole number"),
    "-1 left in": (row(3, ["-1"]), "line 3: class -1 stands for no label"),
}


@pytest.mark.parametrize("name", FOLDER_DAMAGES)
def test_each_damage_to_a_file_of_edition_3_is_found(template, tmp_path, name):
    out = tmp_path / "out"
    make(template, predictions(), out, 3)
    damage, message = FOLDER_DAMAGES[name]
    file = out / "14-30-1920x1080.txt"
    file.write_text("\n".join([*damage(file.read_text().splitlines()), ""]))
    (fault,) = check(out, template, 3)
    assert fault.startswith(f"{file}: {message}")


def test_files_missing_and_files_too_many_are_found(template, tmp_path):
    out = tmp_path / "out"
    assert check(out, template, 3) == [f"{out}: no such folder; write the submission first"]
    assert check(out, template, 8) == [f"{out}: no such file; write the submission first"]
    make(template, predictions(), out, 3)
    (out / "video59_left.txt").rename(out / "video60.txt")
    assert check(out, template, 3) == [
        f"{out / 'video60.txt'}: is the file of no video in the template; remove it",
        f"{out / 'video59_left.txt'}: no such file; write one for each video in the template",
    ]


def test_many_faults_are_counted_after_the_first_fifty(tmp_path):
    path = tmp_path / "template.txt"
    path.write_text(template_text({"a": 100}))
    template = read_template(path)
    out = tmp_path / "out.txt"
    out.write_text("\n".join([HEADER, *(f"a/{i:05d}.jpg,9" for i in range(1, 101)), ""]))
    faults = check(out, template, 6)
    assert len(faults) == 51
    assert "line 51: class 9" in faults[49]
    assert faults[50] == f"{out}: 50 more faults"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([1, 2], [0]), r"expected frame numbers \(n,\) and classes .*got shapes \(2,\) and \(1,\)"),
        (([1], np.zeros((1, 7))), r".* got shapes \(1,\) and \(1, 7\)"),
        (([1], np.full((1, 8), np.nan)), "probabilities are NaN or infinite"),
        (([1], [-1]), r"expected classes 0 to 7, got \[-1\]"),
        (([1], [8]), r"expected classes 0 to 7, got \[8\]"),
        (([1], [1.0]), "classes must be whole numbers, got float64"),
        (([1.5], [1]), "frame numbers must be whole numbers, got float64"),
        (([3, 1, 3], [1, 1, 2]), "frame 3 comes twice"),
    ],
)
def test_predictions_that_do_not_fit_are_refused_and_nothing_is_written(template, tmp_path, given, message):
    out = tmp_path / "out.txt"
    out.write_text("older")
    with pytest.raises(ValueError, match=f"predictions of video59_right: {message}"):
        make(template, predictions() | {"video59_right": given}, out, 8)
    assert out.read_text() == "older"


def test_unknown_editions_and_fills_are_refused(template, tmp_path):
    for call in (lambda: make(template, {}, tmp_path / "x", 5), lambda: check(tmp_path / "x", template, 5)):
        with pytest.raises(ValueError, match="edition must be one of 3, 6, 8, got 5"):
            call()
    with pytest.raises(ValueError, match=r"fill must be nearest or one of Neutral, .*, got 'Contempt'"):
        make(template, {}, tmp_path / "x", 8, fill="Contempt")
    assert not (tmp_path / "x").exists()


def test_edition_3_needs_a_template_without_gaps(tmp_path):
    path = tmp_path / "template.txt"
    path.write_text(f"{HEADER}\na/00001.jpg\na/00003.jpg\n")
    template = read_template(path)
    with pytest.raises(
        ValueError, match=r"template.txt: edition 3 has line i for frame i, but frame 2 of a is not"
    ):
        make(template, {}, tmp_path / "out", 3)
    make(template, {"a": ([3], [4])}, tmp_path / "out", 8)
    assert check(tmp_path / "out", template, 8) == []
