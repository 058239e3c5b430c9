"""Exports say what torch says: the stock ViT without our code, ONNX graphs at sizes of every kind."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from cards import report, save_run
from conftest import COMMON, ENCODERS, SIZE, picture
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loading import WITHOUT_THE_PACKAGE, run
from test_temporal import video_model
from transformers import AutoModelForImageClassification, Dinov2Config, ViTConfig, ViTImageProcessor

from modeling_fer import FerConfig, FerForImageClassification
from modeling_fer.hub import export as exporting
from modeling_fer.hub import export_onnx
from modeling_fer.hub.card import write_card
from modeling_fer.hub.export import Agreement, export
from modeling_fer.hub.export_vit import stock_vit
from modeling_fer.hub.release import check_model, endpoint_files, released_files
from modeling_fer.hub.runs import FACTS
from modeling_fer.learning.adapters import add_lora
from modeling_fer.learning.inference import load_classifier
from modeling_fer.temporal_fer import TEMPORAL_HEADS

PRESENT = {0: "Neutral", 1: "Happiness", 2: "Surprise"}  # of a set that lacks the others


def still_model(seed=0, image_size=None, pooling="mean", id2label=None, mirror=False, **encoder):
    """A tiny classifier all of whose weights are random, those of norms and positions too."""
    config = ViTConfig(**{**COMMON, "intermediate_size": 32, **encoder})
    model = FerForImageClassification(
        FerConfig(
            encoder_config=config, pooling=pooling, image_size=image_size, id2label=id2label, mirror=mirror
        )
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        shift = float("norm" in name and name.endswith("weight"))
        parameter.data = shift + 0.5 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def processor(size=SIZE):
    return ViTImageProcessor(
        size={"height": size, "width": size}, image_mean=[0.5, 0.4, 0.6], image_std=[0.5, 0.3, 0.4]
    )


def faces(count=12, size=SIZE):
    return np.stack([np.asarray(picture(i % 8, i, size)).transpose(2, 0, 1) for i in range(count)])


def pixels(count=6, size=SIZE):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def logits(model, images=None):
    return model.eval()(pixel_values=pixels() if images is None else images).logits


def damaged(model):
    """The stock model of a model, with a classifier that is a little off."""
    stock = stock_vit(model)
    stock.classifier.bias.data[0] += 1e-3
    return stock


# -- the stock model --------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    pooling=st.sampled_from(["mean", "cls"]),
    heads=st.sampled_from([1, 2, 4, 8]),
    layers=st.integers(1, 3),
    eps=st.sampled_from([1e-12, 1e-6, 1e-5, 1e-2]),
    bias=st.booleans(),
)
def test_the_stock_model_is_the_same_function(seed, pooling, heads, layers, eps, bias):
    model = still_model(
        seed,
        pooling=pooling,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        layer_norm_eps=eps,
        qkv_bias=bias,
    )
    stock = stock_vit(model)
    rounded, exact = logits(model).double(), logits(model.double(), pixels().double())
    # Some of these random models magnify rounding: in float64, and what float32 does to ours is allowed.
    apart = (logits(stock.double(), pixels().double()) - exact).abs().max()
    assert apart <= 2e-5 + 2 * (rounded - exact).abs().max()
    assert len(stock.vit.layers) == layers + 1
    assert stock.config.hidden_size == 16 + {1: 3, 2: 4, 4: 4, 8: 8}[heads]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_epsilons_of_all_norms_are_kept(pooling):
    model = still_model(pooling=pooling, layer_norm_eps=0.1)
    model.fer.norm.eps = 0.1
    expected = logits(model)
    torch.testing.assert_close(logits(stock_vit(model)), expected, rtol=0, atol=1e-5)
    # Each of them matters here: that the comparison can fail.
    model.fer.norm.eps = 0.2
    assert (logits(model) - expected).abs().max() > 1e-2
    model.fer.norm.eps, model.fer.encoder.layers[0].layernorm_before.eps = 0.1, 0.2
    assert (logits(model) - expected).abs().max() > 1e-2


def test_positions_for_another_image_size_are_written_out():
    model = still_model(image_size=24)
    stock = stock_vit(model)
    assert stock.config.image_size == 24
    torch.testing.assert_close(
        logits(stock, pixels(size=24)), logits(model, pixels(size=24)), rtol=0, atol=1e-4
    )


def test_adapters_are_merged_and_the_model_is_left_as_it_is():
    base = still_model()
    plain = logits(base)
    adapted = add_lora(base, 2, "all")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    expected = logits(adapted)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(stock_vit(adapted)), expected, rtol=0, atol=1e-4)
    assert torch.equal(logits(adapted), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: still_model(pooling="pooler"), "no pooler, and this model's pooling is 'pooler'"),
        (video_model, "this is a model of videos: export the image model"),
        (
            lambda: FerForImageClassification(
                FerConfig(encoder_config=Dinov2Config(**COMMON, **ENCODERS["dinov2"][1]))
            ),
            "only a ViTModel encoder makes a stock ViT, this is Dinov2Model: choose --format onnx",
        ),
        (lambda: torch.nn.Linear(2, 2), "expected a model of stills or of videos, got Linear"),
    ],
)
def test_models_that_the_stock_format_cannot_hold(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(make(), processor(), faces(2), tmp_path / "out", "vit")
    assert list(tmp_path.iterdir()) == []


def test_the_stock_folder_works_without_our_code(tmp_path):
    model = still_model(id2label=PRESENT)
    model.config.crop = {"name": "box", "margin": 0.25}
    (agreement,) = export(model, processor(), faces(), tmp_path / "out", "vit")
    assert json.loads((tmp_path / "out/config.json").read_text())["crop"] == model.config.crop
    assert agreement.examples == 12
    assert agreement.labels == 1
    assert agreement.logits < 1e-4
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json"}
    picture(3, 1).save(tmp_path / "face.png")
    run(
        WITHOUT_THE_PACKAGE
        + """
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
processor = AutoImageProcessor.from_pretrained("out")
model = AutoModelForImageClassification.from_pretrained("out")
assert type(model).__name__ == "ViTForImageClassification"
assert type(model).__module__.startswith("transformers.")
assert model.config.id2label == {0: "Neutral", 1: "Happiness", 2: "Surprise"}
with torch.no_grad():
    logits = model(**processor(images=Image.open("face.png"), return_tensors="pt")).logits
