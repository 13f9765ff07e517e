"""KTO: Kahneman-Tversky optimisation (Ethayarajh 2024, 2402.01306, equation 8), for responses labelled good or bad.

    lr = sum_t log pi(y_t) - log pi_ref(y_t)
    desirable:   lambda_D (1 - sigmoid(beta (lr - z)))
    undesirable: lambda_U (1 - sigmoid(beta (z - lr)))
    z = max(0, mean of lr over the step's mismatched pairs (x_i, y_j))

z estimates the policy's KL from the reference. It is one number for a step and carries no gradient, so it cannot come
from a micro-batch. Whoever trains scores the mismatched pairs of the whole step first, asks `reference_point`, and
gives the answer as the column "reference_point" on every token. The column "label" is above 0 where a response is
desirable. Each response counts alone; the mean is over responses.

Tests: tests/unit/algorithms/test_preference.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch

from flowrl.algorithms.base import Lesson, Loss, LossBatch, Objective
from flowrl.algorithms.functional import has_tokens, last_value, masked, right_side
from flowrl.config import Meta

if TYPE_CHECKING:
    from collections.abc import Sequence


class KTO(Objective):
    """Kahneman-Tversky optimisation."""

    beta: Annotated[float, Meta(gt=0)] = 0.1  # per nat: greater keeps the policy closer to the reference
    # The paper balances unequal numbers of labels: desirable_weight * num_desirable between 1 and 4/3 of the other's.
    desirable_weight: Annotated[float, Meta(ge=0)] = 1.0
    undesirable_weight: Annotated[float, Meta(ge=0)] = 1.0  # of the loss of undesirable responses

    @property
    def needs_mismatched(self) -> bool:
        """Return True: z is estimated from mismatched pairs."""
        return True

    @property
    def learns_from(self) -> Lesson:
        """Return "labelled responses", good and bad: without either the policy only drifts away from the reference."""
        return "labelled responses"

    @property
    def score_metric(self) -> str:
        """Return "accuracy": the share of held-out responses on the right side of z."""
        return "accuracy"

    def reference_point(self, log_ratios: Sequence[float]) -> float:
        """Return z from the summed log ratios of a step's mismatched pairs.

        >>> KTO().reference_point([3.0, -1.0]), KTO().reference_point([-3.0, 1.0])
        (1.0, 0.0)
        """
        return max(0.0, sum(log_ratios) / max(1, len(log_ratios)))

    def loss(self, batch: LossBatch) -> Loss:
        """Return the loss as a sum over responses and their number.

        Metrics: desirable_frac, the share of responses labelled good; accuracy, the share of responses whose log ratio
        is on its label's side of z; reward.desirable and reward.undesirable, beta lr; reference_point, z.
        """
        mask_BT = batch.mask_BT
        present_B = has_tokens(mask_BT)
        log_ratio_B = masked(batch.logprobs_BT - batch.column("reference"), mask_BT).sum(1)
        z_B = last_value(batch.column("reference_point"), mask_BT)
        is_good_B = last_value(batch.column("label"), mask_BT) > 0
        sign_B = torch.where(is_good_B, 1.0, -1.0).to(log_ratio_B.dtype)
        weight_B = torch.where(is_good_B, self.desirable_weight, self.undesirable_weight).to(log_ratio_B.dtype)
        above_B = sign_B * (log_ratio_B - z_B)
        loss_B = masked(weight_B * torch.sigmoid(-self.beta * above_B), present_B)
        count = present_B.sum()
        reward_B = self.beta * log_ratio_B.detach()
        good_B, bad_B = present_B * is_good_B, present_B * ~is_good_B
        metrics = {
            "desirable_frac": (good_B, present_B),
            "accuracy": (present_B * right_side(above_B.detach()), present_B),
            "reward.desirable": (reward_B * good_B, good_B),
            "reward.undesirable": (reward_B * bad_B, bad_B),
            "reference_point": (z_B * present_B, present_B),
        }
        return Loss(loss_B.sum(), count, {name: (values.sum(), of.sum()) for name, (values, of) in metrics.items()})
