"""`fer calibrate`: a temperature fitted on faces that were not learnt from, folded into the weights."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_fer.cli import main
from modeling_fer.data import schema
from modeling_fer.data.augment import Normalize
from modeling_fer.data.collection import expressions_of
from modeling_fer.data.pixels import decode_split
from modeling_fer.evaluation.metrics import compute_metrics
from modeling_fer.labels import CLASSES
from modeling_fer.learning.inference import load_classifier, predict_probabilities


@pytest.fixture
def sure(checkpoint, tmp_path):
    """A run whose model is far too sure of itself."""
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "model")
    weights = load_file(run / "model/model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] *= 8
    save_file(weights, run / "model/model.safetensors", metadata={"format": "pt"})
    (run / "arguments.json").write_text("{}")
    return run


def scores(folder, data):
    model, processor = load_classifier(folder)
    split = schema.load(data, "validation")["validation"]
    pixels = np.array(decode_split(split, processor.size["height"]))
    normalize = Normalize(processor.image_mean, processor.image_std)
    found = predict_probabilities(model, pixels, normalize)
    return compute_metrics(expressions_of(split), found.argmax(1), found, bootstrap_samples=0), found


def test_it_makes_a_model_less_sure_and_changes_no_answer(sure, prepared, tmp_path, capsys):
    out = tmp_path / "final"
    command = ["calibrate", "--model", str(sure / "model"), "--data", str(prepared), "--out", str(out)]
    assert main([*command, "--half"]) == 0
    assert "temperature" in capsys.readouterr().out
    record = json.loads((out / "calibration.json").read_text())
    (before, first), (after, second) = scores(sure / "model", prepared), scores(out / "model", prepared)
    assert record["before"]["nll"] == pytest.approx(before["nll"], rel=1e-4)
    assert record["temperature"] > 1
    assert after["nll"] < before["nll"]
    assert (first.argmax(1) == second.argmax(1)).mean() > 0.9  # half precision may turn a close call
    assert {value.dtype for value in load_file(out / "model/model.safetensors").values()} == {torch.float16}
    assert json.loads((out / "model/config.json").read_text())["dtype"] == "float32"
    assert (out / "arguments.json").exists()  # the run's records come along

    again = tmp_path / "biased"
    assert main([*command[:-1], str(again), "--bias"]) == 0
    record = json.loads((again / "calibration.json").read_text())
    assert set(record["bias"]) == set(CLASSES)
    assert scores(again / "model", prepared)[0]["nll"] <= after["nll"] + 1e-3

    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err
