"""Draws faces: a batch of `Face` parameters in, small RGB images out, in vectorised numpy.

From the background forwards, each part of the face paints itself on a `Canvas`. Left and right are drawn at
once on |u|; numbers without a name are lengths in head units, or strengths found by looking.
"""

from collections.abc import Sequence

import numpy as np

from modeling_fer.data.drawing.canvas import Canvas, bump
from modeling_fer.data.drawing.face import Face

CHUNK_PIXELS = 32_768  # drawn at once: what keeps the working arrays in cache
SMALLEST = 16  # pixels: below, eyes and mouth run into one
BLACK, WHITE, MOUTH, TONGUE = (0.05, 0.03, 0.03), (0.95, 0.94, 0.92), (0.25, 0.05, 0.06), (0.80, 0.38, 0.40)


def render(faces: Sequence[Face], size: int) -> np.ndarray:
    """Draw faces.

    Args:
        faces: what to draw; N of them.
        size: side of the square images in pixels, at least `SMALLEST`.

    Returns:
        uint8 RGB images, shape (N, size, size, 3).

    Raises:
        ValueError: `size` is below `SMALLEST`.
    """
    if size < SMALLEST:
        raise ValueError(f"image size must be at least {SMALLEST} pixels, got {size}")
    out = np.empty((len(faces), size, size, 3), np.uint8)
    step = max(1, CHUNK_PIXELS // size**2)
    for start in range(0, len(faces), step):
        chunk = faces[start : start + step]
        canvas = Canvas(chunk, size)
        _draw(canvas)
        out[start : start + len(chunk)] = np.moveaxis(_photograph(canvas, chunk), 0, -1)
    return out


def _draw(c: Canvas) -> None:
    _draw_background(c)
    _draw_head(c)
    _draw_nose(c)
    _draw_cheeks_and_forehead(c)
    # Eyes and mouth take the most strokes: do not draw them where they cannot be, whatever the actions.
    _draw_mouth(c.part((c.v > -0.15 - c.px) & (c.half < 0.75 + c.px)))
    _draw_hair(c)
    upper = c.part(c.v < 0.3 + c.px)
    _draw_eyes(upper)
    _draw_brows(upper)


def _draw_background(c: Canvas) -> None:
    view, who = c.view, c.who
    run = np.clip(0.5 + 0.5 * (c.screen_x * view.backdrop_x + c.screen_y * view.backdrop_y), 0, 1)
    c.image[:] = view.background + run * (view.backdrop - view.background)
    back = np.maximum(c.y - who.hair_length, 0) * 3
    sides = np.sqrt(c.x * c.x + np.minimum(c.y, 0) ** 2 + back * back) - who.width - who.hair_volume - 0.02
    c.paint(c.cover(sides) * who.hair_cover, who.hair * 0.75)
    neck = np.maximum(np.abs(c.x) - who.width * 0.62, 0.5 - c.y)
    c.paint(c.cover(neck), who.skin * 0.72)
    shoulders = 1.12 + 0.25 * c.x * c.x - c.y
    c.paint(c.cover(shoulders), who.clothes)


def _draw_head(c: Canvas) -> None:
    who, view = c.who, c.view
    ear_x, ear_y = (np.abs(c.x) - who.width - 0.01) / 0.1, (c.y - 0.03) / 0.2
    c.paint(c.cover((np.sqrt(ear_x * ear_x + ear_y * ear_y) - 1) * 0.1), who.skin * 0.85)
    head = c.cover((c.radius - 1) * 0.75)
    c.paint(head, who.skin)
    length = np.sqrt(view.light_x**2 + view.light_y**2 + 1)
    lambert = (c.normal_x * view.light_x + c.normal_y * view.light_y + c.depth) / length
    light = view.ambient + (1.15 - view.ambient) * np.maximum(lambert, 0)
    c.shade *= 1 + head * (light - 1)
    whiskers = np.clip((c.v - 0.66 + 1.1 * np.maximum(c.half - 0.28, 0)) * 6 + 0.5, 0, 1)
    c.paint(head * whiskers * who.beard, who.brows)


def _draw_nose(c: Canvas) -> None:
    who, act = c.who, c.act
    wrinkle = act.nose_wrinkle
    tip = who.eye_y + who.nose_length + 0.02 - 0.05 * wrinkle - 0.02 * act.upper_lip_raise
    wide = who.nose_width * (1 + 0.25 * wrinkle + 0.1 * act.corner_pull)
    bridge = np.clip((tip - c.v) / 0.3, 0, 1) * np.clip((c.v - who.eye_y + 0.1) / 0.1, 0, 1)
    lit = c.hand * c.view.light_x
    c.darken(bump((c.half - wide * 0.75) / 0.09, 0) * bridge * (0.12 - 0.1 * lit))
    c.shade *= 1 + 0.12 * bump(c.u / (wide * 0.7), (c.v - tip + 0.06) / 0.1)
    c.darken(0.3 * bump(c.u / (wide * 1.25), (c.v - tip - 0.065) / 0.055))
    c.darken(0.6 * bump((c.half - wide * 0.5) / (wide * 0.4), (c.v - tip - 0.045) / 0.035))
    wing = bump((c.half - wide) / 0.035, (c.v - tip) / 0.075)
    c.darken((0.25 + 0.4 * wrinkle) * wing)
    # Nose wrinkles: three short folds across the bridge that sag to the sides.
    across = np.clip((0.15 - c.half) * 12, 0, 1) * wrinkle
    for row in (0.0, 0.085, 0.17):
        c.darken(0.6 * across * c.line(c.v - who.eye_y - row + 0.5 * c.half, 0.018))


def _draw_cheeks_and_forehead(c: Canvas) -> None:
    who, act = c.who, c.act
    # Nasolabial folds, from the wings of the nose past the corners of the mouth.
    top = who.eye_y + who.nose_length - 0.04 - 0.05 * act.nose_wrinkle
    down = (c.v - top) / (who.mouth_y + 0.02 - top)
    fold_x = who.nose_width * 1.15 + down * (0.15 + 0.1 * act.corner_pull + 0.04 * act.upper_lip_raise)
    depth = 0.1 * who.age + 0.2 * act.corner_pull + 0.4 * np.maximum(act.upper_lip_raise, act.nose_wrinkle)
    reach = np.clip(2.5 - 5 * np.abs(down - 0.4), 0, 1)
    c.darken(np.minimum(depth, 0.5) * reach * c.line(c.half - fold_x, 0.022))
    # Raised cheeks: a lit apple with a fold above it, and crow's feet.
    raised = act.cheek_raise
    cheek_x, cheek_y = (c.half - who.eye_spacing - 0.05) / 0.22, (c.v - who.eye_y - 0.3) / 0.15
    c.shade *= 1 + 0.14 * raised * bump(cheek_x, cheek_y)
    under = who.eye_y + 0.13 + 0.35 * (c.half - who.eye_spacing) ** 2
    reach = np.clip((0.2 - np.abs(c.half - who.eye_spacing)) * 10, 0, 1)
    depth = 0.06 * who.age + 0.32 * np.maximum(raised, 0.6 * act.nose_wrinkle)
    c.darken(depth * reach * c.line(c.v - under, 0.02))
    out = c.half - who.eye_spacing - who.eye_width
    feet = np.clip(out * 20, 0, 1) * np.clip((0.13 - out) * 20, 0, 1) * raised * 0.35
    for slope in (-0.5, 0.4):
        c.darken(feet * c.line(c.v - who.eye_y - 0.02 - slope * out, 0.014))
    # Forehead: level lines when brows rise, two upright furrows between lowered brows.
    brow = who.eye_y - who.brow_gap
    middle = act.inner_brow_raise * np.clip((0.3 - c.half) * 6, 0, 1)
    lifted = np.minimum(np.maximum(middle, act.outer_brow_raise) + 0.25 * who.age, 1)
    level = np.clip((0.48 - c.half) * 8, 0, 1) * lifted * 0.28
    for row in (0.24, 0.34):
        c.darken(level * c.line(c.v - brow + row - 0.1 * c.half, 0.016))
    knit = np.minimum(act.brow_lower + 0.1 * who.age, 1)
    furrow = np.clip((0.14 - np.abs(c.v - brow - 0.04)) * 12, 0, 1) * knit
    c.darken(0.55 * furrow * c.line(c.half - 0.055 - 0.15 * (c.v - brow) ** 2, 0.018))


def _draw_mouth(c: Canvas) -> None:
    who, act = c.who, c.act
    drop = act.jaw_drop * (1 - act.lip_stretch) * (1 - act.corner_pull)  # a jaw that makes the mouth an O
    wide = who.mouth_width * (1 + 0.25 * act.corner_pull + 0.32 * act.lip_stretch - 0.12 * act.lip_press)
    wide = wide * (1 - 0.55 * act.pucker) * (1 - 0.3 * drop)
    one = c.chosen * act.one_corner
    aside = 0.1 * ((act.side >= 0.5) - np.float32(0.5)) * act.one_corner
    t = (c.u - aside) / (wide * (1 + 0.15 * one))  # -1 and 1 at the corners
    ends = (np.abs(t) - 1) * wide
    t2 = np.minimum(t * t, 1.2)
    hill = np.maximum(1 - t2, 0)
    # How far apart the lips are along the mouth: an arch, a box where lips are drawn up or aside, or an O.
    boxy = np.maximum(act.lip_stretch, 0.8 * act.upper_lip_raise)
    gape = hill + boxy * (hill * t2)
    gape = gape + act.jaw_drop * (1 - boxy) * (np.sqrt(hill) - gape)
    up = gape * (0.02 * act.lips_part + 0.03 * act.jaw_drop + 0.07 * act.upper_lip_raise)
    part = act.lips_part * (0.05 + 0.07 * act.corner_pull + 0.05 * act.lip_stretch)
    down = gape * (part + 0.34 * act.jaw_drop)
    # The line along which the lips meet: its middle, and what the corners do.
    meet = who.mouth_y + 0.05 * act.corner_pull - 0.05 * act.chin_raise - 0.04 * act.corner_depress
    lift = who.mouth_curve + 0.16 * act.corner_pull + 0.19 * one - 0.17 * drop
    lift = lift - 0.03 * act.lip_stretch - 0.02 * act.upper_lip_raise
    sink = 0.17 * act.corner_depress * (0.4 + 0.6 * t2)
    meet = meet + who.asymmetry * np.clip(t, -1, 1) + (sink - lift) * t2
    top, bottom = meet - up, meet + down
    thin = 1 - 0.75 * act.lip_press
    bow = 1 - 0.3 * bump(c.u / (0.3 * wide), 0)
    upper_lip = who.lip_upper * thin * bow * np.minimum(hill * 1.5, 1)
    upper_lip = upper_lip * (1 + act.pucker - 0.3 * act.corner_pull)
    lower_lip = who.lip_lower * thin * hill
    lower_lip = lower_lip * (1 + 0.8 * act.pucker + 0.25 * act.chin_raise - 0.2 * act.corner_pull)
    # Shadow under the lip, deeper and arched over a raised chin.
    chin = c.v - bottom - who.lip_lower - 0.06
    c.darken(bump(c.u / (0.8 * wide), chin / 0.06) * (0.15 + 0.25 * act.chin_raise))
    c.darken(0.45 * act.chin_raise * (c.half < 0.22) * c.line(chin - 0.02 - 0.9 * c.u * c.u, 0.018))
    above = (c.v - top + upper_lip + 0.035) / 0.06
    c.paint(bump(c.u / (who.mouth_width * 1.15), above) * who.moustache, who.brows)
    c.paint(c.cover(np.maximum(np.maximum(top - upper_lip - c.v, c.v - bottom - lower_lip), ends)), who.lips)
    # The open mouth: dark, with tongue, upper teeth (hidden in an O), and lower teeth where lips bare them.
    ajar = np.minimum((up + down) / c.px, 1)
    inside = c.cover(np.maximum(np.maximum(top - c.v, c.v - bottom), ends)) * ajar
    c.paint(inside, MOUTH)
    tongue_x, tongue_y = c.u / (0.7 * wide), (c.v - bottom) / (0.12 + 0.1 * act.jaw_drop)
    c.paint(inside * c.cover((np.sqrt(tongue_x**2 + tongue_y**2) - 1) * 0.15), TONGUE)
    c.paint(inside * c.cover(c.v - top - 0.085 + 0.15 * drop), WHITE)
    c.paint(inside * c.cover(bottom - 0.055 - c.v) * np.maximum(act.lip_stretch, act.upper_lip_raise), WHITE)
    crease = c.line(c.v - meet, 0.014 + 0.012 * act.lip_press) * c.cover(ends) * (1 - ajar)
    c.paint(crease * 0.85, who.lips * 0.3)
    c.darken(bump(ends / 0.05, (c.v - meet) / 0.06) * (0.2 + 0.35 * np.maximum(one, act.corner_pull)))
    out_x, out_y = c.u / 0.15, (c.v - bottom - 0.05) / 0.2
    out = c.cover((np.sqrt(out_x**2 + out_y**2) - 1) * 0.15) * c.cover(top - c.v) * (act.tongue_show > 0.15)
    c.paint(out, TONGUE)
    c.darken(0.3 * out * c.line(c.u, 0.015))


def _draw_hair(c: Canvas) -> None:
    who = c.who
    edge = np.minimum(c.half / who.width, 1.1) ** 2
    line = who.hairline + who.parting * c.u * (1 - c.half)
    line = line + (who.hair_sides - who.hairline) * edge * edge * edge
    outside = (c.radius - 1) * 0.75 - who.hair_volume
    hair = c.cover(np.maximum(outside, c.v - line)) * (c.y < who.hair_sides + 0.2) * who.hair_cover
    strand = c.u * 9 + c.v * 3 * who.parting
    strand = strand - np.floor(strand)
    c.paint(hair, who.hair * (0.85 + 0.3 * np.abs(strand - 0.5)))


def _draw_eyes(c: Canvas) -> None:
    who, act, view = c.who, c.act, c.view
    shut = np.maximum(act.eyes_closed, act.wink * c.chosen)
    squint = np.maximum(act.lid_tighten, act.cheek_raise)
    e = c.half - who.eye_spacing
    t = e / who.eye_width
    v = c.v - who.eye_y + who.eye_tilt * t - 0.05 * act.inner_brow_raise * (1 - act.outer_brow_raise) * t
    hill = np.maximum(1 - t * t, -1)
    c.darken(0.16 * bump(t / 1.5, (v + 0.02) / 0.22))
    upper = who.eye_height * (1.05 + 0.75 * act.upper_lid_raise - 0.35 * squint)
    lower = who.eye_height * (0.75 + 0.1 * act.upper_lid_raise - 0.55 * squint - 0.2 * act.nose_wrinkle)
    upper = upper * (1 - shut) - 0.6 * lower * shut
    lid_top, lid_low = -upper * hill, lower * hill * (1 - 0.15 * shut)
    open_ = c.cover(np.maximum(lid_top - v, v - lid_low)) * (np.abs(t) < 1)
    c.paint(open_ * (1 - shut), WHITE)
    iris_u = c.u - c.hand * who.eye_spacing - 0.07 * view.gaze_x
    iris_v = v - 0.04 * view.gaze_y
    reach = np.sqrt(iris_u * iris_u + iris_v * iris_v)
    seen = open_ * (1 - shut)
    c.paint(seen * c.cover(reach - 0.088), who.iris)
    c.paint(seen * c.cover(reach - 0.045), BLACK)
    glint = np.sqrt((iris_u + 0.03) ** 2 + (iris_v + 0.035) ** 2)
    c.paint(seen * c.cover(glint - 0.022), (1.0, 1.0, 1.0))
    span = np.clip((1.08 - np.abs(t)) * 8, 0, 1)
    c.paint(span * c.line(v - lid_top, 0.02 + 0.012 * shut) * 0.9, who.skin * 0.18)
    c.paint(span * c.line(v - lid_low, 0.01) * 0.5 * (1 - shut), who.skin * 0.45)
    lid = -who.eye_height * (1.05 + 0.6 * act.upper_lid_raise) * hill - 0.06
    c.darken(0.3 * span * c.line(v - lid, 0.012))
    # Glasses: a ring between a box and an oval, a bridge and two arms.
    gx, gy = np.abs(e) / 0.275, np.abs(c.v - who.eye_y - 0.03) / 0.215
    gx2, gy2 = gx * gx, gy * gy
    box, oval = np.sqrt(np.sqrt(gx2 * gx2 * gx2 * gx2 + gy2 * gy2 * gy2 * gy2)), gx2 + gy2
    ring = (np.sqrt(box + who.glasses_round * (oval - box)) - 1) * 0.23
    between = np.maximum(c.half - who.eye_spacing + 0.275, np.abs(c.v - who.eye_y) - 0.018)
    arms = np.maximum(0.275 - e, np.abs(c.v - who.eye_y) - 0.018) + 10 * (c.radius > 1)
    frame = np.maximum(c.line(ring, 0.022), c.cover(np.minimum(between, arms)))
    c.paint(frame * who.glasses, who.glasses_colour)


def _draw_brows(c: Canvas) -> None:
    who, act = c.who, c.act
    lowered = act.brow_lower * (1 - 0.85 * act.inner_brow_raise)
    raised = np.maximum(act.outer_brow_raise, act.one_brow * c.chosen)
    s = (c.half - who.eye_spacing - 0.01 + 0.04 * act.brow_lower) / who.brow_width
    inner, outer = np.clip((1 - s) * 0.5, 0, 1), np.clip((1 + s) * 0.5, 0, 1)
    height = who.brow_gap + who.brow_arch * (1 - s * s) - who.brow_slope * s + who.asymmetry * c.hand
    height = height + 0.18 * act.inner_brow_raise * inner + raised * (0.16 * outer + 0.04 * (1 - s * s))
    height = height - lowered * (0.15 * inner + 0.04) - 0.06 * act.nose_wrinkle * inner
    height = height + 0.06 * act.one_brow * c.chosen * inner - 0.04 * act.wink * c.chosen
    thick = who.brow_thickness * (1.1 - 0.45 * np.maximum(s, 0))
    ends = (np.abs(s) - 1) * who.brow_width
    stroke = c.cover(np.maximum(np.abs(c.v - who.eye_y + height) - thick, ends))
    c.paint(stroke * 0.92, who.brows)


def _photograph(c: Canvas, faces: Sequence[Face]) -> np.ndarray:
    """Light, expose, blur and digitise; returns uint8, shape (3, n, size, size)."""
    view = c.view
    image = c.image * c.shade
    image *= view.cast * view.brightness
    image -= 0.5
    image *= view.contrast
    image += 0.5
    np.clip(image, 0, 1, out=image)
    size = image.shape[-1]
    weight = view.blur / 3
    for _ in range(max(1, round(size / 64))):
        for axis in (-1, -2):
            image = _smooth(image, weight, axis)
    for k, face in enumerate(faces):
        grain = np.random.default_rng([face.view.grain]).standard_normal((3, size, size), np.float32)
        image[:, k] += grain * np.float32(face.view.noise)
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def _smooth(image: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
    """Mix every pixel with its two neighbours along `axis`, `weight` each; the border is repeated."""
    first, last = np.take(image, [0], axis), np.take(image, [-1], axis)
    padded = np.concatenate([first, image, last], axis)
    n = image.shape[axis]
    before, after = (np.take(padded, range(k, k + n), axis) for k in (0, 2))
    return image + weight * (before + after - 2 * image)
