"""Advantage estimation and group baselines against slow loops and their defining properties."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from flowrl.algorithms.advantages import (
    discounted_returns,
    gae,
    group_centred,
    group_standardised,
    leave_one_out,
)
from flowrl.algorithms.functional import masked
from tests.support import slow_algorithms as slow
from tests.unit.algorithms.cases import NAN, dirtied, mask_rows, ragged_mask, rows_of, same

if TYPE_CHECKING:
    from torch import Tensor

SEEDS = range(5)
DISCOUNTS = [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (0.0, 1.0)]
BASELINES = {"centred": group_centred, "standardised": group_standardised, "left out": leave_one_out}


def case(seed: int, rows: int = 4, width: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards_BT, values_BT = torch.randn(2, rows, width, generator=generator)
    return rewards_BT, values_BT, ragged_mask(rows, width, generator)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
def test_gae_equals_the_slow_loop_and_skips_environment_tokens(seed: int, gamma: float, lam: float):
    rewards_BT, values_BT, mask_BT = case(seed)
    rows = zip(rows_of(rewards_BT), rows_of(values_BT), mask_rows(mask_BT), strict=True)
    expected = [slow.gae(rewards, values, mask, gamma, lam) for rewards, values, mask in rows]
    advantages_BT, returns_BT = gae(
        dirtied(rewards_BT, mask_BT, NAN), dirtied(values_BT, mask_BT, NAN), mask_BT, gamma=gamma, lam=lam
    )
    assert same(advantages_BT, [advantages for advantages, _ in expected])
    assert same(returns_BT, [returns for _, returns in expected])


def test_gae_takes_the_next_sampled_token_for_the_next_step():
    rewards_BT = torch.tensor([[0.0, 7.0, 1.0]])
    values_BT = torch.tensor([[0.5, 9.0, 0.25]])
    advantages_BT, _ = gae(rewards_BT, values_BT, torch.tensor([[1.0, 0.0, 1.0]]), gamma=1.0, lam=0.5)
    assert advantages_BT.tolist() == [[0.25 - 0.5 + 0.5 * 0.75, 0.0, 0.75]]


@pytest.mark.parametrize("seed", SEEDS)
def test_gae_with_lambda_one_equals_discounted_returns_less_values(seed: int):
    rewards_BT, values_BT, mask_BT = case(seed)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=1.0)
    expected_BT = discounted_returns(rewards_BT, mask_BT, gamma=0.9)
    assert torch.allclose(returns_BT, expected_BT, atol=1e-6)
    assert torch.allclose(advantages_BT, masked(expected_BT - values_BT, mask_BT), atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
def test_discounted_returns_equal_the_slow_sums(seed: int, gamma: float):
    rewards_BT, _, mask_BT = case(seed)
    rows = zip(rows_of(rewards_BT), mask_rows(mask_BT), strict=True)
    expected = [slow.discounted(rewards, mask, gamma) for rewards, mask in rows]
    assert same(discounted_returns(dirtied(rewards_BT, mask_BT, NAN), mask_BT, gamma=gamma), expected)


@pytest.mark.parametrize("width", [1, 2, 3, 31, 32, 33])
def test_every_length_of_sequence_is_summed_to_its_end(width: int):
    returns_BT = discounted_returns(torch.ones(1, width), torch.ones(1, width), gamma=1.0)
    assert returns_BT.tolist() == [[float(width - t) for t in range(width)]]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", BASELINES)
def test_group_baselines_equal_the_slow_ones_and_sum_to_zero(seed: int, kind: str):
    rewards_B = torch.randn(6, generator=torch.Generator().manual_seed(seed))
    advantages_B = BASELINES[kind](rewards_B, torch.ones(6))
    assert same(advantages_B, slow.baseline(kind, rewards_B.double().tolist()))
    assert float(advantages_B.double().sum()) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", BASELINES)
@pytest.mark.parametrize("reward", [0.0, 0.1, -3.3])
def test_equal_rewards_are_worth_exactly_nothing(kind: str, reward: float):
    assert BASELINES[kind](torch.full((7,), reward), torch.ones(7)).tolist() == [0.0] * 7


@pytest.mark.parametrize("kind", BASELINES)
def test_an_absent_sample_leaves_the_others_as_they_are(kind: str):
    without_B = BASELINES[kind](torch.tensor([1.0, 0.0, 0.5]), torch.ones(3))
    with_B = BASELINES[kind](torch.tensor([1.0, NAN, 0.0, 0.5]), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert with_B.tolist() == [without_B[0], 0.0, without_B[1], without_B[2]]


@pytest.mark.parametrize("kind", BASELINES)
def test_one_present_sample_is_worth_nothing(kind: str):
    assert BASELINES[kind](torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])).tolist() == [0.0, 0.0]
