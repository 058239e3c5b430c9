import functools
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_fer.evaluation.bootstrap import resample_examples, resample_groups
from modeling_fer.evaluation.metrics import (
    CLASS_SCORES,
    INTERVAL_SCORES,
    FerMetric,
    class_scores,
    compute_metrics,
    confusion_matrix,
    confusion_scores,
    reliability_bins,
    write_metrics,
    write_whole,
)
from modeling_fer.labels import CLASSES

pytestmark = pytest.mark.filterwarnings(
    "ignore:y_pred contains classes not in y_true", "ignore:A single label was found"
)


def random_case(seed, n=60, classes=8, present=None):
    """References over the first `present` classes, predictions over all, and probabilities."""
    rng = np.random.default_rng([11, seed])
    references = rng.integers(0, present or classes, n)
    probabilities = rng.dirichlet(np.full(classes, 0.7), n)
    predictions = np.where(rng.random(n) < 0.5, references, rng.integers(0, classes, n))
    return references, predictions, probabilities


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 80), present=st.integers(1, 8))
def test_every_score_equals_scikit_learn(seed, n, present):
    y, p, q = random_case(seed, n, present=present)
    got = compute_metrics(y, p, q, bootstrap_samples=0)
    labels = list(range(8))
    there = sorted(set(y.tolist()))
    f1 = {"average": "macro", "zero_division": 0}
    assert got["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(y, p, labels=labels, **f1))
    assert got["macro_f1_present"] == pytest.approx(sklearn.metrics.f1_score(y, p, labels=there, **f1))
    assert got["classes_present"] == [CLASSES[i] for i in there]
    assert got["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(y, p))
    assert got["balanced_accuracy"] == pytest.approx(sklearn.metrics.balanced_accuracy_score(y, p))
    recall = sklearn.metrics.recall_score(y, p, labels=there, average=None)
    assert got["worst_class_recall"] == pytest.approx(recall.min())
    assert got["nll"] == pytest.approx(sklearn.metrics.log_loss(y, q, labels=labels))
    assert got["confusion_matrix"] == sklearn.metrics.confusion_matrix(y, p, labels=labels).tolist()
    report = sklearn.metrics.classification_report(
        y, p, labels=labels, target_names=CLASSES, zero_division=0, output_dict=True
    )
    for name in CLASSES:
        expected = {k.replace("f1-score", "f1"): v for k, v in report[name].items()}
        assert got["per_class"][name] == pytest.approx(expected)
    assert got["samples"] == n


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), present=st.integers(1, 8))
def test_scores_of_a_confusion_matrix_equal_the_scores_of_the_rows(seed, present):
    y, p, _ = random_case(seed, present=present)
    expected = compute_metrics(y, p, bootstrap_samples=0)
    matrices = np.stack([confusion_matrix(y, p, 8), np.zeros((8, 8), np.int64)])
    for name, values in confusion_scores(matrices).items():
        assert values.tolist() == pytest.approx([expected[name], 0])


def test_a_class_absent_everywhere_counts_zero_under_the_abaw_rule_only():
    got = compute_metrics([0, 1, 1], [0, 1, 1], class_names=("a", "b", "c", "d"), bootstrap_samples=50)
    assert (got["macro_f1"], got["macro_f1_present"]) == (0.5, 1.0)
    assert got["interval"]["accuracy"] == [1.0, 1.0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), ignored=st.integers(1, 40), grouped=st.booleans())
