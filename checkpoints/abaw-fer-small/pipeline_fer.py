"""`pipeline("facial-expression")`: the expression of every frame of a video of one face, or of one image."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Pipeline

from .frames_fer import Frame, input_name, is_frame, is_pixels, read_frames

TASK = "facial-expression"
BATCH = 64  # frames that the encoder sees at once
CHUNK = 512  # frames that the temporal head of a stream sees at once
WINDOWS = 32  # windows that a temporal head sees at once


def positions_of(times: Sequence[float | None], frame_rate: float) -> torch.Tensor:
    """Positions `(T,)` in frames, float64, of times in seconds; without times frames follow one another.

    Rounded, so that the time of a whole frame comes back as a whole number.

    Raises:
        ValueError: some times are missing, or they do not rise.
    """
    known = [time for time in times if time is not None]
    if not known or len(times) == 1:
        return torch.arange(len(times), dtype=torch.float64)
    remedy = "pass frame_rate, or frame_times"
    if len(known) < len(times):
        raise ValueError(f"{len(times) - len(known)} of {len(times)} frames have no time stamp: {remedy}")
    positions = (torch.tensor(known, dtype=torch.float64) * frame_rate).round(decimals=6)
    falls = (positions.diff() <= 0).nonzero()
    if len(falls):
        at = int(falls[0]) + 1
        raise ValueError(
            f"times must rise: frame {at} is at {known[at]} s, after {known[at - 1]} s; {remedy}"
        )
    return positions


def windows(positions: torch.Tensor, span: int) -> Iterator[tuple[float, slice]]:
    """Windows `span` frame numbers long, each half over the next, that cover all frames; where each begins.

    The first and the last end where the video does. Where no frames are, there are no windows.
    """
    first, end = float(positions[0]), float(positions[-1]) + 1
    start = first
    while True:
        start = max(first, min(start, end - span))
        low, high = torch.searchsorted(positions, positions.new_tensor([start, start + span])).tolist()
        yield start, slice(low, high)
        if high == len(positions):
            return
        start = float(positions[high]) - span // 2


def frame_logits(model: Any, features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Frame logits `(T, C)` in float32 of one video of any length, before post-processing.

    A causal model follows the frames as a stream. One that looks both ways sees windows of the length that it
    learnt from, each half over the next; where they overlap, logits are averaged with weights that fall
    towards the windows' ends, where neighbours lack. The result is that of the package's own tools.

    Args:
        model: a `FerForVideoClassification`, in evaluation mode.
        features: `(T, D)` of its encoder.
        positions: `(T,)` numbers of the frames, rising, float64; they need not be whole.
    """
    config, like = model.config, model.classifier.weight
    features, times = features.to(like), (positions / config.frame_rate).to(like.device)
    if config.temporal_causal:
        stream, parts = model.init_stream(1), []
        for values, own in zip(features.split(CHUNK), times.split(CHUNK), strict=True):
            logits, _, stream = model.step(values[None], stream, own[None])
            parts.append(logits[0].float().cpu())
        return torch.cat(parts)
    total, weights = torch.zeros(len(features), config.num_labels), torch.zeros(len(features), 1)
    for batch in batches(windows(positions, config.num_frames), WINDOWS):
        places = [place for _, place in batch]
        output = model(
            frame_features=pad_sequence([features[place] for place in places], batch_first=True),
            frame_times=pad_sequence([times[place] for place in places], batch_first=True),
            frame_mask=pad_sequence(
                [torch.ones_like(times[place], dtype=torch.bool) for place in places], batch_first=True
            ),
        )
        for (begin, place), logits in zip(batch, output.frame_logits.float().cpu(), strict=True):
            into = positions[place] - begin
            ramp = (torch.minimum(into, config.num_frames - 1 - into) + 1).float()[:, None]
            total[place] += logits[: len(ramp)] * ramp
            weights[place] += ramp
    return total / weights


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


