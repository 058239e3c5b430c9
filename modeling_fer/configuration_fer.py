"""Configuration of the facial-expression models."""

import math
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, ViTConfig

# The Aff-Wild2 order. Written out, for this file travels with checkpoints; a test compares `labels.CLASSES`.
EXPRESSIONS = ("Neutral", "Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise", "Other")

POOLINGS = ("mean", "cls", "pooler")
HEADS = ("transformer", "convolution", "none")

# How faces are cut out, by name: where right eye, left eye, tip of the nose, right and left corner of the
# mouth (the person's own right and left) belong, in units of the crop's side; None: a plain square box.
# ArcFace: `arcface_src` in deepinsight/insightface, python-package/insightface/utils/face_align.py; a side of
# 112 pixels, whose middles are at whole numbers.
ARCFACE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
CROP_POINTS: dict[str, list[list[float]] | None] = {
    "arcface112": [[(x + 0.5) / 112, (y + 0.5) / 112] for x, y in ARCFACE],
    "box": None,
}


def check_crop(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a crop convention in full, of JSON's types: `name`, `points` and `margin`; see `FerConfig`.

    Raises:
        ValueError: unknown settings, points that are not five or all the same, other points than the name's,
            no points for a name that is not known, or a margin out of its range.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"crop must have a name, and perhaps points and a margin, got {values!r}")
    if unknown := [str(key) for key in values if key not in ("name", "points", "margin")]:
        raise ValueError(f"crop knows name, points, margin; got {', '.join(unknown)}")
    try:
        points = values.get("points")
        points = None if points is None else [[float(x), float(y)] for x, y in points]
        name, margin = str(values["name"]), float(values.get("margin", 0.0))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"crop takes a name, five points (x, y) and a margin, got {dict(values)}") from error
    if name not in CROP_POINTS and points is None:
        raise ValueError(f"crop must have points or be one of {', '.join(CROP_POINTS)}, got {name!r}")
    known = CROP_POINTS.get(name, points)
    if points not in (None, known):
        raise ValueError(f"crop {name!r} has other points: leave yours out, or give it a new name")
    if known is not None:
        finite = all(math.isfinite(value) for point in known for value in point)
        if len(known) != 5 or not finite or known.count(known[0]) == 5:
            raise ValueError(f"points of a crop must be five (x, y) that differ, got {known}")
    if not -0.5 < margin <= 1:
        raise ValueError(f"margin of a crop must be above -0.5 and at most 1, got {margin}")
    return {"name": name, "points": known and [list(point) for point in known], "margin": margin}


