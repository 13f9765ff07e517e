"""Intervals against textbook quantiles and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flowrl.telemetry.intervals import mean_interval, paired_interval, prompt_means, t_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042), (63, 1.998), (120, 1.980)],
)
def test_t_quantile_agrees_with_the_table(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, rel=2e-3)


def test_interval_is_the_t_interval_over_prompt_means() -> None:
    scores = np.random.default_rng(3).random((10, 4))
    interval = mean_interval(prompt_means(scores.tolist()))
    means = scores.mean(axis=1)
    half = 2.26216 * means.std(ddof=1) / np.sqrt(10)
    assert interval.low == pytest.approx(means.mean() - half, rel=1e-4)
    assert interval.high == pytest.approx(means.mean() + half, rel=1e-4)
    assert interval.num == 10


def test_paired_interval_is_narrower_than_unpaired_where_prompts_differ_in_difficulty() -> None:
    draw = np.random.default_rng(4)
    before = draw.random((20, 1)) + 0.01 * draw.random((20, 4))
    after = before + 0.1 + 0.01 * draw.random((20, 4))
    change = paired_interval(before.tolist(), after.tolist())
    assert change is not None
    differences = after.mean(axis=1) - before.mean(axis=1)
    assert change.mean == pytest.approx(differences.mean())
    assert change.half_width == pytest.approx(2.09302 * differences.std(ddof=1) / np.sqrt(20), rel=1e-4)
    assert change.half_width < mean_interval(prompt_means(after.tolist())).half_width / 10


def test_one_prompt_has_no_interval() -> None:
    assert math.isinf(mean_interval([0.5]).half_width)


def test_different_prompts_cannot_be_paired() -> None:
    assert paired_interval([[1.0]], [[1.0], [0.0]]) is None
    assert paired_interval([[1.0], []], [[1.0], [0.0]]) is None


def test_coverage_of_the_interval_is_95_percent() -> None:
    draw = np.random.default_rng(5)
    intervals = [mean_interval(row) for row in draw.normal(size=(600, 8)).tolist()]
    held = [interval.low <= 0 <= interval.high for interval in intervals]
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)
