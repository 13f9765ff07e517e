"""Dr. GRPO: GRPO without its two biases (2503.20783, section 3.2).

    A_i = R_i - mean(R), the same for each token of sample i
    maximise mean_i (1 / constant_tokens) sum_t min(rho A, clip(rho, 1 - low, 1 + high) A)

Not dividing by the standard deviation removes the bias towards easy and hard questions; dividing by a constant instead
of the sequence's length removes the bias towards long wrong answers. The paper uses no KL term.

Tests: tests/unit/algorithms/test_group_advantages.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from flowrl.algorithms.advantages import group_centred
from flowrl.algorithms.policy import PolicyGradient
from flowrl.algorithms.surrogate import Normalisation  # noqa: TC001  (msgspec reads the annotation)

if TYPE_CHECKING:
    from flowrl.algorithms.base import AdvantageBatch, Advantages


class DrGRPO(PolicyGradient):
    """GRPO done right."""

    compares_group: ClassVar = "mean"  # the baseline is the group's mean
    normalisation: Normalisation = "constant"

    def advantages(self, batch: AdvantageBatch) -> Advantages:
        """Return the reward of each sample less the group's mean, on each of its tokens."""
        return self.group_advantages(batch, group_centred)
