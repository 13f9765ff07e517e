"""The baseline's arithmetic is that of flowrl's own algorithms on the same batch, gradients included."""

from __future__ import annotations

import pytest
import torch

from flowrl.algorithms.base import AdvantageBatch, LossBatch
from flowrl.algorithms.corrections import Correction
from flowrl.algorithms.policy import KL
from flowrl.algorithms.ppo import PPO
from flowrl.algorithms.shaping import Shaping
from flowrl.algorithms.value import ValueLoss
from perf.dschat_losses import advantages_and_returns, policy_loss_sum, step_rewards, value_loss_sum

LENGTHS = (5, 1, 3, 4)
ALGORITHM = PPO(kl=KL(coef=0.1), shaping=Shaping(clip=5.0), whiten_advantages=False, correction=Correction())


def columns(seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a mask and random columns that are 0 beyond each response's end."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).float()
    names = ("new", "old", "reference", "values", "new_values", "advantages", "returns")
    found = {name: torch.randn(mask.shape, generator=generator) * mask for name in names}
    found["old"] = found["new"] + 0.3 * found["old"]  # some ratios clipped, some not
    return mask, found


@pytest.mark.parametrize("seed", range(3))
def test_rewards_and_advantages_are_those_of_ppo_credit(seed: int):
    mask, given = columns(seed)
    scores = torch.tensor([0.5, 9.0, -7.0, 1.5])  # two beyond the clip
    rewards = step_rewards(scores, given["old"], given["reference"], mask)
    advantages, returns = advantages_and_returns(rewards, given["values"], mask)
    credited = ALGORITHM.advantages(AdvantageBatch(scores, mask, given["old"], given["reference"], given["values"]))
    assert credited.returns_BT is not None
    torch.testing.assert_close(advantages, credited.advantages_BT, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(returns, credited.returns_BT, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_policy_loss_and_gradient_are_those_of_ppo(seed: int):
    mask, given = columns(seed)
    ours, theirs = (given["new"].clone().requires_grad_() for _ in range(2))
    total = policy_loss_sum(ours, given["old"], given["advantages"], mask)
    held = {"behaviour": given["old"], "proximal": given["old"], "advantages": given["advantages"]}
    loss = ALGORITHM.loss(LossBatch(theirs, mask, held))
    torch.testing.assert_close(total, loss.total, atol=1e-6, rtol=1e-6)
    assert float(loss.count) == sum(LENGTHS)
    torch.testing.assert_close(*torch.autograd.grad(total, ours), *torch.autograd.grad(loss.total, theirs))


@pytest.mark.parametrize("seed", range(3))
def test_value_loss_and_gradient_are_those_of_the_critic(seed: int):
    mask, given = columns(seed)
    ours, theirs = (given["new_values"].clone().requires_grad_() for _ in range(2))
    total = value_loss_sum(ours, given["values"], given["returns"], mask)
    held = {"values": given["values"], "returns": given["returns"]}
    loss = ValueLoss(clip=0.2).loss(LossBatch(theirs, mask, held))
    torch.testing.assert_close(total, loss.total, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(*torch.autograd.grad(total, ours), *torch.autograd.grad(loss.total, theirs))
