"""What a pseudo-label did for the student: the signal that the teacher of Meta Pseudo Labels learns from.

The student takes one step on labels `yhat_i` that the teacher drew from `q_i = softmax(z_i)`, `i = 1..B`.
The teacher wants labels after which the student's loss `L` on labelled faces is low, so it descends
`J = E_yhat[L(student after its step)]`. Since `E[grad log q(yhat)] = 0`, for any constant `b` (Williams,
1992, "REINFORCE"; Pham et al., 2021, arXiv 2003.10580, section 2 and appendix A, to first order)

    grad J = E[ (L_before - L_after - b) * sum_i grad CE(z_i, yhat_i) ].

What follows for a teacher's loss `h * CE(z, yhat)`, `h` a constant to autograd:

- Sign: `h = before - after - b`. Labels after which the student improved become more probable.
- Size: `before - after` is `lr * <grad L, grad CE(student, yhat)>` to first order for a student of plain SGD:
  the student's learning rate is in it. A schedule would carry it into `h`: against the steps of the past
  every label would look good while the rate rises, and bad while it falls. So the difference is divided by
  the rate, as a share of its peak. A mean over `B` in place of the sum gives `grad J / B`.
- Label: `yhat` is what the student was trained on. A label that does not follow the student's says nothing:
  with `b = E[h]` its gradient is zero on average.
- Logits: `z` are those that `yhat` came from. Shifted by constants (not debiased where the labels were) they
  do no harm on average if `b = E[h]`. Those of another view `z'` do: `h * CE(z', yhat)` is an approximation,
  and `b` matters in it: what is left of `E[h]` is a weight of the consistency loss `CE(z', q)`.
- Weights: an example left out of the student's loss is left out here. A fractional weight is in `h` already:
  using it once more squares it.
- With `yhat` the most probable label in place of a drawn one the estimate is biased whatever `b` is: it can
  only raise or lower that label, by whether its step was better than the past ones.
"""

from typing import Any

import torch


class Improvement:
    """How much more one step of the student lowered its labelled loss than its steps have of late.

    The baseline is the moving average of all earlier differences, `a <- m a + (1 - m) (before - after)/rate`
    from `a = 0`, divided by `1 - m^steps` as in Adam (Kingma and Ba, 2015, algorithm 1). Thus it is a true
    weighted mean from the second step on; uncorrected, it would take some `1 / (1 - m)` steps to leave its
    start, and all labels would be praised meanwhile for what any step brings. The present step is not in it:
    a baseline must not know the label. The first step has no past to be compared with and gets 0.

    Args:
        momentum: `m`, in [0, 1). What a step brings falls as the student learns: a baseline that remembers
            much longer than that takes would blame every label for it.

    Raises:
        ValueError: `momentum` is out of range.
    """

    def __init__(self, momentum: float = 0.5) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), not {momentum}")
        self.momentum = momentum
        self.average: float | torch.Tensor = 0.0
        self.steps = 0

    def __call__(
        self, before: float | torch.Tensor, after: float | torch.Tensor, rate: float = 1.0
    ) -> torch.Tensor:
        """Compare two losses on the same labelled faces, then count them into the baseline.

        Args:
            before: mean cross-entropy of the student on the labelled global batch before its step, in nats,
                shape `()`; the same on all processes.
            after: the same after its step; same faces, same views, no dropout.
            rate: learning rate of that step as a share of its peak. 0: nothing was learnt, `h` is 0, and the
                step does not count.

        Returns:
            `h` of shape `()`, float64, without gradient, on the device of the losses: positive when the step
            helped more than usual, in nats of a step at the peak rate.

        Raises:
            ValueError: a loss is not a scalar, or is in half precision, where one step's change is rounding.
        """
        gain = exact(before) - exact(after)
        if rate <= 0:
            return torch.zeros_like(gain)
        gain = gain / rate
        baseline = self.average / (1 - self.momentum**self.steps) if self.steps else gain
        self.average = self.momentum * self.average + (1 - self.momentum) * gain
        self.steps += 1
        return gain - baseline

    def state_dict(self) -> dict[str, Any]:
        """Average and number of steps, as plain numbers."""
        return {"average": float(self.average), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.average, self.steps = float(state["average"]), int(state["steps"])


def exact(loss: float | torch.Tensor) -> torch.Tensor:
    """Return a scalar loss in float64, cut from its graph.

    Raises:
        ValueError: it is not a scalar, or is in half precision.
    """
    dtype, shape = (loss.dtype, tuple(loss.shape)) if isinstance(loss, torch.Tensor) else (None, ())
    if shape:
        raise ValueError(f"a loss of shape {shape} was given, not one number: take the mean over the batch")
    if dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"loss in {dtype} is too coarse for a step's change: compute it from logits.float()")
    return torch.as_tensor(loss, dtype=torch.float64).detach()
