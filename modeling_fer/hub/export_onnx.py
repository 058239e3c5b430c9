"""Models as ONNX graphs: stills, frame features, and the temporal head for any number of frames."""

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim

from modeling_fer.temporal_fer import TemporalTransformer, gather_frames, rotary_angles

NEEDED = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18  # has LayerNormalization; runtimes of 2023 and later, in browsers as well, know it
QUANTIZED = ("MatMul", "Gemm")  # where the weights are; the patch convolution stays as it is


def require_onnx() -> None:
    """Look for what ONNX export needs.

    Raises:
        ValueError: something is not installed.
    """
    if missing := [name for name in NEEDED if not importable(name)]:
        raise ValueError(f'ONNX export needs {", ".join(missing)}: pip install "abaw-fer[export]"')


def importable(name: str) -> bool:
    """Whether a module is installed, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # its import is forbidden: `sys.modules[name]` is None
        return False


class StillGraph(nn.Module):
    """Pixels `(B, 3, H, W)` to logits `(B, C)`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Classify faces."""
        return self.model(pixel_values=pixel_values).logits


class FeatureGraph(nn.Module):
    """Pixels `(B, 3, H, W)` of frames to features `(B, D)`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.fer = model.fer

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode frames."""
        return self.fer(pixel_values=pixel_values).pooler_output


class TemporalGraph(nn.Module):
    """Frame features to frame logits, as `FerForVideoClassification` computes them, in a graph of one shape.

    ONNX has no stable sort of bools: frames are brought to the front by counting. And a graph cannot choose
    its layout by the number of frames: the transformer attends over one block of all frames, whose time and
    memory (heads x frames^2 x 4 bytes) grow with the square of their number; which frames see each other is
    the same. In windows of `num_frames`, which it is for, one block is faster than several would be.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.head, self.classifier = model.temporal.head, model.classifier
        self.frame_rate = model.config.frame_rate

    def forward(
        self, frame_features: torch.Tensor, frame_mask: torch.Tensor, frame_times: torch.Tensor
    ) -> torch.Tensor:
        """Logits `(B, T, C)` of features `(B, T, D)`, mask (bool) and times (seconds, float64) `(B, T)`."""
        positions = (frame_times * self.frame_rate).masked_fill(~frame_mask, 0)
        features = frame_features.masked_fill(~frame_mask[..., None], 0)
        present = frame_mask.long()
        count = present.sum(dim=1, keepdim=True)
        place = torch.where(frame_mask, present.cumsum(dim=1), count + (1 - present).cumsum(dim=1)) - 1
        valid = torch.arange(frame_mask.shape[1])[None] < count
        features = torch.zeros_like(features).scatter(1, place[..., None].expand_as(features), features)
        positions = torch.zeros_like(positions).scatter(1, place, positions)
        whole = self.attend if isinstance(self.head, TemporalTransformer) else self.head
        hidden = gather_frames(whole(features, valid, positions), place)
        return self.classifier(hidden) * frame_mask[..., None]

    def attend(self, features: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`TemporalTransformer.forward` in one block."""
        head: Any = self.head
        numbers = torch.arange(features.shape[1])
        gaps = positions[:, None] - positions[..., None]
        allowed = head.near(gaps, numbers - numbers[:, None], valid[:, None])[:, None]
        angles = rotary_angles(positions, head.width // head.heads)
        hidden = head.project(features)
        bias = head.as_bias(allowed, hidden)
        for layer in head.layers:
            query, key, value = (part.transpose(1, 2) for part in layer.project(hidden, angles))
            found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
            hidden = layer.finish(hidden, found.transpose(1, 2))
        return head.norm(hidden)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep to itself what exporters say to their own developers; errors are raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def write_graph(
    graph: nn.Module, examples: Mapping[str, torch.Tensor], axes: str, out: str, path: Path
) -> None:
    """Write a module as ONNX.

    Args:
        graph: to export, in evaluation mode.
        examples: inputs by name, each dynamic size 2 or more.
        axes: names of the first sizes of every input, which may vary: `batch`, or `batch frames`.
        out: name of the output.
        path: file to write.
    """
    dims = {number: Dim(name) for number, name in enumerate(axes.split())}
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet():
        program: Any = torch.onnx.export(
            graph.eval(),
            tuple(examples.values()),
            input_names=list(examples),
            output_names=[out],
            dynamic_shapes=tuple(dims for _ in examples),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        program.save(path)


def export_stills(model: Any, path: Path) -> None:
    """Write a classifier of stills: `pixel_values` to `logits`, for batches of any size."""
    side = model.config.image_size
    write_graph(StillGraph(model), {"pixel_values": torch.zeros(2, 3, side, side)}, "batch", "logits", path)


def export_features(model: Any, path: Path) -> None:
    """Write the first part of a model of videos: `pixel_values` of frames to `features`."""
    side = model.config.image_size
    write_graph(
        FeatureGraph(model), {"pixel_values": torch.zeros(2, 3, side, side)}, "batch", "features", path
    )


def export_temporal(model: Any, path: Path) -> None:
    """Write the second part: `frame_features`, `frame_mask`, `frame_times` to `frame_logits`."""
    shape = (2, 5)
    examples = {
        "frame_features": torch.zeros(*shape, model.config.feature_size),
        "frame_mask": torch.ones(shape, dtype=torch.bool),
        "frame_times": torch.arange(shape[1], dtype=torch.float64).expand(shape).contiguous(),
    }
    write_graph(TemporalGraph(model), examples, "batch frames", "frame_logits", path)


def quantize(path: Path, out: Path) -> None:
    """Write a graph whose matrices are int8, scaled by output; activations are scaled as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(
            path, out, op_types_to_quantize=list(QUANTIZED), per_channel=True, weight_type=QuantType.QInt8
        )


def open_graph(path: Path, threads: int = 0) -> Any:
    """An onnxruntime session on the CPU; `threads` 0: as many as onnxruntime likes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check_graph(path: Path) -> None:
    """Raise a ValueError unless onnxruntime can open a graph."""
    try:
        open_graph(path, 1)
    except Exception as error:  # its errors have no class of their own in common
        raise ValueError(f"{path.name} is damaged: {error}; export it again") from error


def run_graph(session: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """The graph's one output."""
    found: list[np.ndarray] = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(found[0])
