"""The comparison with other packages: class orders, files between environments, report against JSON."""

import copy
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import accuracy_score, f1_score

from benchmarks import peers
from modeling_fer.data.prepare import prepare
from modeling_fer.data.sources.folder import FolderOptions
from modeling_fer.labels import class_id

RESULT = json.loads(peers.RESULTS.read_text(encoding="utf-8"))
# Our ids in the order of each package's outputs, as read in its code.
NATIVE = {
    "fer_lite": [1, 2, 3, 4, 5, 6, 0],
    "fer_keras": [1, 2, 3, 4, 5, 6, 0],
    "human": [1, 2, 3, 4, 5, 6, 0],
    "facial_emotion_recognition": [1, 2, 3, 4, 5, 6, 0],
    "facex": [1, 2, 3, 4, 0, 5, 6],
    "face_api": [0, 4, 5, 1, 3, 2, 6],
}


@pytest.fixture(scope="module")
def predict():
    spec = importlib.util.spec_from_file_location("predict", peers.PREDICT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@given(st.permutations(range(7)), st.sampled_from([[], ["Other"], ["contempt"]]))
def test_classes_are_matched_by_name_in_any_order(order, more):
    spoken = ["neutral", "angry", "disgusted", "fearful", "happy", "sad", "surprised"]
    ours = np.random.default_rng(0).dirichlet(np.ones(7), size=5)
    values = np.concatenate([ours[:, order] / 2, np.full((5, len(more)), 0.5)], axis=1)
    found = peers.seven_classes([spoken[i] for i in order] + more, values)
    np.testing.assert_allclose(found, ours)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["neutral", "anger", "disgust", "fear", "happiness", "sadness"], "expected each of"),
        (["neutral", "anger", "disgust", "fear", "happiness", "sadness", "sad"], "expected each of"),
        (["neutral", "anger", "disgust", "fear", "happiness", "sadness", "bored"], "unknown expression"),
    ],
)
def test_other_classes_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        peers.seven_classes(names, np.ones((2, len(names))))


def test_every_order_is_that_of_the_package():
    found = {peer: [class_id(name) for name in row["classes"]] for peer, row in RESULT["measured"].items()}
    assert {peer: ids for peer, ids in found.items() if peer != peers.OURS} == NATIVE
    assert sorted(found[peers.OURS])[:7] == list(range(7))


@pytest.mark.parametrize("peer", RESULT["measured"])
def test_no_other_order_would_fit_the_faces_better(peer):
    counts = np.array(RESULT["measured"][peer]["scores"]["fer2013"]["confusion_matrix"])
    _, best = linear_sum_assignment(-counts)
    assert best.tolist() == list(range(7))


def test_predictions_come_back_in_our_order(tmp_path):
    path = tmp_path / "fer2013.csv"
    path.write_text(
        "row,angry,disgust,fear,happy,sad,surprise,neutral\n0,.6,0,0,.4,0,0,0\n1,0,0,0,0,0,.25,.75\n"
    )
    expected = [[0, 0.6, 0, 0, 0.4, 0, 0], [0.75, 0, 0, 0, 0, 0, 0.25]]
    np.testing.assert_allclose(peers.read_predictions(path, 2), expected)
    with pytest.raises(ValueError, match=r"fer2013.csv: expected rows 0 to 2 in order"):
        peers.read_predictions(path, 3)
    path.write_text(path.read_text().replace("happy", "bored"))
    with pytest.raises(ValueError, match=r"fer2013.csv: unknown expression 'bored'"):
        peers.read_predictions(path, 2)
    with pytest.raises(FileNotFoundError, match=r"run `sh benchmarks/peers/run.sh MODEL`"):
        peers.read_predictions(tmp_path / "none.csv", 2)


