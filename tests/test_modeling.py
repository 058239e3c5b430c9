import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTModel,
)

from modeling_fer import FerConfig, FerForImageClassification, FerModel
from modeling_fer.configuration_fer import POOLINGS

pooled = pytest.mark.parametrize("pooling", POOLINGS)


def faces(count=2, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


def without(name, pooling):
    """Whether an encoder of the table lacks what a pooling needs."""
    return name == "siglip" and pooling == "cls"


# -- every encoder, every pooling -------------------------------------------------------------------


@pooled
def test_shapes_gradients_and_a_saved_copy(encoder, pooling, make_model, tmp_path):
    name, encoder_config, leading = encoder
    model = make_model(encoder_config, pooling=pooling)
    if without(name, pooling):
        with pytest.raises(ValueError, match="pooling='cls', but SiglipVisionModel has no class token"):
            model(faces())
        return
    encoded = model.fer(faces())
    assert encoded.last_hidden_state.shape == (2, leading + 4, 16)
    assert encoded.pooler_output.shape == (2, 16)
    output = model(faces(), labels=torch.tensor([1, 5]))
    assert output.logits.shape == (2, 8)

    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert any("patch_embed" in name and gradients[name].abs().max() > 0 for name in gradients)

    model.save_pretrained(tmp_path)
    for loaded in (
        FerForImageClassification.from_pretrained(tmp_path),
        AutoModelForImageClassification.from_pretrained(tmp_path),
    ):
        assert torch.equal(loaded(faces()).logits, output.logits)
    features = AutoModel.from_pretrained(tmp_path)
    assert type(features) is FerModel
    assert torch.equal(features(faces()).pooler_output, encoded.pooler_output)


@pooled
def test_other_sizes_are_accepted(encoder, pooling, make_model):
    name, encoder_config, leading = encoder
    if without(name, pooling):
        pytest.skip("no class token")
    model = make_model(encoder_config, pooling=pooling)
    encoded = model.fer(faces(size=32))
    assert encoded.last_hidden_state.shape == (2, leading + 16, 16)
    assert torch.isfinite(encoded.pooler_output).all()


def test_interpolated_positions_keep_their_place(make_model):
    """Of a 4 x 4 grid stretched from 2 x 2 the corners are nearest to the same corners."""
    model = make_model()
    embeddings = model.fer.encoder.embeddings
    stretched = embeddings.interpolate_pos_encoding(torch.zeros(1, 17, 16), 32, 32)[0, 1:].reshape(4, 4, 16)
    native = embeddings.position_embeddings[0, 1:].reshape(2, 2, 16)
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        distances = (native.reshape(4, 16) - stretched[row, column]).norm(dim=-1).reshape(2, 2)
        assert distances.argmin() == (row * -2) + (column * -1)


def test_mean_pooling_takes_the_patches_only(encoder, make_model):
    _, encoder_config, leading = encoder
    model = make_model(encoder_config)
    tokens = model.fer(faces()).last_hidden_state
    by_hand = F.layer_norm(tokens[:, leading:].sum(1) / 4, (16,), model.fer.norm.weight, model.fer.norm.bias)
    assert torch.allclose(model.fer(faces()).pooler_output, by_hand, atol=1e-6)
    if leading:
        with_others = model.fer.norm(tokens.mean(1))
        assert not torch.allclose(by_hand, with_others, atol=1e-3)


def test_pooling_is_checked_against_what_the_encoder_returns(make_model):
    model = make_model(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16))
    model.fer.config.pooling = "pooler"  # built without one
    with pytest.raises(ValueError, match="ViTModel has no pooler; use 'mean' or 'cls'"):
        model(faces())


