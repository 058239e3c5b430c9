"""Stage `pretrain`: masked autoencoding of faces without labels, as a start for stage `image`."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import concatenate_datasets
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import ViTConfig, ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from modeling_fer.data.augment import AUGMENTATIONS, Normalize, View
from modeling_fer.data.collection import Collection, expressions_of
from modeling_fer.data.dataset import FaceDataset
from modeling_fer.data.feed import Pool
from modeling_fer.data.pixels import decode_split
from modeling_fer.data.sampling import DebiasFeedbackSampler
from modeling_fer.evaluation import plots
from modeling_fer.labels import IGNORE, NUM_CLASSES
from modeling_fer.learning.arguments import FerTrainingArguments
from modeling_fer.learning.image import condition_vit, sincos_positions
from modeling_fer.learning.stage import Stage
from modeling_fer.learning.step import Batch, Logs, PlainStep

# Mean and deviation that images are normalised by, and the limits of what probes and pictures look at.
MEAN = STD = [0.5, 0.5, 0.5]
PROBED, NEIGHBOURS, TEMPERATURE = 5_000, 20, 0.07
HELD_OUT, PICTURED = 1_024, 8


def build_autoencoder(arguments: FerTrainingArguments) -> ViTMAEForPreTraining:
    """A masked autoencoder (He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022).

    The stock model, with what its own initialisation leaves out: built from a configuration, its position
    embeddings are all zero, and an encoder that does not know where a patch is learns nothing.

    Raises:
        ValueError: the decoder's width has no sin-cos positions.
    """
    width = arguments.decoder_hidden_size
    if width % 4:
        raise ValueError(f"--decoder_hidden_size {width} must be a multiple of 4 (sin-cos positions)")
    side = arguments.image_size or 112
    config = ViTMAEConfig(
        image_size=side,
        patch_size=arguments.patch_size,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.num_heads,
        intermediate_size=4 * arguments.hidden_size,
        decoder_hidden_size=width,
        decoder_num_hidden_layers=arguments.decoder_layers,
        decoder_num_attention_heads=arguments.num_heads,
        decoder_intermediate_size=4 * width,
        mask_ratio=arguments.mask_ratio,
        norm_pix_loss=True,
        initializer_range=arguments.hidden_size**-0.5,
    )
    model = ViTMAEForPreTraining(config)
    condition_vit(model.vit)
    grid = side // arguments.patch_size
    with torch.no_grad():
        model.decoder.decoder_pos_embed[0, 1:] = sincos_positions(grid, width)
        for token in (model.vit.embeddings.cls_token, model.decoder.mask_token):
            token.normal_(std=0.02)
    return model


def as_encoder(model: ViTMAEForPreTraining) -> ViTModel:
    """The encoder alone, as a plain ViT that sees every patch (the masked one never does)."""
    names = ViTConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    shared = {name: value for name, value in model.config.to_dict().items() if name in names}
    encoder: Any = ViTModel(ViTConfig(**shared), add_pooling_layer=False)
    encoder.load_state_dict(model.vit.state_dict())
    return encoder.to(next(model.parameters()).device)


class ReconstructionStep(PlainStep):
    """Predict the normalised pixels of masked patches.

    Args:
        model: masked autoencoder, prepared for its device.
        view: uint8 images to normalised views, on the device.
        autocast: makes the context in which the forward pass runs.
    """

    def __init__(self, model: nn.Module, view: nn.Module, autocast: Any) -> None:
        self.model, self.view, self.autocast = model, view, autocast

    def __call__(self, batch: Batch, backward: Any) -> Logs:
        """See `Step`. Batch: `pixels` uint8 `(B, 3, H, W)`."""
        views = self.view(batch["pixels"])
        with self.autocast():
            loss = self.model(pixel_values=views).loss
        backward(loss)
        return {"loss": loss.detach()}


@torch.no_grad()
def features(
    encoder: nn.Module, pixels: np.ndarray, normalize: Normalize, device: torch.device, size: int = 512
) -> np.ndarray:
    """Mean of the patch tokens of each face, `(N, D)`."""
    found = []
    for start in range(0, len(pixels), size):
        images = normalize(torch.from_numpy(np.array(pixels[start : start + size])).to(device))
        found.append(encoder(pixel_values=images).last_hidden_state[:, 1:].mean(1).float().cpu())
    return torch.cat(found).numpy()


def knn_accuracy(
    known: np.ndarray, labels: np.ndarray, asked: np.ndarray, answers: np.ndarray, k: int = NEIGHBOURS
) -> float:
    """Accuracy of a weighted vote of the `k` nearest neighbours by cosine, `exp(similarity / 0.07)` each.

    As in Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018,
    section 3.4.
    """
    unit = [torch.from_numpy(f - known.mean(0)) for f in (known, asked)]
    unit = [nn.functional.normalize(f, dim=1) for f in unit]
    similarity, nearest = (unit[1] @ unit[0].T).topk(min(k, len(known)), dim=1)
    votes = torch.zeros(len(asked), NUM_CLASSES)
    votes.scatter_add_(1, torch.from_numpy(labels)[nearest], (similarity / TEMPERATURE).exp())
    return float((votes.argmax(1).numpy() == answers).mean())


def linear_accuracy(known: np.ndarray, labels: np.ndarray, asked: np.ndarray, answers: np.ndarray) -> float:
    """Accuracy of a logistic regression on standardised features."""
    mean, deviation = known.mean(0), known.std(0) + 1e-6
    probe = LogisticRegression(C=0.1, max_iter=200).fit((known - mean) / deviation, labels)
    return float(probe.score((asked - mean) / deviation, answers))


@torch.no_grad()
def reconstruct(
    model: ViTMAEForPreTraining, images: torch.Tensor, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks and reconstructions of normalised images `(B, 3, H, W)`, the same masks for the same seed.

    Returns:
        The loss, images with masked patches blank, images with masked patches as the model fills them in
        (each patch given the mean and deviation of the true one, which the model does not predict).
    """
    patches: Any = model.patchify(images)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(patches.shape[:2], generator=generator).to(images.device)
    output: Any = model(pixel_values=images, noise=noise)
    hidden = output.mask.unsqueeze(-1)
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    filled = output.logits.float() * (variance + 1e-6).sqrt() + mean
    blank, whole = patches * (1 - hidden), patches * (1 - hidden) + filled * hidden
    return output.loss, model.unpatchify(blank), model.unpatchify(whole)


