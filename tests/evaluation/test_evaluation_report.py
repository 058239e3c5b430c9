import json

import numpy as np
import pytest

from modeling_fer.evaluation.metrics import compute_metrics
from modeling_fer.evaluation.report import summary, write_report
from modeling_fer.labels import CLASSES


@pytest.fixture
def scored():
    """Labels and probabilities of 6 people with 40 rows each; people differ, the rows of one hardly do."""
    rng = np.random.default_rng(0)
    references = rng.integers(0, 8, 240)
    groups = np.repeat([f"p{number}" for number in range(6)], 40)
    hits = rng.random(240) < np.repeat([0.1, 0.9, 0.2, 0.8, 0.1, 0.9], 40)
    guesses = np.where(hits, references, (references + 1) % 8)
    return references, np.eye(8)[guesses] * 0.92 + 0.01, groups.tolist()


def test_groups_are_resampled_and_named(scored, tmp_path):
    references, probabilities, groups = scored
    metrics = write_report(tmp_path / "by", references, probabilities, groups=groups, unit="subjects")
    expected = compute_metrics(references, probabilities.argmax(1), probabilities, groups=groups)
    assert metrics["interval"] == expected["interval"]
    written = json.loads((tmp_path / "by/metrics.json").read_text())
    assert written == metrics
    assert written["bootstrap"] == {"samples": 1000, "seed": 0, "unit": "subjects"}
    low, high = metrics["interval"]["macro_f1"]
    assert f"(95 % interval over subjects {low:.3f} to {high:.3f})" in summary(metrics)

    single = write_report(tmp_path / "single", references, probabilities)
    assert single["bootstrap"]["unit"] == "images"
    assert "(95 % interval over images " in summary(single)
    width, narrow = (np.ptp(found["interval"]["accuracy"]) for found in (metrics, single))
    assert width > 2 * narrow


def test_absent_classes_are_named(scored, tmp_path):
    references, probabilities, _ = scored
    full = summary(write_report(tmp_path, references, probabilities))
    assert "no rows" not in full
    gone = np.isin(references, [CLASSES.index("Anger"), CLASSES.index("Other")])
    metrics = write_report(tmp_path, np.where(gone, -1, references), probabilities)
    score = metrics["macro_f1_present"]
    assert f"no rows of Anger, Other; macro F1 {score:.3f} over the 6 classes present" in summary(metrics)
