"""LoRA adapters on the encoder: add them, merge them into the weights, save them alone."""

import re
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

# Which linear layers of the encoder's repeated blocks carry an adapter, by their path in the model.
LORA_TARGETS = {
    "attention": re.compile(r"attention|attn"),
    "mlp": re.compile(r"^(?!.*(attention|attn)).*$"),
    "all": re.compile(r""),
}


def find_targets(model: nn.Module, kind: str, last: int = 0) -> list[str]:
    """Names of the encoder's linear layers of one kind, found by looking at the model.

    With `last` above 0, only those in so many blocks, the last ones.

    Only layers inside numbered blocks count, so that poolers and heads stay out. Parameter names differ
    between encoders and between versions of transformers; none is assumed beyond attention being called so.

    Raises:
        ValueError: unknown kind, or the encoder has no such layer.
    """
    if kind not in LORA_TARGETS:
        raise ValueError(f"LoRA targets must be one of {', '.join(LORA_TARGETS)}, got {kind!r}")
    in_block = re.compile(r"(?:^|\.)encoder\..*?(?<=\.)(\d+)\.")
    blocks = {
        name: int(found[1])
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (found := in_block.search(name))
        and LORA_TARGETS[kind].search(name)
    }
    first = max(blocks.values(), default=0) + 1 - last if last else 0
    names = [name for name, block in blocks.items() if block >= first]
    if not names:
        raise ValueError(
            f"no {kind} linear layer found for LoRA in the encoder of {type(model).__name__}; "
            f"choose other targets ({', '.join(LORA_TARGETS)}) or train all weights with rank 0"
        )
    return names


def add_lora(
    model: nn.Module, rank: int, targets: str = "attention", alpha: float | None = None, last: int = 0
) -> PeftModel:
    """Freeze the encoder and add LoRA adapters to it.

    Pooling norm and heads stay trainable and belong to the adapter. A fresh adapter changes nothing: its
    second matrix starts at zero.

    Args:
        model: a facial-expression model, fully built (injection must come after weights are initialised or
            loaded).
        rank: rank of the update, at least 1.
        targets: a key of `LORA_TARGETS`.
        alpha: scale of the update is `alpha / rank`; default twice the rank.
        last: adapt only so many blocks of the encoder, the last ones; 0: all.

    Raises:
        ValueError: rank below 1, unknown targets, or nothing to adapt.
    """
    if rank < 1:
        raise ValueError(
            f"LoRA rank must be at least 1, got {rank}; rank 0 means full fine-tuning, without adapters"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=find_targets(model, targets, last),
        modules_to_save=["classifier", "fer.norm", *(["temporal"] if hasattr(model, "temporal") else [])],
    )
    return get_peft_model(model, config)


def merge_lora(model: nn.Module) -> nn.Module:
    """The plain model with adapters merged into its weights; one without adapters is returned as it is."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Save only the adapter, with norm and classifier.

    `PeftModel.from_pretrained(base, folder)` puts it on its base again.
    """
    model.save_pretrained(str(folder))
