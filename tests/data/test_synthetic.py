import dataclasses
import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from modeling_fer.data import schema
from modeling_fer.data.drawing.acting import (
    EXPRESSIONS,
    VISIBLE,
    Segment,
    act,
    film,
    timeline,
    video_intensity,
    video_labels,
)
from modeling_fer.data.drawing.face import ACTION_NAMES, Actions, Face, Identity, View
from modeling_fer.data.drawing.render import SMALLEST, render
from modeling_fer.data.prepare import prepare
from modeling_fer.data.sources.synthetic import (
    BY_FREQUENCY,
    SUBJECT_SHARES,
    SyntheticOptions,
    apportion,
    bursts,
    class_counts,
    examples,
    identity,
    subjects_of,
)
from modeling_fer.labels import CLASSES, IGNORE, NUM_CLASSES

FEW = SyntheticOptions(subjects=12, image_size=32, train=120, validation=16, test=24, unlabeled=60)
FILMS = SyntheticOptions(subjects=8, image_size=16, videos=6, frames=96)


def faces(count, seed=0):
    rng = np.random.default_rng([seed])
    drawn = []
    for k in range(count):
        actions = act(k % NUM_CLASSES, rng.uniform(0.5, 1), rng)
        drawn.append(Face(Identity.sample(rng), actions, View.sample(rng)))
    return drawn


def decoded(example):
    return np.asarray(Image.open(io.BytesIO(example.image)))


def by_split(rows):
    rows = list(rows)
    return {split: [row for row in rows if row.split == split] for split in SUBJECT_SHARES}


@pytest.fixture(scope="module")
def stills():
    return list(examples(FEW))


@pytest.fixture(scope="module")
def films():
    return list(examples(FILMS))


@pytest.mark.parametrize("options", [FEW, FILMS])
def test_same_seed_gives_the_same_bytes_and_another_seed_others(options, stills, films):
    first = stills if options is FEW else films
    assert list(examples(options)) == first
    other = list(examples(dataclasses.replace(options, seed=1)))
    assert len(other) == len(first)
    assert all(a.image != b.image for a, b in zip(first, other, strict=True))


def test_seeds_do_not_collide_with_subjects():
    a = identity(SyntheticOptions(seed=1), subject=2)
    assert a == identity(SyntheticOptions(seed=1, train=5), subject=2)
    assert a != identity(SyntheticOptions(seed=2), subject=1)
    assert a != identity(SyntheticOptions(seed=0), subject=3)


def test_a_split_does_not_depend_on_the_size_of_another(stills):
    more = examples(dataclasses.replace(FEW, train=200, unlabeled=0))
    assert by_split(more)["test"] == by_split(stills)["test"]


@pytest.mark.parametrize("size", [16, 40, 64])
def test_a_face_looks_the_same_in_every_batch(size):
    batch = faces(21)
    # Extreme poses stretch the boxes that a batch shares.
    batch[3] = dataclasses.replace(batch[3], view=View(yaw=0.5, pitch=-0.4, roll=1.2, scale=1.3, shift_y=0.5))
    batch[4] = dataclasses.replace(batch[4], actions=Actions.from_vector(np.ones(len(ACTION_NAMES))))
    together = render(batch, size)
    assert together.shape == (21, size, size, 3)
    assert together.dtype == np.uint8
    assert np.array_equal(together, np.concatenate([render([face], size) for face in batch]))
    assert np.array_equal(together[::-1], render(batch[::-1], size))


def test_nothing_to_draw_is_an_empty_batch_and_tiny_images_are_refused():
    assert render([], 32).shape == (0, 32, 32, 3)
    with pytest.raises(ValueError, match="at least 16 pixels, got 15"):
        render(faces(1), SMALLEST - 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    amounts=arrays(np.float64, (2, len(ACTION_NAMES)), elements=st.floats(0, 1)),
    seed=st.integers(0, 2**32),
    yaw=st.floats(-0.5, 0.5),
)
def test_any_actions_draw_a_finite_face(amounts, seed, yaw):
    who = Identity.sample(np.random.default_rng([seed]))
    drawn = [Face(who, Actions.from_vector(row), View(yaw=yaw)) for row in amounts]
    with np.errstate(invalid="raise", divide="raise", over="raise"):  # a NaN would become a valid byte unseen
        images = render(drawn, 24)
    assert images.shape == (2, 24, 24, 3)
    assert images.dtype == np.uint8
    assert images.std(axis=(1, 2, 3)).min() > 5  # a face, not a blank
    assert np.array_equal(images[1:], render(drawn[1:], 24))