class FerConfig(PreTrainedConfig):
    """What a facial-expression model is made of.

    Args:
        encoder_config: configuration (or its dict, with `model_type`) of a vision encoder that `AutoModel`
            can build: ViT, DINOv2/v3, CLIP or SigLIP vision tower, or one that gives a map of features, as
            RegNet, ResNet and ConvNeXt do. Default: ViT-Tiny/16 at 112 x 112.
        image_size: side of the square input image in pixels. Default: the encoder's own, where it has one;
            another size makes encoders with learned position embeddings interpolate them.
        pooling: how patch features become one vector of a face: `mean` over patch tokens or over the places
            of a map, the `cls` token, or the encoder's own `pooler`.
        classifier_dropout: probability of dropping a feature before the classifier.
        mirror: outside training, classify a still face and its mirror image and take the mean of their
            logits: a little more accurate, at twice the cost. Models of videos do not look at it.
        initializer_range: standard deviation of new linear weights.
        temporal_head: how the video model looks at neighbouring frames: `transformer`, `convolution`, `none`.
        temporal_hidden_size, temporal_num_layers, temporal_num_heads: its width and depth.
        temporal_window: frames to each side that a frame of the transformer attends to, in each layer.
        temporal_causal: a frame sees only itself and the past, so that streams can be followed.
        temporal_dropout: probability of dropping a feature within the temporal head.
        frame_rate: frames a second of the videos that the temporal head learnt from; times are counted in it.
        num_frames: frames that the video model was trained on at once, and that the stock
            `video-classification` pipeline takes of a video.
        postprocess: what turns frame logits into probabilities (`postprocess_fer.PostProcess` as a dict), or
            None: a softmax.
        crop: how the faces that the model learnt from were cut out, or None: not known. A dict of `name`, one
            in `CROP_POINTS` or your own; `points`, where the five landmarks belong ((0, 0) top left, (1, 1)
            bottom right, before the margin), given by a known name; `margin`, what is added on each side, in
            units of the crop's side without it, negative to cut off. Faces are turned, scaled and shifted to
            the points; without points ("box") the crop is the smallest square around the middle of a
            detector's box that holds it.
        id2label: class names by id. Default: the eight Aff-Wild2 classes in their order.

    Raises:
        ValueError: unknown pooling, an encoder that is neither a vision transformer (one `hidden_size`,
            `image_size` and `patch_size`) nor one of maps (`num_channels`, `hidden_sizes` of its stages), no
            size of the image, an unknown temporal head or one whose sizes do not fit, class names that
            repeat, or a crop that `check_crop` refuses.
    """

    model_type = "abaw_fer"
    sub_configs = {"encoder_config": AutoConfig}  # noqa: RUF012, the name and type that transformers asks for

    encoder_config: Any = None
    image_size: int | None = None
    pooling: str = "mean"
    classifier_dropout: float = 0.0
    mirror: bool = False
    initializer_range: float = 0.02
    temporal_head: str = "transformer"
    temporal_hidden_size: int = 256
    temporal_num_layers: int = 4
    temporal_num_heads: int = 4
    temporal_window: int = 64
    temporal_causal: bool = False
    temporal_dropout: float = 0.1
    frame_rate: float = 30.0
    num_frames: int = 128
    postprocess: dict[str, Any] | None = None
    crop: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        if self.encoder_config is None:
            self.encoder_config = ViTConfig(
                hidden_size=192,
                num_hidden_layers=12,
                num_attention_heads=3,
                intermediate_size=768,
                image_size=112,
            )
        elif isinstance(self.encoder_config, dict):
            values = dict(self.encoder_config)
            self.encoder_config = AutoConfig.for_model(values.pop("model_type", "vit"), **values)
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if self.temporal_head not in HEADS:
            raise ValueError(f"temporal_head must be one of {', '.join(HEADS)}, got {self.temporal_head!r}")
        if self.temporal_hidden_size % (2 * self.temporal_num_heads):
            raise ValueError(
                f"temporal_hidden_size {self.temporal_hidden_size} must divide by twice temporal_num_heads "
                f"{self.temporal_num_heads}: rotary positions turn pairs of features"
            )
        for name in ("temporal_window", "temporal_num_layers", "num_frames", "frame_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        kind, native = type(self.encoder_config).__name__, getattr(self.encoder_config, "image_size", None)
        side = (int, list, tuple)
        if not self.is_hierarchical:
            for name, types in {"hidden_size": (int,), "image_size": side, "patch_size": side}.items():
                if not isinstance(getattr(self.encoder_config, name, None), types):
                    raise ValueError(f"encoder_config needs {name}; {kind} has none: is it a vision encoder?")
        if self.image_size is None:
            if native is None:
                raise ValueError(f"image_size is missing: {kind} takes images of any size")
            self.image_size = native if isinstance(native, int) else native[0]
        if self.crop is not None:
            self.crop = check_crop(self.crop)
        if self.id2label is None:
            self.id2label = dict(enumerate(EXPRESSIONS))
        super().__post_init__(**kwargs)
        if sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError(f"class ids must be 0 to C - 1, got {sorted(self.id2label)}")
        names = self.class_names
        if len(set(names)) != len(names):
            raise ValueError(f"class names must differ, got {names}")
        self.label2id = {name: i for i, name in enumerate(names)}

    @property
    def is_hierarchical(self) -> bool:
        """Whether the encoder has stages of different widths, as those that give maps of features do."""
        config = self.encoder_config
        sizes = getattr(config, "hidden_sizes", None)
        return isinstance(sizes, (list, tuple)) and isinstance(getattr(config, "num_channels", None), int)

    @property
    def feature_size(self) -> int:
        """Number `D` of features that the encoder gives of a face."""
        return (
            self.encoder_config.hidden_sizes[-1] if self.is_hierarchical else self.encoder_config.hidden_size
        )

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of the logits."""
        names: Any = self.id2label
        return [names[i] for i in range(len(names))]


__all__ = ["FerConfig"]
