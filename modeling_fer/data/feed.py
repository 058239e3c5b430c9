"""Streams of batches without end: a labelled one, and beside it perhaps an unlabelled one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from modeling_fer.data.dataset import as_batch, class_translation
from modeling_fer.data.sampling import DebiasFeedbackSampler
from modeling_fer.data.stream import FaceStream

Batch = dict[str, torch.Tensor]


@dataclass
class Pool:
    """Faces that can be fetched by number, in the order of a sampler, which keeps the place."""

    dataset: Dataset
    sampler: DebiasFeedbackSampler

    def batches(self, microbatches: int = 1) -> Iterator[Batch]:
        """This process's batches from where the sampler stands, each a `microbatches`-th of its share."""
        size = self.sampler.batch_size // self.sampler.world_size // microbatches
        loader: DataLoader = DataLoader(
            self.dataset,
            size,
            sampler=self.sampler,
            collate_fn=as_batch,
            pin_memory=torch.cuda.is_available(),
        )
        while True:
            yield from loader

    def advance(self) -> bool:
        """Note that one global batch was used; True if that ended a round."""
        return self.sampler.advance()

    def state_dict(self) -> dict[str, Any]:
        """The sampler's."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved place."""
        self.sampler.load_state_dict(state)


class Streamed:
    """Unlabelled faces read as they come, see `FaceStream`, which keeps the place by what was used.

    Args:
        source: shards to read, see `FaceStream`.
        size: side of the images in pixels.
        batch_size: examples of one global batch.
        seed: of the order of shards.
        rank, world_size: this process and how many there are.
        classes: names of the model's classes; hidden labels are translated to their order.
    """

    def __init__(
        self,
        source: str,
        size: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        classes: Sequence[str],
    ) -> None:
        self.options = (source, size, batch_size, seed, rank, world_size)
        self.translate = class_translation(classes)
        self.stream: FaceStream | None = None
        self.start: dict[str, Any] | None = None

    def batches(self, microbatches: int = 1) -> Iterator[Batch]:
        """This process's batches from the saved place, each a `microbatches`-th of its share."""
        source, size, batch_size, *rest = self.options
        self.stream = FaceStream(source, size, batch_size // microbatches, *rest)
        if self.start is not None:
            self.stream.load_state_dict(self.start)
        for batch in self.stream:
            yield {**batch, "labels": self.translate[batch["labels"]]}

    def advance(self) -> bool:
        """The stream itself notes what was used."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch."""
        return self.stream.state_dict() if self.stream is not None else self.start or {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start from a saved place."""
        self.start = state or None


def joined(
    labelled: Pool, unlabelled: Pool | Streamed | None, microbatches: int, device: torch.device
) -> Iterator[Batch]:
    """Batches on the device; what is unlabelled has names that start with `unlabelled_`."""
    both = [("", labelled.batches(microbatches))]
    if unlabelled is not None:
        both.append(("unlabelled_", unlabelled.batches(microbatches)))
    while True:
        yield {
            prefix + name: values.to(device, non_blocking=True)
            for prefix, batches in both
            for name, values in next(batches).items()
        }