class FacialExpressionPipeline(Pipeline):
    """Expression of every frame of a video of one face, or of one image of a face.

    Faces are expected cropped as those that the model learnt from: a checkpoint brings no detector (the
    package abaw-fer has one, `modeling_fer.video.faces`). Models of videos see the frames together, however
    many there are, and are post-processed as their configuration says; models of stills see each for itself.

    ```python
    classify = pipeline("facial-expression", model="org/name", trust_remote_code=True)
    for frame in classify("faces.mp4"):
        print(frame["seconds"], frame["label"], frame["score"])
    ```
    """

    _load_image_processor: Any = True
    _load_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = False

    def __init__(self, *args: Any, batch_size: int = BATCH, num_workers: int = 0, **kwargs: Any) -> None:
        # The batch size of transformers counts inputs, and pads them to one size.
        super().__init__(*args, frames_at_once=batch_size, workers=num_workers, **kwargs)
        model: Any = self.model
        if not hasattr(model, "classifier"):
            raise ValueError(f"{type(model).__name__} has no classifier: load a model of stills or of videos")
        if self.image_processor is None:
            raise ValueError("pass image_processor, too: the model comes without one")
        self.is_video = hasattr(model, "temporal")

    def __call__(
        self, inputs: Any, *args: Any, num_workers: int = 0, batch_size: Any = None, **kwargs: Any
    ) -> Any:
        """Name the expression of every frame.

        Args:
            inputs: a video or an image of one face: a path, an http(s) URL, the bytes of the file (image or
                video is told from the content), pixels `(T, H, W, 3)` or `(H, W, 3)` in uint8, a PIL image,
                or a list of frames (PIL images or pixels). A list of anything else, a generator or a data
                set is of several such inputs, each judged for itself.
            args: as of any pipeline.
            num_workers: 0; worker processes could not hand over frames that are read when they are needed.
            batch_size: frames that the encoder sees at once; of a video only so many are in memory.
            kwargs:
                frame_rate: frames a second, in place of a video file's time stamps; lists and arrays of
                    frames have none, and count as running at the rate that the model learnt from.
                frame_times: seconds of each frame, rising, in place of either.
                top_k: name only so many classes a frame, the likeliest. Default: all.
                smooth: do the model's post-processing (temperature, smoothing over time, bias of classes);
                    False: a plain softmax. Models of stills have none.
                max_frames, max_pixels: refuse videos of more frames, and frames of more pixels.

        Returns:
            A list of one dict a frame, of a single image too: `frame`, its number from 0; `seconds` from the
            start of the video, None where that is not known; `label` and `score` of the likeliest class;
            `scores`, probabilities by class, the likeliest first. Of several inputs, such lists.

        Raises:
            FileNotFoundError: no such file.
            ImportError: Pillow or PyAV is needed and not installed.
            ValueError: no image and no video, damaged or refused ones, times that do not rise.
        """
        if isinstance(inputs, list | tuple):
            if not inputs:
                raise ValueError("there are no frames")
            # transformers takes a list for several inputs, and a tuple for one.
            inputs = tuple(inputs) if any(is_frame(one) for one in inputs) else list(inputs)
        return super().__call__(inputs, *args, workers=num_workers, frames_at_once=batch_size, **kwargs)

    def _sanitize_parameters(  # type: ignore[override]
        self,
        frame_rate: float | None = None,
        frame_times: Sequence[float] | None = None,
        max_frames: int | None = None,
        max_pixels: int | None = None,
        frames_at_once: int | None = None,
        workers: int = 0,
        top_k: int | None = None,
        smooth: bool | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if workers:
            raise ValueError(
                f"num_workers must be 0, got {workers}: frames are read as the model asks for them"
            )
        if frame_rate is not None and frame_times is not None:
            raise ValueError("pass either frame_rate or frame_times")
        for name, value in {"frame_rate": frame_rate, "top_k": top_k, "batch_size": frames_at_once}.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        timing: dict[str, Any] = {"frame_rate": frame_rate, "frame_times": frame_times}
        limits = {"max_frames": max_frames, "max_pixels": max_pixels}
        # A rate in a call takes the place of times from the start, and the other way round.
        reading = (timing if frame_rate is not None or frame_times is not None else {}) | given(limits)
        return reading, given({"batch_size": frames_at_once}), given({"top_k": top_k, "smooth": smooth})

    def preprocess(  # type: ignore[override]
        self,
        inputs: Any,
        frame_rate: float | None = None,
        frame_times: Sequence[float] | None = None,
        max_frames: int | None = None,
        max_pixels: int | None = None,
    ) -> dict[str, Any]:
        """Frames as the model takes them, each read when it is asked for, and their times."""
        name = input_name(inputs)
        process: Any = self.image_processor

        def frames() -> Iterator[Frame]:
            number = -1
            for number, (image, time) in enumerate(read_frames(inputs, max_pixels)):
                if max_frames is not None and number >= max_frames:
                    raise ValueError(f"{name} has more than {max_frames:,} frames: cut it into parts")
                if frame_rate is not None:
                    time = number / frame_rate
                elif frame_times is not None:
                    time = float(frame_times[number]) if number < len(frame_times) else None
                like = {"input_data_format": "channels_last"} if is_pixels(image, 3) else {}
                yield process(image, return_tensors="pt", **like)["pixel_values"], time
            if number < 0:
                raise ValueError(f"{name} has no frames")
            if frame_times is not None and len(frame_times) != number + 1:
                raise ValueError(f"{name} has {number + 1} frames, but frame_times has {len(frame_times)}")

        return {"frames": frames()}

    def _forward(self, model_inputs: dict[str, Any], batch_size: int = BATCH) -> dict[str, Any]:  # type: ignore[override]
        """Logits `(T, C)` of the frames, their times and positions."""
        model: Any = self.model
        found, times = [], []
        for batch in batches(model_inputs["frames"], batch_size):
            pixels = torch.cat([pixels for pixels, _ in batch]).to(self.device, model.dtype)
            times += [time for _, time in batch]
            if self.is_video:  # in the precision that temporal heads learn from
                found.append(model.fer(pixel_values=pixels).pooler_output.half().cpu())
            else:
                found.append(model(pixel_values=pixels).logits.float().cpu())
        logits, positions = torch.cat(found), torch.arange(len(times), dtype=torch.float64)
        if self.is_video:
            positions = positions_of(times, model.config.frame_rate)
            logits = frame_logits(model, logits, positions)
        if not logits.isfinite().all():
            raise ValueError(
                "the model's output is not finite: its weights are damaged, or training diverged"
            )
        return {"logits": logits, "times": times, "positions": positions}

    def postprocess(  # type: ignore[override]
        self, model_outputs: dict[str, Any], top_k: int | None = None, smooth: bool = True
    ) -> list[dict[str, Any]]:
        """One dict a frame; see `__call__`."""
        logits, model = model_outputs["logits"], self.model
        probabilities = logits.softmax(-1)
        if self.is_video and smooth:
            post: Any = model.postprocess
            probabilities = post(logits[None], positions=model_outputs["positions"][None])[0]
        names: Any = model.config.id2label
        count = min(top_k or len(names), len(names))
        values, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        rows = []
        for number, (time, best, order) in enumerate(
            zip(model_outputs["times"], values.tolist(), ids.tolist(), strict=True)
        ):
            scores = {names[i]: p for i, p in zip(order[:count], best[:count], strict=True)}
            label = names[order[0]]
            row = {"frame": number, "seconds": time, "label": label, "score": best[0], "scores": scores}
            rows.append(row)
        return rows


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


__all__ = ["TASK", "FacialExpressionPipeline"]
