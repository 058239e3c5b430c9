import csv
import dataclasses
import gzip
import io
import lzma
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from transformers import HfArgumentParser

from modeling_fer.data.schema import Example, Rejected, Remark
from modeling_fer.data.sources import fer2013
from modeling_fer.data.sources.fer2013 import RULES, VOTES, Fer2013Options, examples, soft_labels
from modeling_fer.labels import CLASSES, FERPLUS_ORDER, class_id

FACE = np.arange(48 * 48).reshape(48, 48) % 240


def row(emotion=6, usage="Training", pixels=FACE):
    return [str(emotion), " ".join(map(str, np.ravel(pixels))), usage]


def write(path, rows, header=("emotion", "pixels", "Usage")):
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    path.write_text(text.getvalue())
    return str(path)


def votes(**counts):
    return [str(counts.get(name, 0)) for name in VOTES]


def write_votes(path, rows, header=("Usage", "Image name", *VOTES)):
    return write(path, [[usage, "", *counts] for usage, counts in rows], header)


def read(folder, rows, ferplus=None, **options):
    source = write(folder / "fer2013.csv", rows)
    if ferplus is not None:
        options["ferplus"] = write_votes(folder / "fer2013new.csv", ferplus)
    else:
        options["rule"] = "fer2013"
    return list(examples(Fer2013Options(source, **options)))


def test_original_labels_splits_and_pixels(tmp_path):
    usages = ["Training"] * 7 + ["PublicTest", "PrivateTest"]
    emotions = [*range(7), 0, 3]
    items = read(tmp_path, [row(e, u, FACE + e) for e, u in zip(emotions, usages, strict=True)])
    assert [CLASSES[item.expression] for item in items] == [
        "Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise", "Neutral", "Anger", "Happiness",
    ]  # fmt: skip
    assert [item.split for item in items] == ["train"] * 7 + ["validation", "test"]
    assert [item.origin for item in items] == [f"fer2013.csv row {n}" for n in range(1, 10)]
    assert {item.soft_label for item in items} == {None}
    for item, emotion in zip(items, emotions, strict=True):
        image = Image.open(io.BytesIO(item.image))
        assert (image.format, image.mode) == ("PNG", "L")
        np.testing.assert_array_equal(np.asarray(image), FACE + emotion)


@pytest.mark.parametrize(("ending", "opener"), [(".xz", lzma.open), (".gz", gzip.open)])
def test_compressed_files_columns_in_any_order_and_blank_lines(tmp_path, ending, opener):
    plain = Path(write(tmp_path / "plain.csv", [["Training", *row(3)[:2]], [], ["PublicTest", *row(0)[:2]]],
                       header=("Usage", " emotion", " pixels")))  # fmt: skip
    packed = tmp_path / f"fer2013.csv{ending}"
    with opener(packed, "wt") as file:
        file.write(plain.read_text())
    items = list(examples(Fer2013Options(str(packed), rule="fer2013")))
    assert [(item.split, CLASSES[item.expression]) for item in items] == [
        ("train", "Happiness"), ("validation", "Anger"),
    ]  # fmt: skip


# Votes, and what the majority and the argmax rule make of them: a class or a reason.
VERDICTS = [
    (votes(neutral=10), "Neutral", "Neutral"),
    (votes(anger=6, fear=4), "Anger", "Anger"),
    (votes(anger=5, fear=5), "no majority", "Anger"),  # a tie: the first column
    (votes(anger=4, fear=3, sadness=3), "no majority", "Anger"),
    # 4 of 10 are no majority, 4 of 7 are: the three single votes do not count
    (votes(surprise=4, fear=3, anger=1, sadness=1, neutral=1), "Surprise", "Surprise"),
    (votes(happiness=2, anger=1, fear=1, sadness=1), "Happiness", "Happiness"),
    (votes(anger=1, fear=1), "no majority", "Anger"),  # only single votes
    (votes(unknown=6, sadness=4), "unknown expression", "unknown expression"),
    (votes(contempt=7, neutral=3), "contempt (no class of ours)", "contempt (no class of ours)"),
    (votes(NF=9, neutral=1), "not a face", "not a face"),
    (votes(), "no majority", "no majority"),
]


@pytest.mark.parametrize("rule", RULES)
def test_rules_on_votes(tmp_path, rule):
    rows = [row() for _ in VERDICTS]
    items = read(tmp_path, rows, [("Training", counts) for counts, *_ in VERDICTS], rule=rule)
    expected = [verdict[1 + list(RULES).index(rule)] for verdict in VERDICTS]
    for item, verdict in zip(items, expected, strict=False):
        if verdict == "not a face":
            assert item == Rejected(item.origin, verdict)
        elif verdict in CLASSES:
            assert (item.split, CLASSES[item.expression]) == ("train", verdict)
        else:
            assert (item.split, item.expression, item.soft_label) == ("unlabeled", -1, None)


