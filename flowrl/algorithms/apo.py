"""APO: anchored preference optimisation (D'Oosterlinck 2024, 2408.06266, section 3).

    h = beta (lp - ref), log-probs summed over response tokens
    zero: loss = (1 - sigmoid(h_w)) + sigmoid(h_l)                    better answers than the policy's: raise, lower
    down: loss = sigmoid(h_w) + (1 - sigmoid(h_w - h_l))              worse ones: lower both, the rejected one more

DPO sees the difference of a pair alone, and may lower both; here each response is anchored at the reference. The mean
is over pairs.

Tests: tests/unit/algorithms/test_preference.py
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch

from flowrl.algorithms.base import Loss, LossBatch
from flowrl.algorithms.pairs import PairObjective, log_ratios, num_pairs, pair_metrics, paired
from flowrl.config import Meta


class APO(PairObjective):
    """Anchored preference optimisation."""

    beta: Annotated[float, Meta(gt=0)] = 0.1  # per nat: greater keeps the policy closer to the reference
    anchor: Literal["zero", "down"] = "zero"  # whether the chosen responses are better than the policy's own

    def loss(self, batch: LossBatch) -> Loss:
        """Return the loss as a sum over pairs and their number; metrics as DPO's."""
        chosen_P, rejected_P = paired(batch, self.beta * log_ratios(batch).sum(1))
        if self.anchor == "zero":
            loss_P = 1.0 - torch.sigmoid(chosen_P) + torch.sigmoid(rejected_P)
        else:
            loss_P = torch.sigmoid(chosen_P) + 1.0 - torch.sigmoid(chosen_P - rejected_P)
        return Loss(loss_P.sum(), num_pairs(loss_P), pair_metrics(chosen_P, rejected_P))