def test_action_vectors_are_checked_and_cut():
    amounts = np.linspace(-1, 2, len(ACTION_NAMES))
    assert Actions.from_vector(amounts).vector().tolist() == np.clip(amounts, 0, 1).tolist()
    with pytest.raises(ValueError, match=r"expected 22 action amounts, got shape \(3,\)"):
        Actions.from_vector(np.zeros(3))


@pytest.mark.parametrize("name", [n for n in ACTION_NAMES if n != "side"])
def test_every_action_changes_the_face_and_full_no_less_than_half(name):
    people = [Identity.sample(np.random.default_rng([k])) for k in range(4)]
    rest, half, full = (
        render([Face(who, Actions(**{name: amount})) for who in people], 64).astype(float)
        for amount in (0, 0.5, 1)
    )
    changed = [np.abs(image - rest).mean(axis=(1, 2, 3)).min() for image in (half, full)]
    assert changed[0] > 0.05
    assert changed[1] > 0.9 * changed[0]


def test_one_sided_actions_act_on_their_side():
    who = Identity.sample(np.random.default_rng([5]))
    for name in ("one_corner", "one_brow", "wink"):
        rest, left, right = render(
            [
                Face(who),
                Face(who, Actions(**{name: 1, "side": 0})),
                Face(who, Actions(**{name: 1, "side": 1})),
            ],
            64,
        ).astype(float)
        moved = [
            np.abs(image - rest)[:, half].sum()
            for image in (left, right)
            for half in (slice(32), slice(32, 64))
        ]
        assert moved[0] > 2 * moved[1]
        assert moved[3] > 2 * moved[2]


def test_the_table_has_every_class_and_its_ways_are_told_apart():
    assert tuple(EXPRESSIONS) == CLASSES
    people = [Identity.sample(np.random.default_rng([k])) for k in range(6)]
    labels, pictures = [], []
    for name, ways in EXPRESSIONS.items():
        for way in ways.values():
            labels.append(name)
            pictures.append(render([Face(who, way) for who in people], 64).astype(float))
    rest = pictures[0]
    for name, picture in zip(labels[1:], pictures[1:], strict=True):
        assert np.abs(picture - rest).mean(axis=(1, 2, 3)).min() > 0.7, f"{name} looks like rest"
    for i, a in enumerate(pictures):
        for j, b in enumerate(pictures[:i]):
            if labels[i] != labels[j]:
                assert np.abs(a - b).mean(axis=(1, 2, 3)).min() > 0.8, f"{labels[i]} looks like {labels[j]}"


def test_people_look_different():
    rng = np.random.default_rng([0])
    people = render([Face(Identity.sample(rng)) for _ in range(16)], 64).astype(float)
    gaps = [np.abs(a - b).mean() for i, a in enumerate(people) for b in people[:i]]
    assert min(gaps) > 2


def test_light_blur_and_noise_are_applied():
    who = Identity.sample(np.random.default_rng([0]))
    plain, dark, soft, noisy, again = render(
        [
            Face(who, view=v)
            for v in (View(), View(brightness=0.6), View(blur=1), View(noise=0.1), View(noise=0.1, grain=1))
        ],
        64,
    ).astype(float)
    assert dark.mean() < 0.8 * plain.mean()
    assert np.abs(np.diff(soft, axis=1)).sum() < 0.8 * np.abs(np.diff(plain, axis=1)).sum()
    assert (noisy - plain).std() == pytest.approx(25.5, rel=0.25)
    assert np.abs(noisy - again).mean() > 10


def test_subjects_never_cross_splits(stills, films):
    for rows, options in ((stills, FEW), (films, FILMS)):
        people = {split: {row.subject for row in part} for split, part in by_split(rows).items()}
        assert all(people.values())
        assert sum(map(len, people.values())) == len(set.union(*people.values()))
        for split, numbers in subjects_of(options).items():
            assert people[split] <= {f"s{number:03d}" for number in numbers}
    assert {split: len(r) for split, r in subjects_of(SyntheticOptions()).items()} == {
        "train": 80,
        "validation": 30,
        "test": 30,
        "unlabeled": 60,
    }


def test_the_defaults_give_each_training_subject_sixty_stills():
    options = SyntheticOptions()
    assert (options.train, options.validation, options.test, options.unlabeled) == (4800, 800, 800, 4000)
    assert options.train / len(subjects_of(options)["train"]) == 60


def test_stills_are_rows_of_the_schema(stills):
    assert [len(rows) for rows in by_split(stills).values()] == [120, 16, 24, 60]
    assert len({row.origin for row in stills}) == len(stills)
    for row in stills:
        assert (row.source, row.soft_label, row.video, row.frame) == ("synthetic", None, None, None)
        assert 0 <= row.expression < NUM_CLASSES or (row.split, row.expression) == ("unlabeled", IGNORE)
    assert stills[0].subject == "s000"
    assert stills[0].origin == "synthetic subject 0 still 0"
    assert {decoded(row).shape for row in stills} == {(32, 32, 3)}
    assert len({row.image for row in stills}) == len(stills)


