"""A critic's units: nothing changes in them with a reward's scale and shift."""

from __future__ import annotations

import random

import pytest

from flowrl.algorithms.return_scale import ReturnScale


def in_units(steps: list[list[float]]) -> list[float]:
    """Return every step's returns in the units that hold once it has been seen."""
    scale, found = ReturnScale(), []
    for returns in steps:
        scale = scale.seen(returns)
        found += [(each - scale.mean) / scale.unit for each in returns]
    return found


def test_a_first_step_has_mean_0_and_an_eighth_for_its_deviation() -> None:
    assert in_units([[48.0, 50.0, 52.0, 50.0]]) == pytest.approx([-(2**0.5) / 8, 0.0, 2**0.5 / 8, 0.0])


def test_a_later_step_counts_by_its_weight() -> None:
    scale = ReturnScale().seen([0.0, 2.0]).seen([3.0, 5.0])
    # means 1 and 4, of squares 2 and 17, weights 0.09 and 0.1 of 0.19
    assert scale.mean == pytest.approx((0.09 * 1 + 0.1 * 4) / 0.19)
    assert scale.unit == pytest.approx(8 * ((0.09 * 2 + 0.1 * 17) / 0.19 - scale.mean**2) ** 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_scale_and_shift_of_a_reward_change_nothing(seed: int) -> None:
    drawn = random.Random(seed)
    steps = [[drawn.gauss(0, 1) for _ in range(drawn.randint(1, 9))] for _ in range(8)]
    factor, shift = drawn.choice([0.001, 50.0, 1e4]), drawn.uniform(-100, 100)
    assert in_units([[factor * each + shift for each in step] for step in steps]) == pytest.approx(
        in_units(steps), abs=1e-4
    )


def test_equal_returns_are_0_and_no_division_by_nothing() -> None:
    assert in_units([[7.0, 7.0], [7.0]]) == pytest.approx([0.0] * 3)
    assert ReturnScale().seen([]) == ReturnScale()
