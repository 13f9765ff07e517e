"""REINFORCE++ and its variant with a group baseline (Hu 2025, 2501.03262).

    r_t = -beta log(pi_old / pi_ref), plus the score on the last sampled token
    A_t = sum over k >= t of gamma^(k-t) r_k, whitened over every sampled token of the step

No critic. The variant takes the group's mean off the score first and has gamma = 1; its penalty stays in the reward
unless kl.placement=loss (with k2, as later versions of the paper have it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from flowrl.algorithms.advantages import discounted_returns, group_centred
from flowrl.algorithms.base import AdvantageBatch, Advantages
from flowrl.algorithms.functional import has_tokens
from flowrl.algorithms.policy import KL, PolicyGradient
from flowrl.config import Meta

if TYPE_CHECKING:
    from torch import Tensor


class ReinforcePP(PolicyGradient):
    """REINFORCE++: discounted returns, whitened over the step."""

    gamma: Annotated[float, Meta(ge=0, le=1)] = 1.0  # discount of a later token's reward
    kl: KL = KL(coef=0.01)

    @property
    def whitens(self) -> bool:
        """Return True: the step's mean is the baseline."""
        return True

    def baseline(self, scores_B: Tensor, batch: AdvantageBatch) -> Tensor:
        """Return the scores to be credited."""
        return scores_B

    def advantages(self, batch: AdvantageBatch) -> Advantages:
        """Return each token's discounted return."""
        scores_B, metrics = self.shaped_scores(batch)
        rewards_BT = self.shaped_rewards(batch, self.baseline(scores_B, batch))
        return Advantages(discounted_returns(rewards_BT, batch.mask_BT, gamma=self.gamma), None, metrics)


class ReinforcePPBaseline(ReinforcePP):
    """REINFORCE++-baseline: the group's mean comes off each score, then as REINFORCE++ with gamma = 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma != 1.0:
            raise ValueError(f"gamma {self.gamma}: REINFORCE++-baseline is defined for gamma 1; use ReinforcePP")

    @property
    def needs_group(self) -> bool:
        """Return True: the baseline is the group's mean."""
        return True

    def baseline(self, scores_B: Tensor, batch: AdvantageBatch) -> Tensor:
        """Return the scores less their group's mean."""
        self.require_group(batch)
        return group_centred(scores_B, has_tokens(batch.mask_BT))
