"""Tracks hold every face once and cannot be joined further; the face to go by stays one person's."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_fer.video.faces import Face, iou
from modeling_fer.video.tracks import Tracker


def at(x, y, w, h):
    return Face((float(x), float(y), float(w), float(h)), np.zeros((5, 2)), 0.9)


places, sides = st.integers(0, 30), st.integers(1, 20)
boxes = st.builds(at, places, places, sides, sides)
videos = st.lists(st.lists(boxes, max_size=4), max_size=12)


@dataclasses.dataclass
class Track:
    """One face through a video: the places of the frames that show it, and the faces there."""

    frames: list[int]
    faces: list[Face]


def follow(frames, overlap=0.3, patience=15):
    """All tracks of a video, in the order of their numbers."""
    tracker, found = Tracker(overlap, patience), {}
    for frame, faces in enumerate(frames):
        for number, face in zip(tracker.step(faces), faces, strict=True):
            track = found.setdefault(number, Track([], []))
            track.frames.append(frame)
            track.faces.append(face)
    assert list(found) == list(range(len(found)))
    return list(found.values())


@given(boxes, boxes)
def test_intersection_over_union_is_that_of_the_pixels(one, other):
    pixels = []
    for x, y, w, h in (map(int, face.box) for face in (one, other)):
        pixels.append(set(itertools.product(range(x, x + w), range(y, y + h))))
    expected = len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1])
    assert iou(one, other) == iou(other, one) == pytest.approx(expected)


@settings(deadline=None)
@given(videos, st.sampled_from([0.01, 0.3, 0.7, 1.0]), st.integers(0, 3))
def test_every_face_is_in_one_track_and_each_track_is_of_faces_that_meet(frames, overlap, patience):
    tracks = follow(frames, overlap, patience)
    shown = [(frame, face) for track in tracks for frame, face in zip(track.frames, track.faces, strict=True)]
    wanted = [(frame, face) for frame, faces in enumerate(frames) for face in faces]
    key = lambda item: (item[0], id(item[1]))  # noqa: E731
    assert sorted(shown, key=key) == sorted(wanted, key=key)
    assert [track.frames[0] for track in tracks] == sorted(track.frames[0] for track in tracks)
    for track in tracks:
        for before, after in itertools.pairwise(track.frames):
            assert 1 <= after - before <= patience + 1
        for one, other in itertools.pairwise(track.faces):
            assert iou(one, other) >= overlap


@settings(deadline=None)
@given(videos, st.sampled_from([0.01, 0.3, 0.7]), st.integers(0, 3))
def test_no_track_begins_where_one_could_go_on(frames, overlap, patience):
    tracks = follow(frames, overlap, patience)
    for begun in tracks:
        start = begun.frames[0]
        for other in tracks:
            earlier = [frame for frame in other.frames if frame < start]
            if other is begun or not earlier or start in other.frames or start - earlier[-1] > patience + 1:
                continue
            assert iou(other.faces[len(earlier) - 1], begun.faces[0]) < overlap


def test_people_are_told_apart_whatever_the_order_of_their_faces():
    rng = np.random.default_rng(0)
    starts = [(0, 0), (100, 5), (45, 80)]
    frames, people = [], []
    for number in range(60):
        shown = [
            (who, at(x + number, y + 2 * np.sin(number / 3 + who), 40 + who, 50))
            for who, (x, y) in enumerate(starts)
            if rng.random() > 0.2
        ]
        rng.shuffle(shown)
        people.append([who for who, _ in shown])
        frames.append([face for _, face in shown])
    tracks = follow(frames)
    assert len(tracks) == 3
    for track in tracks:
        assert len({face.box[2] for face in track.faces}) == 1
    assert sum(len(track.frames) for track in tracks) == sum(map(len, people))


def test_the_nearer_of_two_goes_on():
    first, near, far = at(0, 0, 10, 10), at(1, 0, 10, 10), at(4, 0, 10, 10)
    (kept, other) = follow([[first], [far, near]])
    assert kept.faces == [first, near]
    assert other.faces == [far]


def test_a_face_may_be_away_as_long_as_told():
    face = at(0, 0, 10, 10)
    away = [[face], *[[]] * 3, [face]]
    assert [track.frames for track in follow(away, patience=3)] == [[0, 4]]
    assert [track.frames for track in follow(away, patience=2)] == [[0], [4]]


def test_the_face_to_go_by_is_the_one_followed_and_the_largest_only_when_that_is_away():
    ours, larger = at(0, 0, 10, 10), at(50, 0, 30, 30)
    tracker = Tracker(patience=2)

    def shown(*faces):
        tracker.step(faces)
        return None if tracker.foremost is None else faces[tracker.foremost]

    assert shown() is None
    assert shown(ours) is ours
    assert shown(larger, ours) is ours
    assert shown(larger) is larger  # for the time being
    assert shown(ours, larger) is ours
    assert [shown(larger), shown(larger), shown()] == [larger, larger, None]
    assert shown(larger, ours) is larger, (
        "ours was away for too long, so that larger is followed from then on"
    )
    assert shown(ours, at(50, 0, 9, 30)) is not ours


def test_the_largest_is_taken_first():
    small, large = at(0, 0, 10, 10), at(50, 0, 12, 10)
    tracker = Tracker()
    assert tracker.step([small, large]) == [0, 1]
    assert tracker.foremost == 1


def test_what_is_remembered_does_not_grow():
    tracker = Tracker(patience=2)
    for number in range(200):
        assert tracker.step([at(100 * number, 0, 10, 10)]) == [number]
    assert len(tracker._latest) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [({"overlap": 0}, "overlap must be"), ({"overlap": 1.1}, "overlap"), ({"patience": -1}, "patience must")],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Tracker(**options)
