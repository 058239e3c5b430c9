import dataclasses
import itertools
import json

import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_fer.evaluation import tuning
from modeling_fer.evaluation.metrics import compute_metrics
from modeling_fer.evaluation.tuning import (
    VideoLogits,
    apply,
    cross_fit,
    fit,
    fit_bias,
    fit_temperature,
    folds_by_group,
)
from modeling_fer.postprocess_fer import PostProcess

SMALL = {"half_widths": (0, 2, 8), "smoothings": ("box", "median")}


def make_videos(seed=0, videos=12, frames=120, classes=4, noise=2.0, bias=None, hold=20):
    """Videos whose class stays for `hold` frames, seen through noise, a bias, and a third without labels."""
    rng = np.random.default_rng([41, seed])
    odds = np.array([0.45, 0.3, 0.15, 0.1])[:classes]
    found = []
    for number in range(videos):
        truth = np.repeat(rng.choice(classes, -(-frames // hold), p=odds / odds.sum()), hold)[:frames]
        logits = 2.5 * np.eye(classes)[truth] + rng.normal(0, noise, (frames, classes))
        logits += np.zeros(classes) if bias is None else bias
        references = np.where(rng.random(frames) < 0.33, -1, truth)
        group = f"r{number // 2}"  # two tracks a recording
        found.append(VideoLogits(logits.astype(np.float32), references, np.arange(float(frames)), group))
    return found


def macro_f1(references, predictions, classes=4):
    result = compute_metrics(references, predictions, class_names=range(classes), bootstrap_samples=0)
    return result["macro_f1"]


def labelled(videos):
    return np.concatenate([v.references[v.references >= 0] for v in videos])


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_the_temperature_that_made_the_labels_is_found(scale):
    rng = np.random.default_rng(42)
    logits = rng.normal(0, 2, (20_000, 5))
    gumbel = rng.gumbel(size=logits.shape)  # argmax(logits + gumbel) is drawn by softmax(logits)
    references = (logits + gumbel).argmax(1)
    assert fit_temperature((scale * logits).astype(np.float32), references) == pytest.approx(scale, rel=0.05)


def quick_f1(references, predictions, classes):
    """Macro F1 without the checks, for searches by trial."""
    hits = np.bincount(references[references == predictions], minlength=classes)
    total = np.bincount(references, minlength=classes) + np.bincount(predictions, minlength=classes)
    return (2 * hits / np.maximum(total, 1)).mean()


def best_by_trial(scores, references):
    """Highest macro F1 over the bias of the second of two classes: between any two turns of a frame."""
    turning = np.sort(scores[:, 0] - scores[:, 1])
    values = np.array([-3, 0, 3, *((turning[:-1] + turning[1:]) / 2)])
    called = [scores[:, 1] + value > scores[:, 0] for value in values[np.abs(values) <= 3]]
    return max(quick_f1(references, c.astype(int), 2) for c in called)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 40))
def test_the_bias_of_two_classes_is_the_exact_optimum(seed, n):
    rng = np.random.default_rng([43, seed])
    references = np.append([0, 1], (rng.random(n) < 0.2).astype(int))
    scores = np.log(rng.dirichlet([1, 1], n + 2))
    bias = fit_bias(scores, references)
    got = macro_f1(references, (scores + bias).argmax(1), 2)
    assert (np.abs(bias) <= 3).all()
    assert got >= best_by_trial(scores, references) - tuning.BIAS_PENALTY * 9  # what the penalty may cost


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), c=st.integers(0, 3))
def test_one_step_of_the_ascent_is_no_worse_than_any_value_tried(seed, c):
    rng = np.random.default_rng([44, seed])
    references, scores = rng.integers(0, 4, 60), rng.normal(0, 2, (60, 4))
    bias = rng.normal(0, 0.5, 4)

    def objective(value):
        moved = np.where(np.arange(4) == c, value, bias)
        return quick_f1(references, (scores + moved).argmax(1), 4) - tuning.BIAS_PENALTY * value**2

    value, found = tuning._best_value(scores, references, bias, c)
    assert found == pytest.approx(objective(value), abs=1e-9)
    # Between two turns the middle is taken, not what is nearest to 0: the penalty may differ by this much.
    assert found >= max(map(objective, np.linspace(-3, 3, 301))) - tuning.BIAS_PENALTY * 9


