"""Stage `image`: a classifier of single faces from labelled stills."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, ViTConfig, ViTImageProcessor, ViTModel

from modeling_fer import FerConfig, FerForImageClassification
from modeling_fer.configuration_fer import check_crop
from modeling_fer.data.augment import Normalize
from modeling_fer.data.collection import Collection, expressions_of
from modeling_fer.data.dataset import FaceDataset
from modeling_fer.data.feed import Pool, Streamed
from modeling_fer.data.pixels import decode_split
from modeling_fer.data.sampling import DebiasFeedbackSampler
from modeling_fer.evaluation.metrics import compute_metrics
from modeling_fer.labels import CLASSES, IGNORE
from modeling_fer.learning.adapters import add_lora, merge_lora, save_adapter
from modeling_fer.learning.arguments import FerTrainingArguments
from modeling_fer.learning.inference import class_names, over_all_classes, predict_probabilities
from modeling_fer.learning.methods import count_recall, hold_out, step_maker
from modeling_fer.learning.stage import Stage, report_validation

SIZE = 112  # pixels: side of the input image, where neither the arguments nor the encoder say it
SHORTEST_ROUND = 50  # steps between feedback to the sampler, where passes over the labelled faces are shorter


def choose_classes(expressions: np.ndarray, rule: str, folder: str) -> list[str]:
    """Names of the model's classes: all eight, or those with training rows.

    Raises:
        ValueError: rule `all`, and a class has no training row.
    """
    counts = np.bincount(expressions, minlength=len(CLASSES))
    empty = [name for name, n in zip(CLASSES, counts, strict=True) if n == 0]
    if rule == "all" and empty:
        raise ValueError(
            f"{folder}: no training rows of {', '.join(empty)}; add some, or pass --classes present for a "
            "model without"
        )
    return [name for name in CLASSES if name not in empty]


def sincos_positions(grid: int, width: int) -> torch.Tensor:
    """Fixed two-dimensional sin-cos position embeddings `(grid * grid, width)`, rows first.

    The waves of Vaswani et al., "Attention Is All You Need", 2017, section 3.5, half the width a coordinate.

    Raises:
        ValueError: `width` is not a multiple of 4 (sine and cosine of two coordinates).
    """
    if width % 4:
        raise ValueError(f"--hidden_size {width} must be a multiple of 4")
    frequencies = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    along = torch.outer(torch.arange(float(grid)), frequencies)
    waves = torch.cat([along.sin(), along.cos()], dim=1)
    rows, columns = waves.repeat_interleave(grid, dim=0), waves.repeat(grid, 1)
    return torch.cat([rows, columns], dim=1)


@torch.no_grad()
def condition_vit(encoder: nn.Module) -> None:
    """Start a new ViT where it learns from few faces: sin-cos positions, patch filters blind to brightness.

    Neighbouring pixels are nearly equal, so random filters answer to little but a patch's mean, and every
    token starts out as almost the same vector. Filters of zero mean see edges from the first step. What it
    gains is in docs/experiments.md.
    """
    embeddings: Any = encoder.embeddings
    positions, filters = embeddings.position_embeddings, embeddings.patch_embeddings.projection.weight
    grid = math.isqrt(positions.shape[1] - 1)
    positions[0, 1:] = sincos_positions(grid, positions.shape[-1])
    filters.normal_(std=0.3)
    filters -= filters.mean(dim=(2, 3), keepdim=True)


def crop_to_state(arguments: FerTrainingArguments, start: Any) -> dict[str, Any]:
    """The crop convention that a model is to state: as asked for, else that of the model it starts from.

    Where `start`, a configuration or None, says nothing of it, a plain square box: most data sets' faces are
    cut out like that.
    """
    asked = {"name": arguments.crop, "margin": arguments.crop_margin} if arguments.crop else None
    return check_crop(asked or getattr(start, "crop", None) or {"name": "box"})


def input_size(arguments: FerTrainingArguments, config: Any) -> int | None:
    """Side of the input image as asked for, None for the encoder's own, or `SIZE` where that has none."""
    own = getattr(getattr(config, "vision_config", config), "image_size", None)
    return arguments.image_size or (None if own else SIZE)


