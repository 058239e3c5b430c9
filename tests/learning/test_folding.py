import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from modeling_fer.learning.folding import calibrate, fold_grey, fold_temperature


def processor(mean=(0.5, 0.5, 0.5)):
    return ViTImageProcessor(image_mean=list(mean), image_std=[0.25, 0.25, 0.25])


def colours(size, count=3):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def logits_of(model, images):
    """Of arrays (N, H, W, 3) that have the model's size."""
    size = {"height": model.config.image_size, "width": model.config.image_size}
    pixels = processor()([Image.fromarray(image) for image in images], size=size, return_tensors="pt")
    with torch.no_grad():
        return model(**pixels).logits


def test_a_temperature_divides_the_logits(make_model):
    model = make_model()
    images = colours(model.config.image_size)
    before = logits_of(model, images)
    fold_temperature(model, 2.5)
    torch.testing.assert_close(logits_of(model, images), before / 2.5)
    with pytest.raises(ValueError, match="positive"):
        fold_temperature(model, 0.0)


def test_colour_faces_count_as_the_grey_ones_that_pillow_makes_of_them(make_model):
    model = make_model()
    images = colours(model.config.image_size)
    grey = np.stack([np.asarray(Image.fromarray(image).convert("L").convert("RGB")) for image in images])
    before, before_colour = logits_of(model, grey), logits_of(model, images)
    fold_grey(model, processor())
    torch.testing.assert_close(logits_of(model, grey), before, atol=1e-5, rtol=0)  # nothing changed for grey
    torch.testing.assert_close(logits_of(model, images), before, atol=0.05, rtol=0)  # Pillow rounds its greys
    assert (before_colour - before).abs().max() > 0.2


def test_colours_that_are_treated_differently_cannot_be_folded(make_model):
    with pytest.raises(ValueError, match="image_mean differs"):
        fold_grey(make_model(), processor((0.4, 0.5, 0.6)))
    with pytest.raises(ValueError, match="found 0"):
        fold_grey(torch.nn.Linear(2, 2), processor())


def test_calibration_finds_the_temperature_that_the_labels_were_drawn_at(make_model):
    rng = np.random.default_rng(0)
    true = rng.normal(0, 1.5, (20_000, 8))
    shares = np.exp(true) / np.exp(true).sum(1, keepdims=True)
    references = (shares.cumsum(1) < rng.random((len(true), 1))).sum(1).clip(max=7)
    model = make_model()
    weight = model.classifier.weight.detach().clone()
    temperature, _, probabilities = calibrate(model, (true * 3).astype(np.float32), references)
    assert temperature == pytest.approx(3, rel=0.05)
    torch.testing.assert_close(model.classifier.weight, weight / temperature)
    assert np.abs(probabilities - shares).max() < 0.03
