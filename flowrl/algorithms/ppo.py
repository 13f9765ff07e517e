"""PPO with a critic (Schulman 2017, 1707.06347) as RLHF uses it (InstructGPT, 2203.02155; OpenRLHF, 2405.11143, 3.3).

    r_t = -beta log(pi_old / pi_ref), plus the score on the last sampled token
    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  returns = A + V
    maximise E_t min(rho A, clip(rho, 1 - low, 1 + high) A)

Advantages are whitened over every sampled token of the step. Behind an answer's last token V is 0; of an answer that
was cut before its end it is, with `bootstrap_cut`, the critic's value there (partial episodes: Pardo 2018, 1712.00378).
The critic's own loss is in value.py.

Tests: tests/unit/algorithms/test_losses.py
"""

from __future__ import annotations

from typing import Annotated

from flowrl.algorithms.advantages import gae
from flowrl.algorithms.base import AdvantageBatch, Advantages
from flowrl.algorithms.policy import KL, PolicyGradient
from flowrl.config import Meta
from flowrl.errors import ConfigError


class PPO(PolicyGradient):
    """Proximal policy optimisation."""

    gamma: Annotated[float, Meta(ge=0, le=1)] = 1.0  # discount of a later token's reward
    lam: Annotated[float, Meta(ge=0, le=1)] = 0.95  # 1: returns less values, least bias; 0: one-step differences
    whiten_advantages: bool = True  # to mean 0 and std 1 over the tokens of a step
    bootstrap_cut: bool = False  # answers that were cut go on in the critic's eyes, instead of ending with nothing
    kl: KL = KL(coef=0.01)

    def idle_settings(self, num_updates: int, *, is_fresh: bool = False) -> list[str]:
        """Return which settings have no effect in a step of so many updates, and why."""
        found = super().idle_settings(num_updates, is_fresh=is_fresh)
        if self.bootstrap_cut and self.mask_cut:
            found.append("algorithm.bootstrap_cut: no effect with mask_cut=true, which learns nothing of cut answers")
        return found

    @property
    def needs_critic(self) -> bool:
        """Return True: advantages are estimated from values."""
        return True

    @property
    def whitens(self) -> bool:
        """Return whether advantages are whitened over the step."""
        return self.whiten_advantages

    @property
    def needs_after(self) -> bool:
        """Return whether cut answers are bootstrapped."""
        return self.bootstrap_cut

    def advantages(self, batch: AdvantageBatch) -> Advantages:
        """Return generalised advantage estimates and value targets."""
        if batch.values_BT is None:
            raise ConfigError("algorithm", "PPO needs values, which this graph does not give", "add a critic node")
        scores_B, metrics = self.shaped_scores(batch)
        rewards_BT = self.shaped_rewards(batch, scores_B)
        if self.bootstrap_cut and batch.after_B is None:
            what = "needs the values behind cut answers, which were not measured"
            raise ConfigError("algorithm.bootstrap_cut", what, "set it to false, or use flowrl's critic")
        after_B = batch.after_B if self.bootstrap_cut else None
        advantages_BT, returns_BT = gae(
            rewards_BT, batch.values_BT, batch.mask_BT, gamma=self.gamma, lam=self.lam, after_B=after_B
        )
        return Advantages(advantages_BT, returns_BT, metrics)
