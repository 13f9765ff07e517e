"""ORPO: odds ratio preference optimisation, SFT and preference in one (Hong 2024, 2403.07691, equations 6 and 7).

    log odds = m - log(1 - exp(m)), m the response's mean log-prob a token
    loss = -m_w - lam log sigmoid(log odds_w - log odds_l)

No reference and no SFT before it. A response's reward is lam times its log odds. The mean is over pairs.

Tests: tests/unit/algorithms/test_preference.py
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch.nn.functional import logsigmoid

from flowrl.algorithms.base import Loss, LossBatch
from flowrl.algorithms.functional import sequence_mean
from flowrl.algorithms.pairs import PairObjective, num_pairs, pair_metrics, paired
from flowrl.config import Meta

CERTAIN = -1e-6  # a mean log-prob above this has no finite odds in float32


class ORPO(PairObjective):
    """Odds ratio preference optimisation."""

    lam: Annotated[float, Meta(ge=0)] = 0.1  # of the odds ratio, beside the likelihood

    def loss(self, batch: LossBatch) -> Loss:
        """Return the loss as a sum over pairs and their number; metrics as DPO's, and nll."""
        likelihood_B = sequence_mean(batch.logprobs_BT, batch.mask_BT)
        held_B = likelihood_B.clamp_max(CERTAIN)
        log_odds_B = held_B - torch.log(-torch.expm1(held_B))
        chosen_P, rejected_P = paired(batch, log_odds_B)
        likelihood_P, _ = paired(batch, likelihood_B)
        loss_P = -likelihood_P - self.lam * logsigmoid(chosen_P - rejected_P)
        metrics = pair_metrics(self.lam * chosen_P, self.lam * rejected_P)
        metrics["nll"] = (-likelihood_P.detach().sum(), num_pairs(likelihood_P))
        return Loss(loss_P.sum(), num_pairs(loss_P), metrics)