def test_counts_follow_the_long_tail(stills):
    counts = {
        split: np.bincount([row.expression for row in rows], minlength=NUM_CLASSES).tolist()
        for split, rows in by_split(examples(dataclasses.replace(FEW, reveal_unlabeled=True))).items()
    }
    assert counts["train"] == class_counts(120, 10)
    assert counts["unlabeled"] == class_counts(60, 10)
    assert counts["validation"] == [2] * NUM_CLASSES
    assert counts["test"] == [3] * NUM_CLASSES


def test_class_counts_are_geometric():
    counts = class_counts(24_000, 10)
    assert sum(counts) == 24_000
    ordered = np.array([counts[CLASSES.index(name)] for name in BY_FREQUENCY])
    assert ordered[0] / ordered[-1] == pytest.approx(10, rel=0.01)
    assert ordered[:-1] / ordered[1:] == pytest.approx(10 ** (1 / 7), rel=0.01)
    assert class_counts(80, 1) == [10] * NUM_CLASSES


@given(total=st.integers(0, 5000), weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=9))
def test_apportion_gives_everything_away_and_is_never_off_by_one(total, weights):
    parts = apportion(total, weights)
    exact = total * np.array(weights) / sum(weights)
    assert sum(parts) == total
    assert np.abs(parts - exact).max() < 1 + 1e-6


def test_hidden_labels_are_revealed_on_the_same_images(stills):
    hidden = by_split(stills)["unlabeled"]
    shown = by_split(examples(dataclasses.replace(FEW, reveal_unlabeled=True)))["unlabeled"]
    assert {row.expression for row in hidden} == {IGNORE}
    assert {row.expression for row in shown} == set(range(NUM_CLASSES))
    assert [row.image for row in shown] == [row.image for row in hidden]


def test_a_segment_rises_holds_and_fades():
    segment = Segment(expression=4, start=10, apex=20, offset=30, end=50, peak=0.8)
    curve = segment.intensity(np.arange(60))
    assert curve[:11].tolist() == [0] * 11
    assert curve[50:].tolist() == [0] * 10
    assert curve[20:31] == pytest.approx(0.8)
    assert (np.diff(curve[10:21]) > 0).all()
    assert (np.diff(curve[30:51]) < 0).all()
    labels = video_labels(60, [segment])
    assert labels.tolist() == np.where(curve >= VISIBLE, 4, 0).tolist()
    assert labels[[10, 12, 20, 30, 48]].tolist() == [0, 0, 4, 4, 0]
    assert video_intensity(60, [segment]).tolist() == curve.tolist()
    assert video_labels(5, []).tolist() == [0] * 5
    assert video_intensity(5, []).tolist() == [0] * 5


@given(
    seed=st.integers(0, 2**32),
    shown=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    each=st.integers(16, 60),
)
def test_timelines_show_everything_with_rest_between(seed, shown, each):
    frames = each * len(shown)
    segments = timeline(frames, shown, np.random.default_rng([seed]))
    labels = video_labels(frames, segments)
    runs = [int(label) for label, before in zip(labels, [-1, *labels[:-1]], strict=True) if label != before]
    assert runs == [0, *(label for expression in shown for label in (expression, 0))]
    assert all(s.start < s.apex < s.offset < s.end and 0.6 <= s.peak <= 1 for s in segments)
    assert video_intensity(frames, segments).max() == pytest.approx(max(s.peak for s in segments))


def test_too_short_a_video_is_refused():
    with pytest.raises(ValueError, match="2 expressions need 16 frames each, got 31"):
        timeline(31, [1, 2], np.random.default_rng([0]))


def test_a_film_follows_its_timeline_and_drifts_slowly():
    rng = np.random.default_rng([2])
    segments = [Segment(6, 10, 20, 40, 60, 1.0), Segment(4, 70, 80, 100, 110, 0.7)]
    faces_ = film(Identity.sample(rng), 120, segments, rng)
    brows = np.array([f.actions.inner_brow_raise for f in faces_])
    corners = np.array([f.actions.corner_pull for f in faces_])
    assert brows[20:40].min() > 0.7 > 0.2 > max(brows[:10].max(), brows[60:].max())
    assert 0.7 * 0.8 <= corners[80:100].min() <= corners[80:100].max() <= 0.7
    assert corners[:70].max() < 0.2
    yaw = np.array([f.view.yaw for f in faces_])
    assert 0 < np.abs(np.diff(yaw)).max() < 0.03
    assert np.ptp(yaw) > 0.03
    assert len({f.identity for f in faces_}) == 1
    assert len({f.view.grain for f in faces_}) == 120


