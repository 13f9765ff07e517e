"""What a reward model's values are worth: a score for each sequence, or for each step of it.

Invariant: a score is finite, or the group is refused.

Called by the reward-model stage, with an engine that gives one value after every response token
(flowrl.engines.torch:SequenceScoringEngine).

Tests: tests/unit/stages/test_reward.py
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from flowrl.errors import ModelError, RewardError
from flowrl.messages import Buffer
from flowrl.stages.tokens import mask_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from flowrl.data.steps import StepFinder
    from flowrl.engines.base import TokenGroup
    from flowrl.messages import FloatArray, Rollouts


class SequenceScores(NamedTuple):
    """Scores by the value at a sequence's last token."""

    where: str
    weight: float
    clip: float  # scores beyond +- clip are clipped
    mean: float
    std: float

    def call(self, engine: Any) -> Callable[[Sequence[TokenGroup]], list[list[float]]]:
        """Return what of the engine is to be called with groups."""
        return engine.score_groups

    def scores(self, found: list[float], group: Rollouts) -> tuple[list[float], None]:
        """Return the samples' scores from what the engine found in their group."""
        normal = [(score - self.mean) / self.std for score in _checked(found, group, self.where)]
        return [self.weight * max(-self.clip, min(self.clip, score)) for score in normal], None


class StepScores(NamedTuple):
    """Scores by the values at the last tokens of a sequence's steps."""

    where: str
    weight: float
    step_total: Literal["mean", "sum"]
    finder: StepFinder

    def call(self, engine: Any) -> Callable[[Sequence[TokenGroup]], list[list[FloatArray]]]:
        """Return what of the engine is to be called with groups."""
        return engine.score

    def scores(self, found: list[FloatArray], group: Rollouts) -> tuple[list[float], list[Buffer]]:
        """Return the samples' scores from what the engine found in their group, and what each token earned of them."""
        scores, placed = list[float](), list[Buffer]()
        for row, sample in zip(found, group.samples, strict=True):
            ends = self.finder.ends(sample.token_ids.tolist(), mask_of(sample).tolist())
            values = _checked([float(row[end]) for end in ends], group, self.where)
            share = self.weight / (len(ends) if self.step_total == "mean" else 1)
            earned = dict(zip(ends, (share * _probability(value) for value in values), strict=True))
            scores.append(sum(earned.values()))
            placed.append(Buffer.floats([earned.get(place, 0.0) for place in range(len(row))]))
        return scores, placed


def _probability(value: float) -> float:
    """Return the logistic function of a value; `_probability(0.0) == 0.5`."""
    return 1.0 / (1.0 + math.exp(-value)) if value >= 0 else math.exp(value) / (1.0 + math.exp(value))


def _checked(scores: list[float], group: Rollouts, where: str) -> list[float]:
    """Return a model's scores, or refuse them.

    Raises:
        RewardError: one of them is not finite.
    """
    for score in scores:
        if not math.isfinite(score):
            what = f"the model scored a sample of group {group.group_id} {score}"
            raise RewardError(where, what, "check the model and its dtype")
    return scores


def read_normalisation(directory: Path) -> tuple[float, float]:
    """Return the mean and std of a reward model's scores as its config.json states them, else 0 and 1.

    Raises:
        ModelError: they are there and not usable.
    """
    settings = json.loads((directory / "config.json").read_bytes())
    mean, std = settings.get("mean", 0.0), settings.get("std", 1.0)
    usable = all(isinstance(value, int | float) and math.isfinite(value) for value in (mean, std))
    if not usable or std <= 0:
        what = f"its config.json has mean={mean!r} and std={std!r}"
        raise ModelError(f"model {directory}", what, "a reward model's are numbers, std above 0; set normalise=false")
    return float(mean), float(std)
