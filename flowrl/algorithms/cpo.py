"""CPO: contrastive preference optimisation, without a reference (Xu 2024, 2401.08417, equation 6).

    loss = -log sigmoid(beta (lp_w - lp_l)) - nll_coef lp_w / |y_w|, log-probs summed over response tokens

The second term keeps the chosen response likely, as a mean over its tokens. The mean is over pairs.

Tests: tests/unit/algorithms/test_preference.py
"""

from __future__ import annotations

from typing import Annotated

from torch.nn.functional import logsigmoid

from flowrl.algorithms.base import Loss, LossBatch
from flowrl.algorithms.functional import masked, sequence_mean
from flowrl.algorithms.pairs import PairObjective, num_pairs, pair_metrics, paired
from flowrl.config import Meta


class CPO(PairObjective):
    """Contrastive preference optimisation."""

    beta: Annotated[float, Meta(gt=0)] = 0.1  # per nat
    nll_coef: Annotated[float, Meta(ge=0)] = 1.0  # of the chosen response's mean NLL per token

    def loss(self, batch: LossBatch) -> Loss:
        """Return the loss as a sum over pairs and their number; metrics as DPO's, and nll."""
        chosen_P, rejected_P = paired(batch, self.beta * masked(batch.logprobs_BT, batch.mask_BT).sum(1))
        likelihood_P, _ = paired(batch, sequence_mean(batch.logprobs_BT, batch.mask_BT))
        loss_P = -logsigmoid(chosen_P - rejected_P) - self.nll_coef * likelihood_P
        metrics = pair_metrics(chosen_P, rejected_P)
        metrics["nll"] = (-likelihood_P.detach().sum(), num_pairs(likelihood_P))
        return Loss(loss_P.sum(), num_pairs(loss_P), metrics)
