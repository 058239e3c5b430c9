"""Teacher and student: the teacher also learns from what its pseudo-labels did for the student."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from modeling_fer.learning.debias import debiased, with_margin
from modeling_fer.learning.fixmatch import SamplerFeedback, Views
from modeling_fer.learning.improvement import Improvement
from modeling_fer.learning.losses import masked_cross_entropy
from modeling_fer.learning.pseudo_labels import PseudoLabeler
from modeling_fer.learning.step import Batch, Logs, Round


class FeedbackStep:
    """Meta Pseudo Labels (Pham et al., CVPR 2021, arXiv 2003.10580) with debiased labels and a rule.

    Teacher T, student S, `yhat` and `weight` from the weak view `T(w(u))`:

    - `L_S = 1/B sum weight CE(S(s(u)) + tau log p, yhat)`; the student is the model that the loop updates.
    - `L_T = CE(T(w(x)), y) + lambda_u / B sum weight CE(T(s(u)) + tau log p, softmax(T(w(u)) - tau log p))
      + eta h / B sum [weight > 0] CE(T(w(u)) - tau log p, yhat)`.
    - `h`: what the step did for the student on the labelled batch, see `improvement.py`, which also says why
      the last term takes the weak view, debiased, and each counted face once.

    In the last `finetune_steps` the student learns from labelled faces alone and the teacher rests.

    Args:
        student: classifier, prepared for its device.
        plain: the same, not wrapped for several processes.
        teacher, optimizer, schedule: of the same kind as the student's, prepared, the schedule the very same;
            their state is saved by accelerate but for the schedule's.
        views, labeler, autocast, lambda_u, label_smoothing, soft_labels, feedback: as in `FixMatchStep`.
        feedback_weight: `eta`.
        max_grad_norm: the teacher's gradients are clipped to it; infinity: not.
        steps, finetune_steps: all steps of the run, and how many of them at the end fine-tune.
        accelerator: for gradients and means over processes.
        student_lambda_x: weight of a labelled loss in the student's own; 0: pseudo-labels alone, as in the
            paper, which needs many steps. What labels do for the student is in every `h`: the baseline takes
            out what they usually do.
    """

    def __init__(
        self,
        student: nn.Module,
        plain: nn.Module,
        teacher: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler,
        views: Views,
        labeler: PseudoLabeler,
        autocast: Callable[[], Any],
        lambda_u: float,
        label_smoothing: float,
        soft_labels: bool,
        feedback: SamplerFeedback,
        feedback_weight: float,
        max_grad_norm: float,
        steps: int,
        finetune_steps: int,
        accelerator: Accelerator,
        student_lambda_x: float = 0.0,
    ) -> None:
        self.student, self.plain, self.teacher = student, plain, teacher
        self.optimizer, self.schedule = optimizer, schedule
        self.views, self.labeler, self.autocast = views, labeler, autocast
        self.lambda_u, self.label_smoothing = lambda_u, label_smoothing
        self.target = "targets" if soft_labels else "labels"
        self.feedback, self.feedback_weight = feedback, feedback_weight
        self.max_grad_norm, self.accelerator = max_grad_norm, accelerator
        self.student_lambda_x = student_lambda_x
        self.improvement = Improvement()
        self.steps, self.finetune_from = 0, steps - finetune_steps
        self.teach: Callable[[], Logs] | None = None  # what is left to do once the student has moved
        self.improvements: list[float] = []  # of this round

    def __call__(self, batch: Batch, backward: Callable[[torch.Tensor], None]) -> Logs:
        """See `Step`; the batch is that of `FixMatchStep`."""
        x, labels = self.views.labelled(batch["pixels"]), batch[self.target]
        if self.steps >= self.finetune_from:
            with self.autocast():
                logits = self.student(pixel_values=x).logits.float()
            loss = cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            backward(loss)
            return {"loss": loss.detach(), "accuracy": (logits.argmax(-1) == batch["labels"]).float().mean()}

        weak, strong = (view(batch["unlabelled_pixels"]) for view in (self.views.weak, self.views.strong))
        with self.autocast():
            logits = self.teacher(pixel_values=torch.cat([x, weak, strong])).logits.float()
        x_logits, weak_logits, strong_logits = logits.split([len(x), len(weak), len(strong)])
        pseudo = self.labeler(
            weak_logits.detach(),
            batch["unlabelled_index"],
            batch["unlabelled_labels"],
            x_logits.detach(),
            batch["labels"],
        )
        marginal, tau = self.labeler.marginal.value, self.labeler.tau
        labelled_loss = cross_entropy(x_logits, labels, label_smoothing=self.label_smoothing)
        consistency = masked_cross_entropy(
            with_margin(strong_logits, marginal, tau), pseudo.distributions, pseudo.weights
        )
        taught = masked_cross_entropy(debiased(weak_logits, marginal, tau), pseudo.labels, pseudo.weights > 0)

        seen = torch.cat([x, strong]) if self.student_lambda_x else strong
        with self.autocast():
            student_logits = self.student(pixel_values=seen).logits.float()
        known, guessed = student_logits.split([len(seen) - len(strong), len(strong)])
        loss = masked_cross_entropy(with_margin(guessed, marginal, tau), pseudo.labels, pseudo.weights)
        if self.student_lambda_x:
            smoothing = self.label_smoothing
            loss = loss + self.student_lambda_x * cross_entropy(known, labels, label_smoothing=smoothing)
        before = self.judge(x, batch["labels"])
        backward(loss)

        def teach() -> Logs:
            # The teacher's schedule is the student's, and has yet to follow it to the next step.
            rate = float(self.schedule.get_last_lr()[0] / self.schedule.base_lrs[0])
            h = self.improvement(before, self.judge(x, batch["labels"]), rate).float()
            self.improvements.append(h.item())
            teacher_loss = labelled_loss + self.lambda_u * consistency + self.feedback_weight * h * taught
            self.accelerator.backward(teacher_loss)
            nn.utils.clip_grad_norm_(self.teacher.parameters(), self.max_grad_norm)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad(set_to_none=True)
            return {"teacher_loss": teacher_loss.detach(), "h": h}

        self.teach = teach
        return {
            "loss": loss.detach(),
            "labelled_loss": labelled_loss.detach(),
            "unlabelled_loss": consistency.detach(),
            "accuracy": (x_logits.argmax(-1) == batch["labels"]).float().mean(),
            "pseudo_label_rate": pseudo.weights.mean(),
        }

    @torch.no_grad()
    def judge(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The student's labelled loss over all processes, in float32 and without dropout.

        One step changes it little: in bf16 the change would drown in rounding.
        """
        training = self.plain.training
        self.plain.eval()
        loss = cross_entropy(self.plain(pixel_values=x).logits.float(), labels)
        self.plain.train(training)
        return self.accelerator.reduce(loss.double(), "mean")

    def after_update(self) -> Logs:
        """Teach the teacher, now that the student has taken its step."""
        self.steps += 1
        if self.teach is None:
            return {}
        teach, self.teach = self.teach, None
        return teach()

    def end_round(self) -> Round:
        """Log the round; hand class weights to the sampler where there is feedback."""
        weights, logs = self.feedback(self.plain, self.labeler.shares())
        if self.improvements:
            logs["h"] = sum(self.improvements) / len(self.improvements)
            logs["h_positive"] = sum(h > 0 for h in self.improvements) / len(self.improvements)
        self.improvements = []
        return Round(weights, {**self.labeler.end_round(), **logs})

    def state_dict(self) -> dict[str, Any]:
        """All state that accelerate does not save by itself."""
        return {
            "labeler": self.labeler.state_dict(),
            "improvement": self.improvement.state_dict(),
            "improvements": list(self.improvements),
            "schedule": self.schedule.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.labeler.load_state_dict(state["labeler"])
        self.improvement.load_state_dict(state["improvement"])
        self.improvements = list(state["improvements"])
        self.schedule.load_state_dict(state["schedule"])
        self.steps = state["steps"]