def test_rows_held_out_and_without_a_label_are_rejected_never_trained_on(tmp_path):
    for usage, split in (("PublicTest", "validation"), ("PrivateTest", "test")):
        items = read(tmp_path, [row(usage=usage) for _ in VERDICTS], [(usage, v[0]) for v in VERDICTS])
        for item, (_, verdict, _) in zip(items, VERDICTS, strict=False):
            if verdict in CLASSES:
                assert (item.split, CLASSES[item.expression]) == (split, verdict)
            else:
                assert item == Rejected(item.origin, verdict)


def test_contempt_is_left_out_or_other(tmp_path):
    counts = votes(contempt=6, neutral=2, unknown=2)
    (dropped, _) = read(tmp_path, [row()], [("Training", counts)])
    assert dropped.split == "unlabeled"
    (other, _) = read(tmp_path, [row()], [("Training", counts)], contempt="other")
    assert CLASSES[other.expression] == "Other"
    assert other.soft_label == (0.25, 0, 0, 0, 0, 0, 0, 0.75)


def test_remarks_give_the_kept_count_with_and_without_contempt(tmp_path):
    remark = read(tmp_path, [row() for _ in VERDICTS], [("Training", v[0]) for v in VERDICTS])[-1]
    assert isinstance(remark, Remark)
    assert (
        "Training: 11 rows; kept by the majority rule 5, of which contempt without a class of ours 1 dropped "
        "-> 4 labelled" in remark.text
    )
    assert (
        "to unlabeled 6 (1 contempt (no class of ours), 4 no majority, 1 unknown expression)" in remark.text
    )
    assert "; rejected 1 (1 not a face)" in remark.text


def test_original_labels_may_come_with_soft_ones(tmp_path):
    counts = [votes(fear=3, sadness=1, unknown=6), votes(unknown=10)]
    items = read(tmp_path, [row(2), row(4)], [("Training", c) for c in counts], rule="fer2013")
    assert [CLASSES[item.expression] for item in items] == ["Fear", "Sadness"]
    assert [item.soft_label for item in items] == [(0, 0, 0, 0.75, 0, 0.25, 0, 0), None]


def test_own_labels_blend_into_soft_ones(tmp_path):
    counts = [votes(fear=3, sadness=1, unknown=6), votes(unknown=10)]
    items = read(
        tmp_path, [row(2), row(4)], [("Training", c) for c in counts], rule="fer2013", own_weight=0.6
    )
    assert items[0].soft_label == pytest.approx((0, 0, 0, 0.6 + 0.4 * 0.75, 0, 0.4 * 0.25, 0, 0))
    assert items[1].soft_label is None  # nobody voted: its own label stands


@pytest.mark.parametrize("wrong", [{"ferplus": None}, {"rule": "majority"}, {"own_weight": 1.5}])
def test_blending_needs_both_labels_and_a_share(wrong):
    given = {"rule": "fer2013", "ferplus": "v.csv", "own_weight": 0.5} | wrong
    with pytest.raises(ValueError, match="own_weight"):
        Fer2013Options("f.csv", **given)


SHAPES = st.integers(1, 6).map(lambda n: (n, len(VOTES)))
VOTE_TABLES = hnp.arrays(np.int64, SHAPES, elements=st.integers(0, 10))


@given(VOTE_TABLES, st.sampled_from(["drop", "other"]))
def test_soft_labels_are_distributions(table, contempt):
    for counts, soft in zip(table, soft_labels(table, contempt), strict=True):
        ours = counts[:7].sum() + (counts[7] if contempt == "other" else 0)
        assert (soft is None) == (ours == 0)
        if soft is not None:
            assert min(soft) >= 0
            assert sum(soft) == pytest.approx(1)
            for column, name in enumerate(FERPLUS_ORDER[:7]):
                assert soft[class_id(name)] == pytest.approx(counts[column] / ours)


@given(VOTE_TABLES, st.permutations(range(10)))
def test_the_majority_does_not_depend_on_the_order_of_the_columns(table, order):
    winner, accepted = RULES["majority"](table)
    permuted, still = RULES["majority"](table[:, order])
    np.testing.assert_array_equal(accepted, still)
    np.testing.assert_array_equal(np.array(order)[permuted][accepted], winner[accepted])


@given(VOTE_TABLES)
def test_a_majority_is_also_the_argmax(table):
    winner, accepted = RULES["majority"](table)
    most, _ = RULES["argmax"](table)
    np.testing.assert_array_equal(winner[accepted], most[accepted])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(7), r"fer2013.csv row 2: emotion '7' is not a label from 0 to 6"),
        (row("happy"), r"row 2: emotion 'happy'"),
        (row(usage="Test"), r"row 2: unknown Usage 'Test', expected one of Training, PublicTest"),
        (row(pixels=FACE[:47]), r"row 2: 2256 pixels, expected 2304"),
        (row(pixels=FACE - 1), r"row 2: pixels from -1 to 238, expected 0 to 255"),
        (row(pixels=FACE + 17), r"row 2: pixels from 17 to 256, expected 0 to 255"),
        (["0", "1 2 x", "Training"], r"row 2: pixels are not integers"),
        (["0", "1 2"], r"row 2: 2 cells, not the header's 3"),
    ],
)
def test_bad_rows_are_named(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, [row(), bad])


