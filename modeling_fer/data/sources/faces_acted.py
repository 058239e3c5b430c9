"""What faces do: the facial actions that make each expression, and how an expression comes and goes in a video."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from modeling_fer.data.sources.faces import ACTION_NAMES, Actions
from modeling_fer.labels import CLASSES

NEUTRAL = CLASSES.index("Neutral")
VISIBLE = 0.3  # a video frame below this share of the full expression is Neutral

# Each class is one or more ways to show it, drawn with equal odds; amounts are those at full intensity.
EXPRESSIONS: dict[str, dict[str, Actions]] = {
    "Neutral": {"rest": Actions()},
    "Anger": {
        "pressed": Actions(brow_lower=1, upper_lid_raise=0.35, lid_tighten=0.7, lip_press=1, chin_raise=0.35),
        "bared": Actions(brow_lower=1, upper_lid_raise=0.5, lid_tighten=0.5, lips_part=1, lip_stretch=0.35, jaw_drop=0.12,
                         upper_lip_raise=0.4),
    },
    "Disgust": {
        "sneer": Actions(nose_wrinkle=1, upper_lip_raise=1, brow_lower=0.35, lid_tighten=0.7, cheek_raise=0.4,
                         corner_depress=0.35, lips_part=0.25),
        "retch": Actions(nose_wrinkle=1, upper_lip_raise=0.8, brow_lower=0.3, lid_tighten=0.9, cheek_raise=0.5,
                         corner_depress=0.4, jaw_drop=0.3, tongue_show=1),
    },
    "Fear": {
        "tense": Actions(inner_brow_raise=1, outer_brow_raise=0.35, brow_lower=0.7, upper_lid_raise=1, lip_stretch=1,
                         lips_part=0.6),
        "gasp": Actions(inner_brow_raise=1, outer_brow_raise=0.3, brow_lower=0.7, upper_lid_raise=1, lip_stretch=1,
                        lips_part=0.7, jaw_drop=0.3),
    },
    "Happiness": {
        "smile": Actions(corner_pull=1, cheek_raise=0.6),
        "grin": Actions(corner_pull=1, cheek_raise=0.8, lips_part=0.9),
        "laugh": Actions(corner_pull=1, cheek_raise=1, lips_part=1, jaw_drop=0.3),
    },
    "Sadness": {
        "grief": Actions(inner_brow_raise=1, brow_lower=0.5, corner_depress=1, chin_raise=0.6, eyes_closed=0.35),
        "pout": Actions(inner_brow_raise=0.9, brow_lower=0.4, corner_depress=0.9, chin_raise=1, eyes_closed=0.25),
    },
    "Surprise": {
        "awe": Actions(inner_brow_raise=1, outer_brow_raise=1, upper_lid_raise=0.9, jaw_drop=1),
        "oh": Actions(inner_brow_raise=0.9, outer_brow_raise=1, upper_lid_raise=0.7, jaw_drop=0.6, pucker=0.35),
    },
    "Other": {
        "smirk": Actions(one_corner=1, one_brow=0.8),
        "kiss": Actions(pucker=1, lid_tighten=0.2),
        "wink": Actions(wink=1, one_corner=0.6),
        "yawn": Actions(eyes_closed=1, jaw_drop=1, inner_brow_raise=0.3),
        "tongue": Actions(tongue_show=1, jaw_drop=0.25, outer_brow_raise=0.4, inner_brow_raise=0.3),
    },
}  # fmt: skip


def act(expression: int, intensity: float, rng: np.random.Generator) -> Actions:
    """Draw how one person shows `expression` (id 0 to 7) once, at `intensity` in [0, 1].

    Each action comes out at 75 to 115 % of the prototype's amount, over faint actions that belong to no expression.
    """
    ways = list(EXPRESSIONS[CLASSES[expression]].values())
    target = ways[rng.integers(len(ways))].vector() * rng.uniform(0.75, 1.15, len(ACTION_NAMES))
    return blend(idle(rng), Actions.from_vector(target), intensity, rng.random())


def idle(rng: np.random.Generator) -> Actions:
    """Draw a face at rest: no face is quite still, and resting lids and lips differ from moment to moment."""
    amounts = np.maximum(rng.normal(0, 0.045, len(ACTION_NAMES)), 0)
    return dataclasses.replace(Actions.from_vector(amounts), tongue_show=0.0, lips_part=float(rng.random() < 0.2) * 0.3)


def blend(rest: Actions, target: Actions, intensity: float, side: float) -> Actions:
    """Lay `intensity` of `target` over `rest`: the stronger of the two, action by action."""
    amounts = np.maximum(rest.vector(), intensity * target.vector())
    return dataclasses.replace(Actions.from_vector(amounts), side=side)


@dataclasses.dataclass(frozen=True)
class Segment:
    """One expression in a video: rises over [start, apex), holds over [apex, offset), fades over [offset, end); frames."""

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
    """Plan a video of `frames` frames that shows `expressions` one after the other, with rest before, between and after.

    Onsets take 6 to 14 frames, offsets 8 to 20, shortened where a video is short; the rest is apex and rest, at random.
    """
    share = frames // max(len(expressions), 1)  # every segment and the rest around it
    if share < 8:
        raise ValueError(f"{frames} frames are too few for {len(expressions)} expressions: 8 each is the least")
    segments = []
    for k, expression in enumerate(expressions):
        before, onset, apex, offset, after = (rng.uniform(lo, hi) for lo, hi in ((4, 14), (6, 14), (10, 40), (8, 20), (4, 14)))
        marks = np.cumsum([before, onset, apex, offset]) / (before + onset + apex + offset + after) * share
        start, top, fade, end = (k * share + np.ceil(marks)).astype(int).tolist()
        segments.append(Segment(expression, start, top, max(fade, top + 1), end, float(rng.uniform(0.6, 1.0))))
    return segments


def video_intensity(frames: int, segments: Sequence[Segment]) -> np.ndarray:
    """Return each frame's intensity, float64, shape (frames,)."""
    curves = [segment.intensity(np.arange(frames)) for segment in segments]
    return np.max(curves, axis=0) if curves else np.zeros(frames)


def video_labels(frames: int, segments: Sequence[Segment]) -> np.ndarray:
    """Return each frame's class id, int64, shape (frames,): Neutral where the intensity is below `VISIBLE`."""
    labels = np.full(frames, NEUTRAL)
    for segment in segments:
        labels[segment.intensity(np.arange(frames)) >= VISIBLE] = segment.expression
    return labels