def choose(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` of the row numbers, at random, in order."""
    if len(rows) <= count:
        return rows
    return np.sort(np.random.default_rng([seed, len(rows)]).choice(rows, count, replace=False))


def pretrain_stage(arguments: FerTrainingArguments, accelerator: Accelerator) -> Stage:
    """Set up masked autoencoding of every face of the train and unlabeled splits.

    It is judged by the share of the variance of masked patches that is explained, on the validation splits
    (or on faces held out, where there is none). Probes that use labels only report: they choose nothing.
    """
    collection = Collection(arguments.data)
    model = build_autoencoder(arguments)
    side, device = arguments.image_size or 112, accelerator.device
    decode = partial(
        decode_split,
        size=side,
        cache_dir=arguments.cache_dir or collection.cache_dir,
        show_progress=accelerator.is_main_process,
    )
    faces = collection.faces()
    parts = [data["validation"] for _, data in collection.folders["labelled"] if "validation" in data]
    judging = concatenate_datasets(parts) if len(parts) > 1 else next(iter(parts), None)
    with accelerator.main_process_first():
        pixels = decode(faces)
        judged = pixels if judging is None else decode(judging)
    labels = expressions_of(faces)
    order = np.zeros(len(faces), dtype=np.int64)  # one class: every face as often as any other
    answers = labels if judging is None else expressions_of(judging)
    judges = np.arange(len(judged))
    if judging is None:
        judges = choose(judges, min(HELD_OUT, max(1, len(faces) // 20)), arguments.seed)
        order[judges] = IGNORE
    known = choose(np.flatnonzero((labels != IGNORE) & (order != IGNORE)), PROBED, arguments.seed)
    asked = choose(judges[answers[judges] != IGNORE], PROBED, arguments.seed)
    sample = choose(judges, HELD_OUT, arguments.seed)
    sampler = DebiasFeedbackSampler(
        order,
        1,
        arguments.batch_size,
        0.0,
        arguments.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    dataset = FaceDataset(pixels, labels)
    normalize = Normalize(MEAN, STD).to(device)
    view = View(AUGMENTATIONS[arguments.augmentation](arguments.erasing), MEAN, STD).to(device)
    bf16 = arguments.precision == "bf16"

    def make_step(prepared: nn.Module, total: int) -> ReconstructionStep:
        autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
        return ReconstructionStep(prepared, view, autocast)

    def normalized(rows: np.ndarray) -> torch.Tensor:
        return normalize(torch.from_numpy(np.array(judged[rows])).to(device))

    def evaluate(model: Any) -> dict[str, Any]:
        losses = [
            reconstruct(model, normalized(sample[i : i + 256]), i)[0].item() * len(sample[i : i + 256])
            for i in range(0, len(sample), 256)
        ]
        metrics = {"explained_variance": 1 - sum(losses) / len(sample)}
        if len(known) and len(asked) and len(set(labels[known])) > 1:
            encoder = as_encoder(model).eval()
            seen = features(encoder, pixels[known], normalize, device)
            new = features(encoder, judged[asked], normalize, device)
            pairs = (seen, labels[known], new, answers[asked])
            metrics |= {"linear_probe": linear_accuracy(*pairs), "knn_probe": knn_accuracy(*pairs)}
        return metrics

    def save(model: Any, folder: Path) -> None:
        as_encoder(model).cpu().save_pretrained(folder)
        size = {"height": side, "width": side}
        ViTImageProcessor(size=size, image_mean=MEAN, image_std=STD).save_pretrained(folder)
        images = normalized(sample[:PICTURED])
        _, blank, whole = reconstruct(model, images)
        rows = {"input": images, "seen": blank, "reconstructed": whole}
        shown = {name: ((v * 0.5 + 0.5).clamp(0, 1) * 255).byte().cpu().numpy() for name, v in rows.items()}
        plots.save(plots.image_rows_figure(shown), folder / "reconstructions.png")

    return Stage(model, Pool(dataset, sampler), make_step, evaluate, "explained_variance", save)
