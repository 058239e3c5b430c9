"""Which pseudo-labels count, and how much: rules from confidence to weight.

A rule is told each step's batch of all processes and never communicates, so that every process holds the same
state: float64 (int8 for what is remembered of each example), on the device of its input.
"""

import torch


class Rule:
    """What all rules share; by itself nothing is observed.

    Args:
        num_classes: C.
        threshold: confidence between 0 and 1, where the rule has one: fixed, upper or first.
        momentum: share of the old value in a running mean, from 0 to less than 1.
        memory: number of unlabelled examples, for rules that remember each.
    """

    def __init__(self, num_classes: int, threshold: float, momentum: float, memory: int) -> None:
        if num_classes < 2:
            raise ValueError(f"a threshold rule needs at least 2 classes, got {num_classes}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"the confidence threshold must lie between 0 and 1, got {threshold}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and less than 1, got {momentum}")
        self.num_classes, self.threshold = num_classes, threshold
        self.momentum, self.memory = momentum, memory
        self.state: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def observe(
        self,
        probabilities: torch.Tensor,
        index: torch.Tensor,
        labelled_probabilities: torch.Tensor,
        labels: torch.Tensor,
    ) -> None:
        """Take in one step's batch of all processes, before its `weights` are asked for.

        Args:
            probabilities: `(B, C)` of weak views of unlabelled faces, those that pseudo-labels come from.
            index: `(B,)` slot of each of them, from 0 to less than `memory`.
            labelled_probabilities: `(L, C)` of weak views of labelled faces.
            labels: `(L,)` their classes.

        Raises:
            ValueError: shapes do not fit, or a slot lies outside the memory.
        """
        for name, given, what in (
            ("probabilities", probabilities, index),
            ("labelled probabilities", labelled_probabilities, labels),
        ):
            if given.shape != (len(given), self.num_classes) or what.shape != given.shape[:1]:
                raise ValueError(
                    f"{name} must be (B, {self.num_classes}) with one index or label each, "
                    f"got shapes {tuple(given.shape)} and {tuple(what.shape)}"
                )
        if len(probabilities) == 0:
            raise ValueError("there are no unlabelled examples to observe; give at least one a step")
        self.state = {name: value.to(probabilities.device) for name, value in self.state.items()}
        self._unlabelled(probabilities, index.long())
        self._labelled(labelled_probabilities, labels)

    def _unlabelled(self, probabilities: torch.Tensor, index: torch.Tensor) -> None:
        """Change the state after the unlabelled part of a batch, checked."""

    def _labelled(self, probabilities: torch.Tensor, labels: torch.Tensor) -> None:
        """Change the state after the labelled part of a batch, checked."""

    def _average(self, name: str, new: torch.Tensor) -> None:
        """Move a running mean a step towards `new`."""
        self.state[name] = self.momentum * self.state[name] + (1 - self.momentum) * new

    @torch.no_grad()
    def weights(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Weight from 0 to 1 of each pseudo-label: `(B, C)` to float32 `(B,)`; reads the state only."""
        confidence, label = probabilities.max(1)
        return (confidence >= self.thresholds().to(confidence)[label]).float()

    def thresholds(self) -> torch.Tensor:
        """Confidence `(C,)`, float64, from which a pseudo-label of each class counts."""
        return torch.full((self.num_classes,), self.threshold, dtype=torch.float64)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A copy of the state, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.state.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a state.

        Raises:
            ValueError: the state is of another rule, another number of classes or of examples.
        """
        given = {name: tuple(value.shape) for name, value in state.items()}
        expected = {name: tuple(value.shape) for name, value in self.state.items()}
        if given != expected:
            raise ValueError(
                f"state of a threshold rule must have the shapes {expected}, got {given}; "
                "continue with the rule, classes and unlabelled data that the run began with"
            )
        self.state = {name: value.to(self.state[name], copy=True) for name, value in state.items()}


class Fixed(Rule):
    """One threshold for all, at all times: `max p >= tau` (Sohn et al. 2020, FixMatch, eq. 4)."""


class Flex(Rule):
    """Lower thresholds for classes that few examples are yet confidently assigned to (FlexMatch).

    Zhang et al. 2021, arXiv 2110.08263, eq. 5-11. Each example's latest class with `max p >= tau` is
    remembered; `n_c` counts them, `n_none` the examples without one.
    `beta_c = n_c / max(max_c n_c, n_none)`, where `n_none` is the warm-up, and
    `tau_c = tau * beta_c / (2 - beta_c)` (their convex mapping). At the start all thresholds are 0, so that
    everything counts. Of an example seen twice in a batch the later confident view stands.
    """

    def __init__(self, num_classes: int, threshold: float, momentum: float, memory: int) -> None:
        super().__init__(num_classes, threshold, momentum, memory)
        if memory < 1:
            raise ValueError(
                f"the flex rule remembers every unlabelled example: memory must be their number, got {memory}"
            )
        if num_classes > 127:
            raise ValueError(f"the flex rule remembers at most 127 classes, got {num_classes}")
        self.state = {"assigned": torch.full((memory,), -1, dtype=torch.int8)}

    def _unlabelled(self, probabilities: torch.Tensor, index: torch.Tensor) -> None:
        if not 0 <= int(index.min()) <= int(index.max()) < self.memory:
            raise ValueError(
                f"index must lie from 0 to {self.memory - 1}, got {index.min()} to {index.max()}; "
                "memory must be the number of unlabelled examples"
            )
        confidence, label = probabilities.max(1)
        # Writing twice to one slot has no defined order on a device: let all its writers write the same.
        position = torch.arange(len(index), device=index.device)
        position = torch.where(confidence >= self.threshold, position, -1)
        latest = index.new_full((self.memory,), -1).scatter_reduce(0, index, position, "amax")[index]
        assigned = self.state["assigned"]
        assigned[index] = torch.where(latest >= 0, label[latest].to(torch.int8), assigned[index])

    def thresholds(self) -> torch.Tensor:
        """See `Rule`."""
        count = torch.bincount(self.state["assigned"] + 1, minlength=self.num_classes + 1).double()
        beta = count[1:] / count.max()  # the first is the number of examples without a class
        return self.threshold * beta / (2 - beta)


class Free(Rule):
    """Thresholds that follow the model's confidence, overall and by class (FreeMatch).

    Wang et al. 2023, arXiv 2205.07246, eq. 5-8: `tau` is the running mean of `max p`, `p_c` that of the
    predicted probability of class c, both started at 1/C; `tau_c = tau * p_c / max_c p_c`.
    """

    def __init__(self, num_classes: int, threshold: float, momentum: float, memory: int) -> None:
        super().__init__(num_classes, threshold, momentum, memory)
        self.state = {
            "confidence": torch.tensor(1 / num_classes, dtype=torch.float64),
            "marginal": torch.full((num_classes,), 1 / num_classes, dtype=torch.float64),
        }

    def _unlabelled(self, probabilities: torch.Tensor, index: torch.Tensor) -> None:
        exact = probabilities.double()
        self._average("confidence", exact.amax(1).mean())
        self._average("marginal", exact.mean(0))

    def thresholds(self) -> torch.Tensor:
        """See `Rule`."""
        marginal = self.state["marginal"]
        return self.state["confidence"] * marginal / marginal.max()


class Soft(Rule):
    """Weights that fall off smoothly below the mean confidence (SoftMatch).

    Chen et al. 2023, arXiv 2301.10921, sec. 3.1: `exp(-max(mu - max p, 0)^2 / (2 sigma^2 / n^2))` with `mu`
    and `sigma^2` running mean and unbiased variance of `max p`, started at 1/C and 1, and n = 2 as in the
    authors' code. A batch of one has no variance and leaves `sigma^2` alone.
    """

    width = 2.0

    def __init__(self, num_classes: int, threshold: float, momentum: float, memory: int) -> None:
        super().__init__(num_classes, threshold, momentum, memory)
        self.state = {
            "mean": torch.tensor(1 / num_classes, dtype=torch.float64),
            "variance": torch.tensor(1.0, dtype=torch.float64),
        }

    def _unlabelled(self, probabilities: torch.Tensor, index: torch.Tensor) -> None:
        confidence = probabilities.double().amax(1)
        self._average("mean", confidence.mean())
        if len(confidence) > 1:
            self._average("variance", confidence.var(correction=1))

    @torch.no_grad()
    def weights(self, probabilities: torch.Tensor) -> torch.Tensor:
        """See `Rule`; not 0 or 1 but between."""
        confidence = probabilities.double().amax(1)
        mean, variance = (self.state[name].to(confidence) for name in ("mean", "variance"))
        # Where all confidences agree the variance is 0; 0/0 must still give weight 1.
        variance = variance.clamp(min=torch.finfo(torch.float64).eps)
        return torch.exp(-((mean - confidence).clamp(min=0) ** 2) * self.width**2 / (2 * variance)).float()

    def thresholds(self) -> torch.Tensor:
        """Mean confidence, once for every class: from there on weights are 1."""
        return self.state["mean"].repeat(self.num_classes)


class Ada(Rule):
    """Thresholds by class from labelled faces: mean confidence where the prediction is right (after Ada-CM).

    Li et al., CVPR 2022, arXiv 2203.12341: after every epoch the margin of a class is its mean confidence
    over all correctly classified labelled faces, times `beta / (1 + gamma^-epoch)`, which grows with the
    epoch; in their code beta = 0.97, gamma = e, and no margin is below 0.8, the value at the start. Here the
    mean is a running one over steps, started at `threshold` and unscaled; a class moves in steps where a face
    of it is classified correctly, so that one not yet seen keeps `threshold`.
    """

    def __init__(self, num_classes: int, threshold: float, momentum: float, memory: int) -> None:
        super().__init__(num_classes, threshold, momentum, memory)
        self.state = {"margin": super().thresholds()}

    def _labelled(self, probabilities: torch.Tensor, labels: torch.Tensor) -> None:
        confidence, predicted = probabilities.double().max(1)
        classes = torch.arange(self.num_classes, device=labels.device)
        right = ((labels == predicted)[:, None] & (labels[:, None] == classes)).double()
        count = right.sum(0)
        mean = (right * confidence[:, None]).sum(0) / count.clamp(min=1)
        self._average("margin", torch.where(count > 0, mean, self.state["margin"]))

    def thresholds(self) -> torch.Tensor:
        """See `Rule`."""
        return self.state["margin"].clone()


THRESHOLD_RULES: dict[str, type[Rule]] = {
    "fixed": Fixed,
    "flex": Flex,
    "free": Free,
    "soft": Soft,
    "ada": Ada,
}


def make_rule(
    name: str, num_classes: int, threshold: float = 0.95, momentum: float = 0.999, memory: int = 0
) -> Rule:
    """A fresh rule by its name in `THRESHOLD_RULES`; the other arguments are those of `Rule`.

    Raises:
        ValueError: unknown name, or an argument out of its range.
    """
    if name not in THRESHOLD_RULES:
        raise ValueError(f"threshold rule must be one of {', '.join(THRESHOLD_RULES)}, got {name!r}")
    return THRESHOLD_RULES[name](num_classes, threshold, momentum, memory)
