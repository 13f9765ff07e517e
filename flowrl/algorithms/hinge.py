"""Hinge loss on DPO's margin (SLiC-HF, 2305.10425, as a loss on log ratios: RSO, 2309.06657, section 3.2).

    h = beta ((lp_w - ref_w) - (lp_l - ref_l)), log-probs summed over response tokens
    loss = max(0, 1 - h)

Where DPO drives a margin on without end, this one lets a pair rest once its margin is 1. The mean is over pairs.

Tests: tests/unit/algorithms/test_preference.py
"""

from __future__ import annotations

from typing import Annotated

from flowrl.algorithms.base import Loss, LossBatch
from flowrl.algorithms.pairs import PairObjective, log_ratios, num_pairs, pair_metrics, paired
from flowrl.config import Meta


class Hinge(PairObjective):
    """Hinge loss on the margin of implicit rewards."""

    beta: Annotated[float, Meta(gt=0)] = 0.1  # per nat: a pair rests when its log ratios differ by 1 / beta

    def loss(self, batch: LossBatch) -> Loss:
        """Return the loss as a sum over pairs and their number; metrics as DPO's."""
        chosen_P, rejected_P = paired(batch, self.beta * log_ratios(batch).sum(1))
        loss_P = (1.0 - (chosen_P - rejected_P)).clamp_min(0.0)
        return Loss(loss_P.sum(), num_pairs(loss_P), pair_metrics(chosen_P, rejected_P))
