"""Changes of a trained classifier that are folded into its weights, where every export has them."""

from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import nn

from modeling_fer.evaluation.calibration import fit_bias_corrected
from modeling_fer.evaluation.tuning import fit_temperature

# Weights of red, green and blue in brightness, ITU-R BT.601, as Pillow turns colour into grey.
LUMA = (0.299, 0.587, 0.114)


@torch.no_grad()
def fold_temperature(model: nn.Module, temperature: float) -> None:
    """Divide a classifier's logits by a temperature (Guo et al. 2017, arXiv 1706.04599), in its last layer.

    Raises:
        ValueError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"a temperature must be positive, got {temperature}")
    classifier: Any = model.classifier
    classifier.weight /= temperature
    classifier.bias /= temperature


@torch.no_grad()
def fold_grey(model: nn.Module, processor: Any) -> None:
    """Make a model that learnt from grey faces see colour faces as grey ones; of grey faces it says the same.

    On grey faces only the sum of a patch filter over the colours is ever learnt. Here the sum is kept, and
    its parts become those of `LUMA`.

    Raises:
        ValueError: the encoder's first layer is no convolution of three colours, or the image processor
            treats the colours differently.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3]
    if len(convolutions) != 1:
        raise ValueError(
            f"expected one convolution of three colours, the patch filters; found {len(convolutions)}"
        )
    for name in ("image_mean", "image_std"):
        if len(set(getattr(processor, name))) != 1:
            raise ValueError(f"the image processor's {name} differs by colour: {getattr(processor, name)}")
    weight = convolutions[0].weight
    luma = torch.tensor(LUMA, dtype=weight.dtype, device=weight.device).view(1, 3, 1, 1)
    weight.copy_(weight.sum(dim=1, keepdim=True) * luma)


@torch.no_grad()
def fold_bias(model: nn.Module, bias: np.ndarray) -> None:
    """Add biases `(C,)` to a classifier's logits, in its last layer."""
    classifier: Any = model.classifier
    classifier.bias += torch.from_numpy(bias).to(classifier.bias)


def calibrate(
    model: nn.Module, logits: np.ndarray, references: np.ndarray, with_bias: bool = False, seed: int = 0
) -> tuple[float, np.ndarray, np.ndarray]:
    """Fit a temperature, and biases if asked to; fold them into a classifier; tell how it does elsewhere.

    Args:
        logits: `(N, C)` of labelled faces that the model has not learnt from.
        references: `(N,)` places of their classes among the C, none missing.
        with_bias: see `fit_bias_corrected`; else the temperature alone is fitted.

    Returns:
        The temperature, the biases `(C,)` (0 unless asked for), and the probabilities `(N, C)` of each face
        as fitted on the other half of the faces.
    """

    def fitted(rows: np.ndarray) -> tuple[float, np.ndarray]:
        if with_bias:
            return fit_bias_corrected(logits[rows], references[rows])
        return fit_temperature(logits[rows], references[rows]), np.zeros(logits.shape[1])

    half = np.random.default_rng(seed).permutation(len(logits)) % 2
    probabilities = np.empty(logits.shape, dtype=np.float32)
    for part in (0, 1):
        there = half == part
        temperature, bias = fitted(~there)
        probabilities[there] = softmax(logits[there].astype(np.float64) / temperature + bias, axis=1)
    temperature, bias = fitted(np.ones(len(logits), dtype=bool))
    fold_temperature(model, temperature)
    fold_bias(model, bias)
    return temperature, bias, probabilities
