"""Pushing to a server that speaks as the Hub does, and pulling from it; with it failing at every request."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from cards import evaluate, report, save_run, write_json
from conftest import picture
from hub_server import TOKEN, WAIT, hub_server, taken_for_the_hub
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_loading import WITHOUT_THE_PACKAGE

from modeling_fer import FerForImageClassification
from modeling_fer.hub.card import make_card, write_card
from modeling_fer.hub.export import export
from modeling_fer.hub.facts import read_facts
from modeling_fer.hub.push import PushError, push, summary
from modeling_fer.hub.release import check_model
from modeling_fer.hub.runs import FACTS
from modeling_fer.learning.adapters import add_lora
from modeling_fer.learning.image import save_model
from modeling_fer.learning.inference import load_classifier

SHIPPED = ("configuration", "frames", "modeling", "pipeline", "postprocess", "temporal")
CODE = {f"{name}_fer.py" for name in SHIPPED}
MODEL = {*CODE, "config.json", "model.safetensors", "preprocessor_config.json"}
ENDPOINT = {"handler.py", "requirements.txt"}
ADAPTER = {f"adapter/{name}" for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")}
FAULTS = [401, 403, 409, 429, 500, "drop", "truncate"]
CARD = "---\nlicense: apache-2.0\npipeline_tag: image-classification\n---\n\n# A model\n"


def inputs():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def run_folder(checkpoint, tmp_path_factory):
    """What a run with LoRA leaves, its adapter far from the identity, with all that a push must leave out."""
    run = tmp_path_factory.mktemp("run") / "run"
    torch.manual_seed(1)
    adapted = add_lora(FerForImageClassification.from_encoder_pretrained(str(checkpoint)), 2)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    save_model(load_classifier(checkpoint)[1], adapted, run / "model")
    (run / "model/README.md").write_text(CARD)
    (run / "arguments.json").write_text(json.dumps({"encoder": "org/base"}))
    (run / "metrics.json").write_text("{}")
    picture(1, 1).save(run / "learning_curve.png")
    (run / "history.jsonl").write_text("{}\n")
    for unwanted in (
        "checkpoints/step_1/model.bin",
        "logs/events",
        "model/.cache/x.json",
        "model/.secret_fer.py",
    ):
        (run / unwanted).parent.mkdir(parents=True, exist_ok=True)
        (run / unwanted).write_text("not for others")
    (run / "model/notes.txt").write_text("not for others")
    return run


@pytest.fixture
def model(run_folder, tmp_path):
    """Return the model folder of a run of one's own."""
    return shutil.copytree(run_folder, tmp_path / "run") / "model"


@pytest.fixture
def hub(tmp_path, checkpoint, monkeypatch):
    """Return a Hub that this process talks to, with the base of the adapter; nobody waits."""
    with hub_server(tmp_path) as hub, taken_for_the_hub(hub, monkeypatch):
        hub.slept = []
        monkeypatch.setattr(time, "sleep", hub.slept.append)
        push(checkpoint, "org/base", card=False)
        hub.requests.clear()
        yield hub


