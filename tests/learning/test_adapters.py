import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import ViTConfig

from modeling_fer import FerConfig, FerForImageClassification
from modeling_fer.learning.adapters import LORA_TARGETS, add_lora, find_targets, merge_lora, save_adapter


def faces():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def logits(model):
    with torch.no_grad():
        return model.eval()(pixel_values=faces()).logits


def train_a_little(model):
    """Take steps large enough that every trained part matters."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(pixel_values=faces(), labels=torch.tensor([0, 3, 6])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("kind", LORA_TARGETS)
def test_targets_and_a_fresh_adapter_for_every_encoder(encoder, kind, make_model):
    _, encoder_config, _ = encoder
    model = make_model(encoder_config)
    targets = find_targets(model, kind)
    modules = dict(model.named_modules())
    assert all(isinstance(modules[name], nn.Linear) for name in targets)
    expected = {"attention": 4, "mlp": 2, "all": 6}[
        kind
    ] * 2  # query, key, value, output; up, down; of 2 layers
    assert len(targets) == expected

    before = logits(model)
    adapted = add_lora(model, 2, kind)
    assert torch.equal(logits(adapted), before)
    carried = {name for name, m in adapted.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert carried == set(targets)

    for name, p in adapted.named_parameters():
        trained = "lora_" in name or "modules_to_save" in name
        assert p.requires_grad is trained, name
    saved = {name for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name}
    assert {name.split(".modules_to_save")[0].removeprefix("base_model.model.") for name in saved} == {
        "classifier",
        "fer.norm",
    }


def test_layers_outside_the_blocks_carry_no_adapter(make_model):
    model = make_model(pooling="pooler")
    assert isinstance(model.fer.encoder.pooler.dense, nn.Linear)
    assert not [name for name in find_targets(model, "all") if "pooler" in name or "classifier" in name]


def test_an_unknown_kind_is_refused(make_model):
    with pytest.raises(ValueError, match="LoRA targets must be one of attention, mlp, all, got 'query'"):
        add_lora(make_model(), 2, "query")


def test_an_encoder_without_such_layers_is_refused(make_model):
    model = make_model()
    model.fer.encoder.layers = nn.ModuleList([nn.Conv2d(3, 3, 1)])
    with pytest.raises(
        ValueError, match=r"no attention linear layer found for LoRA.*train all weights with rank 0"
    ):
        add_lora(model, 2, "attention")


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank, make_model):
    with pytest.raises(ValueError, match=f"at least 1, got {rank}; rank 0 means full fine-tuning"):
        add_lora(make_model(), rank)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (2.0, 0.5)])
def test_the_scale_is_alpha_over_rank(alpha, scale, make_model):
    adapted = add_lora(make_model(), 4, alpha=alpha)
    scales = {m.scaling["default"] for m in adapted.modules() if hasattr(m, "lora_A")}
    assert scales == {scale}


@pytest.mark.parametrize("kind", LORA_TARGETS)
def test_training_changes_only_what_is_trainable_and_merging_changes_nothing(kind, make_model):
    fresh = make_model()
    adapted = train_a_little(add_lora(make_model(), 2, kind))
    trained = logits(adapted)
    assert (trained - logits(fresh)).abs().max() > 0.01
    base = {name.replace(".base_layer", ""): p for name, p in adapted.base_model.model.named_parameters()}
    for name, p in fresh.fer.encoder.named_parameters():
        assert torch.equal(base[f"fer.encoder.{name}"], p), name

    merged = merge_lora(adapted)
    assert type(merged) is FerForImageClassification
    assert (logits(merged) - trained).abs().max() < 1e-5
    assert merged.state_dict().keys() == fresh.state_dict().keys()


def test_a_model_without_adapters_is_merged_already(make_model):
    model = make_model()
    assert merge_lora(model) is model


def test_an_adapter_saved_alone_goes_back_onto_its_base(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    adapted = train_a_little(add_lora(FerForImageClassification.from_pretrained(tmp_path / "base"), 2))
    save_adapter(adapted, tmp_path / "adapter")
    assert not (tmp_path / "adapter/model.safetensors").exists()
    base = FerForImageClassification.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(adapted))


def test_a_merged_folder_is_a_plain_checkpoint(make_model, tmp_path):
    adapted = train_a_little(add_lora(make_model(), 2))
    save_adapter(adapted, tmp_path / "adapter")
    merged = merge_lora(adapted)
    merged.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()  # Auto classes would put the adapter on again
    assert (tmp_path / "adapter/adapter_config.json").exists()
    loaded = FerForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(merged))


def test_adapters_survive_another_number_of_layers():
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=12,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
    )
    model = FerForImageClassification(FerConfig(encoder_config=config))
    assert len(find_targets(model, "attention")) == 48