found = pipeline("image-classification", model="out")("face.png")
torch.save((logits, {row["label"]: row["score"] for row in found}), "outputs.pt")
""",
        tmp_path,
    )
    found, scores = torch.load(tmp_path / "outputs.pt", weights_only=True)
    given = processor()(images=picture(3, 1), return_tensors="pt")["pixel_values"]
    expected = logits(model, given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    wanted = dict(zip(PRESENT.values(), expected[0].softmax(-1).tolist(), strict=True))
    assert scores == pytest.approx(wanted, abs=1e-4)


# -- what is refused --------------------------------------------------------------------------------


def test_agreement_is_counted_as_it_should_be():
    expected = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    found = expected + torch.tensor([[0.0, -1.0], [0.0, 0.0], [1.5, 0.0], [0.0, 0.0]])
    agreement = Agreement.of("a.onnx", expected, found)
    apart = 1 / (1 + np.exp(-0.5)) - 1 / (1 + np.e)
    assert agreement == Agreement("a.onnx", 4, 1.5, pytest.approx(apart), 0.75)
    assert str(agreement) == (
        "a.onnx: largest probability difference 3.5e-01 (logits 1.5e+00), same class 75.0%, over 4 examples"
    )


@pytest.mark.parametrize("fault", ["damaged", "not a number"])
def test_an_export_that_differs_is_not_kept(tmp_path, monkeypatch, fault):
    model = still_model()
    if fault == "damaged":
        monkeypatch.setattr(exporting, "stock_vit", damaged)
    else:
        model.classifier.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"does not agree with torch.*model.safetensors.*differ by 0.0001"):
        export(model, processor(), faces(), tmp_path / "out", "vit")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formats": "tflite"}, "format must be one of vit, onnx, got 'tflite'"),
        ({"formats": ["vit", "tflite"]}, "format must be one of vit, onnx, got 'tflite'"),
        ({"formats": []}, "format must be one of vit, onnx, got none"),
        ({"int8": True}, "int8 weights are for models of stills in format onnx"),
        ({"model": video_model, "formats": "onnx", "int8": True}, "int8 weights are for models of stills"),
        ({"faces": faces(1)[:0]}, r"N at least 1; got uint8 \(0, 3, 16, 16\)"),
        (
            {"faces": faces(2).transpose(0, 2, 3, 1)},
            r"must be uint8 \(N, 3, H, W\).*got uint8 \(2, 16, 16, 3\)",
        ),
        ({"faces": faces(2) / 255.0}, "got float64"),
        ({"model": lambda: still_model(mirror=True)}, "does not look at mirror images"),
    ],
)
def test_what_cannot_be_exported(tmp_path, change, message):
    values = {"model": still_model, "faces": faces(2), "formats": "vit", "int8": False, **change}
    model = values.pop("model")()
    with pytest.raises(ValueError, match=message):
        export(model, processor(), values.pop("faces"), tmp_path / "out", **values)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_and_a_disk_that_is_full(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out is there already: delete it, or export to another folder"):
        export(still_model(), processor(), faces(2), tmp_path / "out", "vit")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "stock_vit", full)
    with pytest.raises(OSError, match=r"could not write .*new: .*No space left.*then export again"):
        export(still_model(), processor(), faces(2), tmp_path / "new", "vit")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r'needs onnxruntime: pip install "abaw-fer\[export\]"'):
        export(still_model(), processor(), faces(2), tmp_path / "out", "onnx")
    assert list(tmp_path.iterdir()) == []


# -- ONNX -------------------------------------------------------------------------------------------


@pytest.fixture
def onnx():
    """Skip where the extra is not installed."""
    for name in export_onnx.NEEDED:
        pytest.importorskip(name)


@pytest.mark.usefixtures("onnx")
def test_mirror_images_are_in_the_graph(tmp_path):
    model = still_model(mirror=True)
    export(model, processor(), faces(3), tmp_path / "out", "onnx")
    session = export_onnx.open_graph(tmp_path / "out/onnx/model.onnx", 1)
    found = [export_onnx.run_graph(session, pixel_values=view) for view in (pixels(3), pixels(3).flip(-1))]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[0], logits(model, pixels(3)), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("onnx")
def test_stills_as_onnx(tmp_path):
    model = still_model(id2label=PRESENT, pooling="cls")
    model.config.crop = {"name": "box", "margin": 0.25}
    out = tmp_path / "out"
    plain, small = export(model, processor(), faces(30), out, "onnx", int8=True)
    assert plain.probabilities < 1e-5
    assert 0 < small.probabilities < 0.2  # coarser, but not another model
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {
        "config.json",
        "preprocessor_config.json",
        "onnx/model.onnx",
        "onnx/model_quantized.onnx",
    }
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "vit"
    assert config["crop"] == model.config.crop  # for who cuts out the faces
    assert config["id2label"] == {str(i): name for i, name in PRESENT.items()}
    assert not {"auto_map", "architectures"} & config.keys()
    session = export_onnx.open_graph(out / "onnx/model.onnx", 1)
    for count in (1, 2, 7):
        expected = logits(model, pixels(count))
        result = export_onnx.run_graph(session, pixel_values=pixels(count))
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    # Coarse weights were written: the file is not the same graph again.
    coarse = export_onnx.open_graph(out / "onnx/model_quantized.onnx", 1)
    assert (export_onnx.run_graph(coarse, pixel_values=pixels(7)) - expected).abs().max() > 1e-4


@pytest.mark.usefixtures("onnx")
@pytest.mark.parametrize("formats", [["vit", "onnx"], ["onnx", "vit", "onnx"]])
def test_both_formats_in_one_folder(tmp_path, formats):
    model, out = still_model(id2label=PRESENT), tmp_path / "out"
    agreements = export(model, processor(), faces(), out, formats, int8=True)
    assert [one.file for one in agreements] == [
        "model.safetensors",
        "onnx/model.onnx",
        "onnx/model_quantized.onnx",
    ]
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["ViTForImageClassification"]
    assert config["id2label"] == {str(i): name for i, name in PRESENT.items()}
    stock = AutoModelForImageClassification.from_pretrained(out)
    session = export_onnx.open_graph(out / "onnx/model.onnx", 1)
    for found in (logits(stock), export_onnx.run_graph(session, pixel_values=pixels())):
        torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-4)
    check_model(out)


@pytest.mark.usefixtures("onnx")
@pytest.mark.parametrize("video", [False, True])
def test_graphs_without_other_weights_can_be_pushed(tmp_path, video):
    out = tmp_path / "out"
    export(video_model("none") if video else still_model(), processor(), faces(), out, "onnx")
    check_model(out)
    assert endpoint_files(out) == {}
    assert "onnx/features.onnx" if video else "onnx/model.onnx" in released_files(out)
    graph = sorted((out / "onnx").iterdir())[-1]
    whole = graph.read_bytes()
    graph.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=rf"does not load, so it is not pushed: .*{graph.name}.*export it ag"
    ):
        check_model(out)
    (out / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        check_model(out)


# -- the card of an export --------------------------------------------------------------------------


@pytest.fixture
def carded(checkpoint, tmp_path):
    """Return a run's model with a card, at home at org/fer, under a licence of its own."""
    report(tmp_path / "data/faces", "fer2013")
    home = save_run(tmp_path, checkpoint)
    write_card(home, "org/fer")
    return home / "model"