def state_of(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def requests_of_a_push(hub, folder, **options):
    """Return how many requests a push to a repository that is not there yet makes."""
    before = len(hub.requests)
    push(folder, "org/counted", **options)
    return len(hub.requests) - before


# -- push and pull ------------------------------------------------------------------------------------


def in_a_clean_process(code, hub, work, *arguments):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "PYTHON"))}
    command = [sys.executable, "-I", "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=work, env=kept | hub.environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(work / "outputs.pt", weights_only=True)


def test_what_a_clean_process_pushes_clean_processes_pull(run_folder, checkpoint, tmp_path):
    torch.save(inputs(), tmp_path / "inputs.pt")
    with torch.no_grad():
        expected = FerForImageClassification.from_pretrained(run_folder / "model")(inputs()).logits
        base = FerForImageClassification.from_pretrained(checkpoint)(inputs()).logits
    assert not torch.allclose(expected, base, atol=0.1)
    with hub_server(tmp_path) as hub:
        found = in_a_clean_process(
            """
            import re, sys, torch
            from modeling_fer.hub.push import push
            from transformers import AutoModelForImageClassification
            push(sys.argv[1], "org/base", card=False)
            pushed = push(sys.argv[2], "org/fer")
            x = torch.load("inputs.pt", weights_only=True)
            merged = AutoModelForImageClassification.from_pretrained("org/fer")
            assert type(merged).__module__ == "modeling_fer.modeling_fer"

            from huggingface_hub import hf_hub_download
            with open(hf_hub_download("org/fer", "adapter/README.md")) as card:
                names = {}
                exec(re.search(r"```python\\n(.*?)```", card.read(), re.DOTALL)[1], names)
            assert type(names["model"]).__name__ == "PeftModel"
            with torch.no_grad():
                torch.save((merged(x).logits, names["model"](pixel_values=x).logits), "outputs.pt")
            """,
            hub,
            tmp_path,
            checkpoint,
            run_folder / "model",
        )
        assert torch.equal(found[0], expected)
        assert (found[1] - expected).abs().max() < 1e-5
        assert (
            hub.files("org/fer")["model.safetensors"] == (run_folder / "model/model.safetensors").read_bytes()
        )

        shutil.rmtree(tmp_path / "home")
        hub.requests.clear()
        found = in_a_clean_process(
            WITHOUT_THE_PACKAGE
            + textwrap.dedent("""
            import torch
            from transformers import AutoModelForImageClassification
            x = torch.load("inputs.pt", weights_only=True)
            model = AutoModelForImageClassification.from_pretrained("org/fer", trust_remote_code=True)
            assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
            with torch.no_grad():
                torch.save(model(x).logits, "outputs.pt")
            """),
            hub,
            tmp_path,
        )
        assert torch.equal(found, expected)
        assert hub.count("GET", "resolve/.*/model.safetensors") == 1


def test_a_pull_goes_on_where_the_connection_broke(hub, model, tmp_path):
    push(model, "org/fer")
    HfApi().hf_hub_download("org/fer", "config.json", cache_dir=tmp_path / "cache")
    hub.requests.clear()
    hub.fail(2, "truncate")  # after the head of the file comes the file
    file = HfApi().hf_hub_download("org/fer", "model.safetensors", cache_dir=tmp_path / "cache")
    assert hub.count("GET", "model.safetensors") == 2
    with open(file, "rb") as pulled:
        assert pulled.read() == (model / "model.safetensors").read_bytes()


# -- what is pushed -----------------------------------------------------------------------------------


def test_the_release_goes_up_in_one_commit_and_nothing_else_does(hub, model):
    before = state_of(model.parent)
    pushed = push(model, "org/fer")
    records = {"README.md", "arguments.json", "metrics.json", "learning_curve.png"}
    assert set(pushed.files) == MODEL | ENDPOINT | ADAPTER | records
    files = hub.files("org/fer")
    assert set(files) == set(pushed.files) | {".gitattributes"}
    assert [commit.title for commit in hub.commits("org/fer")] == ["initial commit", "Upload model"]
    assert (pushed.sha, pushed.changed) == (hub.commits("org/fer")[-1].sha, True)
    assert pushed.url == f"{hub.url}/org/fer/commit/{pushed.sha}"
    assert summary(pushed) == f"18 files: {pushed.url}"
    for name in MODEL | {"README.md"}:
        assert files[name] == (model / name).read_bytes()
    assert not any(b"not for others" in content for content in files.values())
    assert not hub.repositories["org/fer"].private
    assert state_of(model.parent) == before


def test_an_unchanged_folder_makes_no_commit_and_uploads_nothing(hub, model):
    first = push(model, "org/fer")
    hub.requests.clear()
    second = push(model, "org/fer")
    assert (second.sha, second.changed) == (first.sha, False)
    assert summary(second).startswith("unchanged: ")
    assert len(hub.commits("org/fer")) == 2
    assert hub.count("PUT") == 0
    assert hub.count("POST", "/commit/") == 0


def test_of_a_changed_folder_only_the_change_goes_up(hub, model):
    push(model, "org/fer")
    (model / "README.md").write_text(CARD + "More.\n")
    hub.requests.clear()
    assert push(model, "org/fer").changed
    assert hub.count("PUT") == 0
    assert hub.files("org/fer")["README.md"].endswith(b"More.\n")
    assert len(hub.commits("org/fer")) == 3


def test_a_release_pulled_from_the_hub_has_the_same_card(hub, checkpoint, tmp_path):
    """Also where its run's files and its examples have names of every kind."""
    home = save_run(tmp_path, checkpoint)
    report(tmp_path / "data/faces")
    evaluate(home, "test")
    evaluate(home, "validation")
    sides = {"before": {"ece": 0.1234, "nll": 2.1}, "cross_fitted": {"ece": 0.0123, "nll": 1.9}}
    fitted = {"data": "faces", "split": "validation", "faces": 321, "temperature": 1.3456}
    write_json(home / "calibration.json", {**fitted, **sides})
    examples = [tmp_path / f"smile.{ending}" for ending in ("jpeg", "webp", "PNG", "jpg")]
    for number, path in enumerate(examples):
        picture(4, number).save(path)
    write_card(home, "org/card", examples=examples)
    shown = {f"example_{path.name}" for path in examples}
    pushed = push(home / "model", "org/card")
    assert {FACTS, "calibration.json", "metrics.json", "learning_curve.png", *shown} <= set(pushed.files)
    pulled = snapshot_download("org/card", cache_dir=tmp_path / "cache")
    assert str(make_card(read_facts(pulled))) == hub.files("org/card")["README.md"].decode()
    (home / "metrics.json").write_text('{"of": "something else, later"}')
    assert not push(home / "model", "org/card").changed, "what the card was made of goes up with it"
    (home / "model/example_film.mp4").write_bytes(b"a film")
    assert "example_film.mp4" in push(home / "model", "org/card").files


def test_no_json_that_goes_up_says_where_it_was_made(hub, model, tmp_path):
    """Of paths, their ends alone; a name on the Hub stays whole."""
    run = model.parent
    recorded = {
        "data": f"labelled={tmp_path}/data/faces,unlabelled={tmp_path}/data/web",
        "output_dir": str(run),
        "cache_dir": str(tmp_path / "scratch"),
        "encoder": "org/base",
        "stream": str(tmp_path / "shards/web"),
        "resume": str(run / "checkpoints/step_1"),
        "learning_rate": 0.5,
    }
    write_json(run / "arguments.json", recorded)
    write_json(
        run / "metrics.json", {"model": str(model), "data": str(tmp_path / "data/faces"), "samples": 3}
    )
    push(model, "org/fer")
    files = hub.files("org/fer")
    assert not [name for name in files if str(tmp_path).encode() in files[name]]
    assert json.loads(files["arguments.json"]) == {
        "data": "labelled=faces,unlabelled=web",
        "output_dir": "run",
        "cache_dir": "scratch",
        "encoder": "org/base",
        "stream": ".../shards/web",
        "resume": ".../checkpoints/step_1",
        "learning_rate": 0.5,
    }
    assert json.loads(files["metrics.json"]) == {"model": ".../run/model", "data": "faces", "samples": 3}
    assert json.loads((run / "arguments.json").read_text()) == recorded
    write_json(run / "arguments.json", {**recorded, "encoder": str(tmp_path / "runs/first/model")})
    push(model, "org/fer", base_model="org/base")
    told = json.loads(hub.files("org/fer")["arguments.json"])
    assert told["encoder"] == ".../first/model"  # and does not look like a name on the Hub


def test_a_model_needs_a_card_or_is_pushed_without_one(hub, model):
    (model / "README.md").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no card \(README.md\).*fer card .*--no-card"):
        push(model, "org/fer")
    assert hub.requests == []
    assert "README.md" not in push(model, "org/fer", card=False).files
    api = HfApi()
    api.upload_file(path_or_fileobj=b"# By hand", path_in_repo="README.md", repo_id="org/fer")
    assert not push(model, "org/fer", card=False).changed
    assert hub.files("org/fer")["README.md"] == b"# By hand"
    (model / "README.md").write_text(CARD)
    push(model, "org/fer", card=False)
    assert hub.files("org/fer")["README.md"] == b"# By hand"
    hub.fail(1, 403, times=None)
    with pytest.raises(PushError, match=r"then run again: fer push \S+ org/fer --no-card"):
        push(model, "org/fer", card=False)


def test_all_that_a_push_wrote_is_outdated_by_the_next(hub, model, unchecked):
    """What a release of another kind left goes; what other people put there stays."""
    (model / "onnx").mkdir()
    for name in (
        "LICENSE", "metrics.json", "environment.json", "calibration.json", FACTS, "confusion_matrix.png",
        "reliability.png", "timeline_0.png", "example_smile.webp", "onnx/model.onnx", "handler.py",
    ):  # fmt: skip
        (model / name).write_text("{}")
    shutil.copy(model.parent / "arguments.json", model)
    first = push(model, "org/fer")
    kept = {"example.png": b"by hand", "onnx/notes.txt": b"by hand", "other/config.json": b"by hand"}
    api = HfApi()
    for name, content in kept.items():
        api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="org/fer")
    bare = model.parent.parent / "bare"
    bare.mkdir()
    for name in MODEL | {"README.md"}:
        shutil.copy(model / name, bare / name)
    second = push(bare, "org/fer")
    assert set(second.deleted) == set(first.files) - set(second.files)
    assert set(hub.files("org/fer")) == set(second.files) | kept.keys() | {".gitattributes"}


