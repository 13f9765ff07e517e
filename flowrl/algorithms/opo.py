"""OPO: on-policy reinforcement learning with an optimal reward baseline (Hao 2025, 2505.23585, section 3).

    A_i = R_i - sum_j l_j R_j / sum_j l_j, l the number of sampled tokens, the same for each token of sample i

The baseline of least variance weighs rewards by squared gradient norms, taken to grow with an answer's length. The
paper trains exactly on-policy, with neither KL nor entropy term; here the clip about the policy that sampled stays for
what an asynchronous run adds.

Tests: tests/unit/algorithms/test_group_advantages.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from flowrl.algorithms.advantages import length_weighted
from flowrl.algorithms.policy import PolicyGradient

if TYPE_CHECKING:
    from flowrl.algorithms.base import AdvantageBatch, Advantages


class OPO(PolicyGradient):
    """Policy gradient with the optimal reward baseline."""

    compares_group: ClassVar = "mean"  # the baseline is the group's weighted mean

    def advantages(self, batch: AdvantageBatch) -> Advantages:
        """Return the reward of each sample less the group's mean by length, on each of its tokens."""
        lengths_B = (batch.mask_BT > 0).sum(1)
        return self.group_advantages(batch, lambda rewards_B, _: length_weighted(rewards_B, lengths_B))