def build_model(arguments: FerTrainingArguments, classes: list[str]) -> FerForImageClassification:
    """A classifier on a pretrained encoder, on a new one of any kind, or on a new ViT."""
    options: dict[str, Any] = {
        "pooling": arguments.pooling,
        "classifier_dropout": arguments.dropout,
        "id2label": dict(enumerate(classes)),
    }
    if arguments.encoder:
        try:
            start = AutoConfig.from_pretrained(arguments.encoder)
            options["image_size"] = input_size(arguments, start)
            options["crop"] = crop_to_state(arguments, start if isinstance(start, FerConfig) else None)
            return FerForImageClassification.from_encoder_pretrained(arguments.encoder, **options)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"--encoder {arguments.encoder} is no vision encoder, in a folder or on the Hub: {error}"
            ) from error
    options["crop"] = crop_to_state(arguments, None)
    if arguments.encoder_config:
        try:
            encoder_config = AutoConfig.from_pretrained(arguments.encoder_config)
            options["image_size"] = input_size(arguments, encoder_config)
            model = FerForImageClassification(FerConfig(encoder_config=encoder_config, **options))
        except (OSError, ValueError) as error:
            raise ValueError(f"--encoder_config {arguments.encoder_config}: {error}") from error
    else:
        encoder_config = ViTConfig(
            image_size=arguments.image_size or SIZE,
            patch_size=arguments.patch_size,
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.num_layers,
            num_attention_heads=arguments.num_heads,
            intermediate_size=4 * arguments.hidden_size,
            initializer_range=arguments.hidden_size**-0.5,
        )
        model = FerForImageClassification(FerConfig(encoder_config=encoder_config, **options))
    if type(model.fer.encoder) is ViTModel:
        condition_vit(model.fer.encoder)
    return model


def build_processor(arguments: FerTrainingArguments, image_size: int) -> Any:
    """A stock image processor: resize to a square, then normalise as the encoder expects.

    Raises:
        ValueError: the encoder has no image processor, so that nobody knows what it expects.
    """
    mean = std = [0.5, 0.5, 0.5]
    if arguments.encoder:
        try:
            known, _ = ViTImageProcessor.get_image_processor_dict(arguments.encoder)
            mean, std = known["image_mean"], known["image_std"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"--encoder {arguments.encoder}: no image processor with mean and deviation ({error}); "
                "save one beside the weights (preprocessor_config.json)"
            ) from error
    return ViTImageProcessor(size={"height": image_size, "width": image_size}, image_mean=mean, image_std=std)


def freeze_unused(model: nn.Module, image_size: int) -> list[str]:
    """Freeze parameters that no output depends on (mask tokens, unused poolers), and name them.

    Data-parallel training waits for the gradient of every trainable parameter. They are found by looking: one
    backward pass.
    """
    model.eval()  # a batch norm must not learn from this
    model(pixel_values=torch.zeros(2, 3, image_size, image_size)).logits.sum().backward()
    model.train()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    for name in unused:
        model.get_parameter(name).requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return unused


def save_model(processor: Any, model: nn.Module, folder: Path) -> None:
    """Write a model with its processor; an adapter is merged, and kept beside it."""
    model = copy.deepcopy(model)
    if isinstance(model, PeftModel):
        save_adapter(model, folder / "adapter")
    plain: Any = merge_lora(model)
    plain.save_pretrained(folder)
    processor.save_pretrained(folder)


