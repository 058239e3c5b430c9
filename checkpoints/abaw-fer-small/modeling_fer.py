"""Facial-expression models: a vision encoder of transformers, pooled to one vector a face, and heads."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import ModelOutput

from .configuration_fer import FerConfig
from .postprocess_fer import PostProcess
from .temporal_fer import StreamState, TemporalEncoder

# Which class each Auto class loads for people without the package (`trust_remote_code=True`).
AUTO_MAP = {
    "AutoConfig": "configuration_fer.FerConfig",
    "AutoModel": "modeling_fer.FerModel",
    "AutoModelForImageClassification": "modeling_fer.FerForImageClassification",
    "AutoModelForVideoClassification": "modeling_fer.FerForVideoClassification",
}
IGNORE_INDEX = -1  # label of an example that does not count


def build_encoder(config: Any, pooling: str) -> nn.Module:
    """Build the encoder of a configuration, without a pooling layer of its own where nothing would use it.

    Parameters that no output depends on would break data-parallel training, which waits for every gradient.
    """
    return AutoModel.from_config(config, **pooler_option(MODEL_MAPPING.get(type(config), None), pooling))


def pooler_option(architecture: Any, pooling: str) -> dict[str, bool]:
    """What to tell an encoder class about its pooling layer, where it has the choice."""
    known = inspect.signature(architecture.__init__).parameters if architecture is not None else {}
    return {"add_pooling_layer": pooling == "pooler"} if "add_pooling_layer" in known else {}


def count_patches(config: Any, pixel_values: torch.Tensor) -> int:
    """Number of patch tokens that the encoder makes of images `(B, C, H, W)`."""
    patch = config.patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return (pixel_values.shape[-2] // height) * (pixel_values.shape[-1] // width)


class FerPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving of all facial-expression models."""

    config_class = FerConfig
    base_model_prefix = "fer"
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def save_pretrained(self, save_directory: Any, **kwargs):  # type: ignore[override]
        """Save weights, configuration and, from the package, the code for every Auto class (not just one)."""
        if self._auto_class is not None:
            # Not above: models load where pipelines do not. Here the line makes its file travel with them.
            from .pipeline_fer import TASK, FacialExpressionPipeline

            code = f"{FacialExpressionPipeline.__module__.split('.')[-1]}.{FacialExpressionPipeline.__name__}"
            task = {"impl": code, "pt": [self._auto_class], "type": "video"}
            self.config.custom_pipelines = {TASK: task} if hasattr(self, "classifier") else {}
            self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_encoder_pretrained(cls, name_or_path: str, **config_options):
        """Build a model around pretrained encoder weights; pooling norm and classifier start new.

        Args:
            name_or_path: a Hub id or folder of a vision encoder, of a CLIP or SigLIP pair (its vision tower
                is taken), or of a facial-expression model (its encoder is taken).
            config_options: fields of `FerConfig` other than `encoder_config`.

        Raises:
            ValueError: the folder's configuration is not that of a vision encoder, or weights are missing.
        """
        source = AutoConfig.from_pretrained(name_or_path)
        if isinstance(source, FerConfig):
            loaded: Any = FerModel.from_pretrained(name_or_path, output_loading_info=True)
            encoder, info = loaded[0].encoder, loaded[1]
            missing = [key for key in info["missing_keys"] if key.startswith("encoder.")]
            config_options["image_size"] = config_options.get("image_size") or source.image_size
        else:
            config = getattr(source, "vision_config", source)
            architecture: Any = MODEL_MAPPING.get(type(config), None)
            if architecture is None:
                kind = type(config).__name__
                raise ValueError(f"{name_or_path}: {kind} is not a vision encoder that AutoModel can build")
            option = pooler_option(architecture, config_options.get("pooling", FerConfig.pooling))
            encoder, info = architecture.from_pretrained(
                name_or_path, config=config, output_loading_info=True, **option
            )
            missing = list(info["missing_keys"])
        encoder.config.dtype = torch.float32  # to be trained in, whatever precision it was stored in
        model = cls(FerConfig(encoder_config=encoder.config, **config_options))
        # An encoder may bring a pooling layer that this pooling does not use; nothing of ours may be missing.
        target = model.get_submodule(f"{'' if cls is FerModel else 'fer.'}encoder")
        missing += target.load_state_dict(encoder.state_dict(), strict=False).missing_keys
        if missing:
            raise ValueError(f"{name_or_path} lacks encoder weights: {', '.join(sorted(missing)[:5])}")
        return model


