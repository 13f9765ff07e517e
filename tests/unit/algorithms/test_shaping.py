"""Scores to rewards: order of the shaping, the length penalty, the last token, the group filter."""

from __future__ import annotations

import pytest
import torch

from flowrl.algorithms.base import AdvantageBatch
from flowrl.algorithms.dapo import DAPO
from flowrl.algorithms.grpo import GRPO
from flowrl.algorithms.shaping import (
    Shaping,
    adapted_coef,
    has_contrast,
    last_token,
    overlong_penalty,
    token_rewards,
)
from flowrl.errors import ConfigError
from tests.support import slow_algorithms as slow
from tests.unit.algorithms.cases import NAN, mask_rows, ragged_mask, rewarded, rows_of, same


def shaped(rewards: list[float], lengths: list[int], cut: list[float], shaping: Shaping) -> list[float]:
    mask_BT = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).float()
    batch = AdvantageBatch(torch.tensor(rewards), mask_BT, -mask_BT, cut_B=torch.tensor(cut))
    return GRPO(shaping=shaping).shaped_scores(batch)[0].tolist()


def test_scores_are_normalised_then_clipped_then_shortened_and_fined():
    shaping = Shaping(
        mean=1.0, std=2.0, clip=3.0, cut_penalty=1.0, max_tokens=10, overlong_buffer=4, overlong_factor=0.5
    )
    found = shaped([2.0, 100.0, -100.0], [3, 8, 10], [0.0, 0.0, 1.0], shaping)
    assert found == [0.5, 3.0 - 0.25, -3.0 - 0.5 - 1.0]


def test_nothing_is_clipped_by_default():
    assert shaped([1e6, -1e6], [1, 1], [0.0, 0.0], Shaping()) == [1e6, -1e6]


def test_the_length_penalty_equals_the_paper_at_every_length():
    lengths = list(range(1, 16))
    penalties_B = overlong_penalty(torch.tensor(lengths, dtype=torch.float32), max_tokens=12, buffer=5, factor=0.7)
    assert same(penalties_B, [slow.overlong(length, 12, 5, 0.7) for length in lengths])


def test_an_overlong_buffer_without_its_maximum_is_refused():
    with pytest.raises(ValueError, match=r"overlong_buffer 4 is longer than max_tokens 3"):
        Shaping(overlong_buffer=4, max_tokens=3)
    with pytest.raises(ConfigError, match=r"algorithm\.shaping\.overlong_buffer: is 4, but max_tokens is 0"):
        shaped([1.0, 2.0], [1, 1], [0.0, 0.0], Shaping(overlong_buffer=4))


def test_the_score_falls_on_the_last_sampled_token_and_the_penalty_on_all():
    mask_BT = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    kl_BT = torch.tensor([[0.5, NAN, -1.0, NAN], [NAN] * 4])
    rewards_BT = token_rewards(torch.tensor([2.0, NAN]), mask_BT, kl_BT, 0.1)
    assert same(rewards_BT, [[-0.05, 0.0, 2.1, 0.0], [0.0] * 4])


@pytest.mark.parametrize("seed", range(5))
def test_token_rewards_equal_the_slow_ones(seed: int):
    generator = torch.Generator().manual_seed(seed)
    scores_B, kl_BT = torch.randn(4, generator=generator), torch.randn(4, 8, generator=generator)
    mask_BT = ragged_mask(4, 8, generator)
    rows = zip(scores_B.tolist(), rows_of(kl_BT), mask_rows(mask_BT), strict=True)
    expected = [slow.token_rewards(score, kls, mask, 0.3) for score, kls, mask in rows]
    assert same(token_rewards(scores_B, mask_BT, kl_BT, 0.3), expected)
    assert last_token(mask_BT).sum(1).tolist() == [1.0] * 4


def test_groups_of_equal_rewards_or_outside_the_range_have_no_contrast():
    assert not has_contrast(torch.tensor([0.3, 0.3, 0.3]))
    assert has_contrast(torch.tensor([0.3, 0.3, 0.4]))
    assert not has_contrast(torch.tensor([0.9, 1.0]), (0.1, 0.9))
    assert DAPO(mean_range=(0.1, 0.9)).keeps(rewarded(0.0, 1.0))
    assert not DAPO().keeps(rewarded(1.0, 1.0))


def test_the_filter_sees_the_scores_that_are_learned():
    assert DAPO().keeps(rewarded(20.0, 30.0))
    assert not DAPO(shaping=Shaping(clip=10.0)).keeps(rewarded(20.0, 30.0))
    cut = rewarded(1.0, 1.0)._replace(cut_B=torch.tensor([0.0, 1.0]))
    assert DAPO(shaping=Shaping(cut_penalty=0.5)).keeps(cut)
    assert not DAPO().keeps(cut)


def test_the_adapted_coefficient_moves_by_at_most_a_fifth_of_its_horizon():
    assert adapted_coef(1.0, kl=100.0, target=1.0, num_samples=50, horizon=100) == pytest.approx(1.1)
    assert adapted_coef(1.0, kl=0.0, target=1.0, num_samples=50, horizon=100) == pytest.approx(0.9)
    assert adapted_coef(1.0, kl=1.1, target=1.0, num_samples=100, horizon=100) == pytest.approx(1.1)
