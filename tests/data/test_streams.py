import io
from collections import defaultdict
from itertools import groupby

import numpy as np
import pytest
from PIL import Image

from modeling_fer.data import schema
from modeling_fer.data.prepare import prepare
from modeling_fer.data.schema import Example, Remark
from modeling_fer.data.sources.folder import FolderOptions
from modeling_fer.data.sources.streams import LONGEST, SHORTEST, StreamsOptions, examples

CLASSES = ("Anger", "Happiness", "Sadness")
IDS = (1, 4, 5)
FEW = {"train": 3, "validation": 2, "test": 2, "frames": 300}


def put(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.new("L", (4, 4), shade).save(buffer, format="PNG")
    path.write_bytes(buffer.getvalue())


@pytest.fixture(scope="module")
def stills(tmp_path_factory):
    """20 pictures a class to make streams of; one of each is in train as well, and one there twice."""
    root = tmp_path_factory.mktemp("stills")
    for number, name in enumerate(CLASSES):
        for i in range(20):
            put(root / f"faces/validation/{name}/{i:02d}.png", 60 * number + i)
        put(root / f"faces/validation/{name}/again.png", 60 * number + 5)
        put(root / f"faces/train/{name}/0.png", 60 * number)
        put(root / f"faces/train/{name}/1.png", 60 * number + 50)
    prepare("folder", FolderOptions(str(root / "faces")), root / "stills", show_progress=False)
    return str(root / "stills")


def shade(example):
    return Image.open(io.BytesIO(example.image)).getpixel((0, 0))


def streams(items):
    """Frames of each stream by its split and name."""
    found = defaultdict(list)
    for item in items:
        if isinstance(item, Example):
            found[item.split, item.video].append(item)
    return found


def test_streams_are_segments_of_one_expression(stills):
    found = streams(examples(StreamsOptions(stills, **FEW)))
    assert [split for split, _ in found] == ["train"] * 3 + ["validation"] * 2 + ["test"] * 2
    for frames in found.values():
        assert [frame.frame for frame in frames] == list(range(300))
        assert {frame.expression for frame in frames} <= set(IDS)
        lengths = [len(list(run)) for _, run in groupby(frame.expression for frame in frames)]
        assert all(SHORTEST <= length <= LONGEST for length in lengths[:-1])  # the last one is cut
        assert all(IDS[shade(frame) // 60] == frame.expression for frame in frames)


def test_no_picture_is_in_two_splits_or_in_train(stills):
    shades = defaultdict(set)
    for (split, _), frames in streams(examples(StreamsOptions(stills, **FEW))).items():
        shades[split] |= {shade(frame) for frame in frames}
    used = set().union(*shades.values())
    assert len(used) == sum(map(len, shades.values()))
    assert not used & {0, 60, 120}  # those of the stills' train split


def test_a_longer_median_makes_fewer_segments(stills):
    counts = [
        len(list(groupby(frame.expression for frames in found.values() for frame in frames)))
        for found in (streams(examples(StreamsOptions(stills, **FEW, segment=n))) for n in (20, 200))
    ]
    assert counts[0] > 2 * counts[1]


def test_the_seed_decides(stills):
    first, same, other = (list(examples(StreamsOptions(stills, **FEW, seed=seed))) for seed in (3, 3, 4))
    assert first == same
    assert first != other


def test_prepared_streams_say_that_they_are_simulated(stills, tmp_path):
    report = prepare("streams", StreamsOptions(stills, **FEW), tmp_path / "streams", show_progress=False)
    assert sum("simulated" in remark for remark in report.remarks) == 3
    data = schema.load(tmp_path / "streams")
    assert {split: len(set(rows["video"][:])) for split, rows in data.items()} == {
        "train": 3,
        "validation": 2,
        "test": 2,
    }
    assert np.all(np.asarray(data["test"]["expression"][:]) >= 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train": 0}, "train must be at least 1"),
        ({"frames": 0}, "frames must be at least 1"),
        ({"stills_split": "held"}, "stills_split must be one of train,"),
    ],
)
def test_options_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        StreamsOptions("stills", **wrong)


def test_a_split_that_is_not_there(stills):
    with pytest.raises(FileNotFoundError, match="has no split test"):
        next(examples(StreamsOptions(stills, stills_split="test")))


def test_too_few_stills(tmp_path):
    for number in range(6):
        put(tmp_path / f"faces/train/Anger/{number}.png", 10 * number)
        put(tmp_path / f"faces/validation/Anger/{number}.png", 10 * number + 5)
    prepare("folder", FolderOptions(str(tmp_path / "faces")), tmp_path / "one", show_progress=False)
    with pytest.raises(ValueError, match="fewer than two expressions"):
        next(examples(StreamsOptions(str(tmp_path / "one"))))
    of_train = StreamsOptions(str(tmp_path / "one"), stills_split="train")
    with pytest.raises(ValueError, match="fewer than two expressions"):
        next(item for item in examples(of_train) if not isinstance(item, Remark))
