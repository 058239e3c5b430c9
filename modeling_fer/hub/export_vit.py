"""A still-image model as the stock `ViTForImageClassification`, which needs none of our code.

The stock model classifies the class token after one layer norm. Ours pools what the encoder's last norm gives
(the mean of the patches, or the class token), and norms once more. One layer and a few features more make the
stock model compute the same function, up to rounding:

- Every write to the residual stream is centred (no layer norm sees the mean), so that features of mean 0 can
  be added: a norm over `D'` features, of which `D` vary, is the norm over `D` times `sqrt(D' / D)`.
- The new features carry a mark that tells the class token from patches. Both have marks of one size, which
  take half the place of the norms' epsilon; the other half stays epsilon. No norm changes by that.
- The new layer's first norm is the encoder's last. Its attention reads the mark alone: the class token
  attends to all patches alike and not to itself (`mean`), or only to itself (`cls`). What it finds is written
  so loud that nothing remains of what the stream held. The layer's second half is 0.
- The stock model's last norm is our pooling norm; constants in the new features stand for its epsilon.
"""

import copy
import math
from typing import Any

import torch
from torch import nn
from transformers import ViTForImageClassification, ViTModel

from modeling_fer import FerForImageClassification, FerForVideoClassification
from modeling_fer.learning.adapters import merge_lora

MARKS = (
    3  # features that the mark needs: two that differ on the class token and agree on patches, and their sum
)
LOUDNESS = 2.0**30  # of what is pooled over what the stream held: less than float32 can tell from nothing
MARK_GAIN = (
    16  # log2 of a mark times its query's weight; scores are the square: far above what softmax rounds off
)


def plain_model(model: nn.Module) -> Any:
    """A copy in float32 on the CPU, adapters merged, ready for inference; the model stays as it is."""
    return merge_lora(copy.deepcopy(model)).float().cpu().eval()


def stock_vit(model: nn.Module) -> ViTForImageClassification:
    """The same classifier as a stock `ViTForImageClassification`, in float32.

    It has one layer more and, so that each attention head grows alike, 3 or more features, a multiple of the
    number of heads. Half precision (float16) cannot hold its weights; float32 and bfloat16 can.

    Args:
        model: a `FerForImageClassification` around a `ViTModel`, with or without LoRA.

    Raises:
        ValueError: another encoder, a model of videos, or a pooling or mirror images that the stock model
            cannot express.
    """
    source = plain_model(model)
    if isinstance(source, FerForVideoClassification):
        raise ValueError(
            "a stock ViT sees single images, this is a model of videos: export the image model that it was "
            "made from, or choose --format onnx"
        )
    if not isinstance(source, FerForImageClassification):
        raise ValueError(f"expected a FerForImageClassification, got {type(source).__name__}")
    encoder: Any = source.fer.encoder
    if type(encoder) is not ViTModel:
        kind = type(encoder).__name__
        raise ValueError(f"only a ViTModel encoder makes a stock ViT, this is {kind}: choose --format onnx")
    pooling = source.config.pooling
    if pooling not in ("mean", "cls"):
        raise ValueError(
            f"a stock ViT has no pooler, and this model's pooling is {pooling!r}: choose --format onnx"
        )
    if source.config.mirror:
        raise ValueError(
            "a stock ViT does not look at mirror images, as config.mirror of this model asks for: choose "
            "--format onnx, or set it to false"
        )
    stock = ViTForImageClassification(stock_config(source.config)).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.zero_()
        fill_embeddings(stock.vit.embeddings, encoder, mark_size(encoder.config))
        *layers, last = stock.vit.layers
        for target, layer in zip(layers, encoder.layers, strict=True):
            fill_layer(target, layer)
        fill_pooling(last, source.fer, mark_size(encoder.config))
        fill_norm(stock.vit.layernorm, source.fer.norm)
        width = source.classifier.in_features
        stock.classifier.weight[:, :width] = source.classifier.weight
        stock.classifier.bias[:] = source.classifier.bias
    return stock


def stock_config(config: Any) -> Any:
    """Configuration of the stock model of a `FerConfig`."""
    stock = copy.deepcopy(config.encoder_config)
    width, heads = stock.hidden_size, stock.num_attention_heads
    stock.hidden_size = width + heads * math.ceil(MARKS / heads)
    stock.num_hidden_layers += 1
    stock.layer_norm_eps *= width / stock.hidden_size / 2
    stock.image_size = config.image_size
    stock.pooler_output_size = stock.hidden_size
    stock.id2label = dict(enumerate(config.class_names))
    stock.label2id = dict(config.label2id)
    stock.problem_type = "single_label_classification"
    stock.dtype = torch.float32
    stock._name_or_path = ""
    stock.crop = config.crop  # not read by ViT: kept for who cuts out the faces
    return stock


