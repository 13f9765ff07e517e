"""PPO with a critic (Schulman 2017, 1707.06347) as RLHF uses it (InstructGPT; OpenRLHF paper, section 3.3).

The score is credited on the last sampled token, the KL to the reference on every token; advantages are generalised
advantage estimates (1506.02438), whitened over every token of the step. The critic's loss is in value.py.
"""

from __future__ import annotations

from typing import Annotated

from flowrl.algorithms.base import CreditBatch, Credited
from flowrl.algorithms.functional import gae, kl_estimate, masked, token_rewards
from flowrl.algorithms.policy import PolicyGradient
from flowrl.config import Meta


class PPO(PolicyGradient):
    """Proximal policy optimisation."""

    gamma: Annotated[float, Meta(ge=0, le=1)] = 1.0
    lam: Annotated[float, Meta(ge=0, le=1)] = 0.95
    reward_clip: Annotated[float, Meta(gt=0)] = 10.0  # scores beyond +- this are clipped
    whiten_advantages: bool = True

    @property
    def needs_critic(self) -> bool:
        """Return True: advantages are estimated from values."""
        return True

    @property
    def whitens(self) -> bool:
        """Return whether advantages are whitened over the step."""
        return self.whiten_advantages

    def credit(self, batch: CreditBatch) -> Credited:
        """Return generalised advantage estimates and value targets."""
        if batch.values_BT is None:
            raise ValueError("PPO needs values; add a critic")
        rewards_B = batch.rewards_B.clamp(-self.reward_clip, self.reward_clip)
        kl_BT = None
        metrics: dict[str, float] = {}
        if batch.reference_BT is not None:
            kl_BT = masked(kl_estimate(batch.behaviour_BT, batch.reference_BT, "k1"), batch.mask_BT)
            metrics["kl"] = float(kl_BT.sum(1).mean())
        coef = self.kl.coef if self.kl.placement == "reward" else 0.0
        rewards_BT = token_rewards(rewards_B, batch.mask_BT, kl_BT, coef)
        advantages_BT, returns_BT = gae(rewards_BT, batch.values_BT, batch.mask_BT, gamma=self.gamma, lam=self.lam)
        return Credited(advantages_BT, returns_BT, metrics)
