"""The labelled sampler: balanced over classes, weighted by feedback, the same for any number of processes."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler


def class_quotas(probabilities: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers `(C,)` that sum to `total`, each within one of `probabilities * total`."""
    exact = probabilities * total
    quotas = np.floor(exact).astype(np.int64)
    # The largest remainders are rounded up; stable, so that equal ones go to the lower class id everywhere.
    largest = np.argsort(-(exact - quotas), kind="stable")
    quotas[largest[: total - quotas.sum()]] += 1
    return quotas


def feedback_weights(shares: np.ndarray, recall: np.ndarray | None = None, bound: float = 3.0) -> np.ndarray:
    """Class weights `(C,)` with sum 1 that lean against the bias of pseudo-labels and against low recall.

    `w_c` is proportional to `shares_c ** -1/2`, times `recall_c ** -1/2` where recall is known, each with a
    floor of a hundredth, and no weight leaves `[1/bound, bound]` times uniform. The square root goes half of
    the way: unlabelled faces need not be uniform over classes.

    Args:
        shares: share of each class in the pseudo-labels, sum 1.
        recall: of each class on held-out labelled faces, 0 to 1.
        bound: at least 1, which gives uniform weights.

    Raises:
        ValueError: a bound below 1.
    """
    if not bound >= 1:
        raise ValueError(f"class weights need a bound of at least 1, got {bound}")
    wanted = np.maximum(np.asarray(shares, np.float64), 0.01) ** -0.5
    if recall is not None:
        wanted = wanted * np.maximum(np.asarray(recall, np.float64), 0.01) ** -0.5
    # One factor brings the clipped weights to a mean of 1: the mean grows with it, from 1/bound to bound.
    low, high = 1 / (bound * wanted.max()), bound / wanted.min()
    for _ in range(60):
        factor = np.sqrt(low * high)
        low, high = (factor, high) if np.clip(factor * wanted, 1 / bound, bound).mean() < 1 else (low, factor)
    weights = np.clip(high * wanted, 1 / bound, bound)
    return weights / weights.sum()


def _shuffled(members: np.ndarray, start: int, length: int, seed: list[int]) -> np.ndarray:
    """`length` members from place `start` of an endless stream of random permutations, `(length,)`."""
    if not length:
        return np.empty(0, np.int64)
    size = len(members)
    first, last = start // size, (start + length - 1) // size
    passes = [np.random.default_rng([*seed, i]).permutation(size) for i in range(first, last + 1)]
    return members[np.concatenate(passes)[start - first * size :][:length]]


