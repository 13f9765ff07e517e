"""DAPO: four changes to GRPO (2503.14476, section 3).

    asymmetric clip (3.1): low 0.2, high 0.28, so that unlikely tokens can rise
    dynamic sampling (3.2): groups whose rewards are all equal teach nothing and are filtered (`filter_groups`)
    token-level loss (3.3): a mean over the step's tokens, not over sequences
    overlong filtering (3.4): answers that were cut are left out of the loss (`mask_cut`), off unless set
    overlong penalty (3.4): `shaping.overlong_buffer` tokens before the longest answer, off unless set

Advantages are GRPO's; there is no KL term.

Tests: tests/unit/algorithms/test_shaping.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from flowrl.algorithms.advantages import group_standardised
from flowrl.algorithms.policy import PolicyGradient
from flowrl.config import Meta

if TYPE_CHECKING:
    from flowrl.algorithms.base import AdvantageBatch, Advantages


class DAPO(PolicyGradient):
    """Decoupled clip and dynamic sampling policy optimisation."""

    compares_group: ClassVar = "mean and std"
    clip_high: Annotated[float, Meta(ge=0)] = 0.28  # ratios count up to 1 + this
    filter_groups: bool = True  # leave out groups whose rewards are all equal

    def advantages(self, batch: AdvantageBatch) -> Advantages:
        """Return the standardised reward of each sample on each of its tokens."""
        return self.group_advantages(batch, group_standardised)
