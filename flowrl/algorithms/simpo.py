"""SimPO: simple preference optimisation, without a reference (Meng 2024, 2405.14734, equation 6).

    r = beta mean_t lp_t
    loss = -log sigmoid(r_w - r_l - gamma)

The reward is what generation goes by, the mean log-prob, so length alone earns nothing. The paper's gamma is 0.3 to 1.6
times beta by the model, and its beta 2 to 10. The mean is over pairs.

Tests: tests/unit/algorithms/test_preference.py
"""

from __future__ import annotations

from typing import Annotated

from torch.nn.functional import logsigmoid

from flowrl.algorithms.base import Loss, LossBatch
from flowrl.algorithms.functional import sequence_mean
from flowrl.algorithms.pairs import PairObjective, num_pairs, pair_metrics, paired
from flowrl.config import Meta


class SimPO(PairObjective):
    """Simple preference optimisation."""

    beta: Annotated[float, Meta(gt=0)] = 2.0  # per nat a token
    gamma: Annotated[float, Meta(ge=0)] = 1.0  # margin of rewards aimed at

    def loss(self, batch: LossBatch) -> Loss:
        """Return the loss as a sum over pairs and their number; metrics as DPO's."""
        chosen_P, rejected_P = paired(batch, self.beta * sequence_mean(batch.logprobs_BT, batch.mask_BT))
        loss_P = -logsigmoid(chosen_P - rejected_P - self.gamma)
        return Loss(loss_P.sum(), num_pairs(loss_P), pair_metrics(chosen_P, rejected_P))
