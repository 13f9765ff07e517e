"""The clipped policy loss that the online algorithms share, with its off-policy corrections and KL term.

    loss = -w min(rho A, clip(rho, 1 - low, 1 + high) A) + coef KL - entropy_coef H

with rho = exp(lp - lp_prox) (PPO, 1707.06347, equation 7; asymmetric range: DAPO, 2503.14476, section 3.1) and w what
corrects for samples drawn by an older policy, lp_old. The loss returns the sum over sampled tokens and their number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch

from flowrl.algorithms.base import Algorithm, Loss, LossBatch
from flowrl.algorithms.functional import Estimator, kl_estimate, masked
from flowrl.config import Config, Meta

if TYPE_CHECKING:
    from torch import Tensor


class KL(Config):
    """The penalty for leaving the reference."""

    coef: Annotated[float, Meta(ge=0)] = 0.01
    placement: Literal["reward", "loss"] = "reward"  # taken off every token's reward, or added to the loss
    estimator: Estimator = "k1"  # k1 in the reward; k2 or k3 in the loss, where k1 has the wrong gradient

    def __post_init__(self) -> None:
        if self.placement == "loss" and self.estimator == "k1":
            raise ValueError("kl.estimator k1 has no useful gradient as a loss; use k2 or k3, or placement=reward")


class Correction(Config):
    """What makes up for samples of an older policy; every kind logs its weights and the effective sample size."""

    kind: Literal["none", "truncated", "icepop", "sequence", "decoupled"] = "truncated"
    cap: Annotated[float, Meta(gt=0)] = 2.0  # truncated: greatest weight; icepop, sequence: greatest ratio kept
    floor: Annotated[float, Meta(ge=0)] = 0.5  # icepop, sequence: least ratio kept


class PolicyGradient(Algorithm):
    """Settings and loss of every algorithm that maximises a clipped surrogate."""

    clip_low: Annotated[float, Meta(ge=0, lt=1)] = 0.2
    clip_high: Annotated[float, Meta(ge=0)] = 0.2
    dual_clip: Annotated[float, Meta(ge=0)] = 0.0  # 1912.09729: least surrogate c A for A < 0; 0: off
    entropy_coef: Annotated[float, Meta(ge=0)] = 0.0
    kl: KL = KL()
    correction: Correction = Correction()

    @property
    def needs_entropy(self) -> bool:
        """Return whether the loss has an entropy bonus."""
        return self.entropy_coef > 0

    def loss(self, batch: LossBatch) -> Loss:
        """Return the clipped surrogate with its terms, summed over sampled tokens."""
        mask_BT = batch.mask_BT
        lp_BT = masked(batch.logprobs_BT, mask_BT)
        prox_BT = masked(batch.columns["proximal"], mask_BT)
        old_BT = masked(batch.columns["behaviour"], mask_BT)
        advantages_BT = masked(batch.columns["advantages"], mask_BT)
        weight_BT = correction_weight(self.correction, prox_BT - old_BT, mask_BT)
        anchor_BT = prox_BT if self.correction.kind != "none" else old_BT
        ratio_BT = torch.exp(lp_BT - anchor_BT)
        surrogate_BT = clipped_surrogate(ratio_BT, advantages_BT, self.clip_low, self.clip_high, self.dual_clip)
        loss_BT = -weight_BT * surrogate_BT
        count = mask_BT.sum()
        raw_BT = masked(torch.exp(prox_BT - old_BT), mask_BT)
        metrics: dict[str, tuple[Tensor, Tensor]] = {
            "policy_loss": (loss_BT.detach().sum(), count),
            "clip_frac_high": (masked((ratio_BT > 1 + self.clip_high).float(), mask_BT).sum(), count),
            "clip_frac_low": (masked((ratio_BT < 1 - self.clip_low).float(), mask_BT).sum(), count),
            "mismatch_kl": (masked(kl_estimate(old_BT, prox_BT, "k3"), mask_BT).sum(), count),
            "is_weight": (raw_BT.sum(), count),
            "is_weight_sq": ((raw_BT * raw_BT).sum(), count),
        }
        if "reference" in batch.columns:
            reference_BT = masked(batch.columns["reference"], mask_BT)
            if self.kl.placement == "loss" and self.kl.coef:
                kl_BT = masked(kl_estimate(lp_BT, reference_BT, self.kl.estimator), mask_BT)
                loss_BT = loss_BT + self.kl.coef * kl_BT
            metrics["kl_ref"] = (masked(kl_estimate(lp_BT.detach(), reference_BT, "k3"), mask_BT).sum(), count)
        if batch.entropy_BT is not None:
            entropy_BT = masked(batch.entropy_BT, mask_BT)
            loss_BT = loss_BT - self.entropy_coef * entropy_BT
            metrics["entropy"] = (entropy_BT.detach().sum(), count)
        return Loss(loss_BT.sum(), count, metrics)


def clipped_surrogate(ratio_BT: Tensor, advantages_BT: Tensor, low: float, high: float, dual: float) -> Tensor:
    """Return min(rho A, clip(rho) A), with dual clip not below c A for A < 0.

    >>> float(clipped_surrogate(torch.tensor(2.0), torch.tensor(1.0), 0.2, 0.2, 0.0))
    1.2000000476837158
    """
    surrogate_BT = torch.minimum(ratio_BT * advantages_BT, ratio_BT.clamp(1 - low, 1 + high) * advantages_BT)
    if dual:
        floor_BT = torch.maximum(surrogate_BT, dual * advantages_BT)
        surrogate_BT = torch.where(advantages_BT < 0, floor_BT, surrogate_BT)
    return surrogate_BT


def correction_weight(correction: Correction, log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return each token's weight from log(pi_prox / pi_old); no gradient flows through it."""
    ratio_BT = torch.exp(log_ratio_BT.detach())
    if correction.kind == "none":
        return torch.ones_like(ratio_BT)
    if correction.kind == "decoupled":  # 2505.24298, equation 5
        return ratio_BT
    if correction.kind == "truncated":
        return ratio_BT.clamp(max=correction.cap)
    if correction.kind == "icepop":
        return torch.where((ratio_BT >= correction.floor) & (ratio_BT <= correction.cap), ratio_BT, 0.0)
    total_B = masked(log_ratio_BT.detach(), mask_BT).sum(1) / mask_BT.sum(1).clamp_min(1.0)
    keep_B = (torch.exp(total_B) >= correction.floor) & (torch.exp(total_B) <= correction.cap)
    return keep_B[:, None].to(ratio_BT.dtype).expand_as(ratio_BT)