def test_hidden_states_and_attentions_pass_through(make_model):
    model = make_model()
    model.set_attn_implementation("eager")
    output = model(faces(), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert [a.shape for a in output.attentions] == [(2, 2, 5, 5)] * 2
    as_tuple = model(faces(), labels=torch.tensor([0, 1]), return_dict=False)
    assert torch.equal(as_tuple[1], output.logits)


def test_checkpointed_gradients_are_the_same(make_model):
    plain, saving = make_model().train(), make_model().train()
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        model(faces(), labels=torch.tensor([2, 3])).loss.backward()
    assert any(getattr(m, "gradient_checkpointing", False) for m in saving.modules())
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


# -- encoders of maps -------------------------------------------------------------------------------

MAPS = {
    "regnet": ("RegNetConfig", {"embedding_size": 8, "groups_width": 4, "downsample_in_first_stage": False}),
    "resnet": ("ResNetConfig", {"embedding_size": 8, "layer_type": "basic"}),
    "convnextv2": ("ConvNextV2Config", {"patch_size": 2, "num_stages": 2}),
}


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_a_map_is_pooled_over_its_places(kind, pooling, make_model, tmp_path):
    name, options = MAPS[kind]
    config = getattr(transformers, name)(hidden_sizes=[8, 16], depths=[1, 1], **options)
    model = make_model(config, image_size=32, pooling=pooling)
    encoded = model.fer(faces(size=32))
    assert encoded.last_hidden_state.shape[:2] == (2, 16)
    places = encoded.last_hidden_state.sum((2, 3)) / encoded.last_hidden_state[0, 0].numel()
    if pooling == "pooler":
        places = model.fer.encoder(faces(size=32)).pooler_output.reshape(2, 16)
    by_hand = F.layer_norm(places, (16,), model.fer.norm.weight, model.fer.norm.bias)
    assert torch.allclose(encoded.pooler_output, by_hand, atol=1e-6)
    logits = model(faces(size=32), labels=torch.tensor([1, 5])).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(faces(size=32)).logits, logits)
    again = FerForImageClassification.from_encoder_pretrained(tmp_path, pooling=pooling).eval()
    assert torch.equal(again.fer.encoder(faces(size=32)).last_hidden_state, encoded.last_hidden_state)


def test_a_map_has_no_class_token(make_model):
    config = transformers.ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = make_model(config, image_size=32, pooling="cls")
    with pytest.raises(ValueError, match="pooling='cls', but ResNetModel has no class token; use 'mean'"):
        model(faces(size=32))


def test_a_hierarchical_encoder_of_tokens_or_of_another_width_is_refused(make_model):
    stages = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
    model = make_model(transformers.DINOv3ConvNextConfig(image_size=32, **stages), image_size=32)
    with pytest.raises(ValueError, match="gives tokens of which nobody knows the patches"):
        model(faces(size=32))
    model = make_model(transformers.ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1]), image_size=32)
    model.fer.config.encoder_config.hidden_sizes = [8, 12]
    with pytest.raises(ValueError, match="ResNetModel gives 16 features, its configuration says 12"):
        model(faces(size=32))


# -- initial weights --------------------------------------------------------------------------------

ROOMY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}


def odd_weights(model, std):
    """Name the matrices whose spread is far from `std`, and the tables that are all zero."""
    odd = []
    for name, p in model.named_parameters():
        if p.ndim >= 2 and p.numel() >= 96:
            if not 0.8 * std < p.std().item() < 1.2 * std:
                odd.append((name, p.std().item()))
        elif name.endswith("bias") and p.abs().max() > 0:
            odd.append((name, p.abs().max().item()))
    return odd


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_initial_weights_after_building(std):
    config = FerConfig(
        encoder_config=ViTConfig(**ROOMY, image_size=32, patch_size=8, initializer_range=std),
        initializer_range=std,
    )
    model = FerForImageClassification(config)
    assert odd_weights(model, std) == []
    assert model.fer.encoder.embeddings.position_embeddings.std() > 0.8 * std
    assert torch.equal(model.fer.norm.weight, torch.ones(48))


