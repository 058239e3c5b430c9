"""From weak views to pseudo-labels: debiasing, alignment, gate and threshold over the global batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from modeling_fer.learning.debias import Alignment, Marginal, debiased
from modeling_fer.learning.gate import Gate
from modeling_fer.learning.thresholds import Rule


@dataclass
class PseudoLabels:
    """What this process's part of an unlabelled batch is taught.

    Attributes:
        labels: hard labels `(B,)`.
        distributions: what the labels are the maxima of, `(B, C)`.
        weights: how much each counts, `(B,)`, 0 to 1.
    """

    labels: torch.Tensor
    distributions: torch.Tensor
    weights: torch.Tensor


class PseudoLabeler:
    """Chooses pseudo-labels and keeps the shared statistics that the choice depends on.

    Every process gathers the predictions of all and does the same sums in float64, so that marginal,
    thresholds and counts are equal everywhere, and equal to those of one process with the same global batch.

    Args:
        rule: which pseudo-labels count, by confidence.
        marginal: the running mean of predictions.
        tau: strength of debiasing; 0: none.
        alignment: pulls the distribution of predictions to a target, or None.
        gate: keeps faces that look like the labelled ones.
        gather: tensors `(B, ...)` of every process to one of all, in the order of ranks.
        rank: of this process.
    """

    def __init__(
        self,
        rule: Rule,
        marginal: Marginal,
        tau: float,
        alignment: Alignment | None,
        gate: Gate,
        gather: Callable[[torch.Tensor], torch.Tensor],
        rank: int,
    ) -> None:
        self.rule, self.marginal, self.tau = rule, marginal, tau
        self.alignment, self.gate = alignment, gate
        self.gather, self.rank = gather, rank
        self.counts = self._no_counts()

    def _no_counts(self) -> dict[str, torch.Tensor]:
        """Sums over the current round, by class of the pseudo-label; of probabilities, each class's own."""
        zeros = torch.zeros(self.rule.num_classes, dtype=torch.float64)
        names = ("weight", "known", "right", "gated", "faces", "probability")
        return {name: zeros.clone() for name in names}

    @torch.no_grad()
    def __call__(
        self,
        logits: torch.Tensor,
        index: torch.Tensor,
        hidden: torch.Tensor,
        labelled_logits: torch.Tensor,
        labels: torch.Tensor,
    ) -> PseudoLabels:
        """Choose the pseudo-labels of this process's faces, after counting in the faces of all processes.

        Args:
            logits: of weak views of unlabelled faces, `(B, C)`, as many on every process.
            index: their numbers `(B,)`, for rules that remember each face.
            hidden: their true labels `(B,)` where known, else -1: measured against, never learnt.
            labelled_logits: of weak views of labelled faces, `(L, C)`.
            labels: their classes `(L,)`.
        """
        size = len(logits)
        packed = torch.cat([logits.double(), index[:, None].double(), hidden[:, None].double()], dim=1)
        packed, known = (
            self.gather(part.contiguous())
            for part in (packed, torch.cat([labelled_logits.double(), labels[:, None].double()], dim=1))
        )
        logits, index, hidden = packed[:, :-2], packed[:, -2].long(), packed[:, -1].long()
        labelled_logits, labels = known[:, :-1], known[:, -1].long()

        raw, labelled = logits.softmax(1), labelled_logits.softmax(1)
        self.marginal.observe(raw)
        self.gate.observe(labelled_logits)
        distributions = debiased(logits, self.marginal.value, self.tau).softmax(1)
        if self.alignment is not None:  # what it is told is what it aligns: with debiasing, the debiased
            self.alignment.observe(distributions, labelled)
            distributions = self.alignment(distributions)
        slots = index % max(1, self.rule.memory)  # of a stream, the latest faces are remembered
        self.rule.observe(distributions, slots, labelled, labels)
        kept = self.gate(logits)
        weights = self.rule.weights(distributions) * kept
        chosen = distributions.argmax(1)
        self._count(chosen, weights, kept, hidden)
        self.counts["probability"] = self.counts["probability"].to(distributions) + distributions.sum(0)
        mine = slice(self.rank * size, (self.rank + 1) * size)
        return PseudoLabels(chosen[mine], distributions[mine].float(), weights[mine])

    def _count(
        self, chosen: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor, hidden: torch.Tensor
    ) -> None:
        measured = weights.double() * (hidden >= 0)
        # Not `index_add_`, whose order of sums on a GPU is another in each process: samplers would part ways.
        by_class = (chosen[:, None] == torch.arange(self.rule.num_classes, device=chosen.device)).double()
        for name, values in {
            "weight": weights.double(),
            "known": measured,
            "right": measured * (hidden == chosen),
            "gated": (~kept).double(),
            "faces": torch.ones_like(measured),
        }.items():
            self.counts[name] = self.counts[name].to(values) + (by_class * values[:, None]).sum(0)

    def shares(self) -> torch.Tensor | None:
        """Mean of what this round's labels are the maxima of, `(C,)`; None where there were no faces.

        Not the histogram of labels that count: a round may have a handful of those, which is noise.
        """
        faces = self.counts["faces"].sum()
        return self.counts["probability"] / faces if faces > 0 else None

    def end_round(self) -> dict[str, Any]:
        """Numbers on the round that ends, and a new count.

        `pseudo_label_rate`: mean weight; `pseudo_label_histogram`: share of each class in the weights;
        `pseudo_label_accuracy`: where true labels are known; `gated`: share that the gate left out;
        `marginal`, `thresholds`: by class, as they stand.
        """
        sums = {name: float(values.sum()) for name, values in self.counts.items()}
        faces = sums["faces"]
        if not sums["faces"]:
            return {}
        found: dict[str, Any] = {
            "pseudo_label_rate": sums["weight"] / faces,
            "pseudo_label_histogram": (self.counts["weight"] / max(sums["weight"], 1e-12)).tolist(),
            "gated": sums["gated"] / faces,
            "marginal": self.marginal.value.tolist(),
            "thresholds": self.rule.thresholds().tolist(),
        }
        if sums["known"] > 0:
            found["pseudo_label_accuracy"] = sums["right"] / sums["known"]
        self.counts = self._no_counts()
        return found

    def state_dict(self) -> dict[str, Any]:
        """All state, as tensors and numbers."""
        state: dict[str, Any] = {
            "rule": self.rule.state_dict(),
            "marginal": self.marginal.state_dict(),
            "gate": self.gate.state_dict(),
            "counts": {name: values.cpu().clone() for name, values in self.counts.items()},
        }
        if self.alignment is not None:
            state["alignment"] = self.alignment.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.rule.load_state_dict(state["rule"])
        self.marginal.load_state_dict(state["marginal"])
        self.gate.load_state_dict(state["gate"])
        self.counts = {name: values.clone() for name, values in state["counts"].items()}
        if self.alignment is not None:
            self.alignment.load_state_dict(state["alignment"])
