"""IPO: identity preference optimisation (Azar 2023, 2310.12036, equation 17).

    h = (lp_w - ref_w) - (lp_l - ref_l)
    loss = (h - 1 / (2 beta))^2

Where DPO drives a pair's margin on without end, this one stops at 1 / (2 beta). The paper sums log-probs over tokens;
its authors' implementation takes their mean, so that the target does not depend on length, and so does ours by default:
`reduction`. A response's reward is beta (lp - ref), reduced alike. The mean is over pairs.

Tests: tests/unit/algorithms/test_preference.py
"""

from __future__ import annotations

from typing import Annotated, Literal

from flowrl.algorithms.base import Loss, LossBatch
from flowrl.algorithms.functional import sequence_mean
from flowrl.algorithms.pairs import PairObjective, log_ratios, num_pairs, pair_metrics, paired
from flowrl.config import Meta


class IPO(PairObjective):
    """Identity preference optimisation."""

    beta: Annotated[float, Meta(gt=0)] = 0.1  # the margin aimed at is 1 / (2 beta) nats
    reduction: Literal["mean", "sum"] = "mean"  # of log-probs over a response's tokens

    def loss(self, batch: LossBatch) -> Loss:
        """Return the loss as a sum over pairs and their number; metrics as DPO's."""
        log_ratios_BT = log_ratios(batch)
        is_mean = self.reduction == "mean"
        log_ratio_B = sequence_mean(log_ratios_BT, batch.mask_BT) if is_mean else log_ratios_BT.sum(1)
        chosen_P, rejected_P = paired(batch, log_ratio_B)
        loss_P = (chosen_P - rejected_P - 0.5 / self.beta) ** 2
        return Loss(loss_P.sum(), num_pairs(loss_P), pair_metrics(self.beta * chosen_P, self.beta * rejected_P))