def test_what_an_earlier_push_left_and_would_be_loaded_is_deleted(hub, model):
    left = {"model-00001-of-00002.safetensors": b"old", "old_fer.py": b"old", "adapter_config.json": b"{}"}
    kept = {"example.png": b"by hand", "other/model.safetensors": b"by hand"}
    push(model, "org/fer")
    api = HfApi()
    for name, content in (left | kept).items():
        api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="org/fer")
    shutil.rmtree(model / "adapter")
    pushed = push(model, "org/fer")
    assert set(pushed.deleted) == left.keys() | ADAPTER
    assert "deleted there, from an earlier push: adapter/README.md, " in summary(pushed)
    files = hub.files("org/fer")
    assert set(files) == set(pushed.files) | kept.keys() | {".gitattributes"}
    assert {name: files[name] for name in kept} == kept


def test_a_handler_of_ones_own_goes_up_and_that_of_a_stock_model_goes_away(hub, model, tmp_path):
    push(model, "org/fer")
    assert b"class EndpointHandler" in hub.files("org/fer")["handler.py"]
    assert b"av>=" in hub.files("org/fer")["requirements.txt"]
    (model / "handler.py").write_text("# mine\n")
    push(model, "org/fer")
    assert hub.files("org/fer")["handler.py"] == b"# mine\n"
    export(*load_classifier(model), np.zeros((2, 3, 16, 16), np.uint8), tmp_path / "vit", "vit")
    deleted = set(push(tmp_path / "vit", "org/fer", card=False).deleted)
    assert {"handler.py", "requirements.txt", "pipeline_fer.py", "metrics.json"} <= deleted


