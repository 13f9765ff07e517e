"""ReMax: REINFORCE with the reward of the likeliest response as baseline (Li 2023, 2310.10505, section 4, algorithm 1).

    r_t = -beta log(pi_old / pi_ref), plus the score on the last sampled token
    A_t = sum over k >= t of r_k, less the score of the greedy response to the same prompt

No critic, and no group: one sample of a prompt is enough. The greedy response comes from the policy that samples, is
scored as the samples are, without the penalty, and never learned. Where rewards are placed on turns or steps, each is
compared with what the greedy response had still to earn at its beginning, 0 behind its end. Its whole score would
punish every late turn. The clipped surrogate stands in for the paper's log pi, whose gradient is the same on fresh
samples.

Tests: tests/unit/algorithms/test_group_advantages.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from flowrl.algorithms.advantages import discounted_returns, segment_starts, segments
from flowrl.algorithms.base import AdvantageBatch, Advantages
from flowrl.algorithms.functional import has_tokens, masked
from flowrl.algorithms.policy import KL, PolicyGradient
from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class ReMax(PolicyGradient):
    """REINFORCE with a greedy baseline."""

    kl: KL = KL(coef=0.01)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mean_range:
            what = f"mean_range {self.mean_range}: ReMax compares a sample with the greedy response, not with its group"
            raise ValueError(f"{what}; leave it out")

    @property
    def needs_greedy(self) -> bool:
        """Return True: the baseline is the score of the greedy response."""
        return True

    @property
    def needs_group(self) -> bool:
        """Return False, also where groups are filtered: a sample is compared with the greedy response."""
        return False

    @property
    def centred_by(self) -> str:
        """Return what a score is compared with."""
        return "the greedy response's score"

    def keeps(self, batch: AdvantageBatch) -> bool:
        """Return whether a group has an answer to learn and, where groups are filtered, one that differs in score."""
        if not self.filter_groups:
            return super().keeps(batch)
        scores_B, baseline = self._scores(batch)
        learned_B = has_tokens(batch.mask_BT) > 0
        if self.mask_cut and batch.cut_B is not None:
            learned_B = learned_B & (batch.cut_B <= 0)
        return bool((scores_B != baseline)[learned_B].any())

    def advantages(self, batch: AdvantageBatch) -> Advantages:
        """Return each token's reward to go less the score of the greedy response."""
        scores_B, metrics = self.shaped_scores(batch)
        _, baseline = self._scores(batch)
        present_B = has_tokens(batch.mask_BT) > 0
        metrics["groups.mixed"] = float((scores_B != baseline)[present_B].any())
        metrics["reward.greedy"] = float(baseline)
        returns_BT = discounted_returns(self.shaped_rewards(batch, scores_B), batch.mask_BT, gamma=1.0)
        if batch.placed_BT is not None:
            starts_S = self._greedy_to_go(batch)
            baseline = starts_S[segments(batch.mask_BT, batch.placed_BT).clamp_max(len(starts_S) - 1)]
        return Advantages(masked(returns_BT - baseline, batch.mask_BT), None, metrics)

    def _greedy_to_go(self, batch: AdvantageBatch) -> Tensor:
        """Return what the greedy response had still to earn at the beginning of each of its turns or steps, then 0."""
        greedy = batch.greedy
        assert greedy is not None, "`_scores` has refused it"
        assert greedy.placed_BT is not None, "a group's responses are rewarded alike"
        unpenalised = msgspec.structs.replace(self, kl=KL())
        rewards_BT = unpenalised.shaped_rewards(greedy, self.shaped_scores(greedy)[0])
        to_go_BT = discounted_returns(rewards_BT, greedy.mask_BT, gamma=1.0)
        return segment_starts(to_go_BT[0], segments(greedy.mask_BT, greedy.placed_BT)[0], greedy.mask_BT[0])

    def _scores(self, batch: AdvantageBatch) -> tuple[Tensor, Tensor]:
        """Return the samples' scores as they are learned, and the greedy response's."""
        if batch.greedy is None:
            what = "ReMax takes off the score of the greedy response, which nothing has sampled"
            raise ConfigError("algorithm", what, "set greedy_baseline=true in graphs/group_async.py")
        return self.shaped_scores(batch)[0], self.shaped_scores(batch.greedy)[0][0]