def test_initial_weights_after_loading_with_another_head(tmp_path):
    config = FerConfig(encoder_config=ViTConfig(**ROOMY, image_size=32, patch_size=8))
    first = FerForImageClassification(config)
    torch.nn.init.constant_(first.fer.norm.weight, 3.0)
    first.save_pretrained(tmp_path)
    names = {i: f"class {i}" for i in range(5)}
    second = FerForImageClassification.from_pretrained(tmp_path, id2label=names, ignore_mismatched_sizes=True)
    assert second.classifier.weight.shape == (5, 48)
    assert odd_weights(second, 0.02) == []
    for (name, a), b in zip(first.fer.named_parameters(), second.fer.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_model_can_be_loaded_without_reading_values_while_it_is_built(checkpoint):
    with torch.device("meta"):
        empty = FerForImageClassification(FerConfig.from_pretrained(checkpoint))
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    loaded = FerForImageClassification.from_pretrained(checkpoint)
    assert not [name for name, t in loaded.state_dict().items() if t.is_meta or not torch.isfinite(t).all()]
    assert empty.state_dict().keys() == loaded.state_dict().keys()
    assert all(
        name in loaded.state_dict() for name, _ in loaded.named_buffers()
    )  # none is made up on loading


# -- mirror images ---------------------------------------------------------------------------------


def test_mirror_is_the_mean_of_both_views_and_not_for_training(make_model, tmp_path):
    model = make_model()
    with torch.no_grad():
        straight, flipped = (model(views).logits for views in (faces(), faces().flip(-1)))
    assert not torch.allclose(straight, flipped, atol=1e-4)
    model.save_pretrained(tmp_path)
    both = AutoModelForImageClassification.from_pretrained(tmp_path, mirror=True)
    with torch.no_grad():
        found = both(faces()).logits
        assert torch.equal(found, both(faces().flip(-1)).logits)
        assert torch.equal(both.train()(faces()).logits, straight), "no dropout in this one"
    torch.testing.assert_close(found, (straight + flipped) / 2)
    both.save_pretrained(tmp_path / "both")
    kept = FerForImageClassification.from_pretrained(tmp_path / "both")
    assert torch.equal(kept(faces()).logits, found)


# -- loss -------------------------------------------------------------------------------------------

TINY = FerForImageClassification(
    FerConfig(
        encoder_config=ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=16,
            patch_size=8,
        )
    )
).eval()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-1, 7), min_size=1, max_size=6))
def test_loss_is_the_cross_entropy_of_what_counts(ids):
    labels = torch.tensor(ids)
    output = TINY(faces(len(ids)), labels=labels)
    counted = labels != -1
    if counted.any():
        expected = F.cross_entropy(output.logits[counted], labels[counted])
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    else:
        assert output.loss.item() == 0


def test_no_label_at_all_gives_no_gradient(make_model):
    model = make_model()
    model(faces(), labels=torch.tensor([-1, -1])).loss.backward()
    assert all(p.grad is None or not p.grad.abs().max() for p in model.parameters())


def test_soft_labels(make_model):
    model = make_model()
    ids = torch.tensor([3, 6, 0])
    hard = model(faces(3), labels=ids).loss
    assert torch.allclose(model(faces(3), labels=F.one_hot(ids, 8).float()).loss, hard)

    votes = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)).softmax(-1)
    logits = model(faces(3)).logits
    by_hand = -(votes * logits.log_softmax(-1)).sum(-1).mean()
    assert torch.allclose(model(faces(3), labels=votes).loss, by_hand)

    votes[1] = 0  # no votes: does not count, like -1
    by_hand = -(votes * logits.log_softmax(-1)).sum() / 2
    assert torch.allclose(model(faces(3), labels=votes).loss, by_hand)


def test_dropout_acts_in_training_only(make_model):
    model = make_model(classifier_dropout=0.5)
    assert torch.equal(model(faces()).logits, model(faces()).logits)
    model.train()
    assert not torch.equal(model(faces()).logits, model(faces()).logits)


# -- pretrained encoders ----------------------------------------------------------------------------


def same_weights(model, reference):
    known = reference.state_dict()
    return [torch.equal(value, known[name]) for name, value in model.state_dict().items()]


