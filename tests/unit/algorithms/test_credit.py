"""The credit of every algorithm against slow loops, with and without the penalty in the reward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from flowrl.algorithms.cispo import CISPO
from flowrl.algorithms.dapo import DAPO
from flowrl.algorithms.dr_grpo import DrGRPO
from flowrl.algorithms.grpo import GRPO
from flowrl.algorithms.gspo import GSPO
from flowrl.algorithms.policy import KL, PolicyGradient
from flowrl.algorithms.ppo import PPO
from flowrl.algorithms.reinforce_pp import ReinforcePP, ReinforcePPBaseline
from flowrl.algorithms.rloo import RLOO
from flowrl.algorithms.shaping import Shaping
from flowrl.errors import ConfigError
from tests.support import slow_algorithms as slow
from tests.unit.algorithms.cases import credit_batch, mask_rows, rows_of, same

if TYPE_CHECKING:
    from flowrl.algorithms.base import AdvantageBatch
    from flowrl.algorithms.functional import Estimator

SEEDS = range(3)
GROUPS = [
    (GRPO, "standardised"),
    (GSPO, "standardised"),
    (CISPO, "standardised"),
    (DAPO, "standardised"),
    (DrGRPO, "centred"),
    (RLOO, "left out"),
]


def slow_rewards(
    batch: AdvantageBatch, coef: float, scores: list[float] | None = None, estimator: Estimator = "k1"
) -> list[list[float]]:
    assert batch.reference_BT is not None
    kls = [
        [slow.kl(old, ref, estimator) for old, ref in zip(row, other, strict=True)]
        for row, other in zip(rows_of(batch.behaviour_BT), rows_of(batch.reference_BT), strict=True)
    ]
    rows = zip(scores or batch.rewards_B.double().tolist(), kls, mask_rows(batch.mask_BT), strict=True)
    return [slow.token_rewards(score, kl, mask, coef) for score, kl, mask in rows]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_ppo_credits_penalised_rewards_by_gae(estimator: Estimator, seed: int):
    batch = credit_batch(seed)
    assert batch.values_BT is not None
    credited = PPO(gamma=0.9, lam=0.8, kl=KL(coef=0.2, estimator=estimator)).advantages(batch)
    rewards = slow_rewards(batch, 0.2, estimator=estimator)
    rows = zip(rewards, rows_of(batch.values_BT), mask_rows(batch.mask_BT), strict=True)
    expected = [slow.gae(rewards, values, mask, 0.9, 0.8) for rewards, values, mask in rows]
    assert credited.returns_BT is not None
    assert same(credited.advantages_BT, [advantages for advantages, _ in expected])
    assert same(credited.returns_BT, [returns for _, returns in expected])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("coef", [0.0, 0.2])
@pytest.mark.parametrize(("kind", "baseline"), GROUPS)
def test_group_algorithms_give_every_token_its_samples_advantage(
    seed: int, coef: float, kind: type[PolicyGradient], baseline: str
):
    batch = credit_batch(seed)
    credited = kind(kl=KL(coef=coef)).advantages(batch)
    wholes = slow.baseline(baseline, [sum(row) for row in slow_rewards(batch, coef)])
    rows = zip(wholes, mask_rows(batch.mask_BT), strict=True)
    assert same(credited.advantages_BT, [[whole * m for m in mask] for whole, mask in rows])
    assert credited.returns_BT is None


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("is_centred", [False, True])
def test_reinforce_pp_credits_discounted_penalised_rewards(seed: int, is_centred: bool):
    batch = credit_batch(seed)
    scores = batch.rewards_B.double().tolist()
    gamma = 1.0 if is_centred else 0.9
    algorithm = ReinforcePPBaseline(kl=KL(coef=0.2)) if is_centred else ReinforcePP(gamma=0.9, kl=KL(coef=0.2))
    rewards = slow_rewards(batch, 0.2, slow.baseline("centred", scores) if is_centred else scores)
    rows = zip(rewards, mask_rows(batch.mask_BT), strict=True)
    assert same(algorithm.advantages(batch).advantages_BT, [slow.discounted(row, mask, gamma) for row, mask in rows])
    assert algorithm.whitens


def test_the_figures_are_shaped_reward_and_kl_to_the_reference():
    batch = credit_batch(0)
    metrics = GRPO(shaping=Shaping(clip=0.5)).advantages(batch).metrics
    kls = slow_rewards(batch, -1.0, [0.0] * 4)
    assert metrics["kl"] == pytest.approx(sum(map(sum, kls)) / 4, abs=1e-6)
    clipped = [min(max(reward, -0.5), 0.5) for reward in batch.rewards_B.tolist()]
    assert metrics["reward.shaped"] == pytest.approx(sum(clipped) / 4, abs=1e-6)


@pytest.mark.parametrize("kind", [PPO, ReinforcePP, ReinforcePPBaseline, *(kind for kind, _ in GROUPS)])
def test_scores_are_shaped_before_they_are_credited(kind: type[PolicyGradient]):
    batch = credit_batch(0)
    shaping = Shaping(mean=0.5, std=0.8, clip=0.6, max_tokens=7, overlong_buffer=5, overlong_factor=0.3)
    scores = [min(max((reward - 0.5) / 0.8, -0.6), 0.6) for reward in batch.rewards_B.double().tolist()]
    lengths = [sum(mask) for mask in mask_rows(batch.mask_BT)]
    scores = [score + slow.overlong(length, 7, 5, 0.3) for score, length in zip(scores, lengths, strict=True)]
    by_hand = kind().advantages(batch._replace(rewards_B=torch.tensor(scores)))
    assert torch.allclose(kind(shaping=shaping).advantages(batch).advantages_BT, by_hand.advantages_BT, atol=1e-5)
    assert not torch.allclose(kind().advantages(batch).advantages_BT, by_hand.advantages_BT, atol=1e-2)


def test_a_penalty_without_a_reference_is_refused():
    batch = credit_batch(0)._replace(reference_BT=None)
    with pytest.raises(ConfigError, match=r"algorithm\.kl\.coef: 0\.01 needs the reference's log-probs"):
        PPO().advantages(batch)
    assert torch.isfinite(PPO(kl=KL()).advantages(batch).advantages_BT).all()


def test_ppo_without_values_is_refused():
    with pytest.raises(ConfigError, match="add a critic node"):
        PPO().advantages(credit_batch(0)._replace(values_BT=None))
