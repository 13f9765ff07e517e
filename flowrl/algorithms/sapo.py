"""SAPO: soft adaptive policy optimisation (Qwen, 2511.20347, equations 5 and 6).

    f(rho) = 4 / tau sigmoid(tau (rho - 1)), tau = tau_positive where A > 0, else tau_negative
    maximise mean_i mean_t f(rho) A_i, with GRPO's advantages, rho against the policy that sampled

f is a clip without an edge: its slope is 1 at rho = 1 and falls off on both sides. Bad tokens fall off a little sooner
(tau_negative > tau_positive), for raising all other tokens in their place is noisier than raising one good one.

Tests: tests/unit/algorithms/test_losses.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from flowrl.algorithms.advantages import group_standardised
from flowrl.algorithms.policy import PolicyGradient
from flowrl.algorithms.surrogate import Normalisation  # noqa: TC001  (msgspec reads the annotation)
from flowrl.config import Meta

if TYPE_CHECKING:
    from torch import Tensor

    from flowrl.algorithms.base import AdvantageBatch, Advantages

FADED = 0.5  # of the slope: a token below this is told as clipped


class SAPO(PolicyGradient):
    """Soft adaptive policy optimisation."""

    has_own_region: ClassVar = True  # the gate bounds the ratio
    compares_group: ClassVar = "mean and std"
    tau_positive: Annotated[float, Meta(gt=0)] = 1.0  # how soon good tokens stop counting
    tau_negative: Annotated[float, Meta(gt=0)] = 1.05  # and bad ones
    normalisation: Normalisation = "sequence"

    @property
    def bounds(self) -> tuple[str, ...]:
        """Return what is in the clip's place."""
        return ("tau_positive", "tau_negative")

    def advantages(self, batch: AdvantageBatch) -> Advantages:
        """Return the standardised reward of each sample on each of its tokens."""
        return self.group_advantages(batch, group_standardised)

    def surrogate(self, ratio_BT: Tensor, advantages_BT: Tensor, logprobs_BT: Tensor) -> Tensor:
        """Return f(rho) A."""
        tau_BT = self._tau(advantages_BT)
        return 4.0 / tau_BT * torch.sigmoid(tau_BT * (ratio_BT - 1.0)) * advantages_BT

    def clipped(self, ratio_BT: Tensor, advantages_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the slope has fallen below a half, under and over a ratio of 1."""
        gate_BT = torch.sigmoid(self._tau(advantages_BT) * (ratio_BT - 1.0))
        is_faded_BT = 4.0 * gate_BT * (1.0 - gate_BT) < FADED
        return is_faded_BT & (ratio_BT < 1.0), is_faded_BT & (ratio_BT > 1.0)

    def _tau(self, advantages_BT: Tensor) -> Tensor:
        taus = torch.tensor(
            [self.tau_negative, self.tau_positive], dtype=advantages_BT.dtype, device=advantages_BT.device
        )
        return taus[(advantages_BT > 0).long()]