def test_an_export_has_a_card_that_refers_to_that_of_its_model(carded, tmp_path):
    model, own = load_classifier(carded)
    (agreement,) = export(model, own, faces(), tmp_path / "out", "vit", source=carded)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("org/fer", "finetune")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-classification")
    ours = ModelCard.load(carded / "README.md").data
    terms = [(one.license, one.license_name, one.license_link) for one in (card.data, ours)]
    assert terms == [
        ("other", "research-only", "https://huggingface.co/org/fer"),
        ("other", "research-only", "README.md"),
    ]
    assert str(agreement) in card.text
    for words in (
        "[org/fer](https://huggingface.co/org/fer)",
        "perceived, not what a person felt",
        "Art. 5(1)(f)",
        "Licence of the weights: research-only",
    ):
        assert words in card.text
    [snippet] = re.findall(r"^```python\n(.*?)^```", card.text, re.M | re.S)
    picture(3, 1).save(tmp_path / "face.png")
    printed = run(WITHOUT_THE_PACKAGE + snippet.replace("path/of/this/folder", "out"), tmp_path)
    with torch.no_grad():
        expected = model(own(picture(3, 1), return_tensors="pt")["pixel_values"]).logits[0].softmax(-1)
    found = {name: float(score) for name, score in re.findall(r"^(\w+): ([\d.]+)$", printed, re.M)}
    assert found == pytest.approx(
        {model.config.id2label[i]: expected[i].item() for i in expected.topk(5).indices.tolist()}, abs=2e-4
    )


