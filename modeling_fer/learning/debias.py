"""Against pseudo-labels that pile up in few classes: logit adjustment and distribution alignment.

Running means are told each step's batch of all processes and never communicate, so that every process holds
the same state, in float64 on the device of its input.
"""

import torch

# A class that is never predicted must not have a logarithm of minus infinity.
SMALLEST = torch.finfo(torch.float32).tiny
TARGETS = ("uniform", "labelled")


class Marginal:
    """Running mean of predicted distributions: `p <- m p + (1 - m) mean_B probabilities`, started uniform.

    DebiasPL (Wang et al., CVPR 2022, arXiv 2201.01490) takes it over weak views of unlabelled faces, before
    any debiasing. It is a vector, one number a class: a single number would shift all logits alike, in vain.

    Args:
        num_classes: C.
        momentum: m, from 0 to less than 1.
    """

    def __init__(self, num_classes: int, momentum: float = 0.999) -> None:
        if num_classes < 2:
            raise ValueError(f"a marginal needs at least 2 classes, got {num_classes}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and less than 1, got {momentum}")
        self.momentum = momentum
        self.value = torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)

    @torch.no_grad()
    def observe(self, probabilities: torch.Tensor) -> None:
        """Take in the batch `(B, C)` of all processes.

        Raises:
            ValueError: another shape, or an empty batch.
        """
        if len(probabilities) == 0 or probabilities.shape[1:] != self.value.shape:
            raise ValueError(
                f"probabilities must be (B, {len(self.value)}) with B at least 1, "
                f"got shape {tuple(probabilities.shape)}"
            )
        mean = probabilities.double().mean(0)
        self.value = self.momentum * self.value.to(mean) + (1 - self.momentum) * mean

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A copy of the state, on the CPU."""
        return {"value": self.value.cpu().clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a state.

        Raises:
            ValueError: it is of another number of classes.
        """
        if state["value"].shape != self.value.shape:
            raise ValueError(
                f"the saved marginal has shape {tuple(state['value'].shape)}, expected "
                f"{tuple(self.value.shape)}; continue with the classes that the run began with"
            )
        self.value = state["value"].to(self.value, copy=True)


def _scaled_log(logits: torch.Tensor, marginal: torch.Tensor, tau: float) -> torch.Tensor:
    """`tau log p`, in the type and on the device of the logits."""
    if marginal.shape != logits.shape[-1:]:
        raise ValueError(
            f"the marginal must be one number a class, shape {tuple(logits.shape[-1:])}, "
            f"got {tuple(marginal.shape)}"
        )
    return (tau * marginal.clamp(min=SMALLEST).log()).to(logits)


def _check(tau: float) -> None:
    if not tau >= 0:
        raise ValueError(f"tau must not be negative, got {tau}; 0 switches debiasing off")


def debiased(logits: torch.Tensor, marginal: torch.Tensor, tau: float) -> torch.Tensor:
    """`logits - tau log p`: logits to choose pseudo-labels from, less the model's own habit.

    DebiasPL (Wang et al., CVPR 2022, arXiv 2201.01490, counterfactual debiasing); post-hoc logit adjustment
    in Menon et al. 2021, arXiv 2007.07314.

    Args:
        logits: `(B, C)` of weak views.
        marginal: `(C,)`, as in `Marginal.value`.
        tau: strength; 0 returns `logits` itself.

    Raises:
        ValueError: tau is negative, or the marginal is not one number a class.
    """
    _check(tau)
    return logits if tau == 0 else logits - _scaled_log(logits, marginal, tau)


def with_margin(logits: torch.Tensor, marginal: torch.Tensor, tau: float) -> torch.Tensor:
    """`logits + tau log p`: logits for the loss on pseudo-labels, with margins for rare classes.

    The adaptive marginal loss of DebiasPL (Wang et al., CVPR 2022, arXiv 2201.01490); the logit-adjusted loss
    of Menon et al. 2021, arXiv 2007.07314. Arguments and errors are those of `debiased`, the logits those
    of strong views.
    """
    _check(tau)
    return logits if tau == 0 else logits + _scaled_log(logits, marginal, tau)


class Alignment:
    """Distribution alignment: predictions are rescaled so that their mean becomes a target distribution.

    `p * target / mean prediction on unlabelled`, normalised (Berthelot et al. 2020, ReMixMatch, arXiv
    1911.09785, sec. 3.1). Target "uniform" wants all classes alike; "labelled" is the running mean of the
    model's own predictions on labelled faces, which fits also where unlabelled faces come from another domain
    (Berthelot et al. 2022, AdaMatch, arXiv 2106.04732).

    Args:
        target: "uniform" or "labelled".
        num_classes: C.
        momentum: of both running means, started uniform; see `Marginal`.
    """

    def __init__(self, target: str, num_classes: int, momentum: float = 0.999) -> None:
        if target not in TARGETS:
            raise ValueError(f"alignment target must be one of {', '.join(TARGETS)}, got {target!r}")
        self.follows_labelled = target == "labelled"
        self.predicted = Marginal(num_classes, momentum)
        self.target = Marginal(num_classes, momentum)

    def observe(self, unlabelled_probabilities: torch.Tensor, labelled_probabilities: torch.Tensor) -> None:
        """Take in predictions `(B, C)` and `(L, C)` of all processes, not aligned ones.

        Raises:
            ValueError: another shape, or an empty batch.
        """
        self.predicted.observe(unlabelled_probabilities)
        if self.follows_labelled:
            self.target.observe(labelled_probabilities)

    @torch.no_grad()
    def __call__(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Aligned distributions `(B, C)`, in the type of the given ones."""
        exact = probabilities.double()
        ratio = self.target.value.to(exact) / self.predicted.value.to(exact).clamp(min=SMALLEST)
        aligned = exact * ratio
        # A row keeps the sum it came with (1, up to rounding), so that a ratio of 1 changes no bit.
        return (aligned * (exact.sum(1) / aligned.sum(1))[:, None]).to(probabilities.dtype)

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """A copy of the state, on the CPU."""
        return {"predicted": self.predicted.state_dict(), "target": self.target.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Take over a state.

        Raises:
            ValueError: it is of another number of classes.
        """
        self.predicted.load_state_dict(state["predicted"])
        self.target.load_state_dict(state["target"])
