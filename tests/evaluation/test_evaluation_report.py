import hashlib
import json

import numpy as np
import pytest

from modeling_fer.evaluation.metrics import compute_metrics
from modeling_fer.evaluation.report import score_groups, summary, weights_digest, write_report
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


def test_the_digest_of_the_weights_is_kept(scored, tmp_path, monkeypatch):
    references, probabilities, _ = scored
    weights = bytes(range(256)) * 5000
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(weights)
    about = {"model": str(tmp_path / "model"), "split": "test"}
    write_report(tmp_path / "out", references, probabilities, about=about)
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert written["weights"] == hashlib.sha256(weights).hexdigest() == weights_digest(tmp_path / "model")
    assert about.keys() == {"model", "split"}, "ours is not changed"
    monkeypatch.chdir(tmp_path / "model")  # weights that nobody named
    write_report(tmp_path / "out", references, probabilities)
    assert "weights" not in json.loads((tmp_path / "out/metrics.json").read_text())
    assert weights_digest(tmp_path) is None


def test_each_group_of_faces_is_scored_for_itself(scored, tmp_path):
    references, probabilities, people = scored
    references = np.where(np.arange(240) % 7 == 0, -1, references)
    ages = np.repeat(["young", "old", None], [80, 120, 40])  # 2, 3 and 1 people
    ages[references == -1] = "nobody's"
    eyes = [float("nan") if i % 3 else "" for i in range(240)]
    columns = {"age": ages, "eyes": eyes}
    metrics = write_report(
        tmp_path, references, probabilities, groups=people, unit="subjects", per_group=columns
    )
    written = json.loads((tmp_path / "metrics.json").read_text())["per_group"]
    assert written == metrics["per_group"]
    assert list(written["age"]) == ["not stated", "old", "young"]
    keys = ("macro_f1_present", "accuracy", "balanced_accuracy")
    for name, row in written["age"].items():
        rows = ages == (None if name == "not stated" else name)
        units = None if name == "not stated" else np.array(people)[rows]
        expected = compute_metrics(
            references[rows], probabilities[rows].argmax(1), groups=units, bootstrap_samples=1000
        )
        assert row["samples"] == (references[rows] >= 0).sum()
        assert {key: row[key] for key in keys} == {key: expected[key] for key in keys}
        if name == "not stated":
            assert "interval" not in row, "one person cannot be resampled"
        else:
            assert row["interval"] == {key: expected["interval"][key] for key in keys}
    assert list(written["eyes"]) == ["not stated"]
    row = written["age"]["old"]
    shown = (
        f"  old: macro F1 {row['macro_f1_present']:.3f} over classes present, accuracy {row['accuracy']:.3f}"
    )
    assert "by age:\n  not stated: macro F1 " in summary(metrics)
    assert f"{shown}, {row['samples']} faces" in summary(metrics)
    with pytest.raises(ValueError, match="groups of faces: expected 240 values, a row each, got 2"):
        score_groups(references, probabilities.argmax(1), ["a", "b"])
