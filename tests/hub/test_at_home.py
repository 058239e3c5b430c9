"""A model that training pushed says the same everywhere: Auto classes, pipelines, adapter, stock export.

The largest differences are printed: `pytest -s tests/hub/test_at_home.py`.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hub_server import hub_server, taken_for_the_hub
from PIL import Image
from test_loading import WITHOUT_THE_PACKAGE
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from modeling_fer import FerForImageClassification, FerForVideoClassification
from modeling_fer.cli import main
from modeling_fer.data.drawing.acting import act
from modeling_fer.data.drawing.face import Face, Identity, View
from modeling_fer.data.drawing.render import render
from modeling_fer.hub.card import write_card
from modeling_fer.hub.export import export
from modeling_fer.hub.push import push
from modeling_fer.learning.inference import load_classifier
from tests.runs import run_here
from tests.test_train import ROOT, command, environment
from tests.test_train_video import TINY, videos  # noqa: F401, a fixture

REAL = ROOT.parent / "shared/data/faces"
COUNT = 64

# What each clean process begins with: the faces, and a place for what it finds.
BEGIN = """
import glob, sys, torch
from PIL import Image
from transformers import AutoImageProcessor, pipeline

faces = [Image.open(name).convert("RGB") for name in sorted(glob.glob("faces/*.png"))]
found = {}

@torch.no_grad()
def logits(model, name):
    pixels = AutoImageProcessor.from_pretrained(name)(faces, return_tensors="pt")["pixel_values"]
    return model.eval()(pixel_values=pixels).logits

def stacked(results, names):
    rows = [{one["label"]: one["score"] for one in result} for result in results]
    return torch.tensor([[row[name] for name in names] for row in rows])
"""
WITH_THE_PACKAGE = """
import re
import modeling_fer
from huggingface_hub import hf_hub_download
from transformers import AutoModel, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("org/fer")
assert type(model) is modeling_fer.FerForImageClassification
found["Auto class"] = logits(model, "org/fer")
features = AutoModel.from_pretrained("org/fer")
assert type(features) is modeling_fer.FerModel
model.fer = features.eval()
found["AutoModel and the classifier"] = logits(model, "org/fer")
names = model.config.class_names
stock = pipeline("image-classification", model="org/fer", top_k=8, function_to_apply="none")
found["image-classification"] = stacked(stock(faces), names)
own = pipeline("facial-expression", model="org/fer")
assert type(own) is modeling_fer.FacialExpressionPipeline
scores = [[row["scores"][name] for name in names] for row in own(faces)]
found["facial-expression"] = torch.tensor(scores, dtype=torch.float64).log()

card = open(hf_hub_download("org/fer", "adapter/README.md")).read()
there = {}
exec(re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1], there)
assert type(there["model"]).__name__ == "PeftModel"
found["adapter on its base"] = logits(there["model"], "org/fer")
assert there["model"].base_model.model.config.to_dict().items() >= {
    "crop": model.config.crop, "id2label": model.config.id2label
}.items()
with there["model"].disable_adapter():
    found["base"] = logits(there["model"], "org/fer")
torch.save(found, "found.pt")
"""
REMOTE_CODE = """
from transformers import AutoModel, AutoModelForImageClassification

