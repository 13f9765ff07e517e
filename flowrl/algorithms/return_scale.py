"""The scale of returns: in what units a critic's network learns them, (R - mean) / unit, of running mean and deviation.

Without it a reward of 50 has the network climb there by its learning rate, and a value clip of 0.2 hold it back. As in
MAPPO (2103.01955, section 5.1), which has it from PopArt (1602.07714) and leaves out the preserving of outputs.

A unit is `GAIN` deviations. Adam moves a new head of zeros by its learning rate, whatever the size of the gradient, and
that rate is meant for the weights of a language model. So it learns as much faster as it has less far to go.

Invariant: with the scale and shift of returns nothing changes in what a network learns, after the first step.

Called by the critic.

Tests: tests/unit/algorithms/test_return_scale.py
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

GAIN = 8.0  # deviations of the returns in a unit
DECAY = 0.9  # of what earlier steps said of returns: about ten of them count


class ReturnScale(msgspec.Struct, frozen=True):
    """Running mean and deviation of the returns of a run's steps; before the first, `mean` is a guess and a unit 1."""

    weight: float = 0.0  # of what has been seen, 1 in the long run
    mean: float = 0.0
    square: float = 1.0  # mean of the squares

    @property
    def unit(self) -> float:
        """Return what 1 from the network is worth; before the first step, and where all returns were equal, 1.

        >>> ReturnScale().seen([49.0, 51.0]).unit, ReturnScale().seen([5.0, 5.0]).unit, ReturnScale().unit
        (8.0, 1.0, 1.0)
        """
        variance = self.square - self.mean**2 if self.weight else 0.0
        return GAIN * math.sqrt(variance) if variance > 1e-12 * self.square else 1.0

    def seen(self, returns: Sequence[float]) -> ReturnScale:
        """Return the scale after a step with these returns.

        >>> scale = ReturnScale().seen([1.0, 3.0]).seen([4.0, 6.0])
        >>> round(scale.mean, 4), round(scale.weight, 4)  # (0.9 * 0.1 * 2 + 0.1 * 5) / 0.19
        (3.5789, 0.19)
        """
        if not returns:
            return self
        before, weight = DECAY * self.weight, DECAY * self.weight + 1 - DECAY
        new = (math.fsum(returns) / len(returns), math.fsum(each**2 for each in returns) / len(returns))
        mean, square = (
            (before * old + (1 - DECAY) * each) / weight
            for old, each in zip((self.mean, self.square), new, strict=True)
        )
        return ReturnScale(weight, mean, square)
