"""Pushing from the command line: at the end of training, and by `fer push`, to a local Hub."""

import hashlib
import json
import shutil
import subprocess

import pytest
from hub_server import hub_server, taken_for_the_hub
from huggingface_hub import ModelCard

import train
from modeling_fer.cli import main
from modeling_fer.hub.runs import FACTS
from modeling_fer.learning.arguments import FerTrainingArguments
from modeling_fer.learning.command_line import parse_arguments
from tests.test_train import ROOT, command, environment


def test_training_ends_with_a_push_of_model_and_card(prepared, tmp_path):
    with hub_server(tmp_path) as hub:
        argv = command(prepared, tmp_path / "run", max_steps=4, push_to_hub=True, hub_model_id="org/tiny-fer")
        done = subprocess.run(
            argv,
            env={**environment(), **hub.environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        files = hub.files("org/tiny-fer", "main")
        commits = hub.commits("org/tiny-fer")
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"} <= set(files)
    assert {"modeling_fer.py", "temporal_fer.py", "postprocess_fer.py", "configuration_fer.py"} <= set(files)
    assert {"metrics.json", "arguments.json", "confusion_matrix.png", FACTS} <= set(files)
    assert not [name for name in files if "checkpoint" in name or name.endswith((".bin", ".pt"))]
    assert "org/tiny-fer" in done.stdout
    assert len(commits) <= 2, "the first, empty one and ours"
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert "Not evaluated" not in card.text
    assert "the training step was chosen on" in card.text.lower()
    metrics = json.loads(files["metrics.json"])
    assert (metrics["split"], metrics["data"]) == ("validation", prepared.name)
    assert metrics["weights"] == hashlib.sha256(files["model.safetensors"]).hexdigest()
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found["Accuracy"] == metrics["accuracy"]
    assert str(tmp_path) not in files["arguments.json"].decode() + files["metrics.json"].decode()


@pytest.mark.parametrize("what", ["card", "push"])
def test_a_run_whose_push_fails_is_kept_and_says_what_to_run(what, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("it rains")

    monkeypatch.setattr(train, "write_card" if what == "card" else "push", fail)
    monkeypatch.setattr(train, "push" if what == "card" else "write_card", lambda *_, **__: None)
    run = tmp_path / "run"
    arguments = FerTrainingArguments(
        data="d", output_dir=str(run), push_to_hub=True, hub_model_id="org/fer", hub_base_model="org/base"
    )
    with pytest.raises(ValueError, match="it rains") as caught:
        train.publish(arguments)
    told = str(caught.value)
    assert told.startswith(f"the run is done, and its model is in {run / 'model'}")
    again = f"fer card {run} --repo org/fer && fer push {run / 'model'} org/fer --base-model org/base"
    assert again in told
    assert "--resume auto" in told
    assert "--hub_base_model" in told
    assert "\n" not in told


def test_card_and_push_from_the_command_line(checkpoint, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    assert main(["card", str(model), "--repo", "org/mine"]) == 0
    assert "org/mine" in (model / "README.md").read_text()
    with hub_server(tmp_path) as hub, taken_for_the_hub(hub, monkeypatch):
        assert main(["push", str(checkpoint), "org/bare"]) == 2
        assert f"run `fer card {checkpoint}`" in capsys.readouterr().err
        assert main(["push", str(checkpoint), "org/bare", "--no-card"]) == 0
        assert "README.md" not in hub.files("org/bare", "main")
        assert main(["push", str(model), "org/mine", "--private"]) == 0
        files = hub.files("org/mine", "main")
        assert "README.md" in files
        capsys.readouterr()
        assert main(["push", str(tmp_path / "nothing"), "org/mine"]) == 2
        assert "nothing" in capsys.readouterr().err


def test_a_push_needs_to_know_where_to():
    with pytest.raises(ValueError, match="--push_to_hub needs --hub_model_id"):
        parse_arguments(["--data", "d", "--output_dir", "o", "--push_to_hub"])
