"""Views of faces, made as batched tensors on the training device.

Strengths are drawn from torch's global generator: on the CPU wherever the images are, for each image anew,
and as many numbers for one batch as for another of its size. So a seed gives the same views on a GPU as well,
but for the pixels of `CameraNoise`, which are too many for that.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from modeling_fer.data.operations import NEUTRAL, distort, erase, warp

Ranges = Mapping[str, tuple[float, float]]

# Strengths are drawn evenly between these ends; `NEUTRAL` gives their units. Every image gets all of these.
WEAK: Ranges = {
    "rotate": (-12, 12),
    "translate_x": (-0.08, 0.08),
    "translate_y": (-0.08, 0.08),
    "zoom": (0.88, 1.12),
    "brightness": (-0.25, 0.25),
    "contrast": (0.75, 1.25),
}
# The operations of FixMatch's appendix, at strengths that leave a face a face.
STRONG: Ranges = {
    "identity": (0, 0),
    "rotate": (-30, 30),
    "shear_x": (-0.3, 0.3),
    "shear_y": (-0.3, 0.3),
    "translate_x": (-0.2, 0.2),
    "translate_y": (-0.2, 0.2),
    "brightness": (-0.3, 0.3),
    "contrast": (0.4, 1.6),
    "saturation": (0.1, 1.9),
    "sharpness": (0.1, 1.9),
    "posterize": (4, 8),
    "solarize": (0.6, 1),
    "autocontrast": (1, 1),
    "equalize": (1, 1),
}


class Normalize(nn.Module):
    """Images `(B, 3, H, W)` in [0, 255] to normalised float32, as the checkpoint's image processor does."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("scale", 1 / (255 * torch.tensor(std).view(3, 1, 1)), persistent=False)
        self.register_buffer(
            "shift", -torch.tensor(mean).view(3, 1, 1) / torch.tensor(std).view(3, 1, 1), persistent=False
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scale and shift each channel."""
        return self.overwrite(images.to(self.scale.dtype, copy=True))

    def overwrite(self, images: torch.Tensor) -> torch.Tensor:
        """Scale and shift each channel of float images in place."""
        # Two passes, each with one broadcast tensor, are faster than torch.addcmul with two.
        return images.mul_(self.scale).add_(self.shift)


def _between(low: float, high: float, *shape: int) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape)


def _mirror(count: int) -> torch.Tensor:
    """1 or -1, evenly."""
    return 1.0 - 2 * torch.randint(2, (count,))


class Distort(nn.Module):
    """Half the images mirrored, and operations of random strength: images in [0, 255] to float32 in [0, 255].

    Args:
        always: operation to the ends of its strength.
        some: likewise, operations of which each image gets a few; one that is in both has this strength then.
        count: how many of `some` are drawn for an image, all different.
    """

    def __init__(self, always: Ranges, some: Ranges | None = None, count: int = 0) -> None:
        super().__init__()
        self.always, self.some, self.count = always, some or {}, count

    def draw(self, count: int) -> dict[str, torch.Tensor]:
        """Strengths `(count,)` by operation, for `distort`."""
        strengths = {name: _between(*ends, count) for name, ends in self.always.items()}
        chosen = torch.rand(count, len(self.some)).argsort(1) < self.count
        for (name, ends), mask in zip(self.some.items(), chosen.T, strict=True):
            otherwise = strengths.get(name, torch.tensor(float(NEUTRAL[name])))
            strengths[name] = torch.where(mask, _between(*ends, count), otherwise)
        return {"mirror": _mirror(count), **strengths}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, 3, H, W)` to the same shape."""
        return distort(images, self.draw(len(images)))


class Crop(nn.Module):
    """A random part of each image, resized to the whole, and half the images mirrored; to float32.

    Args:
        area: ends of the part's share of the image.
        ratio: most that its width and height differ by, as a factor, beyond those of the image.
    """

    def __init__(self, area: tuple[float, float] = (0.6, 1.0), ratio: float = 4 / 3) -> None:
        super().__init__()
        self.area, self.ratio = area, ratio

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, 3, H, W)` to the same shape."""
        count = len(images)
        area, ratio = _between(*self.area, count), self.ratio ** _between(-1, 1, count)
        size = torch.stack([area * ratio, area / ratio], -1).sqrt().clamp(max=1)  # width, height
        center = (1 - size) * _between(-1, 1, count, 2)
        matrix = torch.cat([torch.diag_embed(size), center[..., None]], -1)
        matrix[:, 0] *= _mirror(count)[:, None]
        return warp(images, matrix)


class Erase(nn.Module):
    """Mid-grey rectangles over float images in [0, 255], in place (Zhong et al. 2020, arXiv 1708.04896).

    Args:
        probability: that an image has one.
        area: ends of its share of the image.
        ratio: most that its height and width differ by, as a factor.

    Raises:
        ValueError: `probability` is none.
    """

    def __init__(
        self, probability: float, area: tuple[float, float] = (0.02, 0.2), ratio: float = 3.3
    ) -> None:
        super().__init__()
        if not 0 <= probability <= 1:
            raise ValueError(f"the probability of erasing must be from 0 to 1, got {probability}")
        self.probability, self.area, self.ratio = probability, area, ratio

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, 3, H, W)`, which it returns."""
        count, _, height, width = images.shape
        area, ratio = _between(*self.area, count) * height * width, self.ratio ** _between(-1, 1, count)
        sides = torch.tensor([width, height])
        size = torch.stack([area / ratio, area * ratio], -1).sqrt().round().clamp(min=1).minimum(sides)
        corner = (torch.rand(count, 2) * (sides - size + 1)).floor()
        chosen = torch.rand(count, 1) < self.probability
        return erase(images, torch.cat([corner, corner + size * chosen], -1))


def _with_erasing(view: nn.Module, *probabilities: float) -> nn.Module:
    return nn.Sequential(view, *(Erase(probability) for probability in probabilities if probability))


def weak_augmentation(erasing: float = 0.0) -> nn.Module:
    """Flips, small turns, shifts and zooms, brightness and contrast.

    Args:
        erasing: probability that a rectangle of an image is blanked.
    """
    return _with_erasing(Distort(WEAK), erasing)


def strong_augmentation(erasing: float = 0.0) -> nn.Module:
    """The weak view with two operations of `STRONG` at random strength, and always a blank rectangle.

    RandAugment (Cubuk et al. 2020, arXiv 1909.13719) over the weak view, then a cutout, as in FixMatch (Sohn
    et al. 2020, arXiv 2001.07685, section 2.3). Unlike there, the two operations of an image differ and keep
    the order of `NEUTRAL`, a strength of the weak view is replaced, not added to, and brightness and contrast
    are those of the weak view in kind.

    Args:
        erasing: probability that a second rectangle is blanked.
    """
    return _with_erasing(Distort(WEAK, STRONG, count=2), 1.0, erasing)


def crop_augmentation(erasing: float = 0.0) -> nn.Module:
    """A random part of the image, resized, and flips: for masked autoencoders.

    He et al. (2022, arXiv 2111.06377) take 0.2 to 1 of the area of photographs. Of a face that is already
    cropped 0.6 and more is kept.

    Args:
        erasing: probability that a rectangle of an image is blanked.
    """
    return _with_erasing(Crop(), erasing)


AUGMENTATIONS: dict[str, Callable[..., nn.Module]] = {
    "none": lambda erasing=0.0: nn.Identity(),
    "weak": weak_augmentation,
    "strong": strong_augmentation,
    "crop": crop_augmentation,
}


class CameraNoise(nn.Module):
    """Some normalised views underexposed and with noise, as of a poor camera: `clip(e x + sigma n)`.

    The exposure `e` is drawn evenly in its logarithm, the deviation `sigma` evenly, and `n ~ N(0, 1)` for
    each pixel, the same on all channels; `x` and the limits are grey levels.

    Args:
        probability: that a view has it.
        mean: of each channel, as a share of 255, by which views were normalised.
        std: of each channel, likewise.
        exposure: ends of the factor of light.
        deviation: ends of the noise's standard deviation, in grey levels.

    Raises:
        ValueError: `probability` is none.
    """

    def __init__(
        self,
        probability: float,
        mean: Sequence[float],
        std: Sequence[float],
        exposure: tuple[float, float] = (0.15, 1.0),
        deviation: tuple[float, float] = (0.0, 25.0),
    ) -> None:
        super().__init__()
        if not 0 <= probability <= 1:
            raise ValueError(f"the probability of noise must be from 0 to 1, got {probability}")
        self.probability, self.exposure, self.deviation = probability, exposure, deviation
        self.normalize = Normalize(mean, std)

    @torch.no_grad()
    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """float32 `(B, 3, H, W)` to new ones of the same shape."""
        count, device = len(views), views.device
        low, high = (math.log(end) for end in self.exposure)
        exposure, deviation = _between(low, high, count).exp(), _between(*self.deviation, count)
        generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
        chosen = torch.rand(count) < self.probability
        rows = chosen.nonzero().flatten()  # on the CPU: a GPU is not waited for
        factors = torch.stack([exposure, deviation])[:, rows].view(2, -1, 1, 1, 1)
        light, strength = factors.to(device, non_blocking=True)
        rows = rows.to(device, non_blocking=True)
        noise = torch.randn((len(rows), 1, *views.shape[2:]), generator=generator, device=device)
        black, scale = self.normalize.shift, self.normalize.scale
        spoilt = (views[rows] - black).mul_(light).add_(noise * strength * scale)
        return views.index_copy(0, rows, spoilt.clamp_(torch.zeros_like(scale), 255 * scale).add_(black))


class View(nn.Module):
    """A random view of uint8 images, normalised for the model.

    Args:
        augmentation: uint8 images `(B, 3, H, W)` to new ones, float32 in [0, 255], or left as they are.
        mean: of each channel, as a share of 255.
        std: of each channel, likewise.
    """

    def __init__(self, augmentation: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.augmentation = augmentation
        self.normalize = Normalize(mean, std)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 `(B, 3, H, W)` to float32 of the same shape."""
        view = self.augmentation(images)
        return self.normalize(images) if view is images else self.normalize.overwrite(view)