trusted = {"trust_remote_code": True}
model = AutoModelForImageClassification.from_pretrained("org/fer", **trusted)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
found["Auto class, remote code"] = logits(model, "org/fer")
model.fer = AutoModel.from_pretrained("org/fer", **trusted).eval()
found["AutoModel and the classifier, remote code"] = logits(model, "org/fer")
names = model.config.class_names
stock = pipeline("image-classification", model="org/fer", top_k=8, function_to_apply="none", **trusted)
found["image-classification, remote code"] = stacked(stock(faces), names)
own = pipeline("facial-expression", model="org/fer", **trusted)
assert type(own).__module__.startswith("transformers_modules."), type(own).__module__
scores = [[row["scores"][name] for name in names] for row in own(faces)]
found["facial-expression, remote code"] = torch.tensor(scores, dtype=torch.float64).log()
torch.save(found, "found.pt")
"""
STOCK = """
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("org/fer-vit")
assert type(model).__module__.startswith("transformers.models.vit"), type(model).__module__
found["stock export"] = logits(model, "org/fer-vit")
names = [model.config.id2label[i] for i in range(8)]
classify = pipeline("image-classification", model="org/fer-vit", top_k=8, function_to_apply="none")
found["stock export, image-classification"] = stacked(classify(faces), names)
assert not any(name.startswith("transformers_modules.") for name in sys.modules)
torch.save(found, "found.pt")
"""


def in_a_clean_process(code, hub, work):
    """Run code with an empty cache and the local Hub alone; return the logits that it found."""
    shutil.rmtree(work / "home", ignore_errors=True)
    shutil.rmtree(work / "modules", ignore_errors=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "PYTHON"))}
    argv = [sys.executable, "-I", "-c", textwrap.dedent(code)]
    done = subprocess.run(
        argv, cwd=work, env=kept | hub.environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(work / "found.pt", weights_only=True)


def write_faces(folder):
    """64 real faces where there are any, drawn ones elsewhere; returns which."""
    folder.mkdir()
    if (REAL / "metadata.csv").exists():
        with (REAL / "metadata.csv").open() as file:
            rows = list(csv.DictReader(file))
        for number, row in enumerate(rows[:: len(rows) // COUNT][:COUNT]):
            shutil.copy(REAL / row["file_name"], folder / f"{number:02d}.png")
        return "real"
    rng = np.random.default_rng(0)
    drawn = [Face(Identity.draw(rng), act(number % 8, 1.0, rng), View.draw(rng)) for number in range(COUNT)]
    for number, pixels in enumerate(render(drawn, 112)):
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return "drawn"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with a stock encoder, `org/base`."""
    work = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    encoder = ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            initializer_range=0.2,
        )
    )
    encoder.save_pretrained(work / "base")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(work / "base")
    with hub_server(work) as hub, pytest.MonkeyPatch.context() as patch:
        with taken_for_the_hub(hub, patch):
            push(work / "base", "org/base", card=False)
        hub.work = work
        yield hub


