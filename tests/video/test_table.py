"""The table of a video comes back as it was written, and a damaged one is named."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_fer import CLASSES
from modeling_fer.video.table import COLUMNS, Row, read_table, write_table

numbers = st.floats(-1e4, 1e4)
rows = st.builds(
    Row,
    st.integers(1, 10**7),
    st.floats(0, 1e5),
    st.integers(0, 99),
    st.none() | st.tuples(numbers, numbers, numbers, numbers),
    st.lists(st.floats(0, 1), min_size=8, max_size=8).map(lambda p: dict(zip(CLASSES, p, strict=True))),
)
empty = st.builds(Row, st.integers(1, 10**7), st.floats(0, 1e5))


def row(frame=1, **probabilities):
    given = dict.fromkeys(CLASSES, 0.0) | (probabilities or {"Fear": 1.0})
    return Row(frame, 0.04 * frame, 0, (1.5, 2.25, 30.125, 40.0), given)


@settings(deadline=None, max_examples=50)
@given(st.lists(rows | empty, max_size=5))
def test_what_was_written_is_read(tmp_path_factory, given_rows):
    path = tmp_path_factory.mktemp("table") / "video.csv"
    write_table(path, given_rows)
    found = read_table(path)
    assert [(r.frame, r.face) for r in found] == [(r.frame, r.face) for r in given_rows]
    for one, other in zip(found, given_rows, strict=True):
        assert one.seconds == pytest.approx(other.seconds, abs=5.1e-4)
        assert (one.box is None) == (other.box is None)
        assert one.box is None or one.box == pytest.approx(other.box, abs=5.1e-4)
        assert one.probabilities == pytest.approx(other.probabilities, abs=5.1e-7)
    again = path.with_name("again.csv")
    write_table(again, found)
    assert again.read_bytes() == path.read_bytes()


def test_the_columns_and_a_frame_without_a_face(tmp_path):
    path = tmp_path / "deep" / "video.csv"
    write_table(path, [row(), Row(2, 1 / 3)])
    assert path.read_text().splitlines() == [
        "frame,seconds,face,x,y,w,h,expression," + ",".join(CLASSES),
        "1,0.040,0,1.500,2.250,30.125,40.000,Fear,"
        + ",".join("1.000000" if name == "Fear" else "0.000000" for name in CLASSES),
        "2,0.333" + "," * (len(COLUMNS) + len(CLASSES) - 2),
    ]


def test_the_class_is_the_most_probable_one():
    assert row(Anger=0.4, Sadness=0.6).expression == "Sadness"
    assert row(Anger=0.5, Sadness=0.5).expression == "Anger"
    assert Row(1, 0.0).expression is None


def test_a_model_of_fewer_classes_has_fewer_columns(tmp_path):
    few = Row(1, 0.0, 3, None, {"Anger": 0.25, "Fear": 0.75})
    write_table(tmp_path / "few.csv", [few], ("Fear", "Anger"))
    assert (tmp_path / "few.csv").read_text().splitlines()[0].endswith("expression,Fear,Anger")
    assert read_table(tmp_path / "few.csv") == [few]
    with pytest.raises(ValueError, match="frame 1 has probabilities of Anger, Fear, the columns are Neutral"):
        write_table(tmp_path / "few.csv", [few])
    assert read_table(tmp_path / "few.csv") == [few], "the file that was there is kept"


GOOD = "1,0.040,0,1.0,2.0,3.0,4.0,Fear,0.1,0.9"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"video.csv line 1: expected frame,seconds,face,x,y,w,h,expression and the classes, got :"),
        (f"{','.join(COLUMNS)}\n", "line 1"),
        (f"{','.join(COLUMNS)},Fear,Fear\n", "line 1"),
        ("frame,time\n", "line 1"),
        (f"{GOOD},0.3\n", "line 2: 11 cells, not the header's 10"),
        (f"{GOOD}\n1,0.1\n", "line 3: 2 cells"),
        (GOOD.replace("0.040", "soon"), "line 2: could not convert"),
        (GOOD.replace("2.0", "nan"), "line 2: 'nan' is no finite number"),
        (GOOD.replace(",2.0", ","), "line 2: could not convert"),
        (GOOD.replace("1,0.040,0", "1,0.040,"), "line 2: a frame without a face has other cells"),
        (GOOD.replace("Fear", "Anger"), "line 2: expression 'Anger', but Fear is the most probable"),
        (GOOD.replace("Fear", "Joy"), "line 2: expression 'Joy'"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, text, message):
    head = "" if "line 1" in message else f"{','.join(COLUMNS)},Anger,Fear\n"
    (tmp_path / "video.csv").write_text(head + text)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "video.csv")


def test_what_is_no_text_or_not_there_is_named(tmp_path):
    (tmp_path / "video.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"video\.csv cannot be read"):
        read_table(tmp_path / "video.csv")
    with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
        read_table(tmp_path / "absent.csv")