def test_a_branch_is_made_and_main_is_left_alone(hub, model):
    push(model, "org/fer")
    main = hub.files("org/fer")
    (model / "README.md").write_text(CARD + "More.\n")
    pushed = push(model, "org/fer", revision="trial/1")
    assert hub.files("org/fer") == main
    assert hub.files("org/fer", "trial/1")["README.md"].endswith(b"More.\n")
    assert (
        b'"org/fer", revision="trial/1", subfolder=' in hub.files("org/fer", "trial/1")["adapter/README.md"]
    )
    assert not push(model, "org/fer", revision="trial/1").changed
    assert hub.commits("org/fer", "trial/1")[-1].sha == pushed.sha


def test_private_is_private_from_the_start(hub, model):
    push(model, "org/fer", private=True)
    assert hub.repositories["org/fer"].private
    assert not push(model, "org/fer").changed  # it stays so
    assert hub.repositories["org/fer"].private
    with pytest.raises(HfHubHTTPError):
        HfApi(token=False).model_info("org/fer")


def test_a_public_repository_is_refused_what_is_private(hub, model):
    before = hub.files("org/base")
    with pytest.raises(
        PushError, match=r"org/base is public already.*choose another name, or leave out --private"
    ):
        push(model, "org/base", private=True)
    assert hub.files("org/base") == before


# -- the adapter --------------------------------------------------------------------------------------


def test_the_adapters_card_and_configuration_name_its_base(hub, model):
    recorded = json.loads((model / "adapter/adapter_config.json").read_text())
    push(model, "org/fer")
    files = hub.files("org/fer")
    card = ModelCard(files["adapter/README.md"].decode()).data
    assert (card.base_model, card.base_model_relation) == ("org/base", "adapter")
    assert (card.library_name, card.license) == ("peft", "apache-2.0")
    configuration = json.loads(files["adapter/adapter_config.json"])
    assert configuration == recorded | {"base_model_name_or_path": "org/base"}


