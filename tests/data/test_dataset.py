import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from modeling_fer.data import schema
from modeling_fer.data.dataset import FaceDataset, as_batch
from modeling_fer.data.pixels import decode_split
from modeling_fer.labels import CLASSES, IGNORE


def pixels(count, size=4):
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def votes(*shares):
    """A distribution over our classes from (name, share) pairs."""
    row = [0.0] * len(CLASSES)
    for name, share in shares:
        row[CLASSES.index(name)] = share
    return row


def test_all_classes_keep_their_ids():
    data = FaceDataset(pixels(9), [*range(8), IGNORE])
    assert data.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, -1]
    assert np.array_equal(data.targets[:8], np.eye(8))
    assert not data.targets[8].any()
    assert data.targets.dtype == np.float32


def test_ids_follow_the_models_order_and_other_classes_are_unlabelled():
    data = FaceDataset(pixels(5), [6, 0, 1, IGNORE, 7], classes=["Surprise", "Neutral", "Other"])
    assert data.labels.tolist() == [0, 1, -1, -1, 2]
    assert data.targets.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_votes_are_scaled_to_the_models_classes():
    data = FaceDataset(
        pixels(5),
        [1, 1, 1, IGNORE, 3],
        [
            votes(("Anger", 0.6), ("Fear", 0.2), ("Neutral", 0.2)),
            None,  # no votes: one-hot
            votes(("Neutral", 1.0)),  # votes for no class of the model: one-hot
            votes(("Anger", 1.0)),  # unlabelled stays so
            votes(("Fear", 1.0)),
        ],
        classes=["Fear", "Anger"],
    )
    expected = [[0.25, 0.75], [0, 1], [0, 1], [0, 0], [1, 0]]
    assert np.allclose(data.targets, expected)
    assert data.labels.tolist() == [1, 1, 1, -1, 0]


@given(st.lists(st.integers(-1, 7), min_size=1, max_size=12), st.permutations(CLASSES), st.integers(1, 8))
def test_labels_name_the_same_class_before_and_after(ids, order, count):
    classes = order[:count]
    data = FaceDataset(pixels(len(ids)), ids, classes=classes)
    for before, after, target in zip(ids, data.labels, data.targets, strict=True):
        named = CLASSES[before] if before != IGNORE else None
        assert (classes[after] if after != IGNORE else None) == (named if named in classes else None)
        assert target.sum() == (after != IGNORE)


@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=8, max_size=8), min_size=1, max_size=5))
def test_targets_of_labelled_rows_always_sum_to_one(rows):
    data = FaceDataset(pixels(len(rows)), [2] * len(rows), rows, classes=["Disgust", "Happiness", "Sadness"])
    assert np.isfinite(data.targets).all()
    assert np.allclose(data.targets.sum(1), 1, atol=1e-5)


def test_a_batch_equals_its_examples():
    data = FaceDataset(
        pixels(6), [0, 1, 2, 3, -1, 5], [None, votes(("Fear", 0.5), ("Anger", 0.5)), *[None] * 4]
    )
    order = [4, 1, 1, 5]
    batch = data.__getitems__(order)
    assert batch["index"].tolist() == order
    assert (batch["pixels"].dtype, batch["pixels"].shape) == (torch.uint8, (4, 3, 4, 4))
    for place, index in enumerate(order):
        for name, value in data[index].items():
            assert torch.equal(value, batch[name][place]), name
    assert len(data) == 6


def test_the_loader_fetches_whole_batches_and_leaves_the_pixels_alone():
    source = pixels(7)
    source.setflags(write=False)  # as a memory map is
    data = FaceDataset(source, [0] * 7)
    batches = list(DataLoader(data, batch_size=3, collate_fn=as_batch))
    assert [b["index"].tolist() for b in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    batches[0]["pixels"].zero_()
    assert source[0].any()


@pytest.mark.parametrize(("labels", "soft"), [(2, None), (3, 2), (4, 3)])
def test_lengths_must_agree(labels, soft):
    with pytest.raises(ValueError, match=f"3 images, but {labels} labels"):
        FaceDataset(pixels(3), [0] * labels, None if soft is None else [None] * soft)


@pytest.mark.parametrize("wrong", [8, -2, 100])
def test_ids_out_of_range_are_an_error(wrong):
    with pytest.raises(ValueError, match=rf"labels must be -1 or 0 to 7, got \[{wrong}\]"):
        FaceDataset(pixels(3), [0, wrong, -1])


def test_unknown_class_names_are_an_error():
    with pytest.raises(ValueError, match="Contempt"):
        FaceDataset(pixels(1), [0], classes=["Contempt"])


def test_a_prepared_split_becomes_arrays(prepared):
    split = schema.load(prepared, "train")["train"]
    expressions = np.asarray(split.with_format("numpy")["expression"][:])
    data = FaceDataset(decode_split(split, 16, show_progress=False), expressions, split["soft_label"][:])
    assert len(data) == 24
    assert np.bincount(data.labels).tolist() == [3] * 8
    means = data.pixels.mean((2, 3))  # the colour tells the class: rows and labels belong together
    for expression in range(8):
        bright = (means[data.labels == expression] > 120).astype(int)
        assert (bright == [expression & 1, expression >> 1 & 1, expression >> 2 & 1]).all()