def test_rows_without_a_label_never_count(seed, ignored, grouped):
    y, p, q = random_case(seed)
    rng = np.random.default_rng([12, seed])
    videos = np.concatenate([[0, 1], rng.integers(0, 6, len(y) - 2)])
    more = {"groups": videos} if grouped else {}
    expected = compute_metrics(y, p, q, bootstrap_samples=30, **more)
    # Rubbish in the other columns: padded frames hold whatever the padding left there.
    place = rng.integers(0, len(y) + 1, ignored)
    y, p = np.insert(y, place, -1), np.insert(p, place, rng.choice([-1, 3, 99], ignored))
    q = np.insert(q, place, np.nan, axis=0)
    if grouped:
        more = {"groups": np.insert(videos, place, rng.integers(0, 9, ignored))}
    assert compute_metrics(y, p, q, bootstrap_samples=30, **more) == expected
    assert confusion_matrix(y, p, 8).tolist() == expected["confusion_matrix"]
    assert reliability_bins(y, q).ece == expected["ece"]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(8)))
def test_permuting_the_classes_permutes_everything(seed, order):
    y, p, q = random_case(seed, present=6)
    order = np.asarray(order)  # new id -> old id
    new = np.argsort(order)
    before = compute_metrics(y, p, q, bootstrap_samples=0)
    names = [CLASSES[i] for i in order]
    after = compute_metrics(new[y], new[p], q[:, order], class_names=names, bootstrap_samples=0)
    matrix = np.asarray(before.pop("confusion_matrix"))
    assert after.pop("confusion_matrix") == matrix[np.ix_(order, order)].tolist()
    assert set(before.pop("classes_present")) == set(after.pop("classes_present"))
    before_classes, after_classes = before.pop("per_class"), after.pop("per_class")
    for name in CLASSES:
        assert after_classes[name] == pytest.approx(before_classes[name])
    assert after == pytest.approx(before)


def test_the_result_is_plain_json():
    y, p, q = random_case(3)
    got = compute_metrics(y.astype(np.int8), p.tolist(), q.astype(np.float32), groups=y.astype(str))
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert got["bootstrap"] == {"samples": 1000, "seed": 0, "unit": "group"}


def width(result, name):
    low, high = result["interval"][name]
    assert low <= result[name] <= high
    return high - low


def test_interval_covers_the_estimate_and_shrinks_with_the_root_of_n():
    y, p, _ = random_case(4, n=800)
    small, large = compute_metrics(y, p), compute_metrics(np.tile(y, 16), np.tile(p, 16))
    for name in INTERVAL_SCORES:
        assert width(large, name) == pytest.approx(width(small, name) / 4, rel=0.15)
    assert compute_metrics(y, p) == small
    assert compute_metrics(y, p, seed=1)["interval"] != small["interval"]


def test_multinomial_bootstrap_agrees_with_drawing_rows():
    y, p, _ = random_case(5, n=120, present=7)
    got = compute_metrics(y, p, bootstrap_samples=4000)["interval"]
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(y), (4000, len(y)))
    replicates = np.stack([confusion_matrix(y[r], p[r], 8) for r in rows[:20]])
    fast = np.zeros((4000, 64), np.int64)
    np.add.at(fast, (np.arange(4000)[:, None], (y * 8 + p)[rows]), 1)
    assert (fast[:20].reshape(20, 8, 8) == replicates).all()
    for name, values in confusion_scores(fast.reshape(-1, 8, 8)).items():
        low, high = got[name]
        spread = values.std()
        assert (low + high) / 2 == pytest.approx(np.percentile(values, [2.5, 97.5]).mean(), abs=0.15 * spread)
        assert (high - low) / (2 * 1.96) == pytest.approx(spread, rel=0.1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), present=st.integers(1, 8))
def test_scores_of_classes_equal_scikit_learn_for_any_number_of_matrices(seed, present):
    y, p, _ = random_case(seed, present=present)
    matrix = confusion_matrix(y, p, 8)
    got = class_scores(np.stack([matrix, np.zeros((8, 8), np.int64)]))
    expected = sklearn.metrics.precision_recall_fscore_support(y, p, labels=range(8), zero_division=0)
    for name, values in zip(CLASS_SCORES, expected[:3], strict=True):
        assert got[name][0] == pytest.approx(values)
        assert not got[name][1].any()