class FerModel(FerPreTrainedModel):
    """Images of faces to feature vectors: encoder, pooling, layer norm."""

    # Loading features from a classifier is usual.
    _keys_to_ignore_on_load_unexpected = [r"^classifier\.", r"^temporal\."]  # noqa: RUF012

    def __init__(self, config: FerConfig):
        super().__init__(config)
        self.encoder = build_encoder(config.encoder_config, config.pooling)
        self.norm = nn.LayerNorm(config.feature_size)
        native: Any = getattr(config.encoder_config, "image_size", None) or config.image_size
        self.native_size = (native, native) if isinstance(native, int) else tuple(native)
        self.interpolates = "interpolate_pos_encoding" in inspect.signature(self.encoder.forward).parameters
        self.post_init()

    def pool(self, encoded: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pool what the encoder says of images to `(B, D)`: of tokens those of patches, which stand last."""
        if self.config.pooling == "pooler":
            if getattr(encoded, "pooler_output", None) is None:
                raise ValueError(
                    f"pooling='pooler', but {type(self.encoder).__name__} has no pooler; use 'mean' or 'cls'"
                )
            return encoded.pooler_output.flatten(1)
        tokens = encoded.last_hidden_state
        kind = type(self.encoder).__name__
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
            patches = tokens.shape[1]
        elif self.config.is_hierarchical:
            raise ValueError(f"{kind} gives tokens of which nobody knows the patches; use pooling='pooler'")
        else:
            patches = count_patches(self.config.encoder_config, pixel_values)
        if tokens.shape[-1] != self.config.feature_size:
            told = self.config.feature_size
            raise ValueError(f"{kind} gives {tokens.shape[-1]} features, its configuration says {told}")
        if self.config.pooling == "mean":
            return tokens[:, -patches:].mean(dim=1)
        if tokens.shape[1] == patches:
            raise ValueError(f"pooling='cls', but {kind} has no class token; use 'mean'")
        return tokens[:, 0]

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encode faces.

        Args:
            pixel_values: `(B, 3, H, W)`, scaled and normalised by the checkpoint's image processor.
            kwargs: passed to the encoder (`output_hidden_states`, `output_attentions`, ...).

        Returns:
            `last_hidden_state` `(B, tokens, D)` or `(B, D, H, W)`, as the encoder gives it, and
            `pooler_output` `(B, D)`, the features of each face.
        """
        kwargs["return_dict"] = True
        if self.interpolates and tuple(pixel_values.shape[-2:]) != self.native_size:
            kwargs["interpolate_pos_encoding"] = True
        encoded = self.encoder(pixel_values=pixel_values, **kwargs)
        features = self.norm(self.pool(encoded, pixel_values))
        return BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=features,
            hidden_states=encoded.get("hidden_states"),
            attentions=encoded.get("attentions"),
        )


