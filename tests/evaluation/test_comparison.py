"""Paired comparison of two models."""

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from modeling_fer.evaluation.comparison import compare, write_comparison


@pytest.fixture
def faces():
    """Return truth, a poor and a better prediction, and subjects."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 8, 600)
    first, second = (np.where(rng.random(600) < p, truth, rng.integers(0, 8, 600)) for p in (0.3, 0.6))
    return truth, first, second, rng.integers(0, 40, 600)


def test_scores_are_scikit_learns_and_the_interval_holds_the_difference(faces):
    truth, first, second, subjects = faces
    result = compare(truth, first, second, groups=subjects)
    for k, predicted in (("first", first), ("second", second)):
        macro = f1_score(truth, predicted, average="macro", labels=range(8), zero_division=0)
        assert result["macro_f1"][k] == pytest.approx(macro)
        assert result["accuracy"][k] == pytest.approx(accuracy_score(truth, predicted))
    low, high = result["macro_f1"]["interval"]
    assert 0 < low < result["macro_f1"]["difference"] < high
    fear = truth == 3
    assert result["recall"]["Fear"] == [pytest.approx((p[fear] == 3).mean()) for p in (first, second)]


def test_pairing_and_order(faces):
    truth, first, second, _ = faces
    same = compare(truth, first, first)
    assert same["macro_f1"]["interval"] == [0, 0]
    there, back = compare(truth, first, second, seed=3), compare(truth, second, first, seed=3)
    assert there["accuracy"]["interval"] == pytest.approx([-b for b in back["accuracy"]["interval"][::-1]])
    # One subject holds everything: nothing varies.
    low, high = compare(truth, first, second, groups=np.zeros(600))["accuracy"]["interval"]
    assert low == high == pytest.approx(accuracy_score(truth, second) - accuracy_score(truth, first))


def test_unlabelled_rows_do_not_count(faces, tmp_path):
    truth, first, second, subjects = faces
    hidden = np.where(np.arange(600) < 300, -1, truth)
    expected = compare(truth[300:], first[300:], second[300:], groups=subjects[300:])
    assert compare(hidden, first, second, groups=subjects) == expected
    text = write_comparison(tmp_path, expected, ("few labels", "more"))
    assert f"{expected['macro_f1']['difference']:+.3f}" in text
    assert json.loads((tmp_path / "comparison.json").read_text())["second_model"] == "more"
    assert (tmp_path / "comparison.png").stat().st_size > 1000


def test_bad_input(faces):
    truth, first, _, _ = faces
    with pytest.raises(ValueError, match="600 references"):
        compare(truth, first, first[1:])
    with pytest.raises(ValueError, match="no row has a label"):
        compare(np.full(600, -1), first, first)
