"""How sure a benchmark's score is: a 95 % interval over its items, by whichever method is right for it.

    wilson      a share of items (every value 0 or 1): Wilson's score interval, which is right at 0 % and 100 % too
    student     a mean of other values, and of paired differences: Student's t (telemetry/intervals.py)
    agreed      a mean of paired differences of shares that are all the same: what of the items may be otherwise and yet
                not be among n (the upper end of Clopper and Pearson's interval for 0 of n, 1 - 0.025^(1/n))
    bootstrap   anything else that a task computes from its items (perplexity, F1, BLEU): percentiles of 1000 resamples

Invariant: the same values and seed give the same interval.

Called by runs/results.py and whoever evaluates.

Tests: tests/unit/telemetry/test_scores.py
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, Literal

import msgspec

from flowrl.telemetry.intervals import mean_interval

Aggregate = Callable[[Sequence[Any]], float]
Z = 1.959963984540054  # the normal's 97.5 % quantile
RESAMPLES = 1000


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """A value, its 95 % interval, and what that was computed from."""

    value: float
    low: float | None  # None: one item says nothing
    high: float | None
    num: int
    method: Literal["wilson", "student", "agreed", "bootstrap"]

    def times(self, factor: float) -> Bounds:
        """Return them on another scale."""
        low, high = (None if end is None else factor * end for end in (self.low, self.high))
        return msgspec.structs.replace(self, value=factor * self.value, low=low, high=high)

    def said(self) -> str:
        """Return it as text."""
        interval = "no interval" if self.low is None or self.high is None else f"[{self.low:.4f}, {self.high:.4f}]"
        return f"{self.value:.4f} {interval}"


def wilson(num_right: int, num: int) -> tuple[float, float]:
    """Return the interval of a share (Wilson 1927); 8 of 10 gives 0.490 to 0.943."""
    share = num_right / num
    below = 1 + Z**2 / num
    middle = (share + Z**2 / (2 * num)) / below
    half = Z * math.sqrt(share * (1 - share) / num + Z**2 / (4 * num**2)) / below
    return max(0.0, middle - half), min(1.0, middle + half)


def score_of(values: Sequence[Any], aggregate: Aggregate | None, *, seed: int) -> Bounds:
    """Return the bounds of a score; `aggregate` None is the mean."""
    if aggregate is None:
        numbers = [float(value) for value in values]
        if set(numbers) <= {0.0, 1.0}:
            low, high = wilson(round(sum(numbers)), len(numbers))
            return Bounds(value=sum(numbers) / len(numbers), low=low, high=high, num=len(numbers), method="wilson")
        return _student(numbers)
    return bootstrap(len(values), lambda drawn: aggregate([values[k] for k in drawn]), seed)


def mean_over(rows: Sequence[Sequence[float]], *, is_share: bool = False, seed: int) -> Bounds:
    """Return the bounds of the mean over all values, those of one row not being independent of each other.

    `is_share` says that every value is one of 0 to 1, so that rows which are all 0 or 1 have Wilson's interval.
    """
    if len({len(row) for row in rows}) > 1:
        return bootstrap(len(rows), lambda drawn: fmean(value for k in drawn for value in rows[k]), seed)
    means = [fmean(row) for row in rows]
    return score_of(means, None, seed=seed) if is_share else _student(means)


def mean_difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], *, seed: int) -> Bounds:
    """Return the bounds of ours - theirs, row by row; else as `mean_over`."""
    apart = [[one - other for one, other in zip(*rows, strict=True)] for rows in zip(ours, theirs, strict=True)]
    return mean_over(apart, seed=seed)


def difference_of(ours: Sequence[Any], theirs: Sequence[Any], aggregate: Aggregate | None, *, seed: int) -> Bounds:
    """Return the bounds of ours - theirs on the same items, pair by pair."""
    if aggregate is None:
        apart = [float(a) - float(b) for a, b in zip(ours, theirs, strict=True)]
        if len(apart) > 1 and len({*apart}) == 1 and all(0 <= float(each) <= 1 for each in (*ours, *theirs)):
            unseen, value = 1 - 0.025 ** (1 / len(apart)), apart[0]
            low, high = value - unseen * (1 + value), value + unseen * (1 - value)
            return Bounds(value=value, low=low, high=high, num=len(apart), method="agreed")
        return _student(apart)
    return bootstrap(
        len(ours), lambda drawn: aggregate([ours[k] for k in drawn]) - aggregate([theirs[k] for k in drawn]), seed
    )


def _student(numbers: Sequence[float]) -> Bounds:
    found = mean_interval(numbers)
    one = not math.isfinite(found.half_width)
    low, high = (None, None) if one else (found.low, found.high)
    return Bounds(value=found.mean, low=low, high=high, num=found.num, method="student")


def bootstrap(num: int, compute: Callable[[Sequence[int]], float], seed: int) -> Bounds:
    """Return the bounds of what is computed from items, given the places of those that were drawn."""
    value = float(compute(range(num)))
    if num < 2:
        return Bounds(value=value, low=None, high=None, num=num, method="bootstrap")
    draw = random.Random(seed)
    found = sorted(float(compute(draw.choices(range(num), k=num))) for _ in range(RESAMPLES))
    low, high = found[round(0.025 * (RESAMPLES - 1))], found[round(0.975 * (RESAMPLES - 1))]
    return Bounds(value=value, low=low, high=high, num=num, method="bootstrap")
