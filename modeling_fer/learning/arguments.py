"""Training arguments: one typed value, checked as a whole, saved with the run."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from modeling_fer.configuration_fer import CROP_POINTS
from modeling_fer.evaluation.metrics import write_whole

# What may change between an interrupted run and its continuation without changing what is learnt.
FREE_ON_RESUME = {
    "resume", "output_dir", "cache_dir", "save_steps", "keep_checkpoints", "log_steps", "tracker",
    "push_to_hub", "hub_model_id", "hub_base_model", "eval_batch_size", "crop", "crop_margin",
}  # fmt: skip


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": help})


@dataclass
class FerTrainingArguments:
    """Everything that decides a training run.

    Sizes are in pixels, batch sizes over all processes, steps are optimizer steps.
    """

    data: str = option(
        "",
        "prepared data set (folder written by `fer data prepare`), or several by role: labelled=DIR, "
        "pseudo=DIR, unlabelled=DIR, separated by commas or given by repeated --data",
    )
    output_dir: str = option("", "folder of the run: model, metrics, history, checkpoints")
    stage: str = option(
        "image", "what to train: pretrain (masked autoencoding), image, or video (a temporal head)"
    )
    cache_dir: str = option("", "where decoded pixels are kept; default: <data>/cache")

    encoder: str = option(
        "", "folder or Hub id of pretrained encoder weights; empty: a new ViT of the sizes below"
    )
    encoder_config: str = option(
        "",
        "image: configuration (json) of a new encoder that AutoModel can build, in place of this ViT",
    )
    image_size: int = option(0, "side of the input image; 0: the encoder's own, or 112 where it has none")
    patch_size: int = option(16, "of a new ViT")
    hidden_size: int = option(192, "of a new ViT")
    num_layers: int = option(12, "of a new ViT")
    num_heads: int = option(3, "of a new ViT")
    crop: str = option(
        "",
        "how the data's faces are cut out, to be kept in the model: box (a detector's, made square) or "
        "arcface112 (turned upright by landmarks); empty: as --encoder's were, where it says so, else box",
    )
    crop_margin: float = option(0.0, "what --crop adds on each side, in units of its side without it")
    pooling: str = option("mean", "mean, cls or pooler")
    dropout: float = option(0.0, "dropout before the classifier")
    classes: str = option(
        "all", "all: the 8 classes, each needs training rows; present: only those with training rows"
    )

    mask_ratio: float = option(0.75, "pretrain: share of patches that are hidden")
    decoder_hidden_size: int = option(96, "pretrain: width of the decoder")
    decoder_layers: int = option(2, "pretrain: layers of the decoder")

    temporal_head: str = option(
        "transformer", "video: transformer, convolution or none (each frame for itself)"
    )
    temporal_hidden_size: int = option(256, "of the temporal head")
    temporal_layers: int = option(4, "of the temporal head")
    temporal_heads: int = option(4, "attention heads of the temporal transformer")
    temporal_window: int = option(64, "frames to each side that a frame attends to in each layer")
    temporal_dropout: float = option(0.1, "in the temporal head")
    causal: bool = option(False, "video: a frame sees only the past, so that the model can follow streams")
    num_frames: int = option(128, "video: frames of a training window")
    frame_rate: float = option(30.0, "video: frames a second of the data, kept in the model")
    frame_masking: float = option(0.15, "video: share of frames whose features are hidden in training")
    speed_jitter: float = option(0.25, "video: training speed between 1 / (1 + this) and 1 + this")
    feature_noise: float = option(0.1, "video: deviation of noise on the features in training")
    class_loss: str = option("logit_adjusted", "video: plain, balanced or logit_adjusted")
    folds: int = option(0, "video: judge by one of so many folds of the training videos; 0: by validation")
    fold: int = option(0, "video: which fold, from 0")

    lora_rank: int = option(0, "rank of LoRA adapters on the encoder; 0: full fine-tuning")
    lora_targets: str = option("attention", "attention, mlp or all")
    lora_layers: int = option(0, "adapt only so many blocks of the encoder, the last ones; 0: all")
    lora_alpha: float = option(0.0, "scale of the update is alpha / rank; 0: twice the rank")

    method: str = option("supervised", "image: supervised, fixmatch or feedback (teacher and student)")
    teacher: str = option(
        "", "supervised: image model of the same classes and input, whose probabilities are learnt from, too"
    )
    distillation: float = option(0.0, "share of --teacher in what is learnt; the rest is the label's")
    strong_augmentation: str = option("strong", "of the views that pseudo-labels are learnt on")
    mu: int = option(4, "unlabelled faces for each labelled one in a batch")
    lambda_u: float = option(1.0, "weight of the unlabelled loss")
    threshold_rule: str = option("fixed", "which pseudo-labels count: fixed, flex, free, soft or ada")
    threshold: float = option(0.95, "confidence for rules fixed and flex, first value for ada")
    threshold_momentum: float = option(0.99, "of the running means of rules free, soft and ada")
    debias_tau: float = option(0.0, "strength of debiasing by the marginal of pseudo-labels; 0: none")
    debias_momentum: float = option(0.99, "of that marginal, and of --align")
    align: str = option(
        "none",
        "pull the distribution of pseudo-labels to: uniform, labelled (as predicted on labelled faces, which "
        "--sampling_alpha 0 draws as they come; for unlabelled faces of another domain) or none",
    )
    gate: str = option(
        "none", "leave out unlabelled faces unlike the labelled by: energy, probability or none"
    )
    gate_quantile: float = option(0.05, "share of labelled faces that the gate would leave out")
    teacher_ema: float = option(
        0.0, "fixmatch: weight average that makes the pseudo-labels; 0: the model itself"
    )
    feedback_weight: float = option(
        1.0, "feedback: weight of the student's improvement in the teacher's loss"
    )
    student_lambda_x: float = option(
        1.0, "feedback: weight of the labelled loss in the student's; 0: pseudo-labels alone, as in the paper"
    )
    finetune: float = option(0.1, "feedback: share of the steps, at the end, on labelled faces alone")
    sampler_bound: float = option(
        1.0, "feedback to the sampler keeps class weights within this factor of uniform; 1: none"
    )
    holdout: float = option(
        0.0,
        "share of labelled training faces kept from training to measure recall for the sampler's feedback",
    )
    round_steps: int = option(
        0, "steps between feedback to the sampler; 0: one pass over the labelled data, at least 50"
    )
    stream: str = option(
        "",
        "unlabelled faces read as they come, in place of the stored: folder of parquet or tar shards, Hub id",
    )
    stream_memory: int = option(100_000, "faces of a stream that rule flex remembers")

    epochs: float = option(10, "passes over the labelled data, where max_steps is 0")
    max_steps: int = option(0, "optimizer steps; 0: given by epochs")
    batch_size: int = option(64, "examples of one optimizer step over all processes and accumulation steps")
    accumulation_steps: int = option(
        1,
        "forward-backward passes of one optimizer step; with fixmatch, marginal and thresholds move in each",
    )
    sampling_alpha: float = option(1.0, "1: labelled classes drawn uniformly, 0: naturally")
    learning_rate: float = option(5e-4, "highest learning rate")
    warmup: float = option(
        0.05, "share of the steps in which the learning rate rises; then it falls by a cosine to 0"
    )
    layer_decay: float = option(
        1.0, "factor of the learning rate from each encoder block to the one below it; 1: none"
    )
    weight_decay: float = option(0.05, "of AdamW, on matrices only")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: not")
    ema_decay: float = option(
        0.999, "moving average of the weights, which is what is evaluated and kept; 0: none"
    )
    label_smoothing: float = option(0.0, "of the cross-entropy")
    soft_labels: bool = option(False, "learn from vote distributions where a row has one")
    augmentation: str = option("weak", "weak, strong, crop or none; crop is for pretraining")
    erasing: float = option(0.0, "probability that part of a training image is blanked")
    noise: float = option(0.0, "supervised: probability that a training image is darkened and made noisy")

    seed: int = option(0, "of weights, order and augmentation")
    precision: str = option("auto", "auto: bf16 where the device computes in it, else fp32; or no, bf16")
    threads: int = option(0, "CPU threads of one process; 0: all cores, shared among the processes")
    compile: bool = option(False, "torch.compile the model")

    eval_steps: int = option(200, "evaluate on validation every so many steps, and at the end")
    eval_batch_size: int = option(256, "images a device evaluates at once")
    save_steps: int = option(200, "write a checkpoint every so many steps, and at the end")
    keep_checkpoints: int = option(2, "how many checkpoints stay")
    log_steps: int = option(20, "log every so many steps")
    resume: str = option(
        "never", "never, auto (from the newest checkpoint of output_dir, if any), or a checkpoint folder"
    )
    push_to_hub: bool = option(False, "push the model to the Hub when the run has ended")
    hub_model_id: str = option("", "org/name to push to")
    hub_base_model: str = option("", "Hub id of --encoder, where that is a folder and an adapter is pushed")
    tracker: str = option("tensorboard", "tensorboard, trackio or none")

    def __post_init__(self) -> None:
        choices = {
            "stage": ("pretrain", "image", "video"),
            "crop": ("", *CROP_POINTS),
            "temporal_head": ("transformer", "convolution", "none"),
            "class_loss": ("plain", "balanced", "logit_adjusted"),
            "classes": ("all", "present"),
            "augmentation": ("weak", "strong", "crop", "none"),
            "strong_augmentation": ("strong", "weak", "none"),
            "method": ("supervised", "fixmatch", "feedback"),
            "threshold_rule": ("fixed", "flex", "free", "soft", "ada"),
            "align": ("none", "uniform", "labelled"),
            "gate": ("none", "energy", "probability"),
            "precision": ("auto", "no", "bf16"),
            "tracker": ("tensorboard", "trackio", "none"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("data", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing: pass it, or set it in the --config file")
        for name in (
            "batch_size", "accumulation_steps", "eval_steps", "eval_batch_size", "save_steps", "log_steps",
            "keep_checkpoints", "patch_size", "hidden_size", "num_layers", "num_heads", "decoder_hidden_size",
            "decoder_layers", "mu", "stream_memory", "temporal_hidden_size", "temporal_layers",
            "temporal_heads", "temporal_window", "num_frames",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "image_size", "lora_rank", "lora_alpha", "seed", "threads", "weight_decay", "max_grad_norm",
            "lambda_u", "debias_tau", "feedback_weight", "student_lambda_x", "round_steps", "speed_jitter",
            "feature_noise", "folds", "fold", "lora_layers",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"--learning_rate must be positive, got {self.learning_rate}")
        if not -0.5 < self.crop_margin <= 1 or (self.crop_margin and not self.crop):
            raise ValueError(
                f"--crop_margin must be above -0.5 and at most 1, and go with --crop, got {self.crop_margin}"
            )
        if self.max_steps < 0 or not self.epochs > 0:
            raise ValueError(f"--max_steps {self.max_steps} --epochs {self.epochs}: nothing would be trained")
        for name in (
            "ema_decay",
            "label_smoothing",
            "erasing",
            "noise",
            "dropout",
            "warmup",
            "sampling_alpha",
            "threshold",
            "gate_quantile",
            "distillation",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must lie between 0 and 1, got {getattr(self, name)}")

        for name in (
            "threshold_momentum",
            "debias_momentum",
            "teacher_ema",
            "finetune",
            "holdout",
            "frame_masking",
        ):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 1 <= self.sampler_bound < math.inf:
            raise ValueError(
                f"--sampler_bound must be a finite number, at least 1 (none), got {self.sampler_bound}"
            )
        asked = {
            "stream": self.stream,
            "sampler_bound": self.sampler_bound > 1,
            "debias_tau": self.debias_tau,
            "align": self.align != "none",
            "gate": self.gate != "none",
        }
        if self.method == "supervised" and any(asked.values()):
            names = ", ".join(f"--{name}" for name, there in asked.items() if there)
            raise ValueError(f"{names}: for unlabelled faces only; add --method fixmatch or feedback")
        if bool(self.teacher) != (self.distillation > 0):
            raise ValueError(
                f"--teacher {self.teacher or 'DIR'} and its share, --distillation {self.distillation}, go "
                "together: pass both, the share above 0, or neither"
            )
        if self.teacher and (self.method != "supervised" or self.stage != "image"):
            raise ValueError(
                f"--teacher {self.teacher} is for --stage image --method supervised: the other methods make "
                "their own"
            )
        if self.encoder_config and (self.encoder or self.stage != "image"):
            raise ValueError(
                f"--encoder_config {self.encoder_config} is of a new encoder for stage image: leave out "
                "--encoder and other stages"
            )
        if self.holdout and self.sampler_bound == 1:
            raise ValueError(f"--holdout {self.holdout} is for the sampler's feedback: add --sampler_bound 3")
        if self.method == "feedback" and self.teacher_ema:
            raise ValueError(
                f"--teacher_ema {self.teacher_ema} is for fixmatch: the teacher of feedback is trained"
            )
        if self.method == "feedback" and self.accumulation_steps > 1:
            raise ValueError(
                "--method feedback compares the student before and after a whole batch: "
                "use --accumulation_steps 1"
            )
        for name in ("layer_decay", "mask_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be above 0 and at most 1, got {getattr(self, name)}")
        if self.stage == "pretrain" and (self.encoder or self.lora_rank or self.crop):
            raise ValueError(
                "--stage pretrain trains a new ViT whole: leave out --encoder, --lora_rank and --crop"
            )
        if self.stage == "video":
            if not self.encoder:
                raise ValueError(
                    "--stage video needs the image model whose features it learns from: --encoder RUN/model"
                )
            if self.method != "supervised" or self.layer_decay != 1:
                raise ValueError("--method and --layer_decay are for stage image: leave them out")
            if self.folds == 1 or (self.folds and self.fold >= self.folds):
                raise ValueError(f"--folds {self.folds} --fold {self.fold}: 2 folds or more, counted from 0")
        if self.stage == "pretrain" and (self.method != "supervised" or self.layer_decay != 1):
            raise ValueError(
                "--method and --layer_decay are for stage image: leave them out of --stage pretrain"
            )
        if not self.encoder and self.lora_rank:
            raise ValueError(
                f"--lora_rank {self.lora_rank} adapts a pretrained encoder: pass --encoder, "
                "or train a new one whole with --lora_rank 0"
            )
        if not (self.encoder or self.encoder_config):
            size = self.image_size or 112
            if size % self.patch_size:
                raise ValueError(f"--image_size {size} must be a multiple of --patch_size {self.patch_size}")
            if self.hidden_size % 4 or self.hidden_size % self.num_heads:
                raise ValueError(
                    f"--hidden_size {self.hidden_size} must divide by 4 and --num_heads {self.num_heads}"
                )
        if self.push_to_hub:
            self.check_push()
        if self.augmentation == "none" and self.erasing:
            raise ValueError(f"--erasing {self.erasing} needs --augmentation weak, got none")
        if self.noise and (self.method != "supervised" or self.stage != "image"):
            raise ValueError(f"--noise {self.noise} is for --stage image --method supervised: leave it out")

    def check_push(self) -> None:
        """Raise what would fail once all is trained: names that the Hub does not take, no card, no base."""
        is_folder = Path(self.encoder).exists() or len(Path(self.encoder).parts) > 2
        if self.stage == "pretrain":
            raise ValueError(
                "--stage pretrain makes an encoder, which has no card: leave out --push_to_hub, and push it "
                f"with `fer push {self.output_dir}/model org/name --no-card`"
            )
        if self.lora_rank and is_folder and not self.hub_base_model:
            raise ValueError(
                f"--encoder {self.encoder} is a folder, which nobody else has: push it, then name it with "
                "--hub_base_model org/name as the base of the adapter"
            )
        for name in ("hub_model_id", *(["hub_base_model"] if self.hub_base_model else [])):
            value = getattr(self, name)
            try:
                validate_repo_id(value)
                if "/" not in value:
                    raise HFValidationError("no organisation or user before it")
            except HFValidationError as error:
                raise ValueError(f"--push_to_hub needs --{name} org/name, got {value!r}: {error}") from error

    def save(self, path: Path) -> None:
        """Write all fields as JSON."""
        write_whole(path, (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """Fields that decide what is learnt and differ from a saved run, as "name: theirs -> ours".

        A field that came after the saved run had its default there.
        """
        ours = dataclasses.asdict(self)
        new = [one for one in dataclasses.fields(self) if one.name not in saved]
        saved = saved | {one.name: one.default for one in new if one.default is not dataclasses.MISSING}
        names = sorted((ours.keys() | saved.keys()) - FREE_ON_RESUME)
        return [f"{n}: {saved.get(n)!r} -> {ours.get(n)!r}" for n in names if saved.get(n) != ours.get(n)]
