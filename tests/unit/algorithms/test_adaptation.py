"""What follows the run: the adaptive KL coefficient and running score normalisation, by hand and against slow loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from flowrl.algorithms.base import StepFigures
from flowrl.algorithms.dapo import DAPO
from flowrl.algorithms.grpo import GRPO
from flowrl.algorithms.policy import KL, PolicyGradient
from flowrl.algorithms.ppo import PPO
from flowrl.algorithms.shaping import Shaping, merged_moments
from flowrl.config import Select
from flowrl.errors import ConfigError
from tests.support import slow_algorithms as slow
from tests.unit.algorithms.cases import advantage_batch, loss_batch, rewarded


def ppo(**options: Any) -> Select:
    return Select(use="flowrl.algorithms.ppo:PPO", options=options)


@pytest.mark.parametrize("seed", range(3))
def test_the_coefficient_follows_the_kl_of_step_after_step(seed: int):
    kls = [6 * torch.rand(1, generator=torch.Generator().manual_seed(100 * seed + k)).item() for k in range(8)]
    choice = ppo(kl={"coef": 0.2, "target": 3.0, "horizon": 50})
    found = [0.2]
    for kl in kls:
        choice = choice.changed(choice.load("algorithm").adapted(StepFigures(torch.zeros(16), kl)))
        found.append(choice.load("algorithm").kl.coef)
    assert found == pytest.approx(slow.adaptive_coefs(0.2, kls, 16, 3.0, 50), rel=1e-12)


def test_an_algorithm_that_adapts_nothing_says_so():
    assert PPO().adapting == ()
    assert PPO().adapted(StepFigures(torch.ones(2), 1.0)) == {}


def test_a_coefficient_that_follows_a_kl_nobody_measures_is_refused():
    with pytest.raises(ConfigError, match=r"algorithm\.kl\.target: 3\.0 needs the reference's log-probs"):
        PPO(kl=KL(coef=0.1, target=3.0)).adapted(StepFigures(torch.ones(2), math.nan))


@pytest.mark.parametrize("cuts", [(1,), (3, 4), (2, 5, 9)])
def test_moments_merged_in_parts_are_those_of_all(cuts: tuple[int, ...]):
    values = torch.randn(12, generator=torch.Generator().manual_seed(len(cuts))) * 3 + 7
    mean, std, count = 0.0, 1.0, 0
    for part in torch.tensor_split(values, cuts):
        mean, std, count = merged_moments(mean, std, count, part)
    assert count == 12
    assert mean == pytest.approx(np.mean(values.double().numpy()), rel=1e-12)
    assert std == pytest.approx(np.std(values.double().numpy()), rel=1e-12)


def test_running_normalisation_takes_a_step_by_the_scores_before_it():
    choice = Select(use="flowrl.algorithms.grpo:GRPO", options={"shaping": {"running": True}})
    first = choice.load("algorithm")
    assert first.shaping.normalised(torch.tensor([3.0])).tolist() == [3.0]
    second = choice.changed(first.adapted(StepFigures(torch.tensor([1.0, 5.0]), math.nan)))
    assert second.load("algorithm").shaping == Shaping(running=True, mean=3.0, std=2.0, num_scores=2)
    third = second.changed(second.load("algorithm").adapted(StepFigures(torch.tensor([3.0, 3.0]), math.nan)))
    assert third.load("algorithm").shaping.std == pytest.approx(math.sqrt(2.0))


def test_equal_scores_are_not_divided_by_nothing():
    assert Shaping(running=True).followed(torch.tensor([2.0, 2.0])) == {"mean": 2.0, "std": 1.0, "num_scores": 2}


def test_stored_statistics_weigh_as_many_scores_as_they_are_said_to_be_of():
    light, heavy = (Shaping(mean=1.0, std=2.0, num_scores=n).followed(torch.tensor([9.0] * 10)) for n in (10, 10_000))
    assert light["mean"] == 5.0
    assert heavy["mean"] == pytest.approx(1.008, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kl": {"coef": 0.0, "target": 6.0}}, "kl.target 6.0 steers a coefficient of 0"),
        ({"mean_range": [0.1, 0.9]}, "has no effect without filter_groups=true"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(options: dict[str, Any], sentence: str):
    with pytest.raises(ConfigError, match=sentence.replace(".", r"\.")):
        ppo(**options).load("algorithm")


def test_any_algorithm_can_filter_groups_and_then_needs_them():
    assert GRPO().keeps(rewarded(1.0, 1.0))
    assert not GRPO(filter_groups=True).keeps(rewarded(1.0, 1.0))
    assert PPO(filter_groups=True).needs_group
    assert not PPO().needs_group
    assert not DAPO().keeps(rewarded(1.0, 1.0))


def test_the_mismatch_is_measured_on_tokens_of_the_learners_own_version():
    batch = loss_batch(3)
    ages_BT = torch.randint(0, 3, batch.mask_BT.shape, generator=torch.Generator().manual_seed(0)).float()
    metrics = PPO().loss(batch._replace(columns={**batch.columns, "age": ages_BT})).metrics
    is_fresh = (batch.mask_BT > 0) & (ages_BT == 0)
    pairs = zip(
        batch.columns["behaviour"][is_fresh].tolist(), batch.columns["proximal"][is_fresh].tolist(), strict=True
    )
    total, count = (float(part) for part in metrics["mismatch_kl"])
    assert total == pytest.approx(sum(slow.kl(old, prox, "k3") for old, prox in pairs), abs=1e-5)
    assert count == int(is_fresh.sum()) < int(batch.mask_BT.sum())
    assert float(metrics["behaviour_kl"][1]) == float(batch.mask_BT.sum())
    assert float(metrics["fresh_frac"][0]) == count


def test_without_ages_every_token_is_the_learners_own():
    batch = loss_batch(3)
    metrics = PPO().loss(batch._replace(columns={k: v for k, v in batch.columns.items() if k != "age"})).metrics
    assert metrics["mismatch_kl"] == metrics["behaviour_kl"]


@pytest.mark.parametrize("placed", [False, True])
def test_the_score_of_a_sample_is_normalised_before_its_penalty_whoever_adapts(placed: bool):
    algorithm: PolicyGradient = PPO(kl=KL(coef=0.2, target=6.0), shaping=Shaping(mean=1.0, std=4.0, running=True))
    fixed = PPO(kl=KL(coef=0.2), shaping=Shaping(mean=1.0, std=4.0))
    batch = advantage_batch(1)
    batch = batch._replace(placed_BT=torch.full_like(batch.mask_BT, 0.5) if placed else None)
    assert torch.equal(algorithm.advantages(batch).advantages_BT, fixed.advantages(batch).advantages_BT)
