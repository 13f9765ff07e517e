"""Reward model: the Bradley-Terry loss on pairs (InstructGPT, 2203.02155, equation 1; Llama 2, 2307.09288, equation 2).

    loss = -log sigmoid(r_w - r_l - margin) + centre_coef (r_w + r_l)^2

The batch's `logprobs_BT` are the model's values, read after each token; a response's score r is the value at its last
token under the mask. The column "label" of the chosen response, where the data has one, is the margin (Llama 2: greater
for pairs that annotators found further apart); without it the margin is 0. Scores are defined up to a constant; the
last term keeps them about 0 (Eisenstein 2023, 2312.09244, section 2). The mean is over pairs.

Tests: tests/unit/algorithms/test_preference.py
"""

from __future__ import annotations

from typing import Annotated

from torch.nn.functional import logsigmoid

from flowrl.algorithms.base import Head, Loss, LossBatch
from flowrl.algorithms.functional import last_value
from flowrl.algorithms.pairs import PairObjective, num_pairs, pair_metrics, paired
from flowrl.config import Meta


class Pairwise(PairObjective):
    """Bradley-Terry reward model."""

    use_margin: bool = True  # take the chosen response's label as the margin, where the data has labels
    centre_coef: Annotated[float, Meta(ge=0)] = 0.0  # of (r_w + r_l)^2; 0.01 is usual

    @property
    def head(self) -> Head:
        """Return "reward": the score is read after the last token."""
        return "reward"

    @property
    def gives_score(self) -> bool:
        """Return True: reward-model nodes score whole responses with it."""
        return True

    def loss(self, batch: LossBatch) -> Loss:
        """Return the loss as a sum over pairs and their number.

        Metrics: accuracy, the share of pairs whose chosen response scores higher (the margin apart); margin of the
        scores; reward.chosen and reward.rejected.
        """
        chosen_P, rejected_P = paired(batch, last_value(batch.logprobs_BT, batch.mask_BT))
        advantage_P = chosen_P - rejected_P
        if self.use_margin and "label" in batch.columns:
            margin_P, _ = paired(batch, last_value(batch.columns["label"], batch.mask_BT))
            advantage_P = advantage_P - margin_P
        loss_P = -logsigmoid(advantage_P)
        if self.centre_coef:
            loss_P = loss_P + self.centre_coef * (chosen_P + rejected_P) ** 2
        return Loss(loss_P.sum(), num_pairs(loss_P), pair_metrics(chosen_P, rejected_P))
