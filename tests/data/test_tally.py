import numpy as np
import pytest

from modeling_fer.data.schema import SPLITS, Example
from modeling_fer.data.tally import Tally, digest
from modeling_fer.labels import CLASSES


def by_hand(rows):
    """Count repeats, conflicts and surplus of rows (split, image, label) as their definitions say it."""
    here = sorted({split for split, _, _ in rows}, key=SPLITS.index)
    within = {split: [row for row in rows if row[0] == split] for split in here}
    images = {split: {image for _, image, _ in within[split]} for split in here}
    repeats = {
        a: {
            b: len(within[a]) - len(images[a]) if a == b else sum(i in images[b] for _, i, _ in within[a])
            for b in here
        }
        for a in here
    }

    def conflicting(some):
        labels = {}
        for _, image, label in some:
            labels.setdefault(image, set()).add(label)
        return {image for image, found in labels.items() if len(found - {-1}) > 1}

    conflicts = {split: len(conflicting(within[split])) for split in here}
    conflicts["all splits together"] = len(conflicting(rows))

    held_out = images.get("validation", set()) | images.get("test", set())
    surplus = []
    for index, (split, image, _) in enumerate(rows):
        reason = None
        if split in ("train", "unlabeled"):
            if image in held_out:
                reason = "the image is also in validation or test"
            elif split == "train" and image in conflicting(within["train"]):
                reason = "identical images with conflicting labels"
            elif any(row[:2] == (split, image) for row in rows[:index]):
                reason = "a copy of an image before it"
        surplus.append(reason)
    return repeats, conflicts, surplus


@pytest.mark.parametrize("seed", range(20))
def test_identical_images_are_counted_and_dropped_by_definition(seed):
    random = np.random.default_rng(seed)
    splits = random.permutation(SPLITS)[: random.integers(1, 6)].tolist()
    rows = [
        (splits[random.integers(len(splits))], int(random.integers(25)), int(random.integers(-1, 3)))
        for _ in range(60)
    ]
    tally = Tally()
    for split, image, label in rows:
        tally.add(Example(split, b"", "", "made", label), np.full((2, 2, 3), image, np.uint8))
    assert (tally.repeats(), tally.conflicts(), tally.surplus()) == by_hand(rows)
    counts = tally.counts()
    assert list(counts) == [split for split in SPLITS if split in tally.blank]
    for split in counts:
        labels = [label for other, _, label in rows if other == split]
        assert list(counts[split].values()) == [labels.count(n) for n in (*range(len(CLASSES)), -1)]


def test_nothing_counted_is_nothing_found():
    tally = Tally()
    assert (tally.counts(), tally.repeats(), tally.surplus()) == ({}, {}, [])
    assert tally.conflicts() == {"all splits together": 0}


def test_sizes_blanks_and_people():
    tally = Tally()
    noise = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for split, rgb, who in (
        ("train", noise, "a"), ("test", noise, "a"), ("train", np.ones((7, 3, 3), np.uint8), "a"),
        ("test", noise, "b"), ("validation", noise, "b"), ("test", noise, None), ("train", noise, None),
    ):  # fmt: skip
        tally.add(Example(split, b"", "", "made", 0, subject=who), rgb)
    assert tally.sizes == {"width": [3, 4], "height": [2, 7]}
    assert tally.blank == {"train": 1, "test": 0, "validation": 0}
    assert tally.crossing_subjects() == {"train/test": 1, "validation/test": 1}


def test_a_digest_is_of_shape_and_pixels():
    flat = np.arange(36, dtype=np.uint8)
    shapes = [(3, 4, 3), (4, 3, 3), (2, 6, 3)]
    assert len({digest(flat.reshape(shape)) for shape in shapes}) == 3
    assert digest(flat.reshape(3, 4, 3)) == digest(flat.reshape(3, 4, 3).copy())
    assert digest(flat.reshape(3, 4, 3)) != digest(flat[::-1].reshape(3, 4, 3))
