"""Knowledge distillation at the response tokens: KL to a teacher's distribution, mixed with the likelihood.

    loss = mix KL + (1 - mix) NLL, mean over the step's masked tokens

A loss is given the log-prob of the response token only, not the student's or the teacher's whole distribution. So the
KL of each position is estimated from that one token: unbiased over tokens drawn from `drawn_by`, exact only in the
mean. The column "reference" holds the teacher's log-prob of the token. With d = log student - log teacher:

    forward KL(teacher || student): tokens of the teacher  exp(d) - 1 - d
                                    tokens of the student  the same, weighted by exp(-d)
    reverse KL(student || teacher): tokens of the student  d^2 / 2: its value is not the KL's, its gradient is (k2)
                                    tokens of the teacher  the same, weighted by exp(d)

Weights carry no gradient and are cut at `max_weight`, which only a wide gap between the two reaches. Sequence-level
distillation (Kim and Rush 2016, 1606.07947) is mix=0 on the teacher's tokens; on-policy distillation (GKD, 2306.13649)
is direction=reverse, drawn_by=student on the student's own samples. The teacher shares the student's vocabulary.

Tests: tests/unit/algorithms/test_supervised.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch

from flowrl.algorithms.base import Loss, LossBatch, Objective
from flowrl.algorithms.functional import MAX_LOG_RATIO, kl_estimate, log_ratio, masked
from flowrl.config import Meta

if TYPE_CHECKING:
    from torch import Tensor


class Distillation(Objective):
    """KL to a teacher at the response tokens."""

    direction: Literal["forward", "reverse"] = "forward"  # forward covers the teacher's modes, reverse seeks one
    drawn_by: Literal["teacher", "student"] = "teacher"  # who sampled the responses
    mix: Annotated[float, Meta(ge=0, le=1)] = 0.5  # of the KL; the rest is the likelihood of the tokens
    max_weight: Annotated[float, Meta(ge=1)] = 10.0  # of tokens that the other one sampled

    def idle_settings(self, num_updates: int, *, is_fresh: bool = False) -> list[str]:
        """Return which settings have no effect, and why."""
        over = "teacher" if self.direction == "forward" else "student"
        if not self.mix:
            names, why = self.changed("direction", "drawn_by", "max_weight"), "with mix=0, the likelihood alone"
        elif self.drawn_by == over:
            names, why = self.changed("max_weight"), f"where the {over}'s own tokens are learned, which have weight 1"
        else:
            return []
        return [f"objective.{', '.join(names)}: no effect {why}"] if names else []

    def loss(self, batch: LossBatch) -> Loss:
        """Return the mixed loss as a sum over masked tokens and their number.

        Metrics: kl, an estimate of the chosen divergence that is never negative; nll; teacher_nll.
        """
        mask_BT = batch.mask_BT
        student_BT = masked(batch.logprobs_BT, mask_BT)
        teacher_BT = masked(batch.column("reference"), mask_BT)
        loss_BT = -(1.0 - self.mix) * student_BT
        if self.mix:
            loss_BT = loss_BT + self.mix * self._divergence(student_BT, teacher_BT)
        count = mask_BT.sum()
        metrics = {
            "kl": (masked(self._estimate(student_BT.detach(), teacher_BT), mask_BT).sum(), count),
            "nll": (-student_BT.detach().sum(), count),
            "teacher_nll": (-teacher_BT.sum(), count),
        }
        return Loss(masked(loss_BT, mask_BT).sum(), count, metrics)

    def _divergence(self, student_BT: Tensor, teacher_BT: Tensor) -> Tensor:
        """Return what has the gradient of the divergence, for each token; however far below the teacher."""
        d_BT = student_BT - teacher_BT
        if self.direction == "forward":
            d_BT = d_BT.clamp_max(MAX_LOG_RATIO)
            loss_BT = torch.expm1(d_BT) - d_BT
        else:
            loss_BT = 0.5 * d_BT * d_BT
        return self._weights(student_BT, teacher_BT) * loss_BT

    def _estimate(self, student_BT: Tensor, teacher_BT: Tensor) -> Tensor:
        """Return an estimate of the divergence for each token, 0 or greater."""
        of, to = (teacher_BT, student_BT) if self.direction == "forward" else (student_BT, teacher_BT)
        return self._weights(student_BT, teacher_BT) * kl_estimate(of, to, "k3")

    def _weights(self, student_BT: Tensor, teacher_BT: Tensor) -> Tensor:
        """Return how much likelier a token is under the distribution that the KL is an average over."""
        over = "teacher" if self.direction == "forward" else "student"
        if self.drawn_by == over:
            return torch.ones_like(student_BT)
        d_BT = log_ratio(student_BT, teacher_BT).detach()
        return torch.exp(d_BT if over == "student" else -d_BT).clamp_max(self.max_weight)
