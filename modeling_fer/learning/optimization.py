"""How a model moves: precision, optimizer, weight averages, and the randomness of a step."""

import math
import os
import re
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

FINETUNE_RATE = 0.3  # of the highest learning rate, where a part of the run at its end fine-tunes


def choose_precision(wanted: str, device: torch.device) -> str:
    """`auto` to what the launcher was told, else to bf16 where the device has instructions for it, else no.

    Raises:
        ValueError: the launcher was told a precision that is not offered.
    """
    if wanted != "auto":
        return wanted
    if (told := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        if told != "bf16":
            raise ValueError(f"accelerate launch --mixed_precision {told} is not offered; use bf16 or no")
        return told
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "no"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "no"


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cpu(threads: int, processes: int) -> None:
    """Set torch up for training on the CPU: threads, and the attention kernel that is fast there.

    `accelerate launch` leaves one thread a process unless told otherwise. The fused attention kernel's
    backward pass in bf16 is several times slower on CPUs than plain matrix products for the few tokens of a
    face; figures in docs/experiments.md. `enable_flash_sdp` rules the CPU's kernel too.
    """
    torch.set_num_threads(threads or max(1, cpu_cores() // processes))
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # else plain attention is done in float32


def layer_depth(name: str, layers: int) -> int:
    """Depth of a parameter: 0 in the embeddings, 1 to `layers` in the blocks, `layers + 1` above them."""
    if re.search(r"\.embed\w+\.", name):
        return 0
    block = re.search(r"encoder\.(?:.*?\.)?(\d+)\.", name)
    return int(block[1]) + 1 if block else layers + 1


def build_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> torch.optim.AdamW:
    """AdamW on what is trainable; weight decay on matrices, not on biases, norms, tokens and positions.

    With `layer_decay` below 1 the learning rate falls by that factor from each block (of a convolutional
    network: each stage) to the one below it, so that general features change least (Clark et al., ELECTRA,
    2020; He et al., MAE, 2022).
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    depths = [layer_depth(name, 0) for name, _ in trainable if re.search(r"encoder\.(?:.*?\.)?\d+\.", name)]
    layers = max(depths, default=0)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, p in trainable:
        decays = p.ndim >= 2 and "position" not in name and "token" not in name
        depth = layers + 1 if layer_decay == 1 else layer_depth(name, layers)
        groups.setdefault((depth, decays), []).append(p)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": weight_decay if decays else 0.0,
                "lr": learning_rate * layer_decay ** (layers + 1 - depth),
            }
            for (depth, decays), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
        ],
        lr=learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )


def build_schedule(optimizer: Optimizer, warmup: float, steps: int, finetune: float = 0.0) -> LambdaLR:
    """Learning rate by step: a linear rise over the share `warmup`, then half a cosine down to 0.

    With `finetune` above 0 that ends before the last such share of the steps, in which a second half cosine
    falls from `FINETUNE_RATE` of the highest rate.
    """
    last = round(finetune * steps)
    first = steps - last
    rise = round(warmup * first)

    def factor(step: int) -> float:
        if step < rise:
            return step / max(1, rise)
        if step < first or not last:
            return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, first - rise))))
        return FINETUNE_RATE * max(0.0, 0.5 * (1 + math.cos(math.pi * (step - first) / last)))

    return LambdaLR(optimizer, factor)


def weight_average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights; it looks back further as steps pass, up to `decay`.

    Running statistics of batch norms are averaged like the weights that they belong to.
    """

    def average(averaged: Any, current: Any, seen: torch.Tensor | int) -> None:
        if not averaged[0].is_floating_point():  # how many batches a norm has seen
            torch._foreach_copy_(averaged, current)
            return
        weight = 1 - min(decay, (1 + int(seen)) / (10 + int(seen)))
        torch._foreach_lerp_(averaged, current, weight)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


@torch.no_grad()
def share_statistics(model: nn.Module, accelerator: Accelerator) -> None:
    """Make running statistics of batch norms their mean over processes: each saw its own part of a batch."""
    if accelerator.num_processes > 1:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for statistic in (module.running_mean, module.running_var):
                    if statistic is not None:
                        statistic.copy_(accelerator.reduce(statistic.clone(), "mean"))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make the randomness of a step a pure function of its place: a resumed run draws what it would have."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
