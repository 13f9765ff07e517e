"""The arithmetic of a DeepSpeed-Chat-style step: rewards, advantages, policy loss, value loss.

Written out plainly for the baseline of `flowrl bench dschat`, with the constants of DeepSpeed-Chat's step 3 (its
ppo_trainer.py): KL 0.1, reward clip 5, policy clip 0.2, value clip 0.2, gamma 1, lambda 0.95, advantages as they are.
A test holds every function against flowrl's own algorithms on the same batch, so that both systems are known to do
the same work. Losses are sums; the loop divides once by the step's tokens.

Shapes: B sequences, T response tokens, right-padded; `mask_BT` is 1 on sampled tokens, the stop token included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

KL_COEF = 0.1
REWARD_CLIP = 5.0
POLICY_CLIP = 0.2
VALUE_CLIP = 0.2
GAMMA = 1.0
LAMBDA = 0.95


def step_rewards(scores_B: Tensor, logprobs_BT: Tensor, reference_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return each token's reward: the KL penalty, and the clipped score on the last token."""
    rewards_BT = -KL_COEF * (logprobs_BT - reference_BT) * mask_BT
    last_B1 = mask_BT.sum(1, keepdim=True).long() - 1
    return rewards_BT.scatter_add(1, last_B1, scores_B.clamp(-REWARD_CLIP, REWARD_CLIP)[:, None])


def advantages_and_returns(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return generalised advantage estimates and returns, token by token from the last; 0 under mask 0."""
    advantages_BT = torch.zeros_like(values_BT)
    following_B = next_value_B = torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        value_B = values_BT[:, t] * mask_BT[:, t]
        delta_B = rewards_BT[:, t] + GAMMA * next_value_B - value_B
        following_B = (delta_B + GAMMA * LAMBDA * following_B) * mask_BT[:, t]
        advantages_BT[:, t], next_value_B = following_B, value_B
    return advantages_BT, (advantages_BT + values_BT) * mask_BT


def policy_loss_sum(logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the clipped surrogate's loss, summed over sampled tokens."""
    ratio_BT = torch.exp((logprobs_BT - old_BT) * mask_BT)
    clipped_BT = ratio_BT.clamp(1.0 - POLICY_CLIP, 1.0 + POLICY_CLIP)
    return (torch.maximum(-advantages_BT * ratio_BT, -advantages_BT * clipped_BT) * mask_BT).sum()


def value_loss_sum(values_BT: Tensor, old_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return half the clipped squared error of the values, summed over sampled tokens."""
    clipped_BT = old_BT + (values_BT - old_BT).clamp(-VALUE_CLIP, VALUE_CLIP)
    return 0.5 * (torch.maximum((values_BT - returns_BT) ** 2, (clipped_BT - returns_BT) ** 2) * mask_BT).sum()