class FerForImageClassification(FerPreTrainedModel):
    """Expression of single face crops."""

    def __init__(self, config: FerConfig):
        super().__init__(config)
        self.fer = FerModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.feature_size, len(config.class_names))
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        return_dict: bool = True,
        **kwargs,
    ) -> ImageClassifierOutput | tuple:
        """Classify faces.

        Args:
            pixel_values: `(B, 3, H, W)`, scaled and normalised by the checkpoint's image processor.
            labels: class ids `(B,)`, or class probabilities `(B, C)`; -1 or all 0 where an example does not
                count.
            return_dict: return an `ImageClassifierOutput` rather than a tuple.
            kwargs: passed to the encoder.

        Returns:
            `logits` `(B, C)` and, with `labels`, the mean cross-entropy `loss` of what counts (0 if nothing);
            with `config.mirror`, outside training, the logits are the mean over faces and mirror images, and
            all else is of the faces.
        """
        encoded = self.fer(pixel_values, **kwargs)
        logits = self.classifier(self.dropout(encoded.pooler_output))
        if self.config.mirror and not self.training:
            asked = {name: value for name, value in kwargs.items() if not name.startswith("output_")}
            mirrored = self.fer(pixel_values.flip(-1), **asked)
            logits = (logits + self.classifier(mirrored.pooler_output)) / 2
        loss = None
        if labels is not None:
            losses = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
            counts = labels.any(dim=-1) if labels.ndim == 2 else labels != IGNORE_INDEX
            loss = losses.sum() / counts.sum().clamp(min=1)
        output = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )
        return output if return_dict else output.to_tuple()


