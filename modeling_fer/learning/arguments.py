"""Training arguments: one typed value, read from a YAML file and the command line, saved with the run."""

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

# What may change between an interrupted run and its continuation without changing what is learnt.
FREE_ON_RESUME = {"resume", "output_dir", "cache_dir", "save_steps", "keep_checkpoints", "log_steps", "tracker", "eval_batch_size"}


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": help})


@dataclass
class FerTrainingArguments:
    """Everything that decides a training run. Sizes in pixels, batch sizes over all processes, steps are optimizer steps."""

    data: str = option("", "prepared data set (folder written by `fer data prepare`)")
    output_dir: str = option("", "folder of the run: model, metrics, history, checkpoints")
    stage: str = option("image", "what to train: image")
    cache_dir: str = option("", "where decoded pixels are kept; default: <data>/cache")

    encoder: str = option("", "folder or Hub id of pretrained encoder weights; empty: a new ViT of the sizes below")
    image_size: int = option(0, "side of the input image; 0: the encoder's own, or 112 for a new ViT")
    patch_size: int = option(16, "of a new ViT")
    hidden_size: int = option(192, "of a new ViT")
    num_layers: int = option(12, "of a new ViT")
    num_heads: int = option(3, "of a new ViT")
    initializer_range: float = option(0.02, "standard deviation of a new ViT's initial weights")
    pooling: str = option("mean", "mean, cls or pooler")
    dropout: float = option(0.0, "dropout before the classifier")
    classes: str = option("all", "all: the 8 classes, each needs training rows; present: only those with training rows")

    lora_rank: int = option(0, "rank of LoRA adapters on the encoder; 0: full fine-tuning")
    lora_targets: str = option("attention", "attention, mlp or all")
    lora_alpha: float = option(0.0, "scale of the update is alpha / rank; 0: twice the rank")

    epochs: float = option(10, "passes over the labelled data, where max_steps is 0")
    max_steps: int = option(0, "optimizer steps; 0: given by epochs")
    batch_size: int = option(64, "examples of one optimizer step over all processes and accumulation steps")
    accumulation_steps: int = option(1, "forward-backward passes of one optimizer step")
    sampling_alpha: float = option(1.0, "1: labelled classes drawn uniformly, 0: naturally")
    learning_rate: float = option(5e-4, "highest learning rate")
    warmup: float = option(0.05, "share of the steps in which the learning rate rises; then it falls by a cosine to 0")
    weight_decay: float = option(0.05, "of AdamW, on matrices only")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: not")
    ema_decay: float = option(0.999, "moving average of the weights, which is what is evaluated and kept; 0: none")
    label_smoothing: float = option(0.0, "of the cross-entropy")
    soft_labels: bool = option(False, "learn from vote distributions where a row has one")
    augmentation: str = option("weak", "weak or none")
    erasing: float = option(0.0, "probability that part of a training image is blanked")

    seed: int = option(0, "of weights, order and augmentation")
    precision: str = option("auto", "auto: bf16 where the device computes in it, else fp32; or no, bf16, fp16")
    threads: int = option(0, "CPU threads of one process; 0: all cores, shared among the processes")
    compile: bool = option(False, "torch.compile the model")

    eval_steps: int = option(200, "evaluate on validation every so many steps, and at the end")
    eval_batch_size: int = option(256, "images a device evaluates at once")
    save_steps: int = option(200, "write a checkpoint every so many steps, and at the end")
    keep_checkpoints: int = option(2, "how many checkpoints stay")
    log_steps: int = option(20, "log every so many steps")
    resume: str = option("never", "never, auto (from the newest checkpoint of output_dir, if any), or a checkpoint folder")
    tracker: str = option("tensorboard", "tensorboard, trackio or none")

    def __post_init__(self) -> None:
        choices = {
            "stage": ("image",),
            "classes": ("all", "present"),
            "augmentation": ("weak", "none"),
            "precision": ("auto", "no", "bf16", "fp16"),
            "tracker": ("tensorboard", "trackio", "none"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("data", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing: pass it, or set it in the --config file")
        for name in ("batch_size", "accumulation_steps", "eval_steps", "save_steps", "log_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.max_steps < 0 or self.epochs <= 0:
            raise ValueError(f"--max_steps {self.max_steps} --epochs {self.epochs}: nothing would be trained")
        for name in ("ema_decay", "label_smoothing", "erasing", "dropout", "warmup", "sampling_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must lie between 0 and 1, got {getattr(self, name)}")

    def save(self, path: Path) -> None:
        """Write all fields as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """Fields that decide what is learnt and differ from a saved run, as "name: theirs -> ours"."""
        ours = dataclasses.asdict(self)
        names = sorted((ours.keys() | saved.keys()) - FREE_ON_RESUME)
        return [f"{n}: {saved.get(n)!r} -> {ours.get(n)!r}" for n in names if saved.get(n) != ours.get(n)]


def parse_arguments(argv: list[str] | None = None) -> FerTrainingArguments:
    """Read `--config FILE.yaml`, then `--field value` for any field, which wins over the file.

    Raises:
        ValueError: the file holds something other than known fields, or a value is out of range.
    """
    parser = HfArgumentParser(FerTrainingArguments, description="Train a facial-expression model.")  # type: ignore[arg-type]
    parser.add_argument("--config", help="YAML file of the fields below; the command line wins over it")
    first, _ = argparse.ArgumentParser(add_help=False, parents=[_config_only()]).parse_known_args(argv)
    if first.config:
        values = yaml.safe_load(Path(first.config).read_text()) or {}
        known = {f.name for f in dataclasses.fields(FerTrainingArguments)}
        if not isinstance(values, dict) or (unknown := sorted(set(values) - known)):
            what = f"unknown fields {', '.join(unknown)}" if isinstance(values, dict) else "no mapping of fields to values"
            raise ValueError(f"{first.config} holds {what}; known fields: {', '.join(sorted(known))}")
        # As strings, so that argparse converts and checks them as it does the command line's (YAML reads 1e-3 as a string).
        parser.set_defaults(**{name: str(value) for name, value in values.items()})
    namespace = vars(parser.parse_args(argv))
    namespace.pop("config")
    return FerTrainingArguments(**namespace)


def _config_only() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config")
    return parser
