"""Small models and data that many tests share; all of it is generated, nothing is downloaded."""
# ruff: noqa: E402, the environment comes before the imports that read it

import os
import tempfile

# Before huggingface_hub is imported: what asks the network fails, and no cache outlives the tests.
CACHE = tempfile.TemporaryDirectory(prefix="fer-tests-", ignore_cleanup_errors=True)
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": CACHE.name}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side: threads would wait for each other

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import ViTImageProcessor

from modeling_fer import CLASSES, FerConfig, FerForImageClassification
from modeling_fer.data.prepare import prepare
from modeling_fer.data.sources.folder import FolderOptions

SIZE, PATCH = 16, 8
COMMON = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}

# Name of the configuration class, its arguments, and how many tokens stand before the patches.
ENCODERS = {
    "vit": ("ViTConfig", {"intermediate_size": 32}, 1),
    "dinov2": ("Dinov2Config", {"mlp_ratio": 2}, 1),
    "dinov2_registers": ("Dinov2WithRegistersConfig", {"mlp_ratio": 2, "num_register_tokens": 3}, 4),
    "dinov3": ("DINOv3ViTConfig", {"intermediate_size": 32, "num_register_tokens": 3}, 4),
    "clip": ("CLIPVisionConfig", {"intermediate_size": 32}, 1),
    "siglip": ("SiglipVisionConfig", {"intermediate_size": 32}, 0),
    "beit": ("BeitConfig", {"intermediate_size": 32}, 1),
}


@pytest.fixture(params=ENCODERS)
def encoder(request):
    """Name, configuration and number of leading tokens of one encoder of the table."""
    kind, options, leading = ENCODERS[request.param]
    return request.param, getattr(transformers, kind)(**{**COMMON, **options}), leading


@pytest.fixture
def make_model():
    """Return a builder of tiny classifiers whose logits differ clearly between images."""

    def make(encoder_config=None, seed=0, **options):
        torch.manual_seed(seed)
        if encoder_config is None:
            encoder_config = transformers.ViTConfig(**COMMON, intermediate_size=32)
        model = FerForImageClassification(FerConfig(encoder_config=encoder_config, **options))
        torch.nn.init.normal_(model.classifier.weight)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Return a folder as training saves it: weights, configuration, code, image processor."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    torch.manual_seed(0)
    model = FerForImageClassification(
        FerConfig(encoder_config=transformers.ViTConfig(**COMMON, intermediate_size=32))
    )
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    processor = ViTImageProcessor(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.5, 0.4, 0.6], image_std=[0.5, 0.3, 0.4]
    )
    processor.save_pretrained(folder)
    return folder


def picture(expression, number, size=20):
    """Paint one image in the colour of its class, with noise that tells it from all others."""
    rng = np.random.default_rng([expression, number])
    colour = np.array([expression & 1, expression >> 1 & 1, expression >> 2 & 1]) * 180 + 30
    return Image.fromarray((colour + rng.integers(0, 40, (size, size, 3))).astype(np.uint8))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Return a folder of class-coloured images: 3 a class to train on, 2 to validate, 2 without a label."""
    root = tmp_path_factory.mktemp("images") / "colours"
    for split, count in {"train": 3, "validation": 2}.items():
        for expression, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(expression, 10 * count + i).save(root / split / name / f"{i}.png")
    (root / "unlabeled").mkdir()
    for i in range(2):
        picture(i, 99).save(root / "unlabeled" / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def prepared(image_folder, tmp_path_factory):
    """Return the prepared data set of `image_folder`."""
    out = tmp_path_factory.mktemp("prepared") / "colours"
    prepare("folder", FolderOptions(root=str(image_folder)), out)
    return out
