"""The pre-training loss beside a policy's: PPO-ptx (InstructGPT, 2203.02155, section 3.5, equation 2).

    coef * -sum_t log pi(x_t | x_<t) / number of tokens, over the texts of a step

Its gradient is added to that of the policy's loss, each divided by its own number of tokens. How many texts there are
beside how many samples does not change what `coef` means. The paper's 27.8 weighs sums over batches of other sizes.
Whatever temperature samples are drawn at, a text's likelihood is the model's own.

Tests: tests/unit/algorithms/test_supervised.py
"""

from __future__ import annotations

from typing import Annotated

from flowrl.algorithms.base import Loss, LossBatch, Objective
from flowrl.algorithms.functional import masked
from flowrl.config import Meta


class Pretraining(Objective):
    """Weighted negative log-likelihood of texts."""

    coef: Annotated[float, Meta(gt=0)] = 0.05  # as OpenRLHF's default

    @property
    def temperature(self) -> float:
        """Return 1."""
        return 1.0

    @property
    def is_beside(self) -> bool:
        """Return True: the policy's loss is the step's own."""
        return True

    def loss(self, batch: LossBatch) -> Loss:
        """Return the weighted negative log-likelihood as a sum over masked tokens and their number; metric: nll."""
        total = -masked(batch.logprobs_BT, batch.mask_BT).sum()
        count = batch.mask_BT.sum()
        return Loss(self.coef * total, count, {"nll": (total.detach(), count)})
