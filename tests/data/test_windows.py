"""Tracks, pieces and windows, and the sampler that takes turns between videos."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_fer.data.sampling import DebiasFeedbackSampler
from modeling_fer.data.videos import groups_of
from modeling_fer.data.windows import WindowDataset, pieces, tracks
from modeling_fer.labels import CLASSES


def some_tracks(seed=0, videos=3, rows=60):
    """Rows in random order: video, frame with holes, label in runs, some without."""
    rng = np.random.default_rng(seed)
    names, frames, labels = [], [], []
    for video in range(videos):
        own = np.sort(rng.permutation(2 * rows)[: rng.integers(1, rows)])
        names += [f"v{video}"] * len(own)
        frames += own.tolist()
        labels += (own // 7 % 9 - 1).tolist()
    order = rng.permutation(len(names))
    pick = lambda values: [values[i] for i in order]  # noqa: E731
    return tracks(pick(names), pick(frames), np.array(pick(labels)), "here"), pick(names), pick(frames)


def test_rows_become_tracks_in_the_order_of_their_frames():
    found, names, frames = some_tracks()
    assert [track.video for track in found] == ["v0", "v1", "v2"]
    assert sorted(np.concatenate([track.rows for track in found]).tolist()) == list(range(len(names)))
    for track in found:
        assert (np.diff(track.frames) > 0).all()
        assert {names[row] for row in track.rows} == {track.video}
        assert [frames[row] for row in track.rows] == track.frames.tolist()


def test_stills_and_frames_that_are_there_twice_are_errors():
    with pytest.raises(ValueError, match="here has rows without video and frame number: they are stills"):
        tracks(["a", None], [1, 2], np.zeros(2, int), "here")
    with pytest.raises(ValueError, match="here: frame 4 of video b is there twice"):
        tracks(["b", "a", "b"], [4, 4, 4], np.zeros(3, int), "here")


def test_tracks_of_a_recording_or_of_a_person_are_one_group():
    """Through others, too: b is of p and q, c of q alone; who is not known joins nobody."""
    videos = ["b_left", "b_right", "a", "c", "d", "e", "c"]
    subjects = ["p", "q", "p", "q", None, None, None]
    found = tracks(videos, [1, 1, 1, 1, 1, 1, 2], np.zeros(7, int), "here", subjects)
    groups = {track.video: track.group for track in found}
    assert groups == {"a": "a", "b_left": "a", "b_right": "a", "c": "a", "d": "d", "e": "e"}
    plain = tracks(videos, [1, 1, 1, 1, 1, 1, 2], np.zeros(7, int), "here")
    assert [track.group for track in plain] == ["a", "b", "b", "c", "d", "e"]


@settings(max_examples=100, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.sampled_from("abcdefgh"), st.one_of(st.none(), st.sampled_from("pqrst"))), min_size=1
    )
)
def test_groups_are_what_shared_people_connect(pairs):
    """Against the transitive closure of sharing a person, by matrices."""
    names = sorted({video for video, _ in pairs})
    shares = np.eye(len(names), dtype=int)
    for a, who in pairs:
        for b, other in pairs:
            shares[names.index(a), names.index(b)] |= who is not None and who == other
    reached = np.linalg.matrix_power(shares, len(names)) > 0
    expected = {name: names[int(np.flatnonzero(row)[0])] for name, row in zip(names, reached, strict=True)}
    assert groups_of(*zip(*pairs, strict=True)) == expected


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), longest=st.integers(1, 20))
def test_pieces_cut_every_labelled_frame_once_into_stretches_of_one_class(seed, longest):
    found, _, _ = some_tracks(seed)
    if not any((track.labels >= 0).any() for track in found):
        return
    cut = pieces(found, CLASSES, longest)
    for number, track in enumerate(found):
        own = cut.track == number
        for anchor, label in zip(cut.anchor[own], cut.label[own], strict=True):
            assert track.labels[track.frames.tolist().index(anchor)] == label
    by_class = np.bincount(cut.label, minlength=8)
    frames = np.concatenate([track.labels for track in found])
    labelled = np.bincount(frames[frames >= 0], minlength=8)
    assert ((by_class > 0) == (labelled > 0)).all()
    assert (by_class * longest >= labelled).all(), "no piece is longer"
    # A window of twice the length around the anchors misses no labelled frame, however few there are.
    for number, track in enumerate(found):
        for frame, label in zip(track.frames, track.labels, strict=True):
            near = cut.anchor[(cut.track == number) & (cut.label == label)]
            assert label < 0 or (np.abs(near - frame) < longest).any()


def test_windows_hold_the_frames_around_their_anchor_each_in_its_slot():
    found, _, _ = some_tracks(seed=1)
    rows = sum(len(track.rows) for track in found)
    values = np.arange(rows, dtype=np.float16)[:, None] + 1  # a row is told by its value; 0 is no row
    data = WindowDataset(values, found, CLASSES, slots=15, longest=5)
    batch = data.__getitems__(list(range(len(data))))
    assert batch["values"].shape == (len(data), 15, 1)
    assert ((batch["values"][..., 0] > 0) == batch["mask"]).all()
    for piece in range(len(data)):
        track = found[data.pieces.track[piece]]
        for slot in range(15):
            frame = data.pieces.anchor[piece] - 7 + slot
            there = np.flatnonzero(track.frames == frame)
            assert bool(batch["mask"][piece, slot]) == bool(len(there))
            if len(there):
                assert batch["values"][piece, slot, 0] == track.rows[there[0]] + 1
                assert batch["labels"][piece, slot] == track.labels[there[0]]
            else:
                assert batch["labels"][piece, slot] == -1
        assert batch["mask"][piece, 7]
        assert batch["labels"][piece, 7] == data.pieces.label[piece]


def test_classes_are_expected_in_windows_as_often_as_they_come():
    """Against windows of 8 frames laid at every place that holds the anchor."""
    found, _, _ = some_tracks(seed=1)
    data = WindowDataset(np.zeros((200, 1)), found, CLASSES, slots=2 * 8 - 1, longest=4)
    labels = data.__getitems__(list(range(len(data))))["labels"].numpy()
    for piece, row in enumerate(labels):
        windows = [row[start : start + 8] for start in range(8)]
        expected = [np.mean([(window == c).sum() for window in windows]) for c in range(8)]
        assert np.allclose(data.labels_around(8)[piece], expected)


def test_classes_that_the_model_lacks_have_no_label():
    found, _, _ = some_tracks(seed=2)
    data = WindowDataset(np.zeros((200, 1)), found, CLASSES[:3], slots=9, longest=4)
    labels = data.__getitems__(list(range(len(data))))["labels"]
    assert set(labels.unique().tolist()) == {-1, 0, 1, 2}


def test_videos_without_a_label_are_an_error():
    found = tracks(["a"] * 3, [1, 2, 3], np.full(3, -1), "here")
    with pytest.raises(ValueError, match="no frame of any video has a label"):
        pieces(found, CLASSES, 5)


def test_the_digest_changes_with_what_is_learnt():
    a, _, _ = some_tracks(seed=3)
    b, _, _ = some_tracks(seed=4)
    values = np.zeros((200, 1))
    assert (
        WindowDataset(values, a, CLASSES, 9, 4).digest() != WindowDataset(values, b, CLASSES, 9, 4).digest()
    )


# -- turns ------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    epoch=st.integers(0, 20),
    seed=st.integers(0, 99),
)
def test_groups_of_a_class_come_by_turns_and_use_up_their_examples(sizes, epoch, seed):
    """One class: however unequal its groups are, each is drawn as often, each example of one as often."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    rounds = 12 * len(sizes)  # in each, every group comes 12 times
    sampler = DebiasFeedbackSampler(
        np.zeros(len(groups)), 1, rounds, seed=seed, round_batches=1, groups=groups
    )
    sampler.epoch = epoch
    drawn = np.array(list(sampler))
    assert (np.bincount(groups[drawn], minlength=len(sizes)) == 12).all()
    counts = np.bincount(drawn, minlength=len(groups))
    for group in range(len(sizes)):
        assert np.ptp(counts[groups == group]) <= 2 - (12 % sizes[group] == 0 and epoch == 0) * 2
    share = sampler.example_probabilities()
    assert np.isclose(share.sum(), 1)
    assert np.allclose(share, 1 / len(sizes) / np.array(sizes)[groups])


def test_rounds_go_on_where_the_last_stopped():
    labels, groups = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1]), np.array([0, 0, 0, 1, 0, 1, 1, 1, 1])

    def draws(round_batches, rounds):
        sampler = DebiasFeedbackSampler(labels, 2, 6, seed=5, round_batches=round_batches, groups=groups)
        for _ in range(rounds):
            yield from sampler.global_order()
            sampler.epoch += 1

    short, long = np.array(list(draws(1, 4))), np.array(list(draws(4, 1)))
    for c in (0, 1):  # the order of the classes is drawn anew, that within a class goes on
        assert short[labels[short] == c].tolist() == long[labels[long] == c].tolist()


def test_probabilities_without_groups_are_those_of_the_classes():
    labels = np.array([0] * 8 + [1] * 2 + [-1])
    share = DebiasFeedbackSampler(labels, 2, 4, alpha=0.5).example_probabilities()
    expected = np.sqrt([8, 2]) / np.sqrt([8, 2]).sum()
    assert np.allclose([share[:8].sum(), share[8:10].sum(), share[10]], [*expected, 0])