def test_an_adapter_in_its_own_repository(hub, model):
    pushed = push(model, "org/fer", adapter_repo="org/fer-lora")
    assert set(hub.files("org/fer-lora")) == {
        ".gitattributes",
        *(name.removeprefix("adapter/") for name in ADAPTER),
    }
    assert not ADAPTER & hub.files("org/fer").keys()
    assert pushed.adapter.sha == hub.commits("org/fer-lora")[-1].sha
    assert f"adapter: 3 files: {pushed.adapter.url}" in summary(pushed)
    card = hub.files("org/fer-lora")["README.md"].decode()
    assert 'FerConfig.from_pretrained("org/fer")' in card
    assert 'PeftModel.from_pretrained(base, "org/fer-lora").eval()' in card
    again = push(model, "org/fer", adapter_repo="org/fer-lora")
    assert (again.changed, again.adapter.changed) == (False, False)


def test_the_adapter_can_be_left_out(hub, model):
    (model.parent / "arguments.json").write_text('{"encoder": "runs/pretrained/model"}')
    assert not ADAPTER & set(push(model, "org/fer", adapter=False).files)


@pytest.mark.parametrize("encoder", ["/somewhere/runs/first/model", "runs/first/model", "", "HERE"])
def test_a_base_that_nobody_else_has_is_refused(hub, model, encoder):
    encoder = str(model) if encoder == "HERE" else encoder
    (model.parent / "arguments.json").write_text(json.dumps({"encoder": encoder}))
    with pytest.raises(ValueError, match=r"name it with --base-model org/name.*leave the adapter out with"):
        push(model, "org/fer")
    assert "org/fer" not in hub.repositories
    push(model, "org/fer", base_model="org/base")
    assert b'"base_model_name_or_path": "org/base"' in hub.files("org/fer")["adapter/adapter_config.json"]


def test_a_base_that_is_not_on_the_hub_is_refused(hub, model):
    with pytest.raises(
        PushError, match="org/none, the adapter's base, is not on the Hub; nothing was pushed"
    ):
        push(model, "org/fer", base_model="org/none")
    assert "org/fer" not in hub.repositories


# -- folders that are not pushed ----------------------------------------------------------------------


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def other_sizes(model):
    config = json.loads((model / "config.json").read_text())
    config["encoder_config"]["num_hidden_layers"] = 3
    (model / "config.json").write_text(json.dumps(config))


def without_code_map(model):
    config = json.loads((model / "config.json").read_text())
    del config["auto_map"]
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda m: (m / "config.json").unlink(),
            r"has no config.json: pass the model folder of a run \(RUN/model",
        ),
        (lambda m: (m / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda m: (m / "preprocessor_config.json").unlink(), "no preprocessor_config.json.*save_pretrained"),
        (lambda m: (m / "config.json").write_text("{"), "does not load, so it is not pushed"),
        (lambda m: cut(m / "model.safetensors"), "does not load, so it is not pushed"),
        (other_sizes, "model.safetensors lacks fer.encoder.*save it again with save_pretrained"),
        (without_code_map, "has no auto_map, so that it loads with this package only"),
        (lambda m: (m / "temporal_fer.py").unlink(), "temporal_fer.py"),
        (lambda m: (m / "modeling_fer.py").unlink(), "modeling_fer.py"),
        (lambda m: (m / "pipeline_fer.py").unlink(), "pipeline_fer.py"),
        (lambda m: (m / "training_args.bin").write_bytes(b""), "training_args.bin may run code.*delete it"),
        (lambda m: (m / "adapter/x.pkl").write_bytes(b""), "x.pkl may run code"),
        (lambda m: (m / "adapter_config.json").write_text("{}"), "onto merged weights: move it"),
        (lambda m: (m / "adapter/adapter_model.safetensors").unlink(), "adapter has no adapter_model"),
        (lambda m: cut(m / "adapter/adapter_model.safetensors"), "is damaged: .*save the adapter again"),
    ],
)
def test_a_folder_that_would_not_load_is_not_pushed(hub, model, damage, words):
    check_model(model)
    damage(model)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        push(model, "org/fer")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["fer", "org/", "a/b/c", "org/f er", "", "org/a--b", "org/fer.git"])
def test_a_name_that_is_none_is_refused(model, name):
    with pytest.raises(ValueError, match="is no name of a repository on the Hub: pass org/name"):
        push(model, name)


def test_an_adapters_repository_needs_an_adapter_and_another_name(checkpoint):
    with pytest.raises(FileNotFoundError, match="has no adapter to push to org/b: leave out --adapter-repo"):
        push(checkpoint, "org/a", adapter_repo="org/b", card=False)
    with pytest.raises(ValueError, match="not both in org/a"):
        push(checkpoint, "org/a", adapter_repo="org/a")


