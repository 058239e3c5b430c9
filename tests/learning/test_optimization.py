import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modeling_fer.learning import optimization
from modeling_fer.learning.optimization import (
    FINETUNE_RATE,
    build_optimizer,
    build_schedule,
    choose_precision,
    layer_depth,
    seed_step,
    share_statistics,
    weight_average,
)

CPU = torch.device("cpu")


def rates(warmup, steps, finetune):
    """Learning rate of each step of a run, and the one after."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = build_schedule(optimizer, warmup, steps, finetune)
    found = []
    for _ in range(steps + 1):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def half_cosine(steps):
    return [0.5 * (1 + math.cos(math.pi * i / steps)) for i in range(steps)]


def test_the_rate_rises_in_a_line_and_falls_by_a_cosine():
    expected = [0, 0.25, 0.5, 0.75, *half_cosine(16), 0]
    assert rates(0.2, 20, 0.0) == pytest.approx([2 * r for r in expected])
    assert rates(0.0, 4, 0.0) == pytest.approx([2 * r for r in (*half_cosine(4), 0)])


def test_fine_tuning_has_a_fall_of_its_own():
    expected = [0, 1 / 3, 2 / 3, *half_cosine(12), *(FINETUNE_RATE * r for r in half_cosine(5)), 0]
    assert rates(0.2, 20, 0.25) == pytest.approx([2 * r for r in expected])


@pytest.mark.parametrize("finetune", [0.01, 0.96])
def test_shares_that_round_to_none_or_all_of_a_short_run(finetune):
    found = rates(0.5, 10, finetune)
    assert len(found) == 11
    assert all(0 <= r <= 2 for r in found)
    assert found[-1] == 0


def test_depth_is_read_from_the_name():
    names = {
        "fer.encoder.embeddings.position_embeddings": 0,
        "fer.encoder.embedder.embedder.convolution.weight": 0,
        "fer.encoder.encoder.stages.1.layers.0.layer.0.convolution.weight": 2,
        "fer.encoder.layers.0.mlp.fc1.weight": 1,
        "fer.encoder.encoder.layer.11.attention.q_proj.bias": 12,
        "fer.encoder.layernorm.weight": 13,
        "classifier.weight": 13,
    }
    assert {name: layer_depth(name, 12) for name in names} == names


def test_lower_blocks_move_less_and_only_matrices_decay(make_model):
    model = make_model()  # two blocks
    model.classifier.bias.requires_grad_(False)
    optimizer = build_optimizer(model, 1.0, 0.05, layer_decay=0.5)
    settings = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert len(settings) == sum(p.requires_grad for p in model.parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            depth = layer_depth(name, 2)
            decays = p.ndim >= 2 and "embeddings.position" not in name and "cls_token" not in name
            assert settings[id(p)] == (0.5 ** (3 - depth), 0.05 if decays else 0.0), name
    plain = build_optimizer(model, 1.0, 0.05)
    assert {group["lr"] for group in plain.param_groups} == {1.0}
    assert len(plain.param_groups) == 2


def test_the_average_looks_back_further_as_steps_pass():
    model = nn.Linear(1, 1, bias=False)
    average, expected = weight_average(model, 0.3), 0.0
    for step in range(6):
        model.weight.data.fill_(float(step + 1))
        average.update_parameters(model)
        decay = 0.0 if step == 0 else min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1)
        assert average.module.weight.item() == pytest.approx(expected)
    assert decay == 0.3


def test_running_statistics_are_averaged_like_weights():
    model = nn.BatchNorm1d(2)
    average, expected = weight_average(model, 0.5), torch.zeros(2)
    for step in range(5):
        model.running_mean.fill_(float(step + 1))
        model.num_batches_tracked.fill_(step + 1)
        average.update_parameters(model)
        decay = 0.0 if step == 0 else min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1)
        torch.testing.assert_close(average.module.running_mean, expected)
        assert average.module.num_batches_tracked == step + 1


def test_processes_share_their_running_statistics():
    def reduce(value, how):
        assert how == "mean"
        return (value + 4) / 2  # of a second process, which has 4 everywhere

    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(2))
    weight = model[0].weight.clone()
    share_statistics(model, SimpleNamespace(num_processes=1, reduce=None))
    assert model[0].running_mean.tolist() == [0, 0]
    share_statistics(model, SimpleNamespace(num_processes=2, reduce=reduce))
    assert (model[0].running_mean.tolist(), model[0].running_var.tolist()) == ([2, 2], [2.5, 2.5])
    assert torch.equal(model[0].weight, weight)


def test_the_randomness_of_a_step_is_its_own():
    def drawn(*place):
        seed_step(*place)
        return torch.rand(4).tolist()

    places = [(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)]
    found = [drawn(*place) for place in places]
    assert len({tuple(row) for row in found}) == 27, "seed, step and rank must not be added or multiplied"
    assert [drawn(*place) for place in places] == found


def test_precision_is_the_wanted_the_launchers_or_the_devices(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert choose_precision("no", CPU) == "no"
    assert choose_precision("auto", CPU) == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="fp16 is not offered; use bf16 or no"):
        choose_precision("auto", CPU)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    for has, precision in (({}, "no"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")):
        monkeypatch.setattr(optimization.torch.cpu, "get_capabilities", lambda has=has: has)
        assert choose_precision("auto", CPU) == precision
