"""GMPO: geometric-mean policy optimisation (Zhao 2025, 2507.20673, equation 4).

    g_i = exp(mean_t s min(s log rho_t, clip(s log rho_t, -width, width))), s the sign of A_i
    maximise mean_i g_i A_i, with GRPO's advantages

GRPO takes the arithmetic mean of a sequence's clipped ratios, this the geometric one, which a single unlikely token
does not throw. rho is against the policy that sampled; the width, in nats, is the paper's 0.4 and bounds tokens, so it
is wider than PPO's. Only the side on which learning moves away is clipped, as in PPO.

Tests: tests/unit/algorithms/test_losses.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from flowrl.algorithms.advantages import group_standardised
from flowrl.algorithms.policy import PolicyGradient
from flowrl.algorithms.surrogate import Normalisation, sequence_log_ratio
from flowrl.config import Meta

if TYPE_CHECKING:
    from torch import Tensor

    from flowrl.algorithms.base import AdvantageBatch, Advantages


class GMPO(PolicyGradient):
    """Geometric-mean policy optimisation."""

    has_own_region: ClassVar = True  # log ratios are clipped before their mean
    compares_group: ClassVar = "mean and std"
    width: Annotated[float, Meta(gt=0)] = 0.4  # nats; a token's log ratio counts up to this on the side it is pushed to
    normalisation: Normalisation = "sequence"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalisation != "sequence":
            raise ValueError(f"normalisation {self.normalisation}: GMPO's mean is a sequence's; use sequence, or GRPO")

    @property
    def bounds(self) -> tuple[str, ...]:
        """Return what is in the clip's place."""
        return ("width",)

    def advantages(self, batch: AdvantageBatch) -> Advantages:
        """Return the standardised reward of each sample on each of its tokens."""
        return self.group_advantages(batch, group_standardised)

    def surrogates(self, log_ratio_BT: Tensor, advantages_BT: Tensor, logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return g A on each of a sequence's tokens."""
        sign_BT = torch.where(advantages_BT > 0, 1.0, -1.0).to(log_ratio_BT.dtype)
        pushed_BT = sign_BT * log_ratio_BT
        held_BT = sign_BT * torch.minimum(pushed_BT, pushed_BT.clamp(-self.width, self.width))
        return torch.exp(sequence_log_ratio(held_BT, mask_BT)) * advantages_BT

    def clipped(self, ratio_BT: Tensor, advantages_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return where a token's log ratio is held: below where A < 0, above where A > 0."""
        log_BT = ratio_BT.log()
        return (log_BT < -self.width) & (advantages_BT <= 0), (log_BT > self.width) & (advantages_BT > 0)
