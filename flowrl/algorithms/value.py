"""The critic's loss: squared error to the returns, with the clipping of PPO's reference implementation.

    0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), mean over the step's sampled tokens

The batch's `logprobs_BT` are the values V; its columns "values" (V_old) and "returns" (R) come from `advantages`.
V_old is the value when the group was sampled, so the clip acts from a step's second update on. Metrics: value_loss;
value_clip_frac.

Tests: tests/unit/algorithms/test_losses.py
"""

from __future__ import annotations

from typing import Annotated

from flowrl.algorithms.base import Head, Loss, LossBatch, Objective
from flowrl.algorithms.functional import masked
from flowrl.algorithms.surrogate import clipped_value_error
from flowrl.config import Meta


class ValueLoss(Objective):
    """Clipped squared error of the values."""

    # values may move so far from what they were when sampled, in the critic's units (return_scale.py); 0: any distance
    clip: Annotated[float, Meta(ge=0)] = 0.2

    @property
    def head(self) -> Head:
        """Return "value": V(s_t) is read before each token."""
        return "value"

    def loss(self, batch: LossBatch) -> Loss:
        """Return the value loss as a sum over sampled tokens and their number."""
        mask_BT = batch.mask_BT
        values_BT = masked(batch.logprobs_BT, mask_BT)
        old_BT = masked(batch.columns["values"], mask_BT)
        returns_BT = masked(batch.columns["returns"], mask_BT)
        loss_BT = clipped_value_error(values_BT, old_BT, returns_BT, self.clip)
        total, count = loss_BT.sum(), mask_BT.sum()
        is_clipped_BT = (values_BT - old_BT).detach().abs() > (self.clip or float("inf"))
        sums = {
            "value_loss": total.detach(),
            "value_clip_frac": is_clipped_BT.to(total.dtype).sum(),
        }
        return Loss(total, count, {name: (value, count) for name, value in sums.items()})
