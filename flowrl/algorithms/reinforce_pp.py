"""REINFORCE++ and its variant with a group baseline (Hu 2025, 2501.03262).

    r_t = -beta log(pi_old / pi_ref), plus the score on the last sampled token
    A_t = sum over k >= t of gamma^(k-t) r_k, whitened over every sampled token of the step

No critic. The variant takes the group's mean off the score first and has gamma = 1; its penalty stays in the reward
unless kl.placement=loss (with k2, as later versions of the paper have it). Where rewards are placed on turns or steps,
what comes off a token's return to go is the group's mean from the beginning of the same turn or step. The mean of whole
returns would punish every late turn, from which less is left to earn.

Tests: tests/unit/algorithms/test_group_advantages.py
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from flowrl.algorithms.advantages import discounted_returns, group_centred, segment_means, segments
from flowrl.algorithms.base import AdvantageBatch, Advantages
from flowrl.algorithms.functional import has_tokens, masked
from flowrl.algorithms.policy import KL, PolicyGradient
from flowrl.config import Meta


class ReinforcePP(PolicyGradient):
    """REINFORCE++: discounted returns, whitened over the step."""

    gamma: Annotated[float, Meta(ge=0, le=1)] = 1.0  # discount of a later token's reward
    kl: KL = KL(coef=0.01)

    @property
    def whitens(self) -> bool:
        """Return True: the step's mean is the baseline."""
        return True

    @property
    def centred_by(self) -> str:
        """Return what whitening, or the group's baseline before it, takes off, where each token has the whole score."""
        return super().centred_by or ("the step's mean" if self.gamma == 1.0 else "")

    @property
    def divided_by(self) -> str:
        """Return what whitening divides by."""
        return "the step's std"

    def advantages(self, batch: AdvantageBatch) -> Advantages:
        """Return each token's discounted return."""
        scores_B, metrics = self.shaped_scores(batch)
        rewards_BT = self.shaped_rewards(batch, scores_B)
        return Advantages(discounted_returns(rewards_BT, batch.mask_BT, gamma=self.gamma), None, metrics)


class ReinforcePPBaseline(ReinforcePP):
    """REINFORCE++-baseline: the group's mean comes off each score, then as REINFORCE++ with gamma = 1."""

    compares_group: ClassVar = "mean"  # the baseline is the group's mean

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma != 1.0:
            raise ValueError(f"gamma {self.gamma}: REINFORCE++-baseline is defined for gamma 1; use ReinforcePP")

    def advantages(self, batch: AdvantageBatch) -> Advantages:
        """Return each token's return less the group's mean, of whole scores or of returns to go by turn."""
        self.require_group(batch)
        scores_B, metrics = self.shaped_scores(batch)
        mask_BT = batch.mask_BT
        if batch.placed_BT is None:
            rewards_BT = self.shaped_rewards(batch, group_centred(scores_B, has_tokens(mask_BT)))
            return Advantages(discounted_returns(rewards_BT, mask_BT, gamma=1.0), None, metrics)
        unpenalised = msgspec.structs.replace(self, kl=KL())
        to_go_BT = discounted_returns(unpenalised.shaped_rewards(batch, scores_B), mask_BT, gamma=1.0)
        baseline_BT = segment_means(to_go_BT, segments(mask_BT, batch.placed_BT), mask_BT)
        returns_BT = discounted_returns(self.shaped_rewards(batch, scores_B), mask_BT, gamma=1.0)
        return Advantages(masked(returns_BT - baseline_BT, mask_BT), None, metrics)
