"""Operations on a batch of faces, each image with a strength of its own. Nothing here is random.

All geometry is one matrix per image and one interpolation; brightness and contrast go over the batch in
place; each of the other operations, which few images have, runs on those images alone. At 112 px on one core
a chain of kornia's modules, each of which copies the batch, takes three times as long for the weak view. Of
its functions, saturation takes 1.6 times as long as ours, the affine map and equalize twice, solarize thrice,
sharpness and posterize eight times and more; `F.affine_grid` takes seven times as long as the sum below.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

# The strength at which each operation changes nothing.
NEUTRAL: dict[str, float] = {
    "identity": 0,
    "mirror": 1,  # -1 swaps left and right, before all else
    "rotate": 0,  # degrees, counterclockwise
    "shear_x": 0,  # tangent of the angle
    "shear_y": 0,
    "translate_x": 0,  # share of the width, to the right
    "translate_y": 0,  # share of the height, downwards
    "zoom": 1,  # factor
    "brightness": 0,  # what is added, as a share of the range of values
    "contrast": 1,  # factor of the values
    "saturation": 1,  # 0: grey
    "sharpness": 1,  # 0: smooth
    "posterize": 8,  # bits kept, rounded down
    "solarize": 1,  # share of the range of values from which on they are inverted
    "autocontrast": 0,  # 1: done
    "equalize": 0,  # 1: done
}


def affine_matrix(strengths: Mapping[str, torch.Tensor], height: int, width: int) -> torch.Tensor:
    """Compose the geometry of each image.

    Args:
        strengths: `(B,)` of mirror, rotate, shear_x, shear_y, translate_x, translate_y and zoom.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        `(B, 2, 3)`, from places (x, y, 1) of the result to places (x, y) of the image, as `F.affine_grid` has
        them: -1 and 1 are the outer edges.
    """
    angle = torch.deg2rad(strengths["rotate"])
    cos, sin = angle.cos() / strengths["zoom"], angle.sin() / strengths["zoom"]
    shear_x, shear_y = strengths["shear_x"], strengths["shear_y"]
    entries = [cos - sin * shear_y, cos * shear_x - sin, sin + cos * shear_y, sin * shear_x + cos]
    # Turns are turns in pixels; the units of x and y differ where the sides do.
    linear = torch.stack(entries, -1).view(-1, 2, 2) * torch.tensor(
        [[1, height / width], [width / height, 1]]
    )
    shift = 2 * torch.stack([strengths["translate_x"], strengths["translate_y"]], -1)[..., None]
    matrix = torch.cat([linear, -(linear * shift.mT).sum(-1, keepdim=True)], -1)
    matrix[:, 0] *= strengths["mirror"][:, None]
    return matrix


def warp(images: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Resample images bilinearly; what lies outside is their reflection.

    Args:
        images: `(B, C, H, W)`.
        matrix: `(B, 2, 3)` as from `affine_matrix`, on any device.

    Returns:
        float32 `(B, C, H, W)`.
    """
    matrix = matrix.to(images.device, non_blocking=True)
    y, x = ((2 * torch.arange(side, device=images.device) + 1) / side - 1 for side in images.shape[-2:])
    along_x, along_y = matrix[:, :, :1] * x + matrix[:, :, 2:], matrix[:, :, 1:2] * y
    grid = (along_x[:, :, None, :] + along_y[:, :, :, None]).permute(0, 2, 3, 1)
    return F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)


