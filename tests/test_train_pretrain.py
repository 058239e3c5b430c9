"""Masked autoencoding through the front door: runs, resumes, processes, and what starts from them."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTModel

import train
from modeling_fer import FerForImageClassification
from modeling_fer.data import schema
from modeling_fer.learning.command_line import parse_arguments
from tests.runs import in_this_process
from tests.test_train import STEPS, TWO_PROCESSES, assert_same_run, command, environment, history, run

PRETRAIN = {"stage": "pretrain", "decoder_hidden_size": 8, "decoder_layers": 1, "augmentation": "crop"}
EXACT = {"augmentation": "none", "erasing": 0, "precision": "no"}


@pytest.fixture(scope="module", autouse=True)
def as_in_a_process_of_its_own():
    """Runs inside this process spare its start."""
    with in_this_process():
        yield


def run_here(data, out, **options):
    flags = command(data, out, **{**PRETRAIN, **options})[2:]
    return train.train(parse_arguments([str(flag) for flag in flags]))


def losses(out):
    return [row["loss"] for row in history(out) if "loss" in row]


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("pretrain") / "whole"
    run_here(prepared, out)
    return out


def test_leaves_the_best_encoder_by_explained_variance_and_pictures(finished):
    judged = {row["step"]: row for row in history(finished) if "validation/knn_probe" in row}
    assert list(judged) == [4, 8, 12]
    assert all(0 <= row["validation/linear_probe"] <= 1 for row in judged.values())
    state = json.loads((finished / f"checkpoints/step_{STEPS:08d}/state.json").read_text())
    explained = {step: row["validation/explained_variance"] for step, row in judged.items()}
    assert state["best"] == max(explained.values()) == explained[state["best_step"]]
    assert json.loads((finished / "model/config.json").read_text())["model_type"] == "vit"
    assert not [name for name in load_file(finished / "model/model.safetensors") if "decoder" in name]
    assert Image.open(finished / "model/reconstructions.png").size == (1500, 495)
    assert min(Image.open(finished / "learning_curve.png").size) > 800, "two panels"


def test_labels_change_nothing_that_is_learnt(finished, prepared, tmp_path):
    data = DatasetDict(schema.load(prepared))
    (tmp_path / "data/data").mkdir(parents=True)
    for split, rows in data.items():
        unlabelled = rows.map(lambda row: {**row, "expression": -1})
        unlabelled.to_parquet(tmp_path / f"data/data/{split}-00000-of-00001.parquet")
    run_here(tmp_path / "data", tmp_path / "run")
    assert losses(tmp_path / "run") == losses(finished)
    ours, theirs = (load_file(path / "model/model.safetensors") for path in (tmp_path / "run", finished))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_killed_at_a_random_step_and_resumed_is_uninterrupted(finished, prepared, tmp_path):
    out, step = tmp_path / "killed", random.Random(0).randrange(4, STEPS - 1)
    process = subprocess.Popen(
        command(prepared, out, **PRETRAIN),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    rows = out / "history.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if rows.exists() and rows.read_text().count('"loss"') >= step:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it must have been killed in the middle"
    assert list((out / "checkpoints").iterdir())
    run_here(prepared, out, resume="auto")
    assert_same_run(finished, out)


def test_stage_image_starts_from_it(finished, prepared, tmp_path):
    options = {"stage": "image", "encoder": finished / "model", "image_size": 0, "max_steps": 1}
    still = {"learning_rate": 1e-30, "weight_decay": 0, "ema_decay": 0}
    run_here(prepared, tmp_path / "image", **options, **still)
    before = ViTModel.from_pretrained(finished / "model", add_pooling_layer=False).state_dict()
    model = FerForImageClassification.from_pretrained(tmp_path / "image/model")
    after = model.fer.encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[name], value, rtol=0, atol=1e-20) for name, value in before.items())
    assert before["layers.0.mlp.fc1.weight"].std() > 0.1, "weights, not zeros"


def test_two_processes_see_what_one_sees(prepared, tmp_path):
    """With all patches hidden: where masks are random each process draws its own, as it does its views."""
    options = {**EXACT, "mask_ratio": 1.0, "max_steps": 6}
    run(prepared, tmp_path / "two", launcher=TWO_PROCESSES, **{**PRETRAIN, **options})
    assert (tmp_path / "two/checkpoints/step_00000006/own_1.pt").exists(), "one process only"
    run_here(prepared, tmp_path / "one", **options)
    rows = [history(tmp_path / name) for name in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], abs=2e-5) for key in a)
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    gaps = {key: (a[key] - b[key]).abs().max().item() for key in a}
    far = {key: gap for key, gap in gaps.items() if gap > 1e-5}
    assert all(key.endswith(("key.bias", "k_proj.bias")) for key in far), far
    assert max(gaps.values()) < 1e-3, far