def test_a_card_that_the_hub_refuses_is_told(hub, model):
    (model / "README.md").write_text("---\nlicense: [\n---\n")
    shutil.rmtree(model / "adapter")
    with pytest.raises(PushError, match=r"Invalid metadata in README.md.*Mend it, then run again: fer push"):
        push(model, "org/fer")
    assert hub.slept == []
    assert len(hub.commits("org/fer")) == 1


# -- a Hub that fails ---------------------------------------------------------------------------------


@pytest.fixture
def unchecked(monkeypatch):
    """Push without loading the model each time: for hundreds of pushes of one good folder."""
    monkeypatch.setattr("modeling_fer.hub.push.check_model", lambda folder: None)


SAID = {
    401: r"does not know who you are \(401\).*Log in with `hf auth login`, or set HF_TOKEN",
    403: r"may not write to org/\w+ \(403\).*Log in with `hf auth login` and a token that may write",
    409: r"being changed by someone else, or its name is taken \(409\)",
    429: rf"too many requests \(429\).*Wait {WAIT + 1} s",
    500: r"is in trouble \(500\).*Wait some minutes",
    "drop": r"does not answer \(.*Look at the network",
    "truncate": r"does not answer \(.*Look at the network",
}
KEPT = r"Nothing local is lost; a push is one commit, so org/\w+ is as it was or complete\. "
AGAIN = r"then run again: fer push \S+/model org/fer --private"


@pytest.mark.parametrize("what", FAULTS)
def test_a_hub_that_goes_on_failing_from_any_request_on_loses_nothing(hub, model, what, unchecked):
    total = requests_of_a_push(hub, model)
    assert total >= 12  # base, look, make, look, card, preupload, batch, 2 uploads, 2 checks, commit
    before = state_of(model.parent)
    for n in range(1, total + 1):
        hub.repositories.pop("org/fer", None)
        hub.fail(n, what, times=None)
        with pytest.raises(PushError, match=SAID[what]) as caught:
            push(model, "org/fer", private=True)
        assert re.search(KEPT, str(caught.value))
        assert re.search(AGAIN, str(caught.value))
        assert "\n" not in str(caught.value)
        hub.mend()
        there = hub.commits("org/fer") if "org/fer" in hub.repositories else []
        done = what == "truncate" and n == total  # the commit was made and its answer lost
        assert len(there) in ({2} if done else {0, 1})
        sent = set(hub.repositories["org/fer"].large) if there else set()
        hub.requests.clear()
        pushed = push(model, "org/fer", private=True)
        assert pushed.changed is not done
        assert len(hub.commits("org/fer")) == 2
        assert set(hub.files("org/fer")) == set(pushed.files) | {".gitattributes"}
        assert hub.count("PUT") == 2 - len(sent)  # what came through is not sent again
    assert state_of(model.parent) == before
    assert hub.repositories["org/fer"].private


@pytest.mark.parametrize("what", FAULTS)
def test_one_failure_is_told_or_passes(hub, model, what, unchecked):
    total = requests_of_a_push(hub, model)
    for n in range(1, total + 1):
        hub.repositories.pop("org/fer", None)
        hub.slept.clear()
        hub.fail(n, what)
        if what in {401, 403}:
            with pytest.raises(PushError, match=SAID[what]):
                push(model, "org/fer")
            assert hub.slept == []
        else:
            assert push(model, "org/fer").changed
            assert hub.slept == [WAIT + 1 if what == 429 else 1]
            assert len(hub.commits("org/fer")) == 2
        hub.mend()


@pytest.mark.parametrize("what", ["drop", "truncate", 403, 500])
def test_an_adapters_own_repository_fails_and_is_completed_in_its_turn(hub, model, what, unchecked):
    options = {"adapter_repo": "org/fer-lora"}
    total = requests_of_a_push(hub, model, adapter_repo="org/counted-lora")
    before = state_of(model.parent)
    for n in range(1, total + 1):
        for name in ("org/fer", "org/fer-lora"):
            hub.repositories.pop(name, None)
        hub.fail(n, what, times=None)
        with pytest.raises(
            PushError, match=r"then run again: fer push \S+ org/fer --adapter-repo org/fer-lora"
        ):
            push(model, "org/fer", **options)
        hub.mend()
        for name in hub.repositories.keys() & {"org/fer", "org/fer-lora"}:
            whole = set(hub.files(name)) != {".gitattributes"}
            assert len(hub.commits(name)) == 1 + whole
        push(model, "org/fer", **options)
        assert [len(hub.commits(name)) for name in ("org/fer", "org/fer-lora")] == [2, 2]
    assert state_of(model.parent) == before