@dataclass
class FerVideoOutput(ModelOutput):
    """What the video model says of `B` videos of `T` frames.

    Attributes:
        loss: mean cross-entropy over frames that are there and labelled, if labels were given.
        logits: `(B, C)` of each video as a whole, the mean over its frames.
        frame_logits: `(B, T, C)`, 0 where there is no frame; before any post-processing.
        last_hidden_state: `(B, T, width)` of the temporal head.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    frame_logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


@dataclass
class VideoStream:
    """Streams that the model follows.

    Attributes:
        temporal: what its temporal head remembers.
        postprocess: what its post-processing remembers.
        finish: the post-processing, as the configuration gave it when the streams began.
    """

    temporal: StreamState
    postprocess: Any
    finish: PostProcess


class FerForVideoClassification(FerPreTrainedModel):
    """Expression of every frame of videos of one face, and of each video as a whole.

    Frames are face crops, or their features (`FerModel`'s `pooler_output`). With `temporal_causal` it also
    follows streams, frame by frame: `init_stream` and `step`.
    """

    def __init__(self, config: FerConfig):
        super().__init__(config)
        self.fer = FerModel(config)
        self.temporal = TemporalEncoder(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(self.temporal.head.width, len(config.class_names))
        self.post_init()

    @property
    def postprocess(self) -> PostProcess:
        """What turns frame logits into probabilities; see `postprocess_fer`."""
        return PostProcess.from_dict(
            {**(self.config.postprocess or {}), "causal": self.config.temporal_causal}
        )

    def encode_frames(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features `(B, T, D)` of frames `(B, T, 3, H, W)`, each for itself."""
        return self.fer(pixel_values.flatten(0, 1)).pooler_output.unflatten(0, pixel_values.shape[:2])

    def positions(self, frame_times: torch.Tensor | None, shape: torch.Size, device: Any) -> torch.Tensor:
        """Positions `(B, T)` in frames, float64, of times in seconds; None: frames follow one another."""
        if frame_times is not None:
            return frame_times.to(device, torch.float64) * self.config.frame_rate
        return torch.arange(shape[1], dtype=torch.float64, device=device).expand(shape)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        frame_times: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool = True,
        **kwargs,
    ) -> FerVideoOutput | tuple:
        """Classify videos.

        Args:
            pixel_values: `(B, T, 3, H, W)` face crops, or `(T, 3, H, W)` of one video, scaled and normalised
                by the checkpoint's image processor.
            frame_features: `(B, T, D)` features of the frames, in place of pixels.
            frame_mask: `(B, T)` bool, True where there is a frame; None: everywhere.
            frame_times: `(B, T)` in seconds, rising; None: frames follow one another at `config.frame_rate`.
            labels: class ids `(B, T)`, -1 where a frame does not count.
            return_dict: return a `FerVideoOutput` rather than a tuple.
            kwargs: ignored; transformers' pipelines pass their own.

        Raises:
            ValueError: neither or both of pixels and features, or shapes that do not fit.
        """
        if (pixel_values is None) == (frame_features is None):
            raise ValueError("pass either pixel_values or frame_features")
        if frame_features is None:
            pixels: Any = pixel_values
            frame_features = self.encode_frames(pixels if pixels.ndim == 5 else pixels[None])
        shape, device = frame_features.shape[:2], frame_features.device
        if not shape[1]:
            raise ValueError(f"videos need at least one frame, got features {tuple(frame_features.shape)}")
        for name, given in {"frame_mask": frame_mask, "frame_times": frame_times, "labels": labels}.items():
            if given is not None and given.shape != shape:
                raise ValueError(f"{name} must be of shape {tuple(shape)}, got {tuple(given.shape)}")
        mask = torch.ones(shape, dtype=torch.bool, device=device) if frame_mask is None else frame_mask.bool()
        hidden = self.temporal(frame_features, mask, self.positions(frame_times, shape, device))
        frame_logits = self.classifier(self.dropout(hidden)) * mask[..., None]
        loss = None
        if labels is not None:
            counted = torch.where(mask, labels, IGNORE_INDEX)
            losses = nn.functional.cross_entropy(
                frame_logits.flatten(0, 1), counted.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
            )
            loss = losses / (counted != IGNORE_INDEX).sum().clamp(min=1)
        logits = frame_logits.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        output = FerVideoOutput(loss=loss, logits=logits, frame_logits=frame_logits, last_hidden_state=hidden)
        return output if return_dict else output.to_tuple()

    def init_stream(self, batch_size: int = 1) -> VideoStream:
        """State of `batch_size` streams before their first frame.

        Raises:
            ValueError: the model looks ahead (`temporal_causal` is False).
        """
        if not self.config.temporal_causal:
            raise ValueError(
                "this model looks at later frames too: a stream needs one trained with temporal_causal=True"
            )
        like, finish = self.classifier.weight, self.postprocess
        smoothing = finish.init_stream(batch_size, len(self.config.class_names), like.device)
        return VideoStream(self.temporal.start(batch_size, like), smoothing, finish)

    @torch.no_grad()
    def step(
        self, frame_features: torch.Tensor, stream: VideoStream, frame_times: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, VideoStream]:
        """Follow streams by one frame, or by several; what a frame costs does not grow with the stream.

        For evaluation mode, without dropout.

        Args:
            frame_features: `(B, D)` of the next frame of each stream, or `(B, n, D)` of the next `n`.
            stream: what `init_stream` or the last step returned; it is left as it is.
            frame_times: `(B,)` or `(B, n)` in seconds, rising, from the last step on, too; None: frames
                follow one another.

        Returns:
            Logits and post-processed probabilities, `(B, C)` or `(B, n, C)`, and the state for the next step.

        Raises:
            ValueError: times are not numbers that rise, or the model is in training mode.
        """
        if self.training:
            raise ValueError("streams are followed in evaluation mode: call model.eval() first")
        if one := frame_features.ndim == 2:
            frame_features = frame_features[:, None]
            frame_times = None if frame_times is None else frame_times[:, None]
        shape, device = frame_features.shape[:2], frame_features.device
        positions, last = self.positions(frame_times, shape, device), stream.temporal.last_position[:, None]
        if frame_times is None:
            positions = positions + last + 1
        else:
            last = last if stream.postprocess.seen else last - torch.inf  # a first time may be any
            if not (positions.isfinite() & (positions.diff(dim=1, prepend=last) > 0)).all():
                raise ValueError(
                    "frame_times must be numbers that rise, within a step and from one to the next, got "
                    f"{frame_times.tolist()} after {(last[:, 0] / self.config.frame_rate).tolist()}"
                )
        hidden, temporal = self.temporal.extend(frame_features, stream.temporal, positions)
        logits = self.classifier(self.dropout(hidden))
        probabilities, smoothing = stream.finish.step(logits, stream.postprocess, positions)
        found = (logits[:, 0], probabilities[:, 0]) if one else (logits, probabilities)
        return *found, VideoStream(temporal, smoothing, stream.finish)


__all__ = ["FerForImageClassification", "FerForVideoClassification", "FerModel"]