@pytest.mark.usefixtures("onnx")
def test_a_card_names_what_is_in_the_folder(carded, tmp_path):
    model, own = load_classifier(carded)
    agreements = export(model, own, faces(), tmp_path / "out", ["vit", "onnx"], True, carded)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.base_model_relation == "quantized"
    assert all(str(one) in card.text for one in agreements)
    assert "```js" in card.text
    facts = json.loads((carded / FACTS).read_text())
    (carded / FACTS).write_text(json.dumps({**facts, "repo_id": None}))
    export(model, own, faces(), tmp_path / "away", "onnx", source=carded)
    card = ModelCard.load(tmp_path / "away/README.md")
    assert (card.data.base_model, card.data.library_name) == (None, "transformers.js")
    assert (card.data.license, card.data.license_link) == ("other", None)
    assert "huggingface.co" not in card.text
    assert "```python" not in card.text


@pytest.mark.usefixtures("onnx")
def test_the_card_of_a_video_models_graphs(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\npipeline_tag: video-classification\n---\n# A model\n"
    )
    export(video_model("none"), processor(), faces(), tmp_path / "out", "onnx", source=tmp_path)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "video-classification")
    [snippet] = re.findall(r"^```python\n(.*?)^```", card.text, re.M | re.S)
    code = snippet.replace("path/of/this/folder", str(tmp_path / "out"))
    there = {"pixels": pixels(7).numpy(), "seconds": np.arange(7) / 30}
    exec(code, there)
    assert there["logits"].shape == (1, 7, 8)


def test_without_a_card_there_is_none_to_refer_to(tmp_path, checkpoint):
    export(*load_classifier(checkpoint), faces(), tmp_path / "out", "vit", source=checkpoint)
    assert not (tmp_path / "out/README.md").exists()


@pytest.mark.usefixtures("onnx")
def test_videos_as_onnx(tmp_path):
    model = video_model("none", postprocess={"temperature": 1.5})
    out = tmp_path / "out"
    agreements = export(model, processor(), faces(), out, "onnx")
    assert [agreement.file for agreement in agreements] == [
        "onnx/temporal.onnx",
        "onnx/features.onnx and onnx/temporal.onnx",
    ]
    assert all(agreement.probabilities < 1e-4 for agreement in agreements)
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["frame_rate"]) == ("abaw_fer", 30.0)
    assert config["postprocess"]["temperature"] == 1.5
    features = export_onnx.run_graph(
        export_onnx.open_graph(out / "onnx/features.onnx", 1), pixel_values=pixels(3)
    )
    torch.testing.assert_close(features, model.fer(pixels(3)).pooler_output.detach(), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("onnx")
@pytest.mark.parametrize("head", sorted(TEMPORAL_HEADS.keys() - {"none"}))  # that one is tested above
def test_the_temporal_graph_takes_any_videos(tmp_path, head):
    """Frames that are absent, of whatever value; one frame; more than one block; nothing at all."""
    model = video_model(head, causal=head == "convolution")
    export_onnx.export_temporal(model, tmp_path / "temporal.onnx")
    session = export_onnx.open_graph(tmp_path / "temporal.onnx", 1)
    generator = torch.Generator().manual_seed(1)
    for batch, frames in ((1, 1), (3, 2), (2, 7), (1, 15), (2, 16), (1, 61)):
        shape = (batch, frames)
        mask = torch.rand(shape, generator=generator) > 0.3
        features = torch.randn(*shape, 16, generator=generator)
        features[~mask] = torch.nan
        times = (100_000 + torch.randint(1, 5, shape, generator=generator).cumsum(1).double()) / 30
        inputs = {"frame_features": features, "frame_mask": mask, "frame_times": times}
        with torch.no_grad():
            expected = model(**inputs).frame_logits
        torch.testing.assert_close(export_onnx.run_graph(session, **inputs), expected, rtol=0, atol=1e-4)