def test_a_server_that_asks_for_hours_is_not_waited_for(hub, model, monkeypatch):
    monkeypatch.setattr("hub_server.WAIT", 5000)
    hub.fail(3, 429, times=None)
    with pytest.raises(PushError, match=r"too many requests \(429\).*Wait 5001 s, then run again"):
        push(model, "org/fer")
    assert hub.slept == []


def test_someone_elses_commit_in_between_is_seen(hub, model):
    push(model, "org/fer")
    (model / "README.md").write_text(CARD + "More.\n")
    create = HfApi.create_commit
    calls = itertools.count()

    def interrupted(self, repo_id, operations, **options):
        if next(calls) == 0:
            files = hub.commits(repo_id)[-1].files
            hub.repositories[repo_id].add("main", "theirs", {**files, "old_fer.py": files["modeling_fer.py"]})
        return create(self, repo_id, operations, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "create_commit", interrupted)
        assert push(model, "org/fer").deleted == ("old_fer.py",)
    assert "old_fer.py" not in hub.files("org/fer")
    assert [commit.title for commit in hub.commits("org/fer")][-2:] == ["theirs", "Upload model"]


def test_a_network_that_is_down_and_one_that_is_not_wanted(hub, model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(PushError, match=r"http://127.0.0.1:9 does not answer.*Look at the network"):
            push(model, "org/fer")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match=r"offline mode is on.*Unset HF_HUB_OFFLINE, then run again"):
        push(model, "org/fer")


def test_strangers_and_foreign_names_are_told_how_to_log_in(hub, model, monkeypatch):
    with pytest.raises(PushError, match=SAID[403].replace("org", "elsewhere")):
        push(model, "elsewhere/fer")
    hub.requests.clear()
    with pytest.raises(PushError, match=SAID[401]) as caught:
        push(model, "org/fer", token="hf_wrong", adapter=False)
    assert [method for method, _ in hub.requests] == ["GET"]  # nothing is made for a stranger
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert push(model, "org/fer", token=TOKEN).changed


@settings(
    max_examples=10,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.tuples(st.integers(1, 14), st.sampled_from(FAULTS), st.sampled_from([1, 2, 7, None])), max_size=4
    )
)
def test_whatever_fails_on_the_way_in_the_end_there_is_one_whole_commit(hub, model, unchecked, faults):
    hub.repositories.pop("org/fer", None)
    for n, what, times in faults:
        hub.fail(n, what, times)
        with contextlib.suppress(PushError):
            push(model, "org/fer")
        if "org/fer" in hub.repositories:
            assert set(hub.files("org/fer")) == {".gitattributes"} or len(hub.commits("org/fer")) == 2
    hub.mend()
    pushed = push(model, "org/fer")
    assert set(hub.files("org/fer")) == set(pushed.files) | {".gitattributes"}
    assert len(hub.commits("org/fer")) == 2


# -- the server itself --------------------------------------------------------------------------------


def test_the_server_answers_the_rest_of_the_client(hub, model, tmp_path):
    push(model, "org/fer")
    api = HfApi()
    assert api.whoami()["name"] == "tester"
    assert {ref.name for ref in api.list_repo_refs("org/fer").branches} == {"main"}
    assert api.model_info("org/fer").pipeline_tag == "image-classification"
    tree = {entry.path for entry in api.list_repo_tree("org/fer")}
    assert {"adapter", "config.json"} < tree
    assert not ADAPTER & tree
    assert set(api.list_repo_files("org/fer")) == set(hub.files("org/fer"))
    assert [c.title for c in api.list_repo_commits("org/fer")] == ["Upload model", "initial commit"]
    [file] = api.get_paths_info("org/fer", ["model.safetensors"])
    assert file.lfs.sha256 == hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert not api.file_exists("org/fer", "none.json")
    folder = snapshot_download("org/fer", cache_dir=tmp_path / "cache")
    assert {str(p.relative_to(folder)) for p in state_of(type(model)(folder))} == set(hub.files("org/fer"))