def test_a_bias_of_the_logits_is_taken_out_again():
    rng = np.random.default_rng(45)
    clean = rng.normal(0, 2, (4000, 5))
    references = clean.argmax(1)
    shift = np.array([1.0, -0.5, 0.3, 0.0, -1.2])
    bias = fit_bias(clean + shift, references)
    assert macro_f1(references, (clean + shift).argmax(1), 5) < 0.85
    assert macro_f1(references, (clean + shift + bias).argmax(1), 5) > 0.995
    np.testing.assert_allclose((bias + shift) - (bias + shift).mean(), 0, atol=0.05)


def test_a_bias_that_gains_nothing_stays_zero():
    references = np.repeat(np.arange(4), 10)
    perfect = np.eye(4)[references] * 3
    assert not fit_bias(perfect, references).any()
    # Every frame alike: no bias tells them apart, and calling all one class is as good as any other.
    alike = np.log(np.tile([0.4, 0.3, 0.2, 0.1], (40, 1)))
    assert not fit_bias(alike, references).any()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(4)))
def test_permuting_the_classes_permutes_the_fit(seed, order):
    order = np.asarray(order)  # new id -> old id
    new = np.append(np.argsort(order), -1)  # -1 stays -1
    videos = make_videos(seed, videos=4, frames=80, bias=np.array([0.8, 0, -0.5, -0.5]))
    turned = [
        dataclasses.replace(v, logits=v.logits[:, order].copy(), references=new[v.references]) for v in videos
    ]
    post, report = fit(videos, **SMALL, folds=2)
    other, again = fit(turned, **SMALL, folds=2)
    assert (other.smoothing, other.half_width) == (post.smoothing, post.half_width)
    assert other.temperature == pytest.approx(post.temperature)
    assert again["macro_f1_after"] == pytest.approx(report["macro_f1_after"], abs=1e-6)
    bias, moved = (np.zeros(4) if p.bias is None else np.array(p.bias) for p in (post, other))
    np.testing.assert_allclose(moved, bias[order], atol=1e-4)


def test_smoothing_is_chosen_where_it_helps_and_the_report_is_true():
    videos = make_videos(bias=np.array([1.5, 0, 0, -1.0]), hold=60)
    post, report = fit(videos, **SMALL)
    assert post.half_width == 8
    assert not post.causal
    truth = labelled(videos)
    before = macro_f1(truth, apply(PostProcess(), videos).argmax(1))
    after = macro_f1(truth, apply(post, videos).argmax(1))
    assert report["macro_f1_before"] == pytest.approx(before)
    assert report["macro_f1_after"] == pytest.approx(after)
    assert after > before + 0.2
    assert report["nll_after"] <= report["nll_before"]
    assert (report["videos"], report["groups"], report["frames"]) == (12, 6, len(truth))
    for row in report["settings"]:
        tried = PostProcess(row["smoothing"], row["half_width"], post.temperature)
        assert row["macro_f1"] == pytest.approx(macro_f1(truth, apply(tried, videos).argmax(1)))
    assert [(r["smoothing"], r["half_width"]) for r in report["settings"]] == [
        ("none", 0), ("box", 2), ("median", 2), ("box", 8), ("median", 8),
    ]  # fmt: skip
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert PostProcess.from_dict(json.loads(json.dumps(post.to_dict()))) == post


def test_no_smoothing_is_chosen_where_every_frame_is_another_class():
    post, _ = fit(make_videos(hold=1, noise=1.0), **SMALL)
    assert (post.smoothing, post.half_width) == ("none", 0)


def test_causal_settings_are_fitted_without_the_future():
    post, _ = fit(make_videos(), causal=True, half_widths=(4,), smoothings=("box",))
    assert post.causal
    assert post.half_width == 4


def test_the_bias_is_dropped_where_it_does_not_hold_for_other_groups(monkeypatch):
    videos = make_videos(noise=1.0)
    bad = np.array([-3.0, 3.0, 3.0, 3.0])
    monkeypatch.setattr(tuning, "fit_bias", lambda scores, references: bad)
    post, report = fit(videos, half_widths=(0,))
    assert post.bias is None
    assert report["bias_strength"] == 0
    held_out = report["bias_held_out"]
    assert list(held_out) == ["0.0", "0.5", "1.0"]
    assert held_out["0.0"] > held_out["0.5"] > held_out["1.0"]
    # Pooled over folds, a fixed bias gives what it gives on all frames at once.
    log = np.log(apply(PostProcess(temperature=post.temperature), videos))
    assert held_out["1.0"] == pytest.approx(macro_f1(labelled(videos), (log + bad).argmax(1)))