def mark_size(config: Any) -> float:
    """Size of the mark's two halves on the class token, whose squares stand for half the norms' epsilon."""
    return math.sqrt(config.layer_norm_eps * config.hidden_size) / 2


def fill_norm(target: nn.LayerNorm, source: nn.LayerNorm) -> None:
    """A norm over all features that gives the source's on the old ones and 0 on the new."""
    width = len(source.weight)
    target.weight[:width] = source.weight * math.sqrt(width / len(target.weight))
    target.bias[:width] = source.bias


def fill_write(target: nn.Linear, source: nn.Linear) -> None:
    """A linear layer that writes to the stream, centred: its output sums to 0."""
    weight, bias = source.weight.double(), source.bias.double()
    target.weight[: len(weight), : weight.shape[1]] = weight - weight.mean(dim=0)
    target.bias[: len(bias)] = bias - bias.mean()


def fill_embeddings(target: Any, encoder: Any, mark: float) -> None:
    """Patch projection and positions, centred; the marks ride on the positions."""
    source, side = encoder.embeddings, target.image_size
    width = source.cls_token.shape[-1]
    weight, bias = (p.double() for p in source.patch_embeddings.projection.parameters())
    target.patch_embeddings.projection.weight[:width] = weight - weight.mean(dim=0)
    target.patch_embeddings.projection.bias[:width] = bias - bias.mean()
    positions = source.position_embeddings
    if tuple(side) != tuple(source.image_size):
        places = positions.new_zeros(1, target.patch_embeddings.num_patches + 1, width)
        positions = source.interpolate_pos_encoding(places, *side)
    for part, values in ((target.cls_token, source.cls_token), (target.position_embeddings, positions)):
        part[..., :width] = values.double() - values.double().mean(dim=-1, keepdim=True)
    target.position_embeddings[0, 0, width : width + MARKS] = torch.tensor([mark, -mark, 0.0])
    same = mark / math.sqrt(3)
    target.position_embeddings[0, 1:, width : width + MARKS] = torch.tensor([same, same, -2 * same])


def fill_layer(target: Any, source: Any) -> None:
    """A layer of the encoder among more features: the new ones are neither read nor written."""
    attention, own = target.attention, source.attention
    heads, size, width = own.num_attention_heads, own.head_dim, own.o_proj.out_features
    fill_norm(target.layernorm_before, source.layernorm_before)
    fill_norm(target.layernorm_after, source.layernorm_after)
    for name in ("q_proj", "k_proj", "v_proj"):
        # Scores are divided by the root of a head's size, which has grown.
        scale = math.sqrt(attention.head_dim / size) if name == "q_proj" else 1.0
        read, given = getattr(attention, name), getattr(own, name)
        read.weight.view(heads, -1, read.in_features)[:, :size, :width] = scale * given.weight.view(
            heads, size, width
        )
        if given.bias is not None:
            read.bias.view(heads, -1)[:, :size] = scale * given.bias.view(heads, size)
    spread = torch.zeros(width, heads, attention.head_dim)
    spread[..., :size] = own.o_proj.weight.view(width, heads, size)
    wide = nn.utils.skip_init(nn.Linear, heads * attention.head_dim, width)
    wide.weight[:], wide.bias[:] = spread.flatten(1), own.o_proj.bias
    fill_write(attention.o_proj, wide)
    target.mlp.fc1.weight[:, :width] = source.mlp.fc1.weight
    target.mlp.fc1.bias[:] = source.mlp.fc1.bias
    fill_write(target.mlp.fc2, source.mlp.fc2)


def fill_pooling(target: Any, model: Any, mark: float) -> None:
    """The new layer: the class token takes the mean over patches, or itself, of the encoder's last norm."""
    width = len(model.norm.weight)
    fill_norm(target.layernorm_before, model.encoder.layernorm)
    target.layernorm_before.weight[width : width + 2] = 1
    attention = target.attention
    # Powers of two: on patches the two features are equal and cancel to the bit, so that their scores are 0.
    gain = 2.0 ** round(MARK_GAIN - math.log2(mark))
    towards = {"mean": -gain, "cls": gain}[model.config.pooling]
    for read, strength in ((attention.q_proj, gain), (attention.k_proj, towards)):
        first = read.weight.view(attention.num_attention_heads, -1, read.in_features)[:, 0]
        first[:, width], first[:, width + 1] = strength, -strength
    nn.init.eye_(attention.v_proj.weight)
    attention.o_proj.weight[:width, :width] = LOUDNESS * (torch.eye(width) - 1 / width)
    rest = LOUDNESS * math.sqrt(width * model.norm.eps / 2)
    attention.o_proj.bias[width : width + 2] = torch.tensor([rest, -rest])
