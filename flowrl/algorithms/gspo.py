"""GSPO: group sequence policy optimisation (Qwen, 2507.18071, equations 5 to 7).

    s_i = (pi(y_i) / pi_old(y_i))^(1 / |y_i|)
    maximise mean_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i), with GRPO's advantages

pi_old is the policy that sampled. Ratio, clip and correction weight belong to the whole sequence, so the loss is a mean
over sequences. The clip range is that of the paper, for long answers: a mean over tokens moves far less than one
token's ratio. Short answers, and samples some versions old, leave so narrow a range at once: watch the clipped shares.

Tests: tests/unit/algorithms/test_losses.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from flowrl.algorithms.advantages import group_standardised
from flowrl.algorithms.functional import log_ratio
from flowrl.algorithms.policy import PolicyGradient
from flowrl.algorithms.surrogate import Normalisation, sequence_log_ratio
from flowrl.config import Meta

if TYPE_CHECKING:
    from torch import Tensor

    from flowrl.algorithms.base import AdvantageBatch, Advantages


class GSPO(PolicyGradient):
    """Group sequence policy optimisation."""

    has_own_region: ClassVar = True  # whole sequences are clipped
    compares_group: ClassVar = "mean and std"
    clip_low: Annotated[float, Meta(ge=0, le=1)] = 3e-4  # sequence ratios count down to 1 - this
    clip_high: Annotated[float, Meta(ge=0)] = 4e-4  # sequence ratios count up to 1 + this
    normalisation: Normalisation = "sequence"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalisation != "sequence":
            raise ValueError(f"normalisation {self.normalisation}: GSPO's ratio is a sequence's; use sequence, or GRPO")

    def advantages(self, batch: AdvantageBatch) -> Advantages:
        """Return the standardised reward of each sample on each of its tokens."""
        return self.group_advantages(batch, group_standardised)

    def log_ratio(self, logprobs_BT: Tensor, anchor_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the sequence's mean log ratio on each of its tokens."""
        return sequence_log_ratio(log_ratio(logprobs_BT, anchor_BT), mask_BT)
