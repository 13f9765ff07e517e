"""Means of held-out scores with 95 % confidence intervals, over prompts.

Samples of one prompt are not independent, so the unit is the prompt. Each prompt's mean score is one observation, and
the interval is Student's t over them, mean +- t(0.975, n - 1) * s / sqrt(n). Before and after are the same prompts, so
their difference is taken prompt by prompt, which takes the prompts' own difficulty out of the noise. The interval says
how a policy would do on more prompts like these; it does not cover what another training seed would give.

Tests: tests/unit/telemetry/test_intervals.py
"""

from __future__ import annotations

import math
from statistics import NormalDist, fmean, stdev
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """A mean and its 95 % confidence interval."""

    mean: float
    half_width: float  # infinite with fewer than two observations
    num: int  # observations: prompts

    @property
    def low(self) -> float:
        """Return the lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Return the upper end."""
        return self.mean + self.half_width


def prompt_means(scores: Sequence[Sequence[float]]) -> list[float]:
    """Return each prompt's mean over its samples; `[[0, 1], [1, 1]]` gives `[0.5, 1.0]`."""
    return [fmean(row) for row in scores if row]


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of at least one observation with its 95 % t interval."""
    half_width = math.inf
    if len(values) > 1:
        half_width = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean=fmean(values), half_width=half_width, num=len(values))


def paired_interval(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Interval | None:
    """Return the mean of after - before, prompt by prompt; None where the prompts are not the same ones."""
    if len(before) != len(after) or not before or not all(before) or not all(after):
        return None
    pairs = zip(prompt_means(before), prompt_means(after), strict=True)
    return mean_interval([new - old for old, new in pairs])


def t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t: 12.706 with 1 degree of freedom, 2.262 with 9, 1.980 with 120.

    Exact for 1 and 2; beyond, the Cornish-Fisher expansion about the normal (Abramowitz and Stegun 26.7.5), which is
    within 0.2 % at 3 degrees of freedom and 0.001 % from 10 on.
    """
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
