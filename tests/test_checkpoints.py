"""The model that comes with the repository: small, honest of its data, and the default of commands."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageClassification

from modeling_fer.cli.options import DEFAULT_MODEL
from modeling_fer.labels import CLASSES

SHIPPED = Path(__file__).parents[1] / "checkpoints" / "abaw-fer-small"


def test_it_is_small_and_in_half_precision():
    weights = SHIPPED / "model.safetensors"
    assert weights.stat().st_size <= 12_000_000
    with safe_open(weights, "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float16}


def test_it_computes_in_single_precision_and_lacks_nothing():
    model, told = AutoModelForImageClassification.from_pretrained(SHIPPED, output_loading_info=True)
    assert model.dtype == torch.float32
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert list(model.config.id2label.values()) == [name for name in CLASSES if name != "Other"]


def test_its_card_says_what_it_may_be_used_for():
    card = (SHIPPED / "README.md").read_text()
    assert "FER2013" in card
    assert "research only" in card
    assert "Art. 5(1)(f)" in card


def test_its_figures_are_of_these_weights():
    metrics = json.loads((SHIPPED / "metrics.json").read_text())
    assert metrics["ece"] < 0.03
    assert metrics["accuracy"] > 1 / 7


def test_colour_is_seen_as_grey():
    model = AutoModelForImageClassification.from_pretrained(SHIPPED).eval()
    size = model.config.image_size
    colour = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    grey = np.repeat(np.asarray(Image.fromarray(colour).convert("L"))[..., None], 3, axis=2)
    both = torch.from_numpy(np.stack([colour, grey])).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        first, second = model(both).logits
    torch.testing.assert_close(first, second, atol=0.05, rtol=0)  # Pillow rounds to whole grey levels


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_commands_take_it_where_no_model_is_named(where, tmp_path):
    assert Path(DEFAULT_MODEL) == SHIPPED
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(tmp_path / "face.png")
    command = [sys.executable, "-m", "modeling_fer.cli", "predict", str(tmp_path / "face.png"), "--json"]
    folder = SHIPPED.parents[1] if where == "here" else tmp_path
    found = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=120)
    probabilities = json.loads(found.stdout)["probabilities"]
    assert set(probabilities) == set(CLASSES) - {"Other"}
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-3)


def test_its_code_is_that_of_the_package():
    for path in sorted(SHIPPED.glob("*_fer.py")):
        assert path.read_text() == (SHIPPED.parents[1] / "modeling_fer" / path.name).read_text(), (
            f"{path} is outdated: cp modeling_fer/*_fer.py {SHIPPED}"
        )
