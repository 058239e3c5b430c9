"""Configuration of the facial-expression models."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig, ViTConfig

# The Aff-Wild2 order. Written out here because this file travels with checkpoints; a test holds it equal to `labels.CLASSES`.
EXPRESSIONS = ("Neutral", "Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise", "Other")

POOLINGS = ("mean", "cls", "pooler")


class FerConfig(PreTrainedConfig):
    """What a facial-expression model is made of.

    Args:
        encoder_config: configuration (or its dict, with `model_type`) of a vision encoder that `AutoModel` can build: ViT,
            DINOv2/v3, CLIP or SigLIP vision tower, ... Default: ViT-Tiny/16 at 112 x 112 pixels.
        image_size: side of the square input image in pixels. Default: the encoder's own; another size makes encoders with
            learned position embeddings interpolate them.
        pooling: how patch features become one vector of a face: `mean` over patch tokens, the `cls` token, or the encoder's
            own `pooler`.
        classifier_dropout: probability of dropping a feature before the classifier.
        initializer_range: standard deviation of new linear weights.
        temporal_head: kind of temporal head of the video model.
        temporal_hidden_size, temporal_num_layers, temporal_num_heads: its width and depth.
        temporal_window: frames to each side that a frame may attend to.
        temporal_causal: a frame sees only itself and the past.
        id2label: class names by id. Default: the eight Aff-Wild2 classes in their order.

    Raises:
        ValueError: unknown pooling, an encoder without `hidden_size`, or class names that repeat.
    """

    model_type = "abaw_fer"
    sub_configs = {"encoder_config": AutoConfig}  # noqa: RUF012, the name and type that transformers asks for

    encoder_config: Any = None
    image_size: int | None = None
    pooling: str = "mean"
    classifier_dropout: float = 0.0
    initializer_range: float = 0.02
    temporal_head: str = "transformer"
    temporal_hidden_size: int = 256
    temporal_num_layers: int = 4
    temporal_num_heads: int = 4
    temporal_window: int = 64
    temporal_causal: bool = False

    def __post_init__(self, **kwargs):
        if self.encoder_config is None:
            self.encoder_config = ViTConfig(
                hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, image_size=112
            )
        elif isinstance(self.encoder_config, dict):
            values = dict(self.encoder_config)
            self.encoder_config = AutoConfig.for_model(values.pop("model_type", "vit"), **values)
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if not isinstance(getattr(self.encoder_config, "hidden_size", None), int):
            kind = type(self.encoder_config).__name__
            raise ValueError(f"encoder_config needs an integer hidden_size; {kind} has none: is it a vision encoder?")
        if self.image_size is None:
            native = self.encoder_config.image_size
            self.image_size = native if isinstance(native, int) else native[0]
        if self.id2label is None:
            self.id2label = dict(enumerate(EXPRESSIONS))
        super().__post_init__(**kwargs)
        names = [self.id2label[i] for i in sorted(self.id2label)]
        if len(set(names)) != len(names):
            raise ValueError(f"class names must differ, got {names}")
        self.label2id = {name: i for i, name in enumerate(names)}

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of the logits."""
        return [self.id2label[i] for i in range(len(self.id2label))]


__all__ = ["FerConfig"]