def vit(**options):
    return ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
        patch_size=8, **options,
    )  # fmt: skip


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("build", [FerModel, FerForImageClassification])
def test_start_from_a_vit(tmp_path, pooling, build):
    saved = ViTModel(vit())
    saved.save_pretrained(tmp_path)
    model = build.from_encoder_pretrained(tmp_path, pooling=pooling, image_size=32)
    own = model.encoder if build is FerModel else model.fer.encoder
    assert all(same_weights(own, saved))
    assert (own.pooler is not None) is (pooling == "pooler")
    assert (model.config.image_size, model.config.encoder_config.image_size) == (32, 16)
    assert torch.isfinite(model.eval()(faces(size=32))[0]).all()


def test_start_from_the_vision_tower_of_clip(tmp_path):
    text = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "vocab_size": 32, "max_position_embeddings": 8,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    saved = CLIPModel(CLIPConfig(text_config=text, vision_config=vision))
    saved.save_pretrained(tmp_path)
    model = FerForImageClassification.from_encoder_pretrained(tmp_path)
    assert all(same_weights(model.fer.encoder, saved.vision_model))
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(faces()).logits, model.eval()(faces()).logits)


def test_start_from_one_of_our_checkpoints(checkpoint):
    saved = FerForImageClassification.from_pretrained(checkpoint)
    model = FerForImageClassification.from_encoder_pretrained(checkpoint, id2label={0: "Fear", 1: "Anger"})
    assert all(same_weights(model.fer.encoder, saved.fer.encoder))
    assert model.config.class_names == ["Fear", "Anger"]
    assert model.classifier.weight.std() < 0.1  # a new head, not the old one


def test_half_precision_weights_are_trained_in_full(tmp_path):
    saved = ViTModel(vit()).to(torch.bfloat16)
    saved.save_pretrained(tmp_path)
    model = FerForImageClassification.from_encoder_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.fer.encoder.layers[0].mlp.fc1.weight, saved.layers[0].mlp.fc1.weight.float())
    model(faces(), labels=torch.tensor([0, 1])).loss.backward()


def test_a_checkpoint_can_be_loaded_in_half_precision(checkpoint):
    model = FerForImageClassification.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    full = FerForImageClassification.from_pretrained(checkpoint)
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert torch.allclose(model(faces().bfloat16()).logits.float(), full(faces()).logits, atol=0.2)


def test_missing_encoder_weights_are_an_error(tmp_path):
    saved = ViTModel(vit(), add_pooling_layer=False)
    state = {name: value for name, value in saved.state_dict().items() if "layers.1.mlp" not in name}
    saved.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks encoder weights: .*layers\.1\.mlp"):
        FerForImageClassification.from_encoder_pretrained(tmp_path)


def test_a_missing_pooler_is_an_error_only_where_it_is_used(tmp_path):
    ViTModel(vit(), add_pooling_layer=False).save_pretrained(tmp_path)
    FerModel.from_encoder_pretrained(tmp_path, pooling="cls")
    with pytest.raises(ValueError, match=r"lacks encoder weights: pooler\.dense\.bias"):
        FerModel.from_encoder_pretrained(tmp_path, pooling="pooler")


def test_missing_weights_in_one_of_our_checkpoints_are_an_error(tmp_path):
    saved = FerForImageClassification(FerConfig(encoder_config=vit()))
    state = {name: value for name, value in saved.state_dict().items() if "position_embeddings" not in name}
    saved.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks encoder weights: .*position_embeddings"):
        FerForImageClassification.from_encoder_pretrained(tmp_path)


def test_a_text_model_is_no_encoder(tmp_path):
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32
    )
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BertConfig has none: is it a vision encoder"):
        FerForImageClassification.from_encoder_pretrained(tmp_path)


def test_weights_differ_between_seeds(make_model):
    assert not torch.allclose(make_model(seed=0)(faces()).logits, make_model(seed=1)(faces()).logits)
