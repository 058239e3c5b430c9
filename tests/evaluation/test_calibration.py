import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from modeling_fer.evaluation.calibration import fit_bias_corrected
from modeling_fer.evaluation.tuning import fit_temperature


def nll(logits, truth):
    return -log_softmax(logits, axis=1)[np.arange(len(truth)), truth].mean()


@pytest.fixture
def shifted():
    """Logits of a model 1.6 times too sure, of labels that give some classes more often than it learnt."""
    rng = np.random.default_rng(0)
    bias = np.array([0.8, -0.3, 0.0, -0.5])
    logits = 2 * rng.normal(size=(40_000, 4))
    chances = softmax(logits / 1.6 + bias, axis=1)
    truth = (chances.cumsum(1) < rng.random((len(logits), 1))).sum(1)
    return logits, truth, bias


def test_what_shifted_the_labels_is_found(shifted):
    logits, truth, bias = shifted
    temperature, found = fit_bias_corrected(logits, truth)
    assert temperature == pytest.approx(1.6, abs=0.05)
    np.testing.assert_allclose(found, bias, atol=0.05)
    assert found.mean() == pytest.approx(0, abs=1e-12)


def test_it_is_at_least_as_likely_as_a_temperature_alone(shifted):
    logits, truth, _ = shifted
    temperature, bias = fit_bias_corrected(logits, truth)
    alone = fit_temperature(logits, truth)
    assert nll(logits / temperature + bias, truth) < nll(logits / alone, truth) - 0.01


def test_the_order_of_classes_does_not_matter(shifted):
    logits, truth, _ = shifted
    order = np.array([2, 0, 3, 1])
    first = fit_bias_corrected(logits, truth)
    second = fit_bias_corrected(logits[:, order], np.argsort(order)[truth])
    assert second[0] == pytest.approx(first[0], rel=1e-3)
    np.testing.assert_allclose(second[1], first[1][order], atol=1e-3)


def test_a_class_that_never_occurs_stays_finite():
    logits = np.random.default_rng(1).normal(size=(50, 3))
    temperature, bias = fit_bias_corrected(logits, np.arange(50) % 2)
    assert np.isfinite([temperature, *bias]).all()


@pytest.mark.parametrize(
    ("logits", "truth"), [(np.zeros((3, 2)), [0, 1]), (np.zeros((0, 2)), []), ([1.0], [0])]
)
def test_shapes_that_do_not_fit(logits, truth):
    with pytest.raises(ValueError, match="expected logits"):
        fit_bias_corrected(np.asarray(logits), np.asarray(truth))
