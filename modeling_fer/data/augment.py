"""Views of faces, made as batched tensors on the training device."""

from collections.abc import Sequence

import kornia.augmentation as K  # kornia's own convention
import torch
from torch import nn


class Normalize(nn.Module):
    """uint8 images `(B, 3, H, W)` to normalised float32, as the checkpoint's image processor does it."""

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
        return torch.addcmul(self.shift, images.to(self.scale.dtype), self.scale)


def weak_augmentation(erasing: float = 0.0) -> nn.Module:
    """Flips, small turns, shifts and zooms, brightness and contrast of float images `(B, 3, H, W)` in [0, 1].

    Randomness comes from torch's global generator, one draw an image.

    Args:
        erasing: probability that a rectangle of an image is blanked.
    """
    views = [
        K.RandomHorizontalFlip(p=0.5),
        K.RandomAffine(
            degrees=12, translate=(0.08, 0.08), scale=(0.88, 1.12), padding_mode="reflection", p=1.0
        ),
        K.RandomBrightness((0.75, 1.25), p=1.0),
        K.RandomContrast((0.75, 1.25), p=1.0),
    ]
    if erasing > 0:
        views.append(K.RandomErasing(scale=(0.02, 0.2), ratio=(0.3, 3.3), value=0.5, p=erasing))
    return nn.Sequential(*views)


AUGMENTATIONS = {"none": lambda erasing=0.0: nn.Identity(), "weak": weak_augmentation}


class View(nn.Module):
    """A random view of uint8 images, normalised for the model."""

    def __init__(self, augmentation: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.augmentation = augmentation
        self.normalize = Normalize(mean, std)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 `(B, 3, H, W)` to float32 of the same shape."""
        if isinstance(self.augmentation, nn.Identity):
            return self.normalize(images)
        return self.normalize(self.augmentation(images.float() / 255) * 255)