def image_stage(arguments: FerTrainingArguments, accelerator: Accelerator) -> Stage:
    """Set up training of a still-image classifier, on labelled faces and perhaps unlabelled ones."""
    collection = Collection(arguments.data)
    train, validation = collection.labelled("train"), collection.labelled("validation")
    expressions, validation_labels = expressions_of(train), expressions_of(validation)
    classes = choose_classes(expressions, arguments.classes, arguments.data)
    if absent := [name for i, name in enumerate(CLASSES) if i not in validation_labels]:
        accelerator.print(
            f"{arguments.data}: no validation rows of {', '.join(absent)}; macro_f1 counts them 0, "
            "macro_f1_present leaves them out"
        )

    model = build_model(arguments, classes)
    image_size = model.config.image_size
    processor = build_processor(arguments, image_size)
    freeze_unused(model, image_size)
    trained: nn.Module = model
    if arguments.lora_rank:
        trained = add_lora(
            model,
            arguments.lora_rank,
            arguments.lora_targets,
            arguments.lora_alpha or None,
            arguments.lora_layers,
        )

    decode = partial(
        decode_split,
        size=image_size,
        cache_dir=arguments.cache_dir or collection.cache_dir,
        show_progress=accelerator.is_main_process,
    )
    unlabelled = None
    if arguments.method != "supervised" and not arguments.stream:
        unlabelled = collection.unlabelled()
        if unlabelled is None:
            raise ValueError(
                f"--method {arguments.method}: {arguments.data} has no unlabeled split; prepare the data "
                "with one, add --data unlabelled=FOLDER, or --stream SHARDS"
            )
    with accelerator.main_process_first():
        pixels, validation_pixels = decode(train), decode(validation)
        unlabelled_pixels = None if unlabelled is None else decode(unlabelled)
    soft_labels = train["soft_label"][:] if arguments.soft_labels else None
    dataset = FaceDataset(pixels, expressions, soft_labels, classes)
    true = np.arange(len(dataset)) < collection.true_labels()  # recall on a model's own labels says nothing
    held_out = hold_out(np.where(true, dataset.labels, IGNORE), arguments.holdout, arguments.seed)

    ranks = (accelerator.process_index, accelerator.num_processes)
    order = DebiasFeedbackSampler(
        np.where(held_out, IGNORE, dataset.labels),
        len(classes),
        arguments.batch_size,
        arguments.sampling_alpha,
        arguments.seed,
        *ranks,
    )
    if arguments.method != "supervised":
        order.batches_per_epoch = arguments.round_steps or max(order.batches_per_pass, SHORTEST_ROUND)
    feed: Pool | Streamed | None = None
    memory = arguments.stream_memory
    size = arguments.mu * arguments.batch_size
    if unlabelled is not None and unlabelled_pixels is not None:
        pool = FaceDataset(unlabelled_pixels, expressions_of(unlabelled), None, classes)
        memory = len(pool)
        one_class = np.zeros(memory, dtype=np.int64)  # no label has a say in the order
        feed = Pool(pool, DebiasFeedbackSampler(one_class, 1, size, 0.0, arguments.seed + 1, *ranks))
    elif arguments.method != "supervised":
        feed = Streamed(arguments.stream, image_size, size, arguments.seed, *ranks, classes=classes)

    normalize = Normalize(processor.image_mean, processor.image_std)

    def predict(model: nn.Module, pixels: np.ndarray) -> np.ndarray:
        return predict_probabilities(model, pixels, normalize, arguments.eval_batch_size, accelerator)

    recall = None
    if held_out.any():
        recall = count_recall(predict, np.array(pixels[held_out]), dataset.labels[held_out], len(classes))
    make_step = step_maker(arguments, accelerator, trained, processor, len(classes), memory, recall)

    def judge(model: nn.Module) -> np.ndarray:
        return over_all_classes(predict(model, validation_pixels), class_names(model))

    def evaluate(model: nn.Module) -> dict[str, Any]:
        found = judge(model)
        metrics = compute_metrics(validation_labels, found.argmax(-1), found, bootstrap_samples=0)
        keys = ("macro_f1", "macro_f1_present", "accuracy", "balanced_accuracy", "ece", "nll")
        return {key: metrics[key] for key in keys}

    save = partial(save_model, processor)
    report = partial(report_validation, collection, validation, judge, accelerator)
    return Stage(trained, Pool(dataset, order), make_step, evaluate, "macro_f1", save, feed, report)