def test_videos_are_rows_of_the_schema(films):
    names = sorted({row.video for row in films})
    assert names == [f"v{k:04d}" for k in range(6)]
    assert {decoded(row).shape for row in films[::50]} == {(16, 16, 3)}
    assert len({row.origin for row in films}) == len(films) == 6 * 96
    for name in names:
        rows = [row for row in films if row.video == name]
        assert [row.frame for row in rows] == list(range(96))
        assert len({(row.split, row.subject) for row in rows}) == 1
        if rows[0].split == "unlabeled":
            assert {row.expression for row in rows} == {IGNORE}
        else:
            labels = [row.expression for row in rows]
            runs = [
                label for label, before in zip(labels, [-1, *labels[:-1]], strict=True) if label != before
            ]
            assert runs[::2] == [0, 0, 0]  # 96 frames: two expressions, rest around each
            assert all(0 < label < NUM_CLASSES for label in runs[1::2])


def test_spoilt_frames_are_dark_and_grainy_and_nothing_else_changes(films):
    noisy = list(examples(dataclasses.replace(FILMS, frame_noise=0.3)))
    assert noisy == list(examples(dataclasses.replace(FILMS, frame_noise=0.3)))
    pairs = list(zip(films, noisy, strict=True))
    assert all(a == dataclasses.replace(b, image=a.image) for a, b in pairs)
    spoilt = [(a, b) for a, b in pairs if a.image != b.image]
    assert len(spoilt) / len(pairs) == pytest.approx(0.3, abs=0.1)
    assert {a.split for a, _ in spoilt} == {a.split for a in films}
    means = np.array([(decoded(a).mean(), decoded(b).mean()) for a, b in spoilt])
    assert means[:, 1].mean() < 0.7 * means[:, 0].mean()
    rough = np.array(
        [[np.abs(np.diff(decoded(row).astype(int), axis=1)).mean() for row in pair] for pair in spoilt]
    )
    assert rough[:, 1].mean() > 1.2 * rough[:, 0].mean()


@given(seed=st.integers(0, 2**32), share=st.floats(0, 0.7, allow_subnormal=False), frames=st.integers(0, 300))
def test_bursts_are_of_one_to_four_frames(seed, share, frames):
    found = bursts(frames, share, np.random.default_rng(seed))
    assert found == sorted(set(found))
    assert set(found) <= set(range(frames))
    flags = "".join("x" if k in set(found) else " " for k in range(frames))
    assert all(len(run) <= 4 for run in flags.split())
    assert found or share < 0.7 or frames < 100
    assert bursts(frames, 0, np.random.default_rng(seed)) == []


@pytest.mark.parametrize("share", [0.05, 0.4, 0.7])
def test_bursts_have_their_share_wherever_in_the_video(share):
    counts = np.zeros(40)
    for seed in range(1500):
        counts[bursts(40, share, np.random.default_rng([seed]))] += 1
    deviation = np.sqrt(share * (1 - share) / 1500)
    assert counts / 1500 == pytest.approx(share, abs=5 * deviation)
    assert counts.mean() / 1500 == pytest.approx(share, rel=0.06)


def test_videos_can_be_prepared_and_every_split_has_them(tmp_path):
    options = SyntheticOptions(subjects=8, image_size=16, videos=8, frames=20, frame_noise=0.2)
    prepare("synthetic", options, tmp_path / "out", show_progress=False)
    data = schema.load(tmp_path / "out")
    assert set(data) == set(SUBJECT_SHARES)
    videos = {split: set(rows["video"][:]) for split, rows in data.items()}
    assert sum(map(len, videos.values())) == len(set.union(*videos.values())) == 8
    for rows in data.values():
        assert rows["frame"][:] == list(range(20)) * (len(rows) // 20)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frame_noise": 0.8}, r"frame_noise must be from 0 to 0\.7, got 0\.8"),
        ({"frame_noise": float("nan")}, "frame_noise must be from 0"),
        ({"subjects": 3}, "subjects must be at least 4, got 3"),
        ({"image_size": 8}, "image_size must be at least 16, got 8"),
        ({"imbalance": 0.5}, r"imbalance must be at least 1, got 0\.5"),
        ({"train": -1}, "train must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"frames": 15}, "frames must be at least 16, got 15"),
    ],
)
def test_bad_options_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SyntheticOptions(**wrong)


def test_every_option_explains_itself():
    for field in dataclasses.fields(SyntheticOptions):
        assert field.metadata["help"]
