"""The advantages of every algorithm against slow loops, with and without the penalty in the reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from flowrl.algorithms.base import AdvantageBatch
from flowrl.algorithms.cispo import CISPO
from flowrl.algorithms.dapo import DAPO
from flowrl.algorithms.dr_grpo import DrGRPO
from flowrl.algorithms.gmpo import GMPO
from flowrl.algorithms.grpo import GRPO
from flowrl.algorithms.gspo import GSPO
from flowrl.algorithms.opo import OPO
from flowrl.algorithms.policy import KL, PolicyGradient
from flowrl.algorithms.ppo import PPO
from flowrl.algorithms.reinforce_pp import ReinforcePP, ReinforcePPBaseline
from flowrl.algorithms.remax import ReMax
from flowrl.algorithms.rloo import RLOO
from flowrl.algorithms.sapo import SAPO
from flowrl.algorithms.shaping import Shaping
from flowrl.errors import ConfigError
from tests.support import slow_algorithms as slow
from tests.unit.algorithms.cases import advantage_batch, mask_rows, rewarded, rows_of, same

if TYPE_CHECKING:
    from flowrl.algorithms.functional import Estimator

SEEDS = range(3)
GROUPS = [
    (GRPO, "standardised"),
    (GSPO, "standardised"),
    (CISPO, "standardised"),
    (DAPO, "standardised"),
    (SAPO, "standardised"),
    (GMPO, "standardised"),
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
    batch = advantage_batch(seed)
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
    batch = advantage_batch(seed)
    credited = kind(kl=KL(coef=coef)).advantages(batch)
    wholes = slow.baseline(baseline, [sum(row) for row in slow_rewards(batch, coef)])
    rows = zip(wholes, mask_rows(batch.mask_BT), strict=True)
    assert same(credited.advantages_BT, [[whole * m for m in mask] for whole, mask in rows])
    assert credited.returns_BT is None


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("is_centred", [False, True])
def test_reinforce_pp_credits_discounted_penalised_rewards(seed: int, is_centred: bool):
    batch = advantage_batch(seed)
    scores = batch.rewards_B.double().tolist()
    gamma = 1.0 if is_centred else 0.9
    algorithm = ReinforcePPBaseline(kl=KL(coef=0.2)) if is_centred else ReinforcePP(gamma=0.9, kl=KL(coef=0.2))
    rewards = slow_rewards(batch, 0.2, slow.baseline("centred", scores) if is_centred else scores)
    rows = zip(rewards, mask_rows(batch.mask_BT), strict=True)
    assert same(algorithm.advantages(batch).advantages_BT, [slow.discounted(row, mask, gamma) for row, mask in rows])
    assert algorithm.whitens


def test_the_figures_are_shaped_reward_and_kl_to_the_reference():
    batch = advantage_batch(0)
    metrics = GRPO(shaping=Shaping(clip=0.5)).advantages(batch).metrics
    kls = slow_rewards(batch, -1.0, [0.0] * 4)
    assert metrics["kl"] == pytest.approx(sum(map(sum, kls)) / 4, abs=1e-6)
    clipped = [min(max(reward, -0.5), 0.5) for reward in batch.rewards_B.tolist()]
    assert metrics["reward.shaped"] == pytest.approx(sum(clipped) / 4, abs=1e-6)


@pytest.mark.parametrize("kind", [PPO, ReinforcePP, ReinforcePPBaseline, *(kind for kind, _ in GROUPS)])
def test_scores_are_shaped_before_they_are_credited(kind: type[PolicyGradient]):
    batch = advantage_batch(0)
    shaping = Shaping(mean=0.5, std=0.8, clip=0.6, max_tokens=7, overlong_buffer=5, overlong_factor=0.3)
    scores = [min(max((reward - 0.5) / 0.8, -0.6), 0.6) for reward in batch.rewards_B.double().tolist()]
    lengths = [sum(mask) for mask in mask_rows(batch.mask_BT)]
    scores = [score + slow.overlong(length, 7, 5, 0.3) for score, length in zip(scores, lengths, strict=True)]
    by_hand = kind().advantages(batch._replace(rewards_B=torch.tensor(scores)))
    assert torch.allclose(kind(shaping=shaping).advantages(batch).advantages_BT, by_hand.advantages_BT, atol=1e-5)
    assert not torch.allclose(kind().advantages(batch).advantages_BT, by_hand.advantages_BT, atol=1e-2)


def test_a_penalty_without_a_reference_is_refused():
    batch = advantage_batch(0)._replace(reference_BT=None)
    with pytest.raises(ConfigError, match=r"algorithm\.kl\.coef: 0\.01 needs the reference's log-probs"):
        PPO().advantages(batch)
    assert torch.isfinite(PPO(kl=KL()).advantages(batch).advantages_BT).all()


def test_ppo_without_values_is_refused():
    with pytest.raises(ConfigError, match="add a critic node"):
        PPO().advantages(advantage_batch(0)._replace(values_BT=None))


@pytest.mark.parametrize("kind", [GRPO, DAPO, DrGRPO, RLOO, GSPO, CISPO, OPO, SAPO, GMPO, ReinforcePP, PPO])
def test_scores_of_any_size_are_learned_as_they_are(kind: type[PolicyGradient]):
    batch = advantage_batch(0)
    big = batch._replace(rewards_B=torch.tensor([20.0, 50.0, 100.0, 80.0]))
    small = batch._replace(rewards_B=big.rewards_B / 100.0)
    free = kind(kl=KL())
    found, expected = free.advantages(big).advantages_BT, free.advantages(small).advantages_BT
    scale = 1.0 if torch.allclose(found, expected, atol=1e-4) else 100.0  # standardised or not
    if kind is not PPO:
        assert torch.allclose(found, scale * expected, atol=1e-3)
    assert len(set(found[:, 0].tolist())) == 4


def test_grpo_of_rewards_beyond_ten_by_hand():
    ones_BT = torch.ones(4, 2)
    batch = AdvantageBatch(torch.tensor([20.0, 30.0, 40.0, 50.0]), ones_BT, -ones_BT, -ones_BT)
    found = GRPO().advantages(batch)
    assert same(found.advantages_BT[:, 0], [-1.1619, -0.3873, 0.3873, 1.1619], 1e-4)
    assert found.metrics["groups.mixed"] == 1.0
    clipping = GRPO(shaping=Shaping(clip=10.0), filter_groups=True)
    clipped = clipping.advantages(batch)
    assert not clipped.advantages_BT.any()
    assert (clipped.metrics["reward.clipped"], clipped.metrics["groups.mixed"]) == (1.0, 0.0)
    assert not clipping.keeps(batch)
    assert GRPO(filter_groups=True).keeps(batch)


@pytest.mark.parametrize("seed", SEEDS)
def test_opo_takes_the_mean_by_length_off_each_score(seed: int):
    batch = advantage_batch(seed)
    lengths = [sum(mask) for mask in mask_rows(batch.mask_BT)]
    rewards = batch.rewards_B.double().tolist()
    baseline = sum(n * r for n, r in zip(lengths, rewards, strict=True)) / sum(lengths)
    rows = zip(rewards, mask_rows(batch.mask_BT), strict=True)
    expected = [[(reward - baseline) * m for m in mask] for reward, mask in rows]
    assert same(OPO().advantages(batch).advantages_BT, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_remax_takes_the_greedy_responses_score_off_each_tokens_reward_to_go(seed: int):
    batch = advantage_batch(seed)
    assert batch.reference_BT is not None
    baseline, coef, std = 0.25, 0.1, 2.0
    expected: list[list[float]] = []
    rows = (batch.rewards_B, mask_rows(batch.mask_BT), rows_of(batch.behaviour_BT), rows_of(batch.reference_BT))
    for reward, mask, old, ref in zip(*rows, strict=True):
        togo, row = float(reward) / std, [0.0] * len(mask)
        for t in reversed(range(len(mask))):
            if mask[t]:
                togo -= coef * (old[t] - ref[t])
                row[t] = togo - baseline / std
        expected.append(row)
    found = ReMax(kl=KL(coef=coef), shaping=Shaping(std=std)).advantages(batch)
    assert same(found.advantages_BT, expected)
    assert found.metrics["reward.greedy"] == baseline / std


def test_remax_keeps_what_differs_from_the_greedy_response():
    plain = ReMax(kl=KL())
    found = plain.advantages(rewarded(1.0, 0.5, greedy=0.5))
    assert found.advantages_BT.tolist() == [[0.5, 0.5], [0.0, 0.0]]
    assert plain.advantages(rewarded(1.0, 1.0, greedy=0.5)).metrics["groups.mixed"] == 1.0
    choosy = ReMax(kl=KL(), filter_groups=True)
    assert choosy.keeps(rewarded(1.0, greedy=0.5))
    assert not choosy.keeps(rewarded(0.5, 0.5, greedy=0.5))
    with pytest.raises(ConfigError, match="greedy response, which nothing has sampled; set greedy_baseline=true"):
        plain.advantages(rewarded(1.0))


def test_a_missing_end_costs_what_is_set_and_the_rest_is_as_it_was():
    ones_BT = torch.ones(2, 1)
    batch = AdvantageBatch(torch.tensor([2.0, 2.0]), ones_BT, -ones_BT, -ones_BT, cut_B=torch.tensor([0.0, 1.0]))

    def returns(**shaping: Any) -> list[float]:
        return ReinforcePP(kl=KL(), shaping=Shaping(**shaping)).advantages(batch).advantages_BT[:, 0].tolist()

    assert returns() == [2.0, 2.0]
    assert returns(cut_penalty=0.5) == [2.0, 1.5]
    assert returns(cut_factor=0.25) == [2.0, 0.5]
    assert returns(mean=1.0, std=2.0, cut_factor=0.0, cut_penalty=0.5) == [0.5, -1.0]


def episodes(*turns: list[float]) -> AdvantageBatch:
    """Episodes of turns of one token, a token of the environment between."""
    width = 2 * max(len(rewards) for rewards in turns) - 1
    placed_BT, mask_BT = torch.zeros(len(turns), width), torch.zeros(len(turns), width)
    for row, rewards in enumerate(turns):
        for turn, reward in enumerate(rewards):
            placed_BT[row, 2 * turn], mask_BT[row, 2 * turn] = reward, 1.0
    sums_B = placed_BT.sum(1)
    return AdvantageBatch(sums_B, mask_BT, -mask_BT, -mask_BT, placed_BT=placed_BT)


@pytest.mark.parametrize("shaping", [Shaping(), Shaping(clip=10.0), Shaping(mean=7.0, clip=1.0), Shaping(std=2.0)])
def test_fifteen_turns_of_reward_one_are_fifteen_equal_rewards(shaping: Shaping):
    batch = episodes([1.0] * 15)
    algorithm = ReinforcePP(kl=KL(), gamma=0.0, shaping=shaping)
    found_BT = algorithm.advantages(batch).advantages_BT
    assert found_BT[0, ::2].tolist() == [1.0 / shaping.std] * 15


def test_episodes_that_earned_the_same_at_other_turns_tie_exactly():
    batch = episodes([0.1, 0.2, 0.4], [0.7], [0.35, 0.35], [0.3, 0.3, 0.1])._replace(rewards_B=torch.full((4,), 0.7))
    for algorithm in (GRPO(kl=KL()), RLOO(kl=KL()), DrGRPO(), OPO()):
        assert not algorithm.advantages(batch).advantages_BT.any()


def test_the_baseline_of_turns_is_by_turn():
    batch = episodes([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0])
    found_BT = ReinforcePPBaseline(kl=KL()).advantages(batch).advantages_BT
    # Returns to go 3, 2, 1; 0, 0, 0; 1. Their means by turn are 4/3, 1 and 1/2.
    assert same(found_BT[:, ::2], [[5 / 3, 1.0, 0.5], [-4 / 3, -1.0, -0.5], [-1 / 3, 0.0, 0.0]])
    assert not found_BT[:, 1::2].any()


def test_remax_compares_each_turn_with_what_the_greedy_response_had_still_to_earn():
    greedy = episodes([1.0, 1.0, 1.0])
    batch = episodes([1.0] * 5, [0.0, 2.0])._replace(greedy=greedy)
    found_BT = ReMax(kl=KL()).advantages(batch).advantages_BT
    # Returns to go 5, 4, 3, 2, 1 and 2, 2 less the greedy response's 3, 2, 1 and nothing after its end.
    assert found_BT[0, ::2].tolist() == [2.0, 2.0, 2.0, 2.0, 1.0]
    assert found_BT[1, :3].tolist() == [-1.0, 0.0, 0.0]
    assert not found_BT[:, 1::2].any()


def test_the_baseline_by_turn_leaves_a_penalty_on_its_tokens():
    batch = episodes([1.0, 0.0], [0.0, 1.0])
    assert batch.reference_BT is not None
    penalised = batch._replace(reference_BT=batch.behaviour_BT - 0.5 * batch.mask_BT)
    free = ReinforcePPBaseline(kl=KL()).advantages(batch).advantages_BT
    costly = ReinforcePPBaseline(kl=KL(coef=0.1)).advantages(penalised).advantages_BT
    assert same(costly - free, [[-0.1, 0.0, -0.05]] * 2)


def test_a_cut_episode_scales_its_placed_rewards_too():
    batch = episodes([1.0, 1.0])._replace(cut_B=torch.ones(1))
    found_BT = ReinforcePP(kl=KL(), gamma=0.0, shaping=Shaping(cut_factor=0.5)).advantages(batch).advantages_BT
    assert found_BT[0].tolist() == [0.5, 0.0, 0.5]