@pytest.mark.parametrize("grouped", [False, True])
def test_intervals_of_classes_are_those_of_scikit_learn_on_the_same_draws(grouped):
    y, p, _ = random_case(9, n=120, present=5)
    units = np.arange(120) // 4
    names = [f"{unit:02d}" for unit in units]  # in the order of their numbers
    got = compute_metrics(y, p, groups=names if grouped else None, bootstrap_samples=150)["per_class"]
    rng = np.random.default_rng(0)
    if grouped:
        drawn = resample_groups(y * 8 + p, units, 8, 150, rng)
    else:
        drawn = resample_examples(confusion_matrix(y, p, 8), 150, rng)
    truth, predicted = np.divmod(np.arange(64), 8)
    score = functools.partial(
        sklearn.metrics.precision_recall_fscore_support, labels=range(8), zero_division=0
    )
    scores = [score(truth, predicted, sample_weight=matrix.ravel())[:3] for matrix in drawn]
    bounds = np.percentile(np.array(scores), [2.5, 97.5], axis=0)  # (2, 3, 8)
    for k, key in enumerate(CLASS_SCORES):
        for i, name in enumerate(CLASSES[:5]):
            assert got[name][f"{key}_interval"] == pytest.approx(bounds[:, k, i])
        assert not [name for name in CLASSES[5:] if f"{key}_interval" in got[name]], "nothing to draw"


def test_group_bootstrap_counts_videos_not_frames():
    y, p, _ = random_case(6, n=100)
    frames = 25  # every video repeats one row 25 times: 2500 frames that hold 100 rows' worth of evidence
    videos = np.repeat(np.arange(100), frames)
    singly = compute_metrics(y, p, bootstrap_samples=2000)
    by_video = compute_metrics(
        np.repeat(y, frames), np.repeat(p, frames), groups=videos, bootstrap_samples=2000
    )
    by_frame = compute_metrics(np.repeat(y, frames), np.repeat(p, frames), bootstrap_samples=2000)
    for name in INTERVAL_SCORES:
        assert width(by_video, name) == pytest.approx(width(singly, name), rel=0.15)
        assert width(by_video, name) > 3 * width(by_frame, name)


def test_group_bootstrap_in_blocks_is_the_same_bootstrap(monkeypatch):
    y, p, _ = random_case(7)
    whole = compute_metrics(y, p, groups=np.arange(60) % 9, bootstrap_samples=100)
    monkeypatch.setattr("modeling_fer.evaluation.bootstrap.DRAWS_AT_ONCE", 70)
    assert compute_metrics(y, p, groups=np.arange(60) % 9, bootstrap_samples=100) == whole


def test_ece_closed_forms():
    half = np.array([0, 1] * 50)
    calibrated = np.full((100, 2), 0.5)
    assert reliability_bins(half, calibrated).ece == pytest.approx(0)
    sure = np.tile([1.0, 0.0], (100, 1))
    assert reliability_bins(half, sure).ece == pytest.approx(0.5)
    assert reliability_bins(np.zeros(100, int), sure).ece == 0
    # 0.8 right 60 of 100 times and 0.6 right 60 of 100 times: half the rows are off by 0.2
    rows = np.repeat([[0.8, 0.2], [0.6, 0.4]], 100, axis=0)
    truth = np.tile(np.repeat([0, 1], [60, 40]), 2)
    assert reliability_bins(truth, rows).ece == pytest.approx(0.1)


def test_reliability_bins_hold_their_upper_bound():
    bins = reliability_bins([0, 0, 1, -1], [[0.5, 0.5], [0.75, 0.25], [0.8, 0.2], [1, 0]], bins=4)
    assert bins.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert bins.counts.tolist() == [0, 1, 1, 1]
    assert bins.confidence.tolist() == pytest.approx([0, 0.5, 0.75, 0.8])
    assert bins.accuracy.tolist() == [0, 1, 1, 0]
    assert bins.ece == pytest.approx((0.5 + 0.25 + 0.8) / 3)


