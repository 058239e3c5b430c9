"""What faces do: the actions that make each expression, and how an expression comes and goes in a video."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from modeling_fer.data.drawing.face import ACTION_NAMES, Actions, Face, Identity, View
from modeling_fer.labels import CLASSES

# Positions in an action vector.
SHUT, JAW = ACTION_NAMES.index("eyes_closed"), ACTION_NAMES.index("jaw_drop")

NEUTRAL = CLASSES.index("Neutral")
VISIBLE = 0.3  # a video frame below this share of the full expression is Neutral
SHORTEST = 16  # frames that an expression needs, with the rest around it
# How far pose and gaze wander in a video, in the units of `View`.
DRIFTS = {
    "yaw": 0.12,
    "pitch": 0.07,
    "roll": 0.05,
    "shift_x": 0.03,
    "shift_y": 0.03,
    "gaze_x": 0.4,
    "gaze_y": 0.2,
}

# Each class is one or more ways to show it, drawn with equal odds; amounts are those at full intensity.
EXPRESSIONS: dict[str, dict[str, Actions]] = {
    "Neutral": {"rest": Actions()},
    "Anger": {
        "pressed": Actions(brow_lower=1, upper_lid_raise=0.35, lid_tighten=0.7, lip_press=1, chin_raise=0.35),
        "bared": Actions(brow_lower=1, upper_lid_raise=0.5, lid_tighten=0.5, upper_lip_raise=0.2,
                         lip_stretch=0.35, lips_part=1, jaw_drop=0.12),
    },
    "Disgust": {
        "sneer": Actions(nose_wrinkle=1, upper_lip_raise=1, brow_lower=0.35, cheek_raise=0.4, lid_tighten=0.7,
                         corner_depress=0.35, lips_part=0.25),
        "retch": Actions(nose_wrinkle=1, upper_lip_raise=0.8, brow_lower=0.3, cheek_raise=0.5,
                         lid_tighten=0.9, corner_depress=0.4, jaw_drop=0.3, tongue_show=1),
    },
    "Fear": {
        "tense": Actions(inner_brow_raise=1, outer_brow_raise=0.35, brow_lower=0.7, upper_lid_raise=1,
                         lip_stretch=1, lips_part=0.6),
        "gasp": Actions(inner_brow_raise=1, outer_brow_raise=0.3, brow_lower=0.7, upper_lid_raise=1,
                        lip_stretch=1, lips_part=0.7, jaw_drop=0.3),
    },
    "Happiness": {
        "smile": Actions(corner_pull=1, cheek_raise=0.7, lips_part=0.35),
        "grin": Actions(corner_pull=1, cheek_raise=0.8, lips_part=0.9),
        "laugh": Actions(corner_pull=1, cheek_raise=1, lips_part=1, jaw_drop=0.3),
    },
    "Sadness": {
        "grief": Actions(inner_brow_raise=1, brow_lower=0.5, corner_depress=1, chin_raise=0.6,
                         eyes_closed=0.35),
        "pout": Actions(inner_brow_raise=0.9, brow_lower=0.4, corner_depress=0.9, chin_raise=1,
                        eyes_closed=0.25),
    },
    "Surprise": {
        "awe": Actions(inner_brow_raise=1, outer_brow_raise=1, upper_lid_raise=0.9, jaw_drop=1),
        "oh": Actions(inner_brow_raise=0.9, outer_brow_raise=1, upper_lid_raise=0.7, jaw_drop=0.6,
                      pucker=0.35),
    },
    "Other": {
        "smirk": Actions(one_corner=1, one_brow=1),
        "kiss": Actions(pucker=1, wink=1),
        "wink": Actions(wink=1, one_corner=0.7),
        "yawn": Actions(eyes_closed=1, jaw_drop=1, inner_brow_raise=0.3),
        "tongue": Actions(tongue_show=1, jaw_drop=0.25, outer_brow_raise=0.4, inner_brow_raise=0.3),
    },
}  # fmt: skip


def act(expression: int, intensity: float, rng: np.random.Generator) -> Actions:
    """Draw how one person shows `expression` (id 0 to 7) once, at `intensity` in [0, 1]."""
    amounts = np.maximum(idle(rng).vector(), intensity * _target(expression, rng))
    return dataclasses.replace(Actions.from_vector(amounts), side=rng.random())


def idle(rng: np.random.Generator) -> Actions:
    """Draw a face at rest: no face is quite still, and some lips are a little apart."""
    amounts = np.maximum(rng.normal(0, 0.035, len(ACTION_NAMES)), 0)
    return dataclasses.replace(Actions.from_vector(amounts), lips_part=0.3 * (rng.random() < 0.2))


def _target(expression: int, rng: np.random.Generator) -> np.ndarray:
    """One way to show an expression in full, each action at 80 to 115 % of its usual amount."""
    ways = list(EXPRESSIONS[CLASSES[expression]].values())
    return np.minimum(ways[rng.integers(len(ways))].vector() * rng.uniform(0.8, 1.15, len(ACTION_NAMES)), 1)


@dataclasses.dataclass(frozen=True)
class Segment:
    """One expression in a video: rises from `start`, holds from `apex`, fades from `offset` to `end`."""

    expression: int
    start: int
    apex: int
    offset: int
    end: int
    peak: float  # intensity at the apex

    def intensity(self, frames: np.ndarray) -> np.ndarray:
        """Return the intensity in [0, peak] at frame numbers `frames`, same shape; 0 outside the segment."""
        rise = (frames - self.start) / max(self.apex - self.start, 1)
        fall = (self.end - frames) / max(self.end - self.offset, 1)
        ramp = np.clip(np.minimum(rise, fall), 0, 1)
        return self.peak * ramp * ramp * (3 - 2 * ramp)  # starts and ends without a jerk


def timeline(frames: int, expressions: Sequence[int], rng: np.random.Generator) -> list[Segment]:
    """Plan a video of `frames` frames that shows `expressions` one after the other, with rest around each.

    Raises:
        ValueError: fewer than `SHORTEST` frames for each expression.
    """
    share = frames // max(len(expressions), 1)  # every expression and the rest around it
    if share < SHORTEST:
        raise ValueError(f"{len(expressions)} expressions need {SHORTEST} frames each, got {frames} in all")
    segments = []
    for k, expression in enumerate(expressions):
        # Rest, onset, apex, offset, rest, in proportion.
        spans = rng.uniform((4, 6, 10, 8, 4), (14, 14, 40, 20, 14))
        marks = np.floor(np.cumsum(spans) / spans.sum() * share).astype(int) + k * share
        start, apex, offset, end, _ = marks.tolist()
        segments.append(Segment(expression, start, apex, offset, end, peak=rng.uniform(0.6, 1.0)))
    return segments


def video_intensity(frames: int, segments: Sequence[Segment]) -> np.ndarray:
    """Return each frame's intensity, float64, shape (frames,)."""
    curves = [segment.intensity(np.arange(frames)) for segment in segments]
    return np.max(curves, axis=0) if curves else np.zeros(frames)


