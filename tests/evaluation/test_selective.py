import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_fer.evaluation.selective import risk_coverage


def table(confidences, classes=3):
    """Rows whose first class has that probability, the others the rest in even parts."""
    first = np.asarray(confidences, dtype=float)
    rest = np.repeat((1 - first)[:, None] / (classes - 1), classes - 1, axis=1)
    return np.concatenate([first[:, None], rest], axis=1)


def test_a_curve_by_hand():
    found = risk_coverage([0, 1, 0, 1, -1], table([0.9, 0.8, 0.7, 0.6, 0.99]))
    np.testing.assert_allclose(found.coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(found.accuracy, [1, 1 / 2, 2 / 3, 1 / 2])
    np.testing.assert_allclose(found.threshold, [0.9, 0.8, 0.7, 0.6])
    assert found.aurc == pytest.approx(1 - (1 + 1 / 2 + 2 / 3 + 1 / 2) / 4)
    told = found.summary((1.0, 0.5, 0.4))
    assert told["coverage"] == [1.0, 0.5, 0.5]
    np.testing.assert_allclose(told["accuracy"], [1 / 2, 1 / 2, 1 / 2])
    np.testing.assert_allclose(told["threshold"], [0.6, 0.8, 0.8])


def test_equal_confidence_counts_with_its_mean():
    found = risk_coverage([0, 1, 1, 0], table([0.7] * 4))
    np.testing.assert_allclose(found.accuracy, [0.5] * 4)
    told = risk_coverage([0, 1, 1, 0, 0], table([0.7] * 4 + [0.9])).summary((0.5, 0.2))
    assert told["coverage"] == [1.0, 0.2]  # at 0.7 all are answered
    assert told["threshold"] == [0.7, 0.9]


cases = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([0.4, 0.5, 0.6, 0.7, 0.9])), min_size=1, max_size=40
)


@given(cases, st.randoms())
def test_the_order_of_examples_does_not_matter(rows, random):
    shuffled = random.sample(rows, len(rows))
    curves = [risk_coverage([c for c, _ in part], table([p for _, p in part])) for part in (rows, shuffled)]
    np.testing.assert_allclose(curves[0].accuracy, curves[1].accuracy, atol=1e-12)
    np.testing.assert_allclose(curves[0].threshold, curves[1].threshold)


@given(cases)
def test_all_answered_is_plain_accuracy(rows):
    found = risk_coverage([c for c, _ in rows], table([p for _, p in rows]))
    assert found.accuracy[-1] == pytest.approx(np.mean([c == 0 for c, _ in rows]))
    assert found.threshold[-1] == pytest.approx(min(p for _, p in rows))
    assert np.all(np.diff(found.threshold) <= 0)
    assert -1e-12 <= found.aurc <= 1 + 1e-12


@pytest.mark.parametrize(
    ("references", "probabilities", "message"),
    [([0, 1], table([0.5]), "expected references"), ([-1], table([0.5]), "no row has a label")],
)
def test_input_that_does_not_fit(references, probabilities, message):
    with pytest.raises(ValueError, match=message):
        risk_coverage(references, probabilities)
