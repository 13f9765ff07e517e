"""The critic's loss: squared error to the returns, with the clipping of PPO's reference implementation.

    0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)

summed over sampled tokens (algorithms: value loss; OpenRLHF paper, section 3.3). `logprobs_BT` of the batch are values.
"""

from __future__ import annotations

from typing import Annotated

import torch

from flowrl.algorithms.base import Loss, LossBatch, Objective
from flowrl.algorithms.functional import masked
from flowrl.config import Meta


class ValueLoss(Objective):
    """Clipped squared error of the values."""

    clip: Annotated[float, Meta(ge=0)] = 0.2  # values may move so far from what they were when sampled; 0: any distance

    def loss(self, batch: LossBatch) -> Loss:
        """Return the value loss as a sum over sampled tokens."""
        values_BT = masked(batch.logprobs_BT, batch.mask_BT)
        old_BT = masked(batch.columns["values"], batch.mask_BT)
        returns_BT = masked(batch.columns["returns"], batch.mask_BT)
        loss_BT = (values_BT - returns_BT) ** 2
        if self.clip:
            clipped_BT = old_BT + (values_BT - old_BT).clamp(-self.clip, self.clip)
            loss_BT = torch.maximum(loss_BT, (clipped_BT - returns_BT) ** 2)
        total, count = 0.5 * loss_BT.sum(), batch.mask_BT.sum()
        error_BT = (returns_BT - values_BT).detach()
        return Loss(total, count, {"value_error": (error_BT.abs().sum(), count)})
