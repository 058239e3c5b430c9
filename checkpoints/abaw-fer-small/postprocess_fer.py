"""Logits of a video's frames to probabilities: temperature, smoothing over time, per-class bias.

Every entry point does this here and nowhere else. The settings are fitted inside training folds
(`modeling_fer.evaluation.tuning`) and travel in the checkpoint's configuration, this file beside it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

CELLS_AT_ONCE = 4_000_000  # float32 of one block of windows (16 MB): bounds memory for videos of any length

# (B, n, C, K) probabilities of the K frames around each of n, (B, n, K) distances in frames, (B, n, K) which
# of the K count, half-width -> (B, n, C), up to a factor for each frame.
Smoothing = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def box(windows: torch.Tensor, distance: torch.Tensor, counts: torch.Tensor, half_width: int) -> torch.Tensor:
    """Sum of the counting neighbours."""
    return (windows * counts[:, :, None]).sum(-1)


def gaussian(
    windows: torch.Tensor, distance: torch.Tensor, counts: torch.Tensor, half_width: int
) -> torch.Tensor:
    """Sum of the counting neighbours, weighted by a normal density with sigma = half_width / 2."""
    weights = torch.exp(-2 * (distance / half_width) ** 2) * counts
    return (windows * weights.float()[:, :, None]).sum(-1)


def median(
    windows: torch.Tensor, distance: torch.Tensor, counts: torch.Tensor, half_width: int
) -> torch.Tensor:
    """Median of the counting neighbours, class by class; of an even number the lower of the middle two."""
    return windows.masked_fill(~counts[:, :, None], torch.nan).nanmedian(-1).values


SMOOTHINGS: dict[str, Smoothing | None] = {"none": None, "box": box, "gaussian": gaussian, "median": median}


@dataclasses.dataclass(frozen=True)
class StreamState:
    """What a stream remembers: the latest `half_width` present frames of each of its B videos.

    `probabilities` (B, H, C), `positions` (B, H), `present` (B, H): False where there was no frame yet;
    `seen`: frames so far, absent ones included.
    """

    probabilities: torch.Tensor
    positions: torch.Tensor
    present: torch.Tensor
    seen: int


@dataclasses.dataclass(frozen=True)
class PostProcess:
    """What happens to logits: temperature, then smoothing over time, then the per-class bias.

    `p = softmax(logits / temperature)`; p is smoothed; the result is `softmax(log p + bias)`.

    A frame's neighbours are the `half_width` present frames to each side of it, as far as they also lie
    within `half_width` (and a half) frames in time: absent frames change nothing, and nothing is smoothed
    across gaps. The frame itself always counts; at the ends of a video there are fewer neighbours.

    Args:
        smoothing: a name in `SMOOTHINGS`. After it, probabilities are scaled to sum to 1 again.
        half_width: frames to each side; with `causal`, frames back. 0: no smoothing.
        temperature: divides the logits; above 1 makes probabilities less sure (Guo et al. 2017, arXiv
            1706.04599, section 4.2).
        bias: added to the log-probability of each class, or None.
        causal: frames that come later change nothing, as a stream needs it.

    Raises:
        ValueError: an unknown smoothing or a value out of its range.
    """

    smoothing: str = "none"
    half_width: int = 0
    temperature: float = 1.0
    bias: tuple[float, ...] | None = None
    causal: bool = False

    def __post_init__(self) -> None:
        if self.smoothing not in SMOOTHINGS:
            raise ValueError(f"smoothing must be one of {', '.join(SMOOTHINGS)}, got {self.smoothing!r}")
        if type(self.half_width) is not int or self.half_width < 0:
            raise ValueError(f"half_width must be a whole number from 0 up, got {self.half_width!r}")
        if not _is_number(self.temperature) or self.temperature <= 0:
            raise ValueError(f"temperature must be a number above 0, got {self.temperature!r}")
        if self.bias is not None and not (isinstance(self.bias, tuple) and all(map(_is_number, self.bias))):
            raise ValueError(f"bias must be None or a tuple of one number a class, got {self.bias!r}")
        if not isinstance(self.causal, bool):
            raise ValueError(f"causal must be true or false, got {self.causal!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PostProcess":
        """Build from plain values, as `to_dict` gives them and a configuration holds them.

        Raises:
            ValueError: an unknown key, or a value that its field does not take.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [str(key) for key in values if key not in known]:
            raise ValueError(f"post-processing knows {', '.join(known)}; got {', '.join(unknown)}")
        bias = values.get("bias")
        return cls(**{**values, "bias": tuple(bias) if isinstance(bias, list) else bias})

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, ready for JSON."""
        return {**dataclasses.asdict(self), "bias": None if self.bias is None else list(self.bias)}

    @torch.no_grad()
    def __call__(
        self, logits: torch.Tensor, mask: torch.Tensor | None = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Post-process whole videos, in float32.

        Args:
            logits: `(B, T, C)`, of any values where a frame is absent.
            mask: `(B, T)` bool, True where there is a frame. None: everywhere.
            positions: `(B, T)` times in frames, rising along T. None: 0 to T - 1.

        Returns:
            Probabilities `(B, T, C)`; those of absent frames are 0.

        Raises:
            ValueError: shapes or types do not fit.
        """
        probabilities, mask, positions = self._inputs(logits, mask, positions, first=0)
        return self._finish(self._smooth(probabilities, mask, positions), mask)

    def init_stream(
        self, batch_size: int, num_classes: int, device: torch.device | str = "cpu"
    ) -> StreamState:
        """The state of B streams before their first frame.

        Raises:
            ValueError: the settings are not causal.
        """
        self._check_causal()
        kept = self.half_width if SMOOTHINGS[self.smoothing] else 0
        return StreamState(
            probabilities=torch.zeros(batch_size, kept, num_classes, device=device),
            positions=torch.zeros(batch_size, kept, dtype=torch.float64, device=device),
            present=torch.zeros(batch_size, kept, dtype=torch.bool, device=device),
            seen=0,
        )

    @torch.no_grad()
    def step(
        self,
        logits: torch.Tensor,
        state: StreamState,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, StreamState]:
        """Post-process the next frames of streams; the same as the whole videos at once would give.

        Args:
            logits: the next frame of each stream `(B, C)`, or the next n `(B, n, C)`.
            state: from `init_stream` or the last step; it is left as it is.
            positions: `(B,)` or `(B, n)` times in frames. None: frames are counted from 0.
            mask: `(B,)` or `(B, n)` bool, True where there is a frame. None: everywhere.

        Returns:
            Probabilities of the shape of `logits`, and the state for the next step.

        Raises:
            ValueError: the settings are not causal, or shapes or types do not fit.
        """
        self._check_causal()
        one = logits.dim() == 2
        if one:
            logits = logits[:, None]
            positions = None if positions is None else positions[:, None]
            mask = None if mask is None else mask[:, None]
        new, mask, positions = self._inputs(logits, mask, positions, first=state.seen)
        kept = state.present.shape[1]
        if new[:, :0].shape != state.probabilities[:, :0].shape:
            raise ValueError(
                f"the stream began with {len(state.present)} videos and {state.probabilities.shape[2]} "
                f"classes, got logits of shape {tuple(logits.shape)}"
            )
        probabilities = torch.cat([state.probabilities, new], 1)
        present = torch.cat([state.present, mask], 1)
        positions = torch.cat([state.positions, positions], 1)
        found = self._finish(self._smooth(probabilities, present, positions)[:, kept:], mask)
        # Absent frames first: what is kept are the latest present ones.
        latest = present.to(torch.int8).argsort(dim=1, stable=True)[:, present.shape[1] - kept :]
        state = StreamState(
            probabilities=_take(probabilities, latest),
            positions=positions.gather(1, latest),
            present=present.gather(1, latest),
            seen=state.seen + logits.shape[1],
        )
        return found[:, 0] if one else found, state

    def _check_causal(self) -> None:
        if not self.causal:
            raise ValueError(
                "this post-processing looks ahead and cannot follow a stream: fit it with causal=True"
            )

    def _inputs(
        self, logits: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None, first: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Probabilities at the temperature, mask and positions, checked; absent frames hold 0."""
        if logits.dim() != 3:
            raise ValueError(f"logits must be (B, T, C), got shape {tuple(logits.shape)}")
        if self.bias is not None and len(self.bias) != logits.shape[2]:
            raise ValueError(f"the bias is for {len(self.bias)} classes, the logits have {logits.shape[2]}")
        shape = logits.shape[:2]
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=logits.device)
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be bool of shape {tuple(shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        if positions is None:
            frames = torch.arange(first, first + shape[1], dtype=torch.float64, device=logits.device)
            positions = frames.expand(shape)
        if positions.shape != shape:
            raise ValueError(f"positions must have shape {tuple(shape)}, got {tuple(positions.shape)}")
        probabilities = (logits.float() / self.temperature).softmax(-1)
        absent = ~mask
        return (
            probabilities.masked_fill(absent[..., None], 0),
            mask,
            positions.double().masked_fill(absent, 0),
        )

    def _smooth(
        self, probabilities: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Smooth over time, block by block."""
        smoothing = SMOOTHINGS[self.smoothing]
        if smoothing is None or self.half_width == 0:
            return probabilities
        batch, length, classes = probabilities.shape
        # Present frames first, in their order: then neighbours are next to each other.
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        back, ahead = self.half_width, 0 if self.causal else self.half_width
        width = back + 1 + ahead
        values = F.pad(_take(probabilities, order), (0, 0, back, ahead))
        times = F.pad(positions.gather(1, order), (back, ahead))
        present = F.pad(mask.gather(1, order), (back, ahead))
        packed = torch.empty_like(probabilities)
        block = max(1, CELLS_AT_ONCE // max(1, batch * classes * width))
        for start in range(0, length, block):
            stop = min(start + block, length)
            windows, near, there = (
                tensor[:, start : stop + width - 1].unfold(1, width, 1) for tensor in (values, times, present)
            )
            distance = (near - times[:, start + back : stop + back, None]).abs()
            counts = there & (distance <= self.half_width + 0.5)
            packed[:, start:stop] = smoothing(windows, distance, counts, self.half_width)
        # Medians of every class can be 0 at once: such classes then share equally.
        packed = packed.clamp(min=torch.finfo(packed.dtype).tiny)
        packed = packed / packed.sum(-1, keepdim=True)
        return torch.empty_like(packed).scatter_(1, order[..., None].expand_as(packed), packed)

    def _finish(self, probabilities: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Add the bias; absent frames hold 0."""
        if self.bias is not None:
            log = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()
            probabilities = (log + log.new_tensor(self.bias)).softmax(-1)
        return probabilities.masked_fill(~mask[..., None], 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index` (B, M) of `values` (B, T, C): (B, M, C)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))
