"""Masked arithmetic that several algorithms share: whitening, KL estimators, rewards per token, GAE, returns.

Shapes: B sequences, T response tokens, `mask_BT` 1 on the tokens the policy sampled. Invariant: what stands under
mask 0, nan included, never changes a result or a gradient; tokens under mask 0 inside a sequence (an environment's)
are skipped, not treated as steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def masked(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the values with zeros under mask 0; unlike a product it lets no nan through."""
    return torch.where(mask_BT > 0, values_BT, torch.zeros_like(values_BT))


def masked_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean over masked tokens; 0 where there are none.

    >>> float(masked_mean(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1.0, 1.0, 0.0]])))
    2.0
    """
    return masked(values_BT, mask_BT).sum() / mask_BT.sum().clamp_min(1.0)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Return values with mean 0 and variance 1 over every masked token of the step (population variance + 1e-8).

    >>> whiten(torch.tensor([1.0, 3.0]), torch.ones(2)).tolist()
    [-1.0, 1.0]
    """
    mean = masked_mean(values, mask)
    centred = masked(values - mean, mask)
    variance = (centred * centred).sum() / mask.sum().clamp_min(1.0)
    return centred * torch.rsqrt(variance + 1e-8)


def kl_estimate(logprobs_BT: Tensor, reference_BT: Tensor, estimator: Estimator) -> Tensor:
    """Return k1 = d, k2 = d^2 / 2 or k3 = exp(-d) - 1 + d with d = logprobs - reference (Schulman 2020).

    >>> float(kl_estimate(torch.tensor([0.0]), torch.tensor([-2.0]), "k2"))
    2.0
    """
    d_BT = logprobs_BT - reference_BT
    if estimator == "k1":
        return d_BT
    if estimator == "k2":
        return 0.5 * d_BT * d_BT
    return torch.expm1(-d_BT) + d_BT


def last_token(mask_BT: Tensor) -> Tensor:
    """Return a mask of each sequence's last sampled token; empty where a sequence has none.

    >>> last_token(torch.tensor([[1.0, 1.0, 0.0]])).tolist()
    [[0.0, 1.0, 0.0]]
    """
    later_BT = mask_BT.flip(1).cumsum(1).flip(1)
    return ((later_BT == 1) & (mask_BT > 0)).to(mask_BT.dtype)


def token_rewards(rewards_B: Tensor, mask_BT: Tensor, kl_BT: Tensor | None, coef: float) -> Tensor:
    """Return rewards per token: the score on the last sampled token, -coef * kl on every sampled token."""
    rewards_BT = last_token(mask_BT) * rewards_B[:, None]
    return rewards_BT if kl_BT is None else masked(rewards_BT - coef * kl_BT, mask_BT)


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns (Schulman 2015, 1506.02438, equations 11 to 16).

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, returns = A + V; t + 1 is the next sampled
    token and the value after the last one is 0.

    >>> ones = torch.ones(1, 2)
    >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), ones, gamma=1.0, lam=1.0)[0].tolist()
    [[0.5, 0.5]]
    """
    rewards_BT, values_BT = masked(rewards_BT, mask_BT), masked(values_BT, mask_BT)
    advantages_BT = torch.zeros_like(rewards_BT)
    next_value_B = torch.zeros_like(rewards_BT[:, 0])
    next_advantage_B = torch.zeros_like(next_value_B)
    for t in reversed(range(rewards_BT.shape[1])):
        is_sampled_B = mask_BT[:, t] > 0
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = delta_B + gamma * lam * next_advantage_B
        advantages_BT[:, t] = torch.where(is_sampled_B, advantage_B, torch.zeros_like(advantage_B))
        next_advantage_B = torch.where(is_sampled_B, advantage_B, next_advantage_B)
        next_value_B = torch.where(is_sampled_B, values_BT[:, t], next_value_B)
    return advantages_BT, masked(advantages_BT + values_BT, mask_BT)