def test_the_bias_is_judged_on_groups_that_it_was_not_fitted_on(monkeypatch):
    videos = make_videos(videos=6)
    fitted, judged = [], []

    def spy_fit(scores, references):
        fitted.append(scores)
        return np.zeros(4)

    def spy_matrix(references, scores):
        judged.append(scores)
        return matrix(references, scores)

    matrix = tuning._matrix
    monkeypatch.setattr(tuning, "fit_bias", spy_fit)
    monkeypatch.setattr(tuning, "_matrix", spy_matrix)
    post, _ = fit(videos, half_widths=(0,), folds=3)

    plain = PostProcess(temperature=post.temperature)
    group_of = {row.tobytes(): v.group for v in videos for row in np.log(apply(plain, [v]).astype(float))}
    groups = [{group_of[row.tobytes()] for row in scores} for scores in fitted]
    assert sorted(map(sorted, groups)) == [["r0", "r1"], ["r0", "r1", "r2"], ["r0", "r2"], ["r1", "r2"]]
    held_out = [{group_of[row.tobytes()] for row in scores} for scores in judged[2:-1]]
    # Three strengths for each fold, on the one group that the fit before did not have.
    assert held_out == [{"r0", "r1", "r2"} - fold for fold in groups[:3] for _ in range(3)]


def test_cross_fit_scores_each_fold_with_settings_from_the_others():
    videos = make_videos(bias=np.array([1.5, 0, 0, -1.0]))
    folds = folds_by_group([v.group for v in videos], [v.references for v in videos], 3)
    result = cross_fit(videos, folds, **SMALL)
    predicted, scores = np.concatenate([np.zeros(0, int)] * 2), []
    truth = np.zeros(0, int)
    for row in result["folds"]:
        inside = [v for v, f in zip(videos, folds, strict=True) if f != row["fold"]]
        outside = [v for v, f in zip(videos, folds, strict=True) if f == row["fold"]]
        post, _ = fit(inside, **SMALL)
        assert row["postprocess"] == post.to_dict()
        called = apply(post, outside).argmax(1)
        scores.append(macro_f1(labelled(outside), called))
        predicted, truth = np.append(predicted, called), np.append(truth, labelled(outside))
    assert [row["macro_f1_after"] for row in result["folds"]] == pytest.approx(scores)
    assert result["after"]["mean"] == pytest.approx(np.mean(scores))
    assert result["after"]["spread"] == pytest.approx(np.std(scores, ddof=1))
    assert result["after"]["pooled"] == pytest.approx(macro_f1(truth, predicted))
    whole = macro_f1(labelled(videos), apply(PostProcess(), videos).argmax(1))
    assert result["before"]["pooled"] == pytest.approx(whole)
    assert result["after"]["pooled"] > whole + 0.1
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_nothing_of_a_fold_reaches_its_own_settings():
    videos = make_videos()
    folds = np.arange(12) // 4
    plain = cross_fit(videos, folds, **SMALL)["folds"]
    rng = np.random.default_rng(46)
    other = [
        dataclasses.replace(v, logits=rng.normal(0, 1, v.logits.shape).astype(np.float32)) if f == 1 else v
        for v, f in zip(videos, folds, strict=True)
    ]
    changed = cross_fit(other, folds, **SMALL)["folds"]
    assert changed[1]["postprocess"] == plain[1]["postprocess"]
    assert changed[1]["macro_f1_after"] != plain[1]["macro_f1_after"]
    for fold in (0, 2):
        assert changed[fold]["postprocess"] != plain[fold]["postprocess"]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.integers(2, 12), folds=st.integers(2, 6))
def test_folds_keep_groups_whole_and_none_is_empty(seed, groups, folds):
    rng = np.random.default_rng([47, seed])
    names = [f"g{i}" for i in range(groups)] + [f"g{i}" for i in rng.integers(0, groups, 8)]
    labels = [rng.integers(-1, 8, rng.integers(0, 40)) for _ in names]
    if groups < folds:
        with pytest.raises(ValueError, match=f"between 2 and that of groups, {groups}; got {folds}"):
            folds_by_group(names, labels, folds)
        return
    found = folds_by_group(names, labels, folds, seed=seed)
    assert set(found.tolist()) == set(range(folds))
    assert len({(name, fold) for name, fold in zip(names, found.tolist(), strict=True)}) == groups
    order = rng.permutation(len(names))
    shuffled = folds_by_group([names[i] for i in order], [labels[i] for i in order], folds, seed=seed)
    assert (shuffled == found[order]).all()