GOOD = {"references": [0, 1], "predictions": [0, 0], "class_names": ("a", "b")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"references": [], "predictions": []}, "expected some other than -1, got none in 0 rows"),
        ({"references": [-1, -1]}, "none in 2 rows"),
        ({"references": [0, 2]}, r"references.*expected ids 0 to 1, got \[2\]"),
        ({"references": [0, -2]}, r"references.*expected ids 0 to 1, got \[-2\]"),
        ({"references": [0.0, 1.0]}, "references: expected whole-number class ids, got .* float64"),
        ({"references": [[0], [1]]}, r"references: expected shape \(N,\), got \(2, 1\)"),
        ({"predictions": [0]}, "predictions: expected 2 rows, one per reference, got 1"),
        ({"predictions": [0, -1]}, r"predictions: expected ids 0 to 1, got \[-1\]"),
        ({"probabilities": [[0.5, 0.5]]}, "probabilities: expected 2 rows.*got 1"),
        ({"probabilities": [[0.5, 0.5, 0]] * 2}, r"expected shape \(N, 2\), got \(2, 3\)"),
        ({"probabilities": [[0.5, 0.5], [np.nan, 1]]}, "finite values, got 1 rows"),
        ({"probabilities": [[0.5, 0.5], [0.5, 0.6]]}, "sum to 1, got a row that sums to 1.1"),
        ({"probabilities": [[0.5, 0.5], [-1, 2]]}, r"values in \[0, 1\], not logits, got -1"),
        ({"probabilities": [[0.5, 0.5]] * 2, "bins": 0}, "bins: expected 1 or more, got 0"),
        ({"groups": ["v"]}, "groups: expected 2 rows, one per reference, got 1"),
        ({"groups": ["v", None]}, "groups: expected an id for every labelled row, got 1 rows without"),
        ({"groups": ["v", "v"]}, r"at least 2 groups to resample, got 1 \('v'\)"),
        ({"class_names": ("a", "a")}, "at least 2 different names"),
        ({"bootstrap_samples": -1}, "expected 0 or more, got -1"),
    ],
)
def test_errors_say_what_was_expected_and_what_was_got(change, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(**(GOOD | change))


def test_an_empty_confusion_matrix_is_zero():
    assert confusion_matrix([], [], 3).tolist() == [[0] * 3] * 3
    assert confusion_matrix([-1], [7], 3).tolist() == [[0] * 3] * 3


def test_metric_object_gives_the_same_as_the_function():
    y, p, q = random_case(8)
    y[:5] = -1
    expected = compute_metrics(y, p, q)
    metric = FerMetric()
    assert metric.compute(references=y, predictions=p, probabilities=q) == expected
    for start in range(0, 60, 25):
        metric.add_batch(references=y[start : start + 25], predictions=p[start : start + 25])
    assert metric.compute(probabilities=q) == expected
    with pytest.raises(ValueError, match=r"sums to 1\.1"):
        metric.compute(references=[0], predictions=[0], probabilities=[[1.1] + [0.0] * 7])
    assert metric.compute(references=y, predictions=p, probabilities=q) == expected


def test_metric_object_needs_no_network_and_leaves_no_files(tmp_path):
    code = """
        import socket
        def refuse(*args, **kwargs):
            raise AssertionError("the metric reached for the network")
        socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
        from modeling_fer.evaluation.metrics import FerMetric
        metric = FerMetric()
        metric.add_batch(references=[0, 1, -1], predictions=[0, 1, 2])
        print(metric.compute(bootstrap_samples=10)["macro_f1"])
    """
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 0.25
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == []
    assert not (tmp_path / "home" / "metrics" / "fer_metric").exists()


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "metrics.json"
    write_metrics({"macro_f1": 0.5}, path)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_metrics({"macro_f1": float("nan")}, path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"half")
    assert json.loads(path.read_text()) == {"macro_f1": 0.5}
    assert [f.name for f in path.parent.iterdir()] == ["metrics.json"]