def test_missing_columns_and_files_are_named(tmp_path):
    path = write(tmp_path / "fer2013.csv", [], header=("emotion", "pixel"))
    with pytest.raises(ValueError, match=r"fer2013.csv lacks the columns pixels, Usage; its header is"):
        list(examples(Fer2013Options(path, rule="fer2013")))
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match=r"empty.csv lacks the columns emotion"):
        list(examples(Fer2013Options(str(tmp_path / "empty.csv"), rule="fer2013")))
    with pytest.raises(FileNotFoundError, match=r"no file nowhere.csv"):
        list(examples(Fer2013Options("nowhere.csv", rule="fer2013")))


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "fer2013.csv.xz"
    path.write_bytes(lzma.compress(b"emotion,pixels,Usage\n" + bytes(range(256)) * 100)[:-40])
    with pytest.raises(ValueError, match=r"fer2013.csv.xz cannot be read .* get it again"):
        list(examples(Fer2013Options(str(path), rule="fer2013")))


@pytest.mark.parametrize(
    ("ferplus", "message"),
    [
        ([("Training", votes())], r"fer2013.csv row 2: FER\+ is not aligned .*ends before it"),
        ([("Training", votes())] * 3, r"row 3: FER\+ is not aligned .*has 2 rows, .*has 3"),
        ([("Training", votes()), ("PublicTest", votes())], r"row 2: .*says Training, .*says PublicTest"),
        ([("Training", votes()), ("Training", ["x"] * 10)], r"fer2013new.csv row 2: votes .*not all whole"),
    ],
)
def test_ferplus_must_list_the_same_rows(tmp_path, ferplus, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, [row(), row()], ferplus)


def test_ferplus_columns_are_read_by_name(tmp_path):
    source = write(tmp_path / "fer2013.csv", [row()])
    header = ["Image name", *VOTES[::-1], "Usage"]
    cells = ["", *votes(anger=9)[::-1], "Training"]
    path = write(tmp_path / "fer2013new.csv", [cells], header)
    item = next(examples(Fer2013Options(source, path)))
    assert CLASSES[item.expression] == "Anger"
    path = write(tmp_path / "fer2013new.csv", [cells[:-2] + cells[-1:]], header[:-2] + header[-1:])
    with pytest.raises(ValueError, match=r"fer2013new.csv lacks the column neutral"):
        next(examples(Fer2013Options(source, path)))


def test_classes_in_an_unknown_order_are_found_by_their_totals(tmp_path, monkeypatch):
    monkeypatch.setattr(fer2013, "WHOLE_SPLITS", {"Training": (2, 1, 0, 0, 0, 0, 0)})
    assert len(read(tmp_path, [row(0), row(0), row(1)])) == 3
    assert len(read(tmp_path, [row(1), row(1)])) == 2  # not the whole split: nothing to compare
    with pytest.raises(
        ValueError, match=r"fer2013.csv: the 3 Training rows .* classes are in an unknown order"
    ):
        read(tmp_path, [row(0), row(1), row(1)])


def test_published_totals_are_met():
    totals = np.sum([fer2013.WHOLE_SPLITS[usage] for usage in fer2013.SPLIT_OF_USAGE], axis=0)
    assert totals.tolist() == [4953, 547, 5121, 8989, 6077, 4002, 6198]
    assert [sum(rows) for rows in fer2013.WHOLE_SPLITS.values()] == [28709, 3589, 3589]


def test_options_are_checked_and_can_be_flags():
    with pytest.raises(ValueError, match=r"rule 'majority' counts FER\+ votes: give .* or ask for .*fer2013"):
        Fer2013Options("fer2013.csv")
    with pytest.raises(ValueError, match="rule must be one of majority, argmax, fer2013, got 'most'"):
        Fer2013Options("fer2013.csv", rule="most")
    with pytest.raises(ValueError, match="contempt must be one of drop, other, got 'keep'"):
        Fer2013Options("fer2013.csv", "new.csv", contempt="keep")
    flags = ["--csv", "a.csv", "--ferplus", "b.csv", "--rule", "argmax", "--contempt", "other"]
    (parsed,) = HfArgumentParser(Fer2013Options).parse_args_into_dataclasses(flags)
    assert parsed == Fer2013Options("a.csv", "b.csv", "argmax", "other")
    assert all(field.metadata["help"] for field in dataclasses.fields(Fer2013Options))


@pytest.mark.slow
@pytest.mark.skipif("FER_SHARED" not in os.environ, reason="FER_SHARED names no folder with data/fer2013")
def test_the_published_files_give_the_published_numbers():
    folder = Path(os.environ["FER_SHARED"]) / "data" / "fer2013"
    options = Fer2013Options(str(folder / "fer2013.csv.xz"), str(folder / "fer2013new.csv"))
    items = list(examples(options))
    labelled = Counter(item.split for item in items if isinstance(item, Example) and item.expression >= 0)
    assert labelled["train"] == 24941
    assert labelled["validation"] == 3186
    text = " ".join(item.text for item in items if isinstance(item, Remark))
    assert "rule 25,060" in text
    assert "rule 3,199" in text