@pytest.fixture(scope="module")
def trained(hub, prepared):
    """The folder of a model that `train.py` trained by LoRA and pushed."""
    out = hub.work / "run"
    argv = command(
        prepared,
        out,
        encoder="org/base",
        image_size=32,
        lora_rank=4,
        lora_targets="all",
        learning_rate=1e-2,
        max_steps=12,
        push_to_hub=True,
        hub_model_id="org/fer",
    )
    done = subprocess.run(
        argv,
        env={**environment(), **hub.environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{hub.url}/org/fer/commit/" in done.stdout
    return out / "model"


def test_what_training_pushed_says_the_same_everywhere(hub, trained, capsys, monkeypatch):
    kind = write_faces(hub.work / "faces")
    faces = [Image.open(path).convert("RGB") for path in sorted((hub.work / "faces").iterdir())]
    model, processor = load_classifier(trained)
    with torch.no_grad():
        expected = model(processor(faces, return_tensors="pt")["pixel_values"]).logits
    pixels = np.stack([np.asarray(face.resize((32, 32))).transpose(2, 0, 1) for face in faces])
    export(model, processor, pixels, hub.work / "vit", "vit", source=trained)
    with taken_for_the_hub(hub, monkeypatch):
        push(hub.work / "vit", "org/fer-vit")
    assert not [name for name in hub.files("org/fer-vit") if name.endswith(".py")]
    assert b"base_model: org/fer\n" in hub.files("org/fer-vit")["README.md"]

    found = in_a_clean_process(BEGIN + WITH_THE_PACKAGE, hub, hub.work)
    found |= in_a_clean_process(WITHOUT_THE_PACKAGE + BEGIN + REMOTE_CODE, hub, hub.work)
    stock = in_a_clean_process(WITHOUT_THE_PACKAGE + BEGIN + STOCK, hub, hub.work)

    base = found.pop("base")
    assert (base - expected).abs().max() > 0.1  # that the adapter does something
    assert expected.std(dim=0).min() > 1e-3  # and faces differ
    lines = [f"largest difference of logits, {len(faces)} {kind} faces:"]
    for allowed, those in ((1e-5, found), (1e-4, stock)):
        for name, logits in those.items():
            wanted = expected.double().log_softmax(-1) if name.startswith("facial") else expected
            apart = (logits - wanted).abs().max().item()
            lines.append(f"  {name}: {apart:.1e}")
            assert logits.shape == (COUNT, 8)
            assert apart <= allowed, "\n".join(lines)
    assert len(lines) == 1 + 5 + 4 + 2
    with capsys.disabled():
        print("", *lines, sep="\n")  # noqa: T201


def assert_judged_as_by_fer_eval(run, data, out):
    """What a run says of its model on validation is what an evaluation says, but for rounding."""
    told = json.loads((run / "metrics.json").read_text())
    assert told.pop("chose") == "the training step"
    assert main(["eval", "--model", str(run / "model"), "--data", str(data), "--out", str(out)]) == 0
    found = json.loads((out / "metrics.json").read_text())
    rounded = {key: pytest.approx(found[key], abs=1e-5) for key in ("ece", "nll")}
    sure, expected = told.pop("selective"), found.pop("selective")
    assert sure == {key: pytest.approx(value, abs=1e-5) for key, value in expected.items()}
    assert told == {**found, **rounded}


def test_what_training_says_of_its_model_is_what_an_evaluation_says(trained, prepared, hub):
    assert_judged_as_by_fer_eval(trained.parent, prepared, hub.work / "eval-stills")
    assert (trained.parent / "confusion_matrix.png").is_file()


def test_the_adapter_of_a_video_model_on_its_base(hub, trained, videos, monkeypatch):  # noqa: F811
    """Its base is the image model on the Hub; encoder, norm, temporal head and classifier come from it."""
    out = hub.work / "video"
    options = {**TINY, "lora_rank": 2, "max_steps": 6, "temporal_head": "convolution", "image_size": 0}
    run_here(command(videos, out, encoder=trained, **options)[2:])
    assert_judged_as_by_fer_eval(out, videos, hub.work / "eval")
    write_card(out, "org/fer-video")
    with taken_for_the_hub(hub, monkeypatch):
        with pytest.raises(ValueError, match=r"is the folder .*nobody else has.*--base-model org/name"):
            push(out / "model", "org/fer-video")
        pushed = push(out / "model", "org/fer-video", base_model="org/fer")
    assert {"adapter/README.md", "handler.py", "pipeline_fer.py"} <= set(pushed.files)
    card = hub.files("org/fer-video")["adapter/README.md"].decode()
    assert "base_model: org/fer\n" in card
    x = torch.randn(1, 7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(x, hub.work / "inputs.pt")
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    after = """
import torch
x = torch.load("inputs.pt", weights_only=True)
with torch.no_grad():
    found = {"adapter": model(pixel_values=x).frame_logits}
    with model.disable_adapter():
        found["base"] = model(pixel_values=x).frame_logits
plain = model.base_model.model
found["smoothed"] = plain.postprocess(found["adapter"])
torch.save(found, "found.pt")
"""
    found = in_a_clean_process(snippet + after, hub, hub.work)
    merged = FerForVideoClassification.from_pretrained(out / "model")
    with torch.no_grad():
        expected = merged(x).frame_logits
    assert (found["adapter"] - expected).abs().max() < 1e-5
    assert (found["base"] - expected).abs().max() > 0.01
    assert torch.allclose(found["smoothed"], merged.postprocess(expected), atol=1e-6)
    start = FerForImageClassification.from_pretrained(trained)
    assert not torch.equal(start.fer.norm.weight, merged.fer.norm.weight)


@pytest.mark.slow
def test_a_push_that_fails_after_training_loses_nothing_and_a_resume_completes_it(hub, prepared):
    out = hub.work / "refused"
    variables = {**environment(), **hub.environment, "PYTHONPATH": str(ROOT)}

    def train_and_push_to(name):
        argv = command(prepared, out, max_steps=4, push_to_hub=True, hub_model_id=name, resume="auto")
        return subprocess.run(argv, env=variables, capture_output=True, text=True, timeout=300)

    refused = train_and_push_to("elsewhere/late")
    assert refused.returncode == 1
    [told] = [line for line in refused.stderr.splitlines() if "could not push" in line]
    assert "may not write to elsewhere/late (403)" in told
    assert "Nothing local is lost; a push is one commit" in told
    assert f"then run again: fer push {out / 'model'} elsewhere/late" in told
    assert f"the run is done, and its model is in {out / 'model'}" in told
    assert f"fer card {out} --repo elsewhere/late && fer push" in told
    by_hand = (out / "metrics.json").read_text().replace('"validation"', '"test"')
    (out / "metrics.json").write_text(by_hand)
    weights = (out / "model/model.safetensors").read_bytes()
    resumed = train_and_push_to("org/late")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert (out / "model/model.safetensors").read_bytes() == weights
    assert hub.files("org/late")["model.safetensors"] == weights
    assert len(hub.commits("org/late")) == 2
    assert (out / "metrics.json").read_text() == by_hand, "nothing was learnt anew: it is left as it is"
