"""Supervised fine-tuning: the mean negative log-likelihood of the step's masked response tokens.

    loss = -sum_t log pi(y_t | x, y_<t) / number of tokens

The mean is over all tokens of a step, not over its responses, so a long response weighs more than a short one
(InstructGPT, 2203.02155, section 3.5, step 1). In a conversation the mask is 1 on the assistant's own tokens; rejection
sampling (RAFT, 2304.06767) and conditional training (SteerLM, 2310.05344) are this loss on data chosen or written so.

Tests: tests/unit/algorithms/test_supervised.py
"""

from __future__ import annotations

from flowrl.algorithms.base import Loss, LossBatch, Objective
from flowrl.algorithms.functional import masked


class SFT(Objective):
    """Negative log-likelihood of demonstrations."""

    def loss(self, batch: LossBatch) -> Loss:
        """Return the negative log-likelihood as a sum over masked tokens and their number."""
        mask_BT = batch.mask_BT
        logprobs_BT = masked(batch.logprobs_BT, mask_BT)
        count = mask_BT.sum()
        probability = masked(logprobs_BT.detach().exp(), mask_BT).sum()
        return Loss(-logprobs_BT.sum(), count, {"token_probability": (probability, count)})