def video_labels(frames: int, segments: Sequence[Segment]) -> np.ndarray:
    """Return each frame's class id, int64, shape (frames,): Neutral below intensity `VISIBLE`."""
    labels = np.full(frames, NEUTRAL)
    for segment in segments:
        labels[segment.intensity(np.arange(frames)) >= VISIBLE] = segment.expression
    return labels


def film(who: Identity, frames: int, segments: Sequence[Segment], rng: np.random.Generator) -> list[Face]:
    """Return one face per frame of a video in which `who` goes through `segments`.

    The head drifts, the eyes wander and blink, some people talk, and now and then a few frames are blurred
    and dark: what a single frame hides, its neighbours show.
    """
    time = np.arange(frames)
    still, side = View.sample(rng), rng.random()
    amounts = np.tile(idle(rng).vector(), (frames, 1))
    for segment in segments:
        full = _target(segment.expression, rng)
        np.maximum(amounts, segment.intensity(time)[:, None] * full, out=amounts)
    for blink in np.flatnonzero(rng.random(frames) < 1 / 60):
        np.maximum(amounts[:, SHUT], 1.5 - np.abs(time - blink) / 1.5, out=amounts[:, SHUT])
    if rng.random() < 0.35:  # talks for a while
        np.maximum(amounts[:, JAW], 0.35 * _drift(frames, rng) * rng.random(frames), out=amounts[:, JAW])
    paths = {name: getattr(still, name) + reach * _drift(frames, rng) for name, reach in DRIFTS.items()}
    bad = np.convolve(rng.random(frames) < 0.02, np.ones(4), "same") > 0
    grains = rng.integers(2**31, size=frames).tolist()
    faces = []
    for k in range(frames):
        pose: dict[str, Any] = {name: float(path[k]) for name, path in paths.items()}
        if bad[k]:
            pose |= {"blur": 1.0, "noise": 0.1, "brightness": 0.6 * still.brightness}
        view = dataclasses.replace(still, grain=grains[k], **pose)
        faces.append(Face(who, dataclasses.replace(Actions.from_vector(amounts[k]), side=side), view))
    return faces


def _drift(frames: int, rng: np.random.Generator) -> np.ndarray:
    """Slow wandering around 0, of order 1, shape (frames,): normal draws 24 frames apart, joined by lines."""
    knots = np.arange(0, frames + 24, 24)
    return np.interp(np.arange(frames), knots, np.clip(rng.standard_normal(len(knots)), -2, 2))
