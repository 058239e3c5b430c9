"""Pixels to paint faces on, with the coordinates of each face and the strokes that its parts are made of.

Every shape is a signed distance (negative inside, in head units) turned into coverage with an edge one pixel
soft. Only + - * / and sqrt touch pixels, each on its own: a face looks the same to the bit in every batch.
"""

import copy
import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Self

import numpy as np

from modeling_fer.data.drawing.face import Actions, Face, Identity, View

HEAD_UNIT = 1.0  # half height of the head in half image sides, at scale 1
BULGE = 0.62  # how far the face stands out of the plane of its outline: what moves when the head turns
# Small movements by which a face is told from one at rest: most of them shows at half the amount.
EARLY = ("pucker", "one_corner", "one_brow", "wink")


def bump(x: np.ndarray, y: np.ndarray | float) -> np.ndarray:
    """Return the height of a smooth hill over the unit disc: 1 in the middle, 0 outside."""
    inside = np.maximum(1 - x * x - y * y, 0)
    return inside * inside


def stack(items: Sequence[object], kind: type) -> SimpleNamespace:
    """Turn n dataclasses of one kind into a namespace of float32 arrays: (n, 1, 1), colours (3, n, 1, 1)."""
    columns = {}
    for field in dataclasses.fields(kind):
        values = np.array([getattr(item, field.name) for item in items], np.float32)
        columns[field.name] = values.T[..., None, None] if values.ndim == 2 else values[:, None, None]
    return SimpleNamespace(**columns)


class Canvas:
    """Pixels being painted, with their coordinates and the parameters of each face as (n, 1, 1) arrays.

    `x, y` lie in the plane of the head's outline, `u, v` on its curved front, where features are; `half` is
    |u|, `hand` its sign, `chosen` 1 on the side of one-sided actions. `radius` is 1 on the outline, `px`
    the size of a pixel. `image` is the albedo, (3, n, size, size), and `shade` what multiplies it in the end.
    """

    def __init__(self, faces: Sequence[Face], size: int) -> None:
        self.who = stack([f.identity for f in faces], Identity)
        self.act = stack([f.actions for f in faces], Actions)
        self.view = view = stack([f.view for f in faces], View)
        for name in EARLY:
            amount = getattr(self.act, name)
            setattr(self.act, name, amount * (2 - amount))
        axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
        self.screen_x, self.screen_y = axis[None, None, :], axis[None, :, None]
        unit = view.scale * HEAD_UNIT
        self.px = 2 / size / unit
        across = (self.screen_x - view.shift_x) / unit
        down = (self.screen_y - view.shift_y) / unit + 0.1
        cos, sin = np.cos(view.roll), np.sin(view.roll)
        self.x, self.y = across * cos + down * sin, down * cos - across * sin
        who, act = self.who, self.act
        below = np.maximum(self.y, 0) / (1 + 0.1 * act.jaw_drop)  # an open jaw lengthens the lower face
        xn, yn = self.x / (who.width * (1 - who.taper * below * below)), np.minimum(self.y, 0) + below
        x2, y2 = xn * xn, yn * yn
        oval = x2 + y2
        box = np.sqrt(x2 * x2 + y2 * y2)
        self.radius = np.sqrt(oval + who.squareness * 0.6 * (self.y > 0) * (box - oval))
        self.depth = np.sqrt(np.maximum(1 - oval, 0))
        self.normal_x, self.normal_y = xn, yn
        bulge = self.depth * BULGE
        self.u = (self.x - bulge * np.sin(view.yaw)) / np.cos(view.yaw)
        self.v = (self.y - bulge * np.sin(view.pitch)) / np.cos(view.pitch)
        self.half = np.abs(self.u)
        self.hand = np.where(self.u > 0, np.float32(1), np.float32(-1))  # which half of the face
        self.chosen = ((self.u > 0) == (act.side >= 0.5)).astype(np.float32)  # the half of one-sided actions
        self.image = np.empty((3, len(faces), size, size), np.float32)
        self.shade = np.ones((len(faces), size, size), np.float32)

    def cover(self, distance: np.ndarray) -> np.ndarray:
        """Turn signed distances into coverage in [0, 1]."""
        edge = distance / self.px
        np.subtract(0.5, edge, out=edge)
        np.maximum(edge, 0, out=edge)
        return np.minimum(edge, 1, out=edge)

    def line(self, distance: np.ndarray, half_width: np.ndarray | float) -> np.ndarray:
        """Return the coverage of a stroke around `distance` = 0; thinner than a pixel it fades."""
        return self.cover(np.abs(distance) - half_width) * np.minimum(1, 2 * half_width / self.px)

    def paint(self, coverage: np.ndarray, colour: np.ndarray | tuple[float, ...]) -> None:
        """Lay a colour, shape (3, n, 1, 1) or 3 numbers, over the image where `coverage` says."""
        over = np.asarray(colour, np.float32)
        over = over.reshape(3, 1, 1, 1) if over.ndim == 1 else over
        change = over - self.image
        change *= coverage
        self.image += change

    def darken(self, amount: np.ndarray) -> None:
        """Shade by `amount` in [0, 1]."""
        self.shade *= 1 - amount

    def part(self, wanted: np.ndarray) -> Self:
        """Return the smallest box of this canvas with all `wanted` pixels, (n, size, size), to paint on.

        Everything drawn on it must lie in what is wanted: the box depends on the other faces of the batch.
        """
        rows, columns = np.flatnonzero(wanted.any(axis=(0, 2))), np.flatnonzero(wanted.any(axis=(0, 1)))
        if not rows.size:
            rows = columns = np.zeros(1, int)
        box = (..., slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        part = copy.copy(self)
        for name in ("x", "y", "u", "v", "half", "hand", "chosen", "radius", "depth", "image", "shade"):
            setattr(part, name, getattr(self, name)[box])
        return part
