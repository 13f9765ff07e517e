"""GRPO: group relative policy optimisation (DeepSeekMath, 2402.03300, section 4.1, outcome supervision).

    A_i = (R_i - mean(R)) / (std(R) + 1e-6), the same for each token of sample i; std is the sample's (n - 1)
    maximise mean_i mean_t min(rho A, clip(rho, 1 - low, 1 + high) A) - beta k3(pi, pi_ref)

equation 3, with a mean over the tokens of each sequence, then over sequences; beta 0.04 is the paper's.

Tests: tests/unit/algorithms/test_group_advantages.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from flowrl.algorithms.advantages import group_standardised
from flowrl.algorithms.policy import KL, PolicyGradient
from flowrl.algorithms.surrogate import Normalisation  # noqa: TC001  (msgspec reads the annotation)

if TYPE_CHECKING:
    from flowrl.algorithms.base import AdvantageBatch, Advantages


class GRPO(PolicyGradient):
    """Group relative policy optimisation."""

    compares_group: ClassVar = "mean and std"
    normalisation: Normalisation = "sequence"
    kl: KL = KL(coef=0.04, placement="loss", estimator="k3")

    def advantages(self, batch: AdvantageBatch) -> Advantages:
        """Return the standardised reward of each sample on each of its tokens."""
        return self.group_advantages(batch, group_standardised)
