"""What a drawn face is made of: who it is, what its muscles do, and how it is seen.

Lengths are in head units (a head is 2 high and about 1.5 wide), x runs right in the image and y down from
the middle of the head. Angles are in radians, colours are RGB in [0, 1].
"""

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np

Colour = tuple[float, float, float]

# Anchors from the lightest to the darkest human skin; an identity lies anywhere between two neighbours.
SKIN_TONES: tuple[Colour, ...] = (
    (0.97, 0.85, 0.78), (0.93, 0.76, 0.65), (0.84, 0.64, 0.50),
    (0.72, 0.51, 0.37), (0.55, 0.37, 0.26), (0.40, 0.26, 0.19),
)  # fmt: skip
# Black, dark brown, brown, auburn, blond, grey, white, and two that are dyed or a head scarf.
HAIR_COLOURS: tuple[Colour, ...] = (
    (0.07, 0.06, 0.06), (0.16, 0.10, 0.07), (0.32, 0.20, 0.12), (0.45, 0.20, 0.10), (0.78, 0.62, 0.36),
    (0.50, 0.50, 0.50), (0.85, 0.84, 0.80), (0.20, 0.25, 0.50), (0.55, 0.15, 0.30),
)  # fmt: skip
EYE_COLOURS: tuple[Colour, ...] = (
    (0.16, 0.09, 0.05), (0.26, 0.15, 0.08), (0.36, 0.28, 0.14), (0.22, 0.38, 0.28), (0.25, 0.42, 0.60),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Actions:
    """Facial actions after the Facial Action Coding System (AU: action unit), from 0 at rest to 1 in full.

    `one_corner`, `one_brow` and `wink` act on one half of the face, the image's left if `side` < 0.5.
    """

    inner_brow_raise: float = 0.0  # AU1
    outer_brow_raise: float = 0.0  # AU2
    brow_lower: float = 0.0  # AU4
    upper_lid_raise: float = 0.0  # AU5
    cheek_raise: float = 0.0  # AU6
    lid_tighten: float = 0.0  # AU7
    nose_wrinkle: float = 0.0  # AU9
    upper_lip_raise: float = 0.0  # AU10
    corner_pull: float = 0.0  # AU12
    corner_depress: float = 0.0  # AU15
    chin_raise: float = 0.0  # AU17
    pucker: float = 0.0  # AU18
    tongue_show: float = 0.0  # AU19
    lip_stretch: float = 0.0  # AU20
    lip_press: float = 0.0  # AU24
    lips_part: float = 0.0  # AU25
    jaw_drop: float = 0.0  # AU26, AU27
    eyes_closed: float = 0.0  # AU43
    one_corner: float = 0.0  # AU14 with AU12, one-sided
    one_brow: float = 0.0  # AU2, one-sided
    wink: float = 0.0  # AU46
    side: float = 0.0  # a choice, not an amount: never scaled

    def vector(self) -> np.ndarray:
        """Return the amounts as a float64 array of shape (len(ACTION_NAMES),)."""
        return np.array([getattr(self, name) for name in ACTION_NAMES])

    @classmethod
    def from_vector(cls, amounts: np.ndarray) -> Self:
        """Return the actions with `amounts`, shape (len(ACTION_NAMES),), cut to [0, 1]."""
        if np.shape(amounts) != (len(ACTION_NAMES),):
            raise ValueError(f"expected {len(ACTION_NAMES)} action amounts, got shape {np.shape(amounts)}")
        return cls(*(float(a) for a in np.clip(amounts, 0.0, 1.0)))


ACTION_NAMES = tuple(field.name for field in dataclasses.fields(Actions))


@dataclasses.dataclass(frozen=True)
class Identity:
    """One person: bone, skin, hair and what is worn, with the brows and mouth of a face at rest."""

    skin: Colour
    lips: Colour
    hair: Colour
    brows: Colour
    iris: Colour
    glasses_colour: Colour
    clothes: Colour
    width: float  # half-width of the head
    taper: float  # how much narrower the jaw is than the temples
    squareness: float  # 0 oval to 1 square jaw
    eye_spacing: float  # centre line to eye centre
    eye_y: float
    eye_width: float  # half
    eye_height: float  # half, of an eye at rest
    eye_tilt: float  # positive: outer corner higher
    brow_gap: float  # eye centre to brow
    brow_width: float  # half
    brow_thickness: float  # half
    brow_arch: float
    brow_slope: float  # resting slope, positive: outer end lower
    nose_length: float
    nose_width: float
    mouth_y: float
    mouth_width: float  # half
    mouth_curve: float  # resting lift of the corners
    lip_upper: float  # thickness
    lip_lower: float
    age: float  # 0 to 1: resting folds and forehead lines
    hair_cover: float  # opacity: 0 is bald
    hairline: float  # y of the hair over the forehead
    hair_sides: float  # y down to which hair runs along the face
    hair_length: float  # y down to which hair hangs behind the head
    hair_volume: float
    parting: float  # tilt of the hairline
    beard: float  # opacity
    moustache: float  # opacity
    glasses: float  # opacity: 0 or 1
    glasses_round: float  # 0 square to 1 round
    asymmetry: float  # left-right difference of brows and mouth at rest

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Self:
        """Draw a person."""
        u = rng.uniform
        tone = u(0, len(SKIN_TONES) - 1)
        skin = np.array(
            [np.interp(tone, range(len(SKIN_TONES)), [t[c] for t in SKIN_TONES]) for c in range(3)]
        )
        skin = np.clip(skin + u(-0.03, 0.03, 3), 0, 1)
        light = bool(skin.mean() > 0.6)
        # Fair hair and eyes go with light skin; grey, white and dyed go with all.
        odds = (
            np.array([4, 4, 3, 1.2, 2.5, 1.2, 0.6, 0.5, 0.5])
            if light
            else np.array([8, 3, 0.5, 0, 0, 1, 0.5, 0.5, 0.5])
        )
        hair = np.clip(np.array(HAIR_COLOURS[rng.choice(len(odds), p=odds / odds.sum())]) * u(0.8, 1.2), 0, 1)
        iris = EYE_COLOURS[rng.integers(len(EYE_COLOURS)) if light else rng.integers(3)]
        brows = np.minimum(hair * u(0.5, 0.8), skin * u(0.3, 0.45))  # brows never vanish into the skin
        style = rng.choice(5, p=[0.12, 0.1, 0.33, 0.25, 0.2])  # bald, receding, short, middle, long
        whiskers = rng.choice(5, p=[0.62, 0.1, 0.1, 0.1, 0.08]) if style < 4 else 0
        return cls(
            skin=_colour(skin),
            lips=_colour(skin * np.array([0.88, 0.6, 0.6]) * u(0.85, 1.05) + np.array([u(0, 0.1), 0, 0.02])),
            hair=_colour(hair),
            brows=_colour(brows),
            iris=_colour(np.array(iris) * u(0.85, 1.15)),
            glasses_colour=_colour(np.full(3, u(0.03, 0.3)) + np.array([u(0, 0.2), 0, u(0, 0.1)])),
            clothes=_colour(u(0.08, 0.9, 3)),
            width=u(0.68, 0.84),
            taper=u(0.08, 0.36),
            squareness=u(0.0, 0.8),
            eye_spacing=u(0.31, 0.38),
            eye_y=u(-0.16, -0.06),
            eye_width=u(0.18, 0.23),
            eye_height=u(0.075, 0.1),
            eye_tilt=u(-0.03, 0.05),
            brow_gap=u(0.24, 0.3),
            brow_width=u(0.19, 0.24),
            brow_thickness=u(0.022, 0.05),
            brow_arch=u(0.0, 0.05),
            brow_slope=u(-0.03, 0.012),
            nose_length=u(0.3, 0.42),
            nose_width=u(0.11, 0.18),
            mouth_y=u(0.5, 0.58),
            mouth_width=u(0.27, 0.34),
            mouth_curve=u(-0.012, 0.018),
            lip_upper=u(0.035, 0.07),
            lip_lower=u(0.05, 0.09),
            age=u(0, 1) ** 2,
            hair_cover=float(style > 0),
            hairline=u(-0.85, -0.78) if style == 1 else u(-0.74, -0.55),
            hair_sides=u(-0.35, 0.0) if style < 3 else u(0.0, 0.35),
            hair_length=-0.5 if style < 3 else u(0.1, 0.6) if style == 3 else u(0.7, 1.2),
            hair_volume=u(0.03, 0.08) if style < 3 else u(0.08, 0.2),
            parting=0.0 if style == 1 else u(-0.3, 0.3),
            beard=u(0.25, 0.85) if whiskers in (1, 2) else u(0.1, 0.3) if whiskers == 3 else 0.0,
            moustache=u(0.4, 0.9) if whiskers in (2, 4) else 0.0,
            glasses=float(rng.random() < 0.22),
            glasses_round=u(0, 1),
            asymmetry=u(-0.012, 0.012),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class View:
    """How a face is seen in one image: pose, gaze, light, background and camera."""

    yaw: float = 0.0  # radians, positive: turned to the image's right
    pitch: float = 0.0  # radians, positive: turned down
    roll: float = 0.0  # radians, positive: clockwise
    scale: float = 1.0
    shift_x: float = 0.0  # of the head's centre, in half image sides
    shift_y: float = 0.0
    gaze_x: float = 0.0  # -1 to 1
    gaze_y: float = 0.0
    light_x: float = 0.0  # where the light comes from, -1 (left, above) to 1
    light_y: float = -0.4
    ambient: float = 0.7  # share of light without direction
    brightness: float = 1.0
    contrast: float = 1.0
    cast: Colour = (1.0, 1.0, 1.0)  # colour of the light
    background: Colour = (0.5, 0.5, 0.5)
    backdrop: Colour = (0.4, 0.4, 0.4)  # second colour, into which the background runs
    backdrop_x: float = 0.5  # direction of that run
    backdrop_y: float = 0.5
    blur: float = 0.0  # 0 sharp to 1: a three-pixel box at 64 pixels
    noise: float = 0.0  # standard deviation
    grain: int = 0  # seed of the noise

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Self:
        """Draw a view; pose is that of a roughly aligned face crop."""
        u, n = rng.uniform, rng.standard_normal
        return cls(
            yaw=float(np.clip(0.1 * n(), -0.3, 0.3)),
            pitch=float(np.clip(0.06 * n(), -0.18, 0.18)),
            roll=float(np.clip(0.05 * n(), -0.15, 0.15)),
            scale=u(0.95, 1.06),
            shift_x=u(-0.04, 0.04),
            shift_y=u(-0.04, 0.04),
            gaze_x=u(-0.6, 0.6),
            gaze_y=u(-0.35, 0.35),
            light_x=u(-1, 1),
            light_y=u(-1, 0.3),
            ambient=u(0.45, 0.85),
            brightness=u(0.8, 1.12),
            contrast=u(0.85, 1.2),
            cast=_colour(1 + u(-0.08, 0.08, 3), top=1.2),
            background=_colour(u(0.1, 0.85) + u(-0.2, 0.2, 3)),
            backdrop=_colour(u(0.1, 0.85) + u(-0.2, 0.2, 3)),
            backdrop_x=u(-1, 1),
            backdrop_y=u(-1, 1),
            blur=u(0, 0.6) ** 2 if rng.random() < 0.75 else u(0.3, 0.7),
            noise=u(0.0, 0.03),
            grain=int(rng.integers(2**31)),
        )


@dataclasses.dataclass(frozen=True)
class Face:
    """Everything that one drawn image shows."""

    identity: Identity
    actions: Actions = Actions()
    view: View = View()


def _colour(values: Sequence[float] | np.ndarray, top: float = 1.0) -> Colour:
    red, green, blue = (float(v) for v in np.clip(values, 0.0, top))
    return red, green, blue
