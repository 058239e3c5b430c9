"""The folder of the Space: whole, and enough for the app to start from in a clean process."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import space
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from test_app import ROOT

from modeling_fer.hub.card import write_card


@pytest.fixture
def model(checkpoint, tmp_path):
    """A model of the test's own, which says how its faces are cut out."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "run/model"))
    config = json.loads((folder / "config.json").read_text()) | {"crop": {"name": "box", "margin": 0.0}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def release(model):
    write_card(model, "org/tiny")
    return model


def test_the_space_is_whole_and_loads_its_own_model(release, tmp_path):
    out = tmp_path / "space"
    assert space.main(["--model", str(release), "--out", str(out)]) == 0
    card = ModelCard.load(out / "README.md").data.to_dict()
    assert card["sdk"] == "gradio"
    assert (out / card["app_file"]).is_file()
    assert f"gradio=={card['sdk_version']}\n" in (ROOT / "constraints.txt").read_text()
    assert len(card["short_description"]) <= 60  # the Hub takes no more
    needed = {Requirement(line).name for line in (out / "requirements.txt").read_text().split("\n") if line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert needed == {
        Requirement(line).name for line in project["dependencies"] + project["optional-dependencies"]["video"]
    }
    assert not list(out.rglob("__pycache__"))

    (out / "face.onnx").write_bytes(b"no detector")
    program = (
        "import json, modeling_fer, recognition\n"
        "recognition.Detector = lambda path: None\n"
        "found = recognition.load(None, 'face.onnx')\n"
        "print(json.dumps([found.name, found.classes, modeling_fer.__file__]))"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FER_", "PYTHON"))}
    done = subprocess.run([sys.executable, "-c", program], cwd=out, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, classes, code = json.loads(done.stdout.strip().split("\n")[-1])
    assert name == space.DEFAULT_MODEL
    assert classes == list(json.loads((release / "config.json").read_text())["id2label"].values())
    assert code.startswith(str(out))  # the Space's own package


def test_a_space_is_not_made_of_a_model_without_a_card_or_over_another(model, tmp_path, capsys):
    out = tmp_path / "space"
    assert space.main(["--model", str(model), "--out", str(out)]) == 2
    assert "has no card" in capsys.readouterr().err
    assert not out.exists()
    write_card(model, "org/tiny")
    out.mkdir()
    assert space.main(["--model", str(model), "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert space.main(["--model", str(tmp_path / "none"), "--out", str(tmp_path / "new")]) == 2
    assert "config.json" in capsys.readouterr().err
