import math

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessor, ViTImageProcessor

from modeling_fer import CLASSES
from modeling_fer.learning.arguments import FerTrainingArguments
from modeling_fer.learning.image import (
    build_model,
    build_processor,
    choose_classes,
    condition_vit,
    freeze_unused,
    sincos_positions,
)

TINY = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_layers": 2, "num_heads": 2}


def arguments(**options):
    return FerTrainingArguments(data="d", output_dir="o", **{**TINY, **options})


def test_which_classes_a_model_has():
    assert choose_classes(np.arange(8), "all", "d") == list(CLASSES)
    some = np.array([6, 0, 0, 4])
    assert choose_classes(some, "present", "d") == ["Neutral", "Happiness", "Surprise"]
    with pytest.raises(
        ValueError, match=r"d: no training rows of Anger, Disgust, Fear, Sadness, Other; .*present"
    ):
        choose_classes(some, "all", "d")


def test_a_new_model_follows_the_arguments():
    model = build_model(arguments(dropout=0.25, pooling="cls"), ["Fear", "Anger"])
    config = model.config
    assert config.class_names == ["Fear", "Anger"]
    assert (config.image_size, config.pooling, config.classifier_dropout) == (32, "cls", 0.25)
    encoder = config.encoder_config
    assert (encoder.hidden_size, encoder.num_hidden_layers, encoder.intermediate_size) == (32, 2, 128)
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)


def test_a_pretrained_model_keeps_its_weights_and_takes_the_new_size(checkpoint):
    model = build_model(arguments(encoder=str(checkpoint), image_size=24), list(CLASSES))
    assert (model.config.image_size, model.config.encoder_config.hidden_size) == (24, 16)
    assert (
        build_model(arguments(encoder=str(checkpoint), image_size=0), list(CLASSES)).config.image_size == 16
    )


def test_a_model_states_how_its_faces_were_cut_out(checkpoint, make_model, tmp_path):
    box, asked = ({"name": "box", "points": None, "margin": margin} for margin in (0.0, 0.1))
    assert build_model(arguments(), list(CLASSES)).config.crop == box
    assert build_model(arguments(crop="box", crop_margin=0.1), list(CLASSES)).config.crop == asked
    assert build_model(arguments(encoder=str(checkpoint)), list(CLASSES)).config.crop == box, (
        "it says nothing"
    )
    make_model(crop={"name": "arcface112"}).save_pretrained(tmp_path / "ours")
    inherited = build_model(arguments(encoder=str(tmp_path / "ours")), list(CLASSES)).config.crop
    assert (inherited["name"], len(inherited["points"])) == ("arcface112", 5)
    other = arguments(encoder=str(tmp_path / "ours"), crop="box", crop_margin=0.1)
    assert build_model(other, list(CLASSES)).config.crop == asked
    make_model().fer.encoder.save_pretrained(tmp_path / "foreign")
    assert build_model(arguments(encoder=str(tmp_path / "foreign")), list(CLASSES)).config.crop == box


def test_the_processor_normalises_as_the_encoder_was_trained(checkpoint, tmp_path):
    own = build_processor(arguments(), 32)
    assert (own.size["height"], own.size["width"]) == (32, 32)
    assert list(own.image_mean) == list(own.image_std) == [0.5] * 3
    taken = build_processor(arguments(encoder=str(checkpoint)), 24)
    assert (taken.size["height"], list(taken.image_mean)) == (24, [0.5, 0.4, 0.6])

    CLIPImageProcessor().save_pretrained(tmp_path / "clip")  # resizes its own way, crops in the centre
    taken = build_processor(arguments(encoder=str(tmp_path / "clip")), 24)
    assert taken.image_mean == CLIPImageProcessor().image_mean
    taken.save_pretrained(tmp_path / "ours")
    again = ViTImageProcessor.from_pretrained(tmp_path / "ours")
    assert again.size["height"] == 24
    assert not getattr(again, "do_center_crop", None)

    (tmp_path / "bare").mkdir()  # weights alone: nobody knows what they expect
    with pytest.raises(
        ValueError, match=r"bare: no image processor with mean and deviation .*save one beside"
    ):
        build_processor(arguments(encoder=str(tmp_path / "bare")), 24)


def test_what_no_output_depends_on_is_frozen(encoder, make_model):
    name, encoder_config, _ = encoder
    model = make_model(encoder_config)
    frozen = freeze_unused(model, 16)
    known = {"dinov2": "mask_token", "dinov2_registers": "mask_token", "dinov3": "mask_token"}
    known |= {"clip": "post_layernorm", "siglip": "head."}
    assert bool(frozen) is (name in known)
    assert all(known[name] in one for one in frozen)
    assert all(p.grad is None for p in model.parameters())
    model(torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1])).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == set(frozen)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(frozen)


def test_sincos_positions_are_the_formula():
    grid, width = 3, 8
    found = sincos_positions(grid, width)
    assert found.shape == (9, 8)
    for y in range(grid):
        for x in range(grid):
            expected = []
            for place in (y, x):
                angles = [place / 10000 ** (i / 2) for i in range(2)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert found[y * grid + x].tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions(3, 6)


def test_a_new_vit_does_not_see_brightness(make_model):
    model = make_model()
    condition_vit(model.fer.encoder)
    filters = model.fer.encoder.embeddings.patch_embeddings.projection
    flat = torch.full((1, 3, 16, 16), 0.7)
    assert torch.allclose(filters(flat), filters.bias.view(1, -1, 1, 1).expand(1, -1, 2, 2), atol=1e-5)
    assert filters(torch.randn(1, 3, 16, 16)).std() > 1
    positions = model.fer.encoder.embeddings.position_embeddings[0, 1:]
    assert torch.cdist(positions, positions).add(torch.eye(len(positions)) * 9).min() > 0.1