def test_faces_reach_the_peers_as_they_are(tmp_path, predict):
    rng, root = np.random.default_rng(0), tmp_path / "source"
    pixels = rng.integers(0, 256, (4, 20, 20), dtype=np.uint8)
    root.mkdir()
    lines = ["file_name,subject,expression"]
    for i, (subject, name) in enumerate([("a", "happy"), ("a", "sad"), ("", "fear"), ("", "anger")]):
        Image.fromarray(pixels[i]).save(root / f"{i}.png")
        lines.append(f"{i}.png,{subject},{name}")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    options = FolderOptions(str(root), validation_fraction=0, test_fraction=0)
    prepare("folder", options, tmp_path / "data", show_progress=False)

    faces = peers.read_set(tmp_path / "data", "train")
    np.testing.assert_array_equal(faces.crops, pixels)
    assert faces.references.tolist() == [4, 5, 3, 1]
    assert len(set(faces.subjects)) == 3  # whoever is unknown is somebody else
    peers.write_faces(faces.crops, tmp_path / "faces" / "small")
    np.testing.assert_array_equal(predict.read_faces(tmp_path / "faces")["small"], pixels)

    Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(root / "0.png")
    prepare("folder", options, tmp_path / "coloured", show_progress=False)
    with pytest.raises(ValueError, match="expected grey faces"):
        peers.read_set(tmp_path / "coloured", "train")
    with pytest.raises(SystemExit, match=r"write them with `python -m benchmarks.peers faces`"):
        predict.read_faces(tmp_path / "nowhere")


def test_scores_equal_scikit_learn():
    rng = np.random.default_rng(0)
    truth, values = rng.integers(0, 7, 300), rng.dirichlet(np.ones(7), size=300)
    scores = peers.score(peers.Faces(np.zeros((300, 8, 8), np.uint8), truth, None), values)
    assert scores["accuracy"] == pytest.approx(accuracy_score(truth, values.argmax(1)))
    assert scores["macro_f1"] == pytest.approx(f1_score(truth, values.argmax(1), average="macro"))
    low, high = scores["accuracy_interval"]
    assert low < scores["accuracy"] < high


def test_time_is_that_of_the_fastest_call_by_face(predict, monkeypatch):
    clock, calls = [0.0], []

    def classify(faces):
        calls.append(len(faces))
        clock[0] += len(faces) * (0.010 if len(calls) % 3 else 0.004)

    monkeypatch.setattr(predict.time, "perf_counter", lambda: clock[0])
    found = predict.milliseconds(classify, np.zeros((70, 4, 4), np.uint8), seconds=1.0)
    assert found == {"1": pytest.approx(4.0), "64": pytest.approx(4.0)}
    assert set(calls) == {1, 64}


def test_a_peer_that_is_not_installed_is_named(predict):
    with pytest.raises(SystemExit, match="no_such_package is not installed here"):
        predict.package("no_such_package")


def test_the_report_is_what_its_json_gives():
    assert RESULT["notes"] == yaml.safe_load(peers.NOTES.read_text(encoding="utf-8"))
    assert list(RESULT["measured"]) == list(RESULT["notes"]["measured"])
    assert peers.render(RESULT) == peers.REPORT.read_text(encoding="utf-8")


def test_the_report_follows_its_json():
    other = copy.deepcopy(RESULT)
    other["measured"][peers.OURS]["scores"]["fer2013"]["accuracy"] = 0.123
    other["measured"]["facex"]["ms_per_face"]["64"] = 987.654
    other["measured"]["facex"]["load"] = 99.9
    text = peers.render(other)
    assert "| 12.3 (" in text
    assert "| 987.65 \\* |" in text
    assert "load average up to 99.9" in text
    assert all(text_there not in peers.render(RESULT) for text_there in ("| 12.3 (", "987.65", "99.9"))


def test_scripts_and_readers_agree_on_what_is_installed():
    """The pins of run.sh are those that the scripts state, and those of the peers that were measured."""
    folder = Path(peers.PREDICT).parent
    run = (folder / "run.sh").read_text()
    for row in (row for peer, row in RESULT["measured"].items() if peer != peers.OURS):
        name, version = row["package"].rsplit(" ", 1)
        pin = f"{name}@{version}" if name.startswith("@") else f"{name}=={version}"
        script = "predict.mjs" if name.startswith("@") else "predict.py"
        assert pin in run
        assert pin in (folder / script).read_text()
