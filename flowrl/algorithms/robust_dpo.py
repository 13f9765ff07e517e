"""Robust DPO: an unbiased DPO loss where pairs are labelled wrongly (Ray Chowdhury 2024, 2403.00409, equation 12).

    h = beta ((lp_w - ref_w) - (lp_l - ref_l)), log-probs summed over response tokens
    loss = (-(1 - e) log sigmoid(h) + e log sigmoid(-h)) / (1 - 2 e)

e is the probability that a label is flipped. Its mean over flips is DPO's loss on the right labels; cDPO (in dpo.py)
adds where this takes away, and aims at a margin instead. The mean is over pairs.

Tests: tests/unit/algorithms/test_preference.py
"""

from __future__ import annotations

from typing import Annotated

from torch.nn.functional import logsigmoid

from flowrl.algorithms.base import Loss, LossBatch
from flowrl.algorithms.pairs import PairObjective, log_ratios, num_pairs, pair_metrics, paired
from flowrl.config import Meta


class RobustDPO(PairObjective):
    """DPO without the bias of flipped labels."""

    beta: Annotated[float, Meta(gt=0)] = 0.1  # per nat: greater keeps the policy closer to the reference
    flipped: Annotated[float, Meta(ge=0, lt=0.5)] = 0.1  # e: the part of pairs labelled wrongly

    def loss(self, batch: LossBatch) -> Loss:
        """Return the loss as a sum over pairs and their number; metrics as DPO's."""
        chosen_P, rejected_P = paired(batch, self.beta * log_ratios(batch).sum(1))
        margin_P = chosen_P - rejected_P
        loss_P = -(1.0 - self.flipped) * logsigmoid(margin_P) + self.flipped * logsigmoid(-margin_P)
        loss_P = loss_P / (1.0 - 2.0 * self.flipped)
        return Loss(loss_P.sum(), num_pairs(loss_P), pair_metrics(chosen_P, rejected_P))
