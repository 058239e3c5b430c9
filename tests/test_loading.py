"""A saved folder loads with the package, without it, and in a pipeline, and gives the same numbers."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import av
import numpy as np
import pytest
import torch
from conftest import picture
from transformers import AutoConfig, AutoModelForImageClassification, pipeline

from modeling_fer import CLASSES, FerConfig, FerForImageClassification, FerForVideoClassification, FerModel
from modeling_fer.data.augment import Normalize
from modeling_fer.data.pixels import decode
from modeling_fer.learning.inference import load_classifier, load_model, predict_probabilities

# The package may be installed: hide it, and only it (the code in a checkpoint has a module of that name).
WITHOUT_THE_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_fer":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import modeling_fer
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the package is not hidden")
"""


def inputs():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def run(code, work, *arguments):
    """Run code in a clean process, without network and with an empty cache, and return what it prints."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "PYTHON"))
    }
    environment |= {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "home"), "HF_MODULES_CACHE": str(work / "modules")
    }  # fmt: skip
    command = [sys.executable, "-I", "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def expected(checkpoint):
    model = FerForImageClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        return model(inputs()).logits, model.fer(inputs()).pooler_output


@pytest.fixture
def work(tmp_path):
    torch.save(inputs(), tmp_path / "inputs.pt")
    return tmp_path


def outputs(work):
    return torch.load(work / "outputs.pt", weights_only=True)


def test_the_folder_holds_code_weights_and_no_pickle(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {
        "config.json",
        "configuration_fer.py",
        "frames_fer.py",
        "model.safetensors",
        "modeling_fer.py",
        "pipeline_fer.py",
        "postprocess_fer.py",
        "preprocessor_config.json",
        "temporal_fer.py",
    }
    auto_map = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_fer.FerConfig",
        "AutoModel": "modeling_fer.FerModel",
        "AutoModelForImageClassification": "modeling_fer.FerForImageClassification",
        "AutoModelForVideoClassification": "modeling_fer.FerForVideoClassification",
    }


def test_a_feature_model_travels_with_every_auto_class_as_well(tmp_path, make_model):
    make_model().fer.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageClassification"] == "modeling_fer.FerForImageClassification"
    assert (tmp_path / "configuration_fer.py").exists()


def test_with_the_package_imported(checkpoint, expected, work):
    run(
        """
        import sys, torch
        import modeling_fer
        from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
        folder, x = sys.argv[1], torch.load("inputs.pt", weights_only=True)
        assert type(AutoConfig.from_pretrained(folder)) is modeling_fer.FerConfig
        model = AutoModelForImageClassification.from_pretrained(folder)
        assert type(model) is modeling_fer.FerForImageClassification
        features = AutoModel.from_pretrained(folder)
        assert type(features) is modeling_fer.FerModel
        with torch.no_grad():
            torch.save((model(x).logits, features(x).pooler_output), "outputs.pt")
        """,
        work,
        checkpoint,
    )
    for found, wanted in zip(outputs(work), expected, strict=True):
        assert torch.equal(found, wanted)


def test_with_remote_code_and_without_the_package(checkpoint, expected, work):
    run(
        WITHOUT_THE_PACKAGE
        + textwrap.dedent("""
        import torch
        from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline
        from transformers.utils import logging
        folder, x = sys.argv[1], torch.load("inputs.pt", weights_only=True)

        for load in (AutoConfig, AutoModel, AutoModelForImageClassification):
            try:
                load.from_pretrained(folder)
            except ValueError as error:  # never another model, never code that nobody trusted
                assert "trust_remote_code" in str(error), error
            else:
                raise AssertionError("loaded without trust")
        assert not any(name.startswith("transformers_modules.") for name in sys.modules)

        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert config.class_names[-1] == "Other"
        model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
        features = AutoModel.from_pretrained(folder, trust_remote_code=True)
        for one in (config, model, features):
            assert type(one).__module__.startswith("transformers_modules."), type(one).__module__
        with torch.no_grad():
            torch.save((model(x).logits, features(x).pooler_output), "outputs.pt")

        model.save_pretrained("again")
        again = AutoModelForImageClassification.from_pretrained("again", trust_remote_code=True)
        features = AutoModel.from_pretrained("again", trust_remote_code=True)
        with torch.no_grad():
            assert torch.equal(again(x).logits, model(x).logits)
            assert torch.equal(features(x).pooler_output, model.fer(x).pooler_output)
        """),
        work,
        checkpoint,
    )
    for found, wanted in zip(outputs(work), expected, strict=True):
        assert torch.equal(found, wanted)
    # What was saved without the package is whole: the package loads it, and the code in it is the same.
    again = FerForImageClassification.from_pretrained(work / "again")
    assert torch.equal(again(inputs()).logits, expected[0])
    for name in sorted(path.name for path in checkpoint.glob("*.py")):
        assert (work / "again" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_trusting_remote_code_with_the_package_takes_the_package(checkpoint, monkeypatch, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(checkpoint, trust_remote_code=True)
    assert torch.equal(
        model(inputs()).logits, FerForImageClassification.from_pretrained(checkpoint)(inputs()).logits
    )


def test_the_pipeline_sees_the_pixels_of_training(checkpoint):
    images = [picture(i, 5, size=24) for i in range(8)]
    classify = pipeline("image-classification", model=str(checkpoint), top_k=8)
    model, processor = load_classifier(checkpoint)
    pixels = np.stack([decode(image, processor.size["height"]) for image in images])
    probabilities = predict_probabilities(model, pixels, Normalize(processor.image_mean, processor.image_std))
    stock = processor(images, return_tensors="pt")["pixel_values"]
    ours = Normalize(processor.image_mean, processor.image_std)(torch.from_numpy(pixels))
    assert (stock - ours).abs().max() < 1e-6
    assert len({row.argmax() for row in probabilities}) > 1  # images that a wrong order would confuse
    for found, row in zip(classify(images), probabilities, strict=True):
        scores = {one["label"]: one["score"] for one in found}
        assert [scores[name] for name in CLASSES] == pytest.approx(row.tolist(), abs=1e-5)


def test_the_pipeline_works_with_remote_code_alone(checkpoint, work):
    picture(4, 5).save(work / "face.png")
    found = run(
        WITHOUT_THE_PACKAGE
        + textwrap.dedent("""
        import json
        from transformers import pipeline
        classify = pipeline("image-classification", model=sys.argv[1], trust_remote_code=True, top_k=8)
        print(json.dumps(classify("face.png")))
        """),
        work,
        checkpoint,
    )
    scores = {one["label"]: one["score"] for one in json.loads(found.splitlines()[-1])}
    here = pipeline("image-classification", model=str(checkpoint), top_k=8)(picture(4, 5))
    assert scores == pytest.approx({one["label"]: one["score"] for one in here}, abs=1e-6)


def test_a_checkpoint_moved_elsewhere_still_loads(checkpoint, tmp_path, expected):
    shutil.copytree(checkpoint, tmp_path / "moved")
    config = AutoConfig.from_pretrained(tmp_path / "moved")
    assert type(config) is FerConfig
    assert torch.equal(FerModel.from_pretrained(tmp_path / "moved")(inputs()).pooler_output, expected[1])


# -- videos -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def video_checkpoint(checkpoint, tmp_path_factory):
    """A causal video model on the encoder of `checkpoint`, post-processed, with the same image processor."""
    folder = tmp_path_factory.mktemp("video") / "model"
    torch.manual_seed(1)
    image_model, processor = load_classifier(checkpoint)
    sizes = {
        "temporal_hidden_size": 16,
        "temporal_num_layers": 2,
        "temporal_num_heads": 2,
        "temporal_window": 4,
    }
    post = {"smoothing": "box", "half_width": 2, "temperature": 2.0, "bias": [0.5] + [0.0] * 7}
    config = FerConfig(
        encoder_config=image_model.config.encoder_config,
        temporal_causal=True,
        num_frames=6,
        postprocess=post,
        **sizes,
    )
    model = FerForVideoClassification(config)
    model.fer.load_state_dict(image_model.fer.state_dict())
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_video_model_with_remote_code_alone(video_checkpoint, work):
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(3))
    torch.save(x, work / "inputs.pt")
    run(
        WITHOUT_THE_PACKAGE
        + textwrap.dedent("""
        import torch
        from transformers import AutoModelForVideoClassification
        x = torch.load("inputs.pt", weights_only=True)
        model = AutoModelForVideoClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
        with torch.no_grad():
            logits = model(frame_features=x).frame_logits
            stream = model.init_stream()
            _, probabilities, stream = model.step(x, stream)
            torch.save((logits, probabilities), "outputs.pt")
        """),
        work,
        video_checkpoint,
    )
    model = FerForVideoClassification.from_pretrained(video_checkpoint)
    with torch.no_grad():
        logits = model(frame_features=x).frame_logits
    assert torch.equal(outputs(work)[0], logits)
    assert torch.allclose(outputs(work)[1], model.postprocess(logits), atol=1e-6)
    assert not torch.allclose(outputs(work)[1], logits.softmax(-1), atol=1e-2)


def test_the_stock_video_pipeline(video_checkpoint, tmp_path):
    frames = [np.asarray(picture(i % 8, 7, size=32)) for i in range(10)]
    with av.open(str(tmp_path / "faces.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, width=32, height=32, pix_fmt="yuv420p")
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    classify = pipeline("video-classification", model=str(video_checkpoint), top_k=8)
    found = {one["label"]: one["score"] for one in classify(str(tmp_path / "faces.mp4"))}
    with av.open(str(tmp_path / "faces.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][:6]
    model, processor = load_model(video_checkpoint)
    with torch.no_grad():
        expected = model(processor(decoded, return_tensors="pt")["pixel_values"]).logits[0].softmax(-1)
    assert [found[name] for name in CLASSES] == pytest.approx(expected.tolist(), abs=1e-5)