def _saturation(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(3, 1, 1)
    grey = (images * weights).sum(1, keepdim=True)
    return torch.lerp(grey, images, strength).clamp_(0, 255)


def _sharpness(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Blend with a 3 x 3 mean that weighs the middle five times; the border stays. Both as Pillow does it."""
    rows = images[..., :-2, :] + images[..., 1:-1, :]
    rows += images[..., 2:, :]
    around = rows[..., :-2] + rows[..., 1:-1]
    around += rows[..., 2:]
    # strength * middle + (1 - strength) * (around + 4 * middle) / 13, without a convolution, which is slower
    share = (1 - strength) / 13
    images[..., 1:-1, 1:-1].mul_(strength + 4 * share).add_(around.mul_(share)).clamp_(0, 255)
    return images


def _posterize(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    step = 2 ** (8 - strength.floor())
    # Half a level up: interpolation leaves 95.9999 where 96 is meant.
    return images.add_(0.5).div_(step).floor_().mul_(step)


def _solarize(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    bright = images.clone().ge_(256 * strength)  # 0 or 1; torch.where on booleans takes three times as long
    return images.lerp_(255 - images, bright)


def _autocontrast(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Stretch each channel to the whole range, unless it is flat."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = high - low < 1
    low, scale = low.masked_fill(flat, 0), (255 / (high - low)).masked_fill(flat, 1)
    return images.sub_(low).mul_(scale).clamp_(0, 255)


def _equalize(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Give each level the share of pixels darker than it, each channel by itself, unless it is flat."""
    levels = images.add_(0.5).long().flatten(2)
    histogram = images.new_zeros(*images.shape[:2], 256)
    histogram.scatter_add_(2, levels, images.new_ones(()).expand_as(levels))
    darker = histogram.cumsum(2) - histogram
    most = darker.gather(2, levels.amax(2, keepdim=True))
    same = torch.arange(256.0, device=images.device)
    return torch.where(most > 0, darker * 255 / most, same).gather(2, levels).view_as(images)


# On float images (b, 3, H, W) in [0, 255], which they may overwrite, with strengths (b, 1, 1, 1).
PHOTOMETRY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "saturation": _saturation,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}


def distort(images: torch.Tensor, strengths: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Apply operations in the order of `NEUTRAL`; values are clipped after each.

    Args:
        images: `(B, 3, H, W)` in [0, 255].
        strengths: float `(B,)` on the CPU by operation; an operation that is not named leaves all as it is.

    Returns:
        float32 `(B, 3, H, W)` in [0, 255].

    Raises:
        ValueError: an operation that is not known.
    """
    if unknown := strengths.keys() - NEUTRAL.keys():
        raise ValueError(f"unknown operation {', '.join(sorted(unknown))}: use {', '.join(NEUTRAL)}")
    count, device = len(images), images.device
    every = {name: torch.full((count,), float(value)) for name, value in NEUTRAL.items()} | dict(strengths)
    images = warp(images, affine_matrix(every, *images.shape[-2:]))
    brightness, contrast = torch.stack([255 * every["brightness"], every["contrast"]]).to(device)
    images.add_(brightness.view(-1, 1, 1, 1)).clamp_(0, 255)
    images.mul_(contrast.view(-1, 1, 1, 1)).clamp_(0, 255)
    for name, change in PHOTOMETRY.items():
        rows = (every[name] != NEUTRAL[name]).nonzero().flatten()  # on the CPU: a GPU is not waited for
        if len(rows):
            strength = every[name][rows].view(-1, 1, 1, 1).to(device, non_blocking=True)
            rows = rows.to(device, non_blocking=True)
            images.index_copy_(0, rows, change(images[rows], strength))
    return images


def erase(images: torch.Tensor, boxes: torch.Tensor, value: float = 127.5) -> torch.Tensor:
    """Blank a rectangle of each image, in place.

    Args:
        images: float `(B, C, H, W)`.
        boxes: `(B, 4)` left, top, right, bottom in pixels, the last two exclusive; empty: nothing is blanked.
        value: what it is filled with.

    Returns:
        `images`.
    """
    left, top, right, bottom = boxes.to(images.device, non_blocking=True).T[..., None]
    y, x = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    rows, columns = ((y >= top) & (y < bottom)).float(), ((x >= left) & (x < right)).float()
    mask = (rows[:, :, None] * columns[:, None, :])[:, None]
    return images.lerp_(images.new_tensor(value), mask)
