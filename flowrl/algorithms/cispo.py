"""CISPO: the importance weight is clipped instead of the update (MiniMax-M1, 2506.13585, equations 4 and 5).

    maximise sum_i sum_t sg(clip(rho, 1 - low, 1 + high)) A_i log pi / sum_i |o_i|, with GRPO's advantages

rho is against the policy that sampled, as in the paper: its clipped weight is the correction for older samples. The
paper sets no lower bound (low = 1) and tunes the upper one without stating it; a weight of at most 5 follows ScaleRL
(2510.13786). No KL term.

Tests: tests/unit/algorithms/test_losses.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from flowrl.algorithms.advantages import group_standardised
from flowrl.algorithms.policy import PolicyGradient
from flowrl.algorithms.surrogate import weighted_logprob
from flowrl.config import Meta

if TYPE_CHECKING:
    from torch import Tensor

    from flowrl.algorithms.base import AdvantageBatch, Advantages


class CISPO(PolicyGradient):
    """Clipped importance-sampling policy optimisation."""

    has_own_region: ClassVar = True  # weights are clipped
    compares_group: ClassVar = "mean and std"
    clip_low: Annotated[float, Meta(ge=0, le=1)] = 1.0  # weights are at least 1 - this
    clip_high: Annotated[float, Meta(ge=0)] = 4.0  # weights are at most 1 + this

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_clip:
            raise ValueError(f"dual_clip {self.dual_clip}: CISPO clips weights, not the surrogate; set it to 0")

    @property
    def needs_full_sampling(self) -> bool:
        """Return whether sequences are kept or left out only; else its own weight or a correction is pi / pi_old."""
        return self.correction.kind == "sequence"

    def advantages(self, batch: AdvantageBatch) -> Advantages:
        """Return the standardised reward of each sample on each of its tokens."""
        return self.group_advantages(batch, group_standardised)

    def surrogate(self, ratio_BT: Tensor, advantages_BT: Tensor, logprobs_BT: Tensor) -> Tensor:
        """Return the log-prob times its advantage and clipped weight."""
        return weighted_logprob(ratio_BT, advantages_BT, logprobs_BT, low=self.clip_low, high=self.clip_high)

    def clipped(self, ratio_BT: Tensor, advantages_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the weight is clipped, whatever the advantage."""
        return ratio_BT < 1.0 - self.clip_low, ratio_BT > 1.0 + self.clip_high