def test_folds_share_out_every_class():
    rng = np.random.default_rng(48)
    odds = rng.dirichlet(np.full(8, 0.3), 60)  # videos of few classes each
    labels = [rng.choice(8, int(rng.integers(50, 400)), p=p) for p in odds]
    groups = [str(i) for i in range(60)]

    def unevenness(folds):
        counts = np.zeros((5, 8))
        for fold, own in zip(folds, labels, strict=True):
            counts[fold] += np.bincount(own, minlength=8)
        return np.abs(counts / counts.sum(0) - 0.2).max()

    dealt = unevenness(folds_by_group(groups, labels, 5))
    by_chance = [unevenness(rng.permutation(np.arange(60) % 5)) for _ in range(200)]
    assert dealt < min(by_chance)
    assert dealt < 0.1


def test_the_seed_decides_among_groups_of_one_size():
    labels = [np.arange(4)] * 10
    groups = [str(i) for i in range(10)]
    found = [folds_by_group(groups, labels, 5, seed=seed).tolist() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert all(sorted(folds) == sorted(list(range(5)) * 2) for folds in found)


VIDEO = make_videos(videos=1, frames=4)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": np.zeros(4, np.float32)}, r"group 'r0' needs logits \(T, C\)"),
        ({"logits": np.zeros((3, 4), np.float32)}, r"got shapes \[\(3, 4\), \(4,\), \(4,\)\]"),
        ({"positions": np.arange(3.0)}, r"got shapes \[\(4, 4\), \(4,\), \(3,\)\]"),
        ({"logits": np.full((4, 4), np.nan, np.float32)}, "group 'r0' has logits that are NaN or infinite"),
        ({"references": np.array([0, 4, -1, 1])}, r"group 'r0': expected class ids -1 to 3, got \[4\]"),
        ({"references": np.array([0, -2, -1, 1])}, r"got \[-2\]"),
    ],
)
def test_damaged_logits_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(VIDEO, **change)


def test_a_fit_without_enough_groups_is_refused():
    videos = make_videos(videos=4)
    with pytest.raises(ValueError, match=r"at least 2 groups with labels, got \['r0'\]"):
        fit(videos[:2])
    unlabelled = dataclasses.replace(videos[2], references=np.full(120, -1))
    with pytest.raises(ValueError, match="at least 2 groups with labels"):
        fit([*videos[:2], unlabelled])
    with pytest.raises(ValueError, match=r"same classes, got logits of \[3, 4\] classes"):
        fit([*videos, *make_videos(classes=3)])


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ([0, 0, 1], "a fold number for each of 4 videos"),
        ([0, 0, 0, 0], r"two at least that differ, got \[0\]"),
        ([0, 1, 1, 1], "group 'r0' is in two folds"),
    ],
)
def test_folds_that_leak_are_refused(folds, message):
    with pytest.raises(ValueError, match=message):
        cross_fit(make_videos(videos=4), folds)


def test_a_fold_without_labels_is_refused():
    videos = make_videos(videos=6)
    videos[0], videos[1] = (dataclasses.replace(video, references=np.full(120, -1)) for video in videos[:2])
    with pytest.raises(ValueError, match="no frame of fold 0 has a label"):
        cross_fit(videos, [0, 0, 1, 1, 2, 2], half_widths=(0,))


def test_apply_gives_the_labelled_frames_in_order_with_their_positions():
    videos = make_videos(videos=2, frames=30)
    gaps = dataclasses.replace(videos[0], positions=videos[0].positions * 100)
    post = PostProcess("box", 2)
    # Frames a hundred apart have no neighbours.
    soft = scipy.special.softmax(gaps.logits[gaps.references >= 0], -1)
    got = apply(post, [gaps, videos[1]])
    np.testing.assert_allclose(got[: len(soft)], soft, atol=1e-6)
    rows = [apply(post, [video]) for video in (gaps, videos[1])]
    assert np.array_equal(got, np.concatenate(rows))
    assert [len(r) for r in rows] == [int((v.references >= 0).sum()) for v in videos]
    assert not any(np.array_equal(a, b) for a, b in itertools.pairwise(rows))
