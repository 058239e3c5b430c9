"""Temporal heads: frame features in, the same frames' features in the light of their neighbours out.

Every head works on packed frames: those that are present, in order, then whatever fills the row. What is
absent can therefore not matter, however much of it there is, and neither can the rest of a batch.

A position is the time of a frame in frames (seconds times the frame rate); frames may be missing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ROTARY_BASE = 1000.0  # the slowest wave turns once in some 6,000 frames
SLACK = 0.5  # frames: what rounding of times must not decide


@dataclass(frozen=True)
class StreamState:
    """What a causal head remembers of streams: constant in size, whatever they have seen.

    Attributes:
        past: per layer, tensors `(B, R, ...)` of the `R` frames before the next; the latest stand last.
        positions: `(B, R)` of those frames, float64.
        valid: `(B, R)`, False where there was no frame yet.
        last_position: `(B,)` of the latest frame, float64; -1 before the first.
    """

    past: tuple[tuple[torch.Tensor, ...], ...]
    positions: torch.Tensor
    valid: torch.Tensor
    last_position: torch.Tensor


def gather_frames(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Take frames `order` `(B, M)` of values `(B, N, ...)`."""
    return values.gather(
        1, order.reshape(*order.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
    )


def pack(valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Order `(B, N)` that brings valid frames to the front, each group in its order, and its inverse."""
    order = valid.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return order, order.argsort(dim=1)


def rotary_angles(positions: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine `(B, N, 1, 1, size / 2)` of rotary embeddings (Su et al., "RoFormer", 2021, eq. 15).

    In float64 up to the angle: after an hour of video, float32 would blur what lies between two frames.
    """
    steps = torch.arange(size // 2, device=positions.device, dtype=torch.float64) / (size // 2)
    angles = positions.to(torch.float64)[..., None, None, None] * ROTARY_BASE**-steps
    return angles.cos().float(), angles.sin().float()


def rotate(values: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn pairs of features `(B, N, parts, heads, size)` by their frame's angles."""
    cos, sin = (a.to(values.dtype) for a in angles)
    first, second = values.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def beside(values: torch.Tensor, size: int, before: int, after: int) -> torch.Tensor:
    """Cut frames `(B, N, ...)` into blocks with the blocks beside them: `(B, N / size, keys, ...)`."""
    padding = [0, 0] * (values.ndim - 2) + [before * size, after * size]
    padded = nn.functional.pad(values, padding)
    count = values.shape[1] // size
    parts = [
        padded[:, i * size : (i + count) * size].unflatten(1, (count, size))
        for i in range(before + 1 + after)
    ]
    return torch.cat(parts, dim=2)


class TemporalLayer(nn.Module):
    """Attention over near frames, then two linear layers; both behind a norm and around a shortcut."""

    def __init__(self, width: int, heads: int, window: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.window, self.causal = heads, window, causal
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_up = nn.Linear(width, 4 * width)
        self.mlp_down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def project(self, hidden: torch.Tensor, angles: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `(B, N, heads, size)`, the first two turned to their positions."""
        found = self.query_key_value(self.attention_norm(hidden)).unflatten(-1, (3, self.heads, -1))
        turning, value = found.split((2, 1), dim=2)
        query, key = rotate(turning, angles).unbind(dim=2)  # at once, since streams pay for every call
        return query, key, value.squeeze(2)

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What stands behind attention, whose result is `(B, N, heads, size)`."""
        hidden = hidden + self.dropout(self.attention_output(attended.flatten(-2)))
        grown = nn.functional.gelu(self.mlp_up(self.mlp_norm(hidden)))
        return hidden + self.dropout(self.mlp_down(grown))

    def forward(self, hidden: torch.Tensor, angles: Any, bias: torch.Tensor, size: int) -> torch.Tensor:
        """Packed frames `(B, N, width)` in blocks of `size`; `bias` of their keys is that of `as_bias`."""
        query, key, value = self.project(hidden, angles)
        neighbours = (0, 0) if bias.shape[-1] == size else (1, int(not self.causal))
        query, key, value = (
            beside(part, size, *around).flatten(0, 1).transpose(1, 2)
            for part, around in ((query, (0, 0)), (key, neighbours), (value, neighbours))
        )
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias.flatten(0, 1)[:, None]
        )
        attended = attended.transpose(1, 2).unflatten(0, (len(hidden), -1)).flatten(1, 2)
        return self.finish(hidden, attended)

    def extend(
        self, hidden: torch.Tensor, angles: Any, bias: torch.Tensor, past: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Frames that follow those of `past` (keys and values); returns them, and keys and values of all."""
        query, *new = self.project(hidden, angles)
        both = tuple(torch.cat([old.to(n.dtype), n], dim=1) for old, n in zip(past, new, strict=True))
        key, value = (part.transpose(1, 2) for part in both)
        attended = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key, value, attn_mask=bias[:, None]
        )
        return self.finish(hidden, attended.transpose(1, 2)), both


class TemporalTransformer(nn.Module):
    """Transformer whose frames attend to those near them in time.

    A frame attends to the `window` present frames before it, and after it unless `causal`, as far as they lie
    within `window` frames of its position. Cost and memory grow linearly with the number of frames.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.width, self.heads = config.temporal_hidden_size, config.temporal_num_heads
        self.window, self.causal = config.temporal_window, config.temporal_causal
        self.reach = self.window  # frames that a stream remembers
        self.project = nn.Linear(config.feature_size, self.width)
        self.layers = nn.ModuleList(
            TemporalLayer(self.width, self.heads, self.window, self.causal, config.temporal_dropout)
            for _ in range(config.temporal_num_layers)
        )
        self.norm = nn.LayerNorm(self.width)

    @staticmethod
    def as_bias(allowed: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """What attention adds to its scores: 0 where `allowed`, else minus infinity; once for all layers."""
        return torch.where(allowed, like.new_zeros(()), -torch.inf)

    def near(self, gaps: torch.Tensor, ranks: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Which frames may be attended to, of a key's position and rank less the query's; itself always."""
        earliest, latest = -self.window, 0 if self.causal else self.window
        in_reach = (ranks >= earliest) & (ranks <= latest)
        return (in_reach & valid & (gaps.abs() <= self.window + SLACK)) | (ranks == 0)

    def forward(self, features: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Packed frames `(B, N, D)` to `(B, N, width)`; what is not `valid` `(B, N)` comes out arbitrary."""
        frames = features.shape[1]
        size = frames if frames <= 3 * self.window else self.window  # few frames make one block
        spare = -frames % size
        around = (0, 0) if size == frames else (1, int(not self.causal))
        features = nn.functional.pad(features, (0, 0, 0, spare))
        valid, positions = (nn.functional.pad(part, (0, spare)) for part in (valid, positions))
        ranks = torch.arange(-around[0] * size, (1 + around[1]) * size, device=features.device)
        ranks = ranks - torch.arange(size, device=features.device)[:, None]
        gaps = beside(positions, size, *around)[:, :, None] - positions.unflatten(1, (-1, size))[..., None]
        allowed = self.near(gaps, ranks, beside(valid, size, *around)[:, :, None])
        angles = rotary_angles(positions, self.width // self.heads)
        hidden = self.project(features)
        bias = self.as_bias(allowed, hidden)
        for layer in self.layers:
            hidden = layer(hidden, angles, bias, size)
        return self.norm(hidden)[:, :frames]

    def start(self, batch: int, like: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Remembered keys and values before the first frame."""
        shape = (batch, self.reach, self.heads, self.width // self.heads)
        return tuple((like.new_zeros(shape), like.new_zeros(shape)) for _ in self.layers)

    def extend(
        self, features: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor, state: StreamState
    ) -> tuple[torch.Tensor, tuple[tuple[torch.Tensor, ...], ...]]:
        """Packed frames `(B, n, D)` that follow, to `(B, n, width)` and what is remembered of all frames."""
        new = features.shape[1]
        ranks = torch.arange(-self.reach, new, device=features.device)
        ranks = ranks - torch.arange(new, device=features.device)[:, None]
        all_positions = torch.cat([state.positions, positions], dim=1)
        gaps = all_positions[:, None] - positions[:, :, None]
        allowed = self.near(gaps, ranks, torch.cat([state.valid, valid], dim=1)[:, None])
        angles = rotary_angles(positions, self.width // self.heads)
        hidden, remembered = self.project(features), []
        bias = self.as_bias(allowed, hidden)
        for layer, past in zip(self.layers, state.past, strict=True):
            hidden, both = layer.extend(hidden, angles, bias, past)  # type: ignore[operator]
            remembered.append(both)
        return self.norm(hidden), tuple(remembered)


class ConvolutionLayer(nn.Module):
    """A dilated convolution over frames, then a linear layer, behind a norm and around a shortcut."""

    kernel = 3

    def __init__(self, width: int, dilation: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.causal, self.reach = causal, (self.kernel - 1) * dilation
        self.norm = nn.LayerNorm(width)
        self.convolution = nn.Conv1d(width, width, self.kernel, dilation=dilation)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def finish(self, hidden: torch.Tensor, around: torch.Tensor) -> torch.Tensor:
        """Convolve frames with what lies around them, `reach` frames more than `hidden` has."""
        found = nn.functional.gelu(self.convolution(around.transpose(1, 2)).transpose(1, 2))
        return hidden + self.dropout(self.output(found))

    def forward(self, hidden: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Packed frames `(B, N, width)`; beyond the first and last valid one lie zeros."""
        normed = self.norm(hidden) * valid[..., None]
        before = self.reach if self.causal else self.reach // 2
        return self.finish(hidden, nn.functional.pad(normed, (0, 0, before, self.reach - before)))

    def extend(
        self, hidden: torch.Tensor, valid: torch.Tensor, past: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames that follow those of `past`; returns them, and what was convolved of all."""
        both = torch.cat([past, self.norm(hidden) * valid[..., None]], dim=1)
        return self.finish(hidden, both[:, -self.reach - hidden.shape[1] :]), both


class TemporalConvolution(nn.Module):
    """Residual convolutions over frames, dilations 1, 2, 4, ... (Bai et al., "TCN", 2018).

    Frames count as evenly spaced: what is missing between two of them is not seen.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.width, self.causal = config.temporal_hidden_size, config.temporal_causal
        self.project = nn.Linear(config.feature_size, self.width)
        self.layers = nn.ModuleList(
            ConvolutionLayer(self.width, 2**i, self.causal, config.temporal_dropout)
            for i in range(config.temporal_num_layers)
        )
        self.reach = (ConvolutionLayer.kernel - 1) * 2 ** (len(self.layers) - 1)  # of the last, the widest
        self.norm = nn.LayerNorm(self.width)

    def forward(self, features: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Packed frames `(B, N, D)` to `(B, N, width)`; what is not `valid` `(B, N)` comes out arbitrary."""
        hidden = self.project(features)
        for layer in self.layers:
            hidden = layer(hidden, valid)
        return self.norm(hidden)

    def start(self, batch: int, like: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Remembered inputs before the first frame."""
        return tuple((like.new_zeros((batch, self.reach, self.width)),) for _ in self.layers)

    def extend(
        self, features: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor, state: StreamState
    ) -> tuple[torch.Tensor, tuple[tuple[torch.Tensor, ...], ...]]:
        """Packed frames `(B, n, D)` that follow, to `(B, n, width)` and what is remembered of all frames."""
        hidden, remembered = self.project(features), []
        for layer, (past,) in zip(self.layers, state.past, strict=True):
            hidden, both = layer.extend(hidden, valid, past)  # type: ignore[operator]
            remembered.append((both,))
        return self.norm(hidden), tuple(remembered)


class PerFrame(nn.Module):
    """No temporal head: every frame for itself."""

    reach = 0

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.width = config.feature_size

    def forward(self, features: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Frames as they are."""
        return features

    def start(self, batch: int, like: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Nothing is remembered."""
        return ()

    def extend(
        self, features: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor, state: StreamState
    ) -> tuple[torch.Tensor, tuple[tuple[torch.Tensor, ...], ...]]:
        """Frames as they are."""
        return features, ()


TEMPORAL_HEADS = {"transformer": TemporalTransformer, "convolution": TemporalConvolution, "none": PerFrame}


class TemporalEncoder(nn.Module):
    """A temporal head of a configuration, for frames of which some are absent, whole or as a stream.

    Args:
        config: a `FerConfig`; its `temporal_*` fields choose the head and its size.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head: Any = TEMPORAL_HEADS[config.temporal_head](config)

    def forward(self, features: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Frames in the light of their neighbours.

        Args:
            features: `(B, T, D)`.
            mask: `(B, T)` bool, True where there is a frame.
            positions: `(B, T)` in frames, rising along the frames that there are.

        Returns:
            `(B, T, width)`, 0 where there is no frame.
        """
        order, inverse = pack(mask)
        # What is absent may be anything, and even 0 times NaN would spread.
        features, positions = features.masked_fill(~mask[..., None], 0), positions.masked_fill(~mask, 0)
        packed = (gather_frames(part, order) for part in (features, mask, positions))
        return gather_frames(self.head(*packed), inverse) * mask[..., None]

    def start(self, batch: int, like: torch.Tensor) -> StreamState:
        """State of `batch` streams before their first frame, of the device and type of `like`."""
        shape = (batch, self.head.reach)
        return StreamState(
            self.head.start(batch, like),
            torch.zeros(shape, dtype=torch.float64, device=like.device),
            torch.zeros(shape, dtype=torch.bool, device=like.device),
            torch.full((batch,), -1.0, dtype=torch.float64, device=like.device),
        )

    def extend(
        self,
        features: torch.Tensor,
        state: StreamState,
        positions: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, StreamState]:
        """The next frames of streams, equal to what `forward` says of all frames so far.

        Args:
            features: `(B, n, D)`.
            state: what `start` or the last call returned.
            positions: `(B, n)` in frames, rising.
            mask: `(B, n)` bool, True where there is a frame; None: everywhere.

        Returns:
            `(B, n, width)`, 0 where there is no frame, and the state for the next call.
        """
        reach = self.head.reach
        if mask is None:
            last_position = positions[:, -1]
            valid = torch.ones(positions.shape, dtype=torch.bool, device=features.device)
            found, remembered = self.head.extend(features, valid, positions, state)
        else:
            last_position = positions.masked_fill(~mask, -torch.inf).amax(dim=1)
            last_position = torch.where(mask.any(dim=1), last_position, state.last_position)
            order, inverse = pack(mask)
            features, positions = features.masked_fill(~mask[..., None], 0), positions.masked_fill(~mask, 0)
            features, valid, positions = (gather_frames(part, order) for part in (features, mask, positions))
            found, remembered = self.head.extend(features, valid, positions, state)
            found = gather_frames(found, inverse) * mask[..., None]
        positions, valid = torch.cat([state.positions, positions], 1), torch.cat([state.valid, valid], 1)

        def latest(values: torch.Tensor) -> torch.Tensor:
            if mask is None:
                return values[:, values.shape[1] - reach :]
            return gather_frames(values, keep)

        if mask is not None:  # the valid ones last, then the last of them
            keep = valid.to(torch.uint8).argsort(dim=1, stable=True)[:, valid.shape[1] - reach :]
        past = tuple(tuple(map(latest, layer)) for layer in remembered)
        return found, StreamState(past, latest(positions), latest(valid), last_position)


__all__ = ["TEMPORAL_HEADS", "StreamState", "TemporalEncoder"]
