"""Unlabelled images that are unlike the labelled faces: score them, and keep them out."""

from collections.abc import Callable

import torch


def alike(logits: torch.Tensor) -> torch.Tensor:
    """The same score for all: `(B, C)` to `(B,)`."""
    return logits.new_zeros(len(logits))


def probability(logits: torch.Tensor) -> torch.Tensor:
    """Largest probability: `(B, C)` to `(B,)` (Hendrycks and Gimpel 2017, arXiv 1610.02136)."""
    return logits.softmax(1).amax(1)


def energy(logits: torch.Tensor) -> torch.Tensor:
    """Negative free energy at temperature 1, `log sum_c exp(logit_c)`: `(B, C)` to `(B,)`.

    Liu et al. 2020, arXiv 2010.03759, eq. 4 with its sign turned: higher is more like the training data.
    """
    return logits.logsumexp(1)


GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": alike,
    "probability": probability,
    "energy": energy,
}


class Gate:
    """Keeps images that score no lower than most labelled faces do.

    The floor is a running mean, in float64 on the device of its input, of a low quantile of the scores of
    each step's labelled faces of all processes, so that all hold the same. Before the first are observed all
    images are kept.

    Args:
        score: `(B, C)` logits to `(B,)`; higher is more like the training data.
        quantile: share of labelled faces below the floor, from 0 to 1.
        momentum: share of the old floor, from 0 to less than 1.
    """

    def __init__(
        self, score: Callable[[torch.Tensor], torch.Tensor], quantile: float, momentum: float
    ) -> None:
        if not 0 <= quantile <= 1:
            raise ValueError(f"the gate's quantile must lie between 0 and 1, got {quantile}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and less than 1, got {momentum}")
        self.score, self.quantile, self.momentum = score, quantile, momentum
        self.floor = torch.tensor(-torch.inf, dtype=torch.float64)

    @property
    def keeps_all(self) -> bool:
        """Whether no image is ever left out."""
        return self.score is alike

    @torch.no_grad()
    def observe(self, labelled_logits: torch.Tensor) -> None:
        """Take in the logits `(L, C)` of labelled faces of all processes.

        Raises:
            ValueError: there are none, or their shape is another.
        """
        if labelled_logits.dim() != 2 or len(labelled_logits) == 0:
            raise ValueError(
                f"labelled logits must be (L, C) with L at least 1, got shape {tuple(labelled_logits.shape)}"
            )
        found = self.score(labelled_logits.double()).quantile(self.quantile)
        old = self.floor.to(found)
        self.floor = torch.where(old.isinf(), found, self.momentum * old + (1 - self.momentum) * found)

    @torch.no_grad()
    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Which images to keep: `(B, C)` to bool `(B,)`."""
        scores = self.score(logits.double())
        return scores >= self.floor.to(scores)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A copy of the state, on the CPU."""
        return {"floor": self.floor.cpu().clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a state.

        Raises:
            ValueError: its floor is not a single number.
        """
        if state["floor"].shape != ():
            raise ValueError(
                f"a gate's floor is a single number, got shape {tuple(state['floor'].shape)}; "
                "the saved state is not a gate's"
            )
        self.floor = state["floor"].to(self.floor, copy=True)


def make_gate(name: str, quantile: float = 0.05, momentum: float = 0.99) -> Gate:
    """A fresh gate by its name in `GATES`; "none" keeps all. The other arguments are those of `Gate`.

    Raises:
        ValueError: unknown name, or an argument out of its range.
    """
    if name not in GATES:
        raise ValueError(f"gate must be one of {', '.join(GATES)}, got {name!r}")
    return Gate(GATES[name], quantile, momentum)


def auroc(inside: torch.Tensor, outside: torch.Tensor) -> float:
    """Area under the ROC curve: how often an inside score `(N,)` exceeds an outside one `(M,)`, ties half.

    Raises:
        ValueError: either is empty.
    """
    if len(inside) == 0 or len(outside) == 0:
        raise ValueError(f"scores of both kinds are needed, got {len(inside)} inside, {len(outside)} outside")
    ranked = outside.double().sort().values
    below, not_above = (torch.searchsorted(ranked, inside.double(), right=right) for right in (False, True))
    return float((below + not_above).double().mean() / (2 * len(outside)))
