"""Process reward model: cross-entropy at the last token of each step (Lightman 2023, 2305.20050, section 2.6).

    p = sigmoid(v_t), loss = -y log p - (1 - y) log(1 - p) at step-end tokens t

The batch's `logprobs_BT` are the model's values, read after each token. The column "step_label" holds a step's label y
in [0, 1] on its last token and nan on every other. A soft label is the share of continuations from there that come out
right (Math-Shepherd, 2312.08935, equation 3); hard ones are 0 and 1, or are made of soft ones by `labels=hard`
(equation 4: any continuation comes out right). The mean is over steps.

Tests: tests/unit/algorithms/test_supervised.py
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch.nn.functional import softplus

from flowrl.algorithms.base import Head, Lesson, Loss, LossBatch, Objective
from flowrl.algorithms.functional import masked, right_side
from flowrl.config import Meta


class Process(Objective):
    """Process reward model."""

    labels: Literal["soft", "hard"] = "soft"  # as they stand, or 1 above `threshold` and 0 otherwise
    threshold: Annotated[float, Meta(ge=0, lt=1)] = 0.0  # of hard labels; 0: a step that ever comes out right is right

    @property
    def learns_from(self) -> Lesson:
        """Return "labelled steps"."""
        return "labelled steps"

    @property
    def head(self) -> Head:
        """Return "reward": a step is judged after its last token."""
        return "reward"

    @property
    def score_metric(self) -> str:
        """Return "accuracy": the share of an example's steps that are judged as labelled."""
        return "accuracy"

    def idle_settings(self, num_updates: int, *, is_fresh: bool = False) -> list[str]:
        """Return which settings have no effect, and why."""
        is_idle = self.labels == "soft" and self.changed("threshold")
        return ["objective.threshold: no effect with labels=soft"] if is_idle else []

    def loss(self, batch: LossBatch) -> Loss:
        """Return the cross-entropy as a sum over labelled steps and their number.

        Metrics: accuracy, the share of steps whose p and label are on the same side of one half (p of one half
        is half right); step_reward, mean p.
        """
        labels_BT = batch.column("step_label")
        is_end_BT = ((batch.mask_BT > 0) & ~labels_BT.isnan()).to(batch.mask_BT.dtype)
        labels_BT = masked(labels_BT, is_end_BT)
        if self.labels == "hard":
            labels_BT = (labels_BT > self.threshold).to(labels_BT.dtype)
        values_BT = masked(batch.logprobs_BT, is_end_BT)
        loss_BT = masked(softplus(values_BT) - labels_BT * values_BT, is_end_BT)
        count = is_end_BT.sum()
        judged_BT = values_BT.detach()
        agrees_BT = right_side(torch.where(labels_BT > 0.5, judged_BT, -judged_BT))
        metrics = {
            "accuracy": (masked(agrees_BT, is_end_BT).sum(), count),
            "step_reward": (masked(torch.sigmoid(judged_BT), is_end_BT).sum(), count),
        }
        return Loss(loss_BT.sum(), count, metrics)
