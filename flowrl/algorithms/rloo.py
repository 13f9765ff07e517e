"""RLOO: REINFORCE with a leave-one-out baseline (Ahmadian 2024, 2402.14740).

    R_i = score_i - beta sum_t log(pi_old / pi_ref)
    A_i = R_i - mean of the other samples' R, the same for each token of sample i

The paper takes one step on fresh samples; here the clipped surrogate of PPO stands in for log pi, whose gradient is
the same there. The mean over the step's tokens is the paper's sum over tokens up to a factor common to the step.

Tests: tests/unit/algorithms/test_group_advantages.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from flowrl.algorithms.advantages import leave_one_out
from flowrl.algorithms.policy import KL, PolicyGradient

if TYPE_CHECKING:
    from flowrl.algorithms.base import AdvantageBatch, Advantages


class RLOO(PolicyGradient):
    """REINFORCE leave-one-out."""

    compares_group: ClassVar = "mean"  # the baseline is the mean of the group's other samples
    kl: KL = KL(coef=0.05)

    def advantages(self, batch: AdvantageBatch) -> Advantages:
        """Return the reward of each sample less the mean of the others', on each of its tokens."""
        return self.group_advantages(batch, leave_one_out)