class DebiasFeedbackSampler(Sampler[int]):
    """Indices of labelled examples, class by class in wanted proportions, cut by process.

    A class `c` of `n_c` examples is drawn with probability proportional to `n_c * n_c**-alpha * w_c`:
    `alpha=1` is uniform over classes, `alpha=0` natural. `w` are class weights, uniform until
    `set_class_weights` hands in others; they take effect when the next round (pass over the data) starts.
    Within a class, examples come in random order and none comes again until all have come, across rounds too
    while weights stay the same.

    The order of a round is a pure function of `(seed, epoch, w)`, whatever the number of processes: process
    `rank` takes every `world_size`-th index of each global batch. Classes get their exact share of each
    round (to the nearest example), so a natural round holds every example once when their number is a
    multiple of the batch size.

    Args:
        labels: class id of each example; ids that are negative are never drawn.
        num_classes: number of classes `C`.
        batch_size: examples of one global batch, over all processes and accumulation steps.
        alpha: 0 to 1, how far sampling is pulled from natural to uniform.
        seed: any non-negative integer.
        rank, world_size: this process and how many there are.
        round_batches: global batches of a round; 0: one pass over the data.
        groups: group of each example (its video, say). Those of a class then come by turns, an example each,
            so that a class is not drawn from its largest groups alone; a small group's come round sooner.

    Raises:
        ValueError: a class without examples, or a batch that does not divide by the processes.
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        num_classes: int,
        batch_size: int,
        alpha: float = 1.0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        round_batches: int = 0,
        groups: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"global batch size {batch_size} must be a positive multiple of the {world_size} processes"
            )
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie between 0 (natural) and 1 (uniform over classes), got {alpha}")
        labels = np.asarray(labels)
        self.size = len(labels)
        self.members = [np.flatnonzero(labels == c) for c in range(num_classes)]
        self.counts = np.array([len(m) for m in self.members])
        if empty := np.flatnonzero(self.counts == 0).tolist():
            raise ValueError(
                f"classes {empty} have no examples to draw; leave them out of the model or add data"
            )
        self.turns: list[list[np.ndarray]] | None = None
        if groups is not None:
            of = np.asarray(groups)
            self.turns = [[m[of[m] == g] for g in np.unique(of[m])] for m in self.members]
        self.data = hashlib.blake2b(labels.astype(np.int64).tobytes(), digest_size=8).hexdigest()
        self.batch_size, self.alpha, self.seed = batch_size, alpha, seed
        self.rank, self.world_size = rank, world_size
        self.class_weights = np.full(num_classes, 1 / num_classes)
        self.batches_per_pass = -(-int(self.counts.sum()) // batch_size)
        self.batches_per_epoch = round_batches or self.batches_per_pass
        self.epoch = 0
        self.batches_done = 0  # of this epoch; an interrupted epoch goes on from here

    def class_probabilities(self) -> np.ndarray:
        """Probability `(C,)` with which each class is drawn."""
        weights = self.counts ** (1.0 - self.alpha) * self.class_weights
        return weights / weights.sum()

    def example_probabilities(self) -> np.ndarray:
        """Probability `(N,)` with which each example is drawn in the long run; 0 for negative labels."""
        found = np.zeros(self.size)
        for c, share in enumerate(self.class_probabilities()):
            groups = [self.members[c]] if self.turns is None else self.turns[c]
            for group in groups:
                found[group] = share / len(groups) / len(group)
        return found

    def set_class_weights(self, weights: Sequence[float] | np.ndarray) -> None:
        """Hand in class weights `(C,)`, positive and finite, the same on every process, between rounds.

        Raises:
            ValueError: wrong length or values.
            RuntimeError: the current round has begun.
        """
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != self.class_weights.shape or not (
            np.isfinite(weights).all() and (weights > 0).all()
        ):
            raise ValueError(
                f"expected {len(self.class_weights)} positive finite class weights, got {weights}"
            )
        if self.batches_done:
            raise RuntimeError(
                f"class weights change between rounds, but {self.batches_done} batches of this one are done"
            )
        self.class_weights = weights / weights.sum()

    def global_order(self) -> np.ndarray:
        """All indices of the current round for all processes, `(batches_per_epoch * batch_size,)`."""
        quotas = class_quotas(self.class_probabilities(), self.batches_per_epoch * self.batch_size)
        classes = np.repeat(np.arange(len(quotas)), quotas)
        np.random.default_rng([self.seed, self.epoch]).shuffle(classes)
        order = np.empty(len(classes), np.int64)
        for c, quota in enumerate(quotas):
            order[classes == c] = self._stretch(c, self.epoch * int(quota), int(quota))
        return order

    def _stretch(self, c: int, start: int, length: int) -> np.ndarray:
        """Part of the endless stream of a class: one random permutation of its examples after another.

        Rounds of unchanged weights go on where the last stopped: no example comes again before all have. With
        groups it is a stream of groups, and each group's turns go through a stream of its examples.
        """
        if self.turns is None:
            return _shuffled(self.members[c], start, length, [self.seed, c])
        groups = self.turns[c]
        numbers = _shuffled(np.arange(len(groups)), start, length, [self.seed, c])
        order = np.empty(length, np.int64)
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number)
            # A group comes once in every pass over the groups: the pass says which of its turns this is.
            turn = (start + places) // len(groups)
            stream = _shuffled(
                groups[number], int(turn[0]), int(turn[-1] - turn[0]) + 1, [self.seed, c, int(number)]
            )
            order[places] = stream[turn - turn[0]]
        return order

    def __iter__(self) -> Iterator[int]:
        batches = self.global_order().reshape(-1, self.batch_size)[self.batches_done :]
        yield from batches[:, self.rank :: self.world_size].ravel().tolist()

    def __len__(self) -> int:
        return (self.batches_per_epoch - self.batches_done) * self.batch_size // self.world_size

    def advance(self) -> bool:
        """Note that one global batch was trained on; True if that ended the round and set up the next."""
        self.batches_done += 1
        if self.batches_done < self.batches_per_epoch:
            return False
        self.epoch, self.batches_done = self.epoch + 1, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Place in the data: which data, epoch, batches done in it, class weights."""
        return {
            "data": self.data,
            "epoch": self.epoch,
            "batches_done": self.batches_done,
            "class_weights": self.class_weights.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place that `state_dict` described.

        Raises:
            ValueError: the examples are not those of the saved run.
        """
        if state["data"] != self.data:
            raise ValueError("the labels of the data, or the features of its frames, have changed since")
        self.batches_done = 0
        self.set_class_weights(state["class_weights"])
        # As they were: to divide them by their sum once more could change their last bits, and so the order.
        self.class_weights = np.asarray(state["class_weights"], dtype=np.float64)
        self.epoch, self.batches_done = state["epoch"], state["batches_done"]
