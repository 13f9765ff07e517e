"""A critic's network learns a reward of 50 as it learns one of 1: in units of the returns' own mean and deviation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flowrl.algorithms.return_scale import ReturnScale
from flowrl.config import Select
from flowrl.engines.base import Ranks, Schedule, TokenGroup, TrainingConfig
from flowrl.engines.torch import TorchEngine
from flowrl.messages import Buffer
from flowrl.stages.critic import explained_variance, in_units, sampled

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

VALUE = Select(use="flowrl.algorithms.value:ValueLoss")  # with its clip of 0.2
STEPS = 12


def explained(model: Path, *, factor: float, shift: float, is_scaled: bool) -> float:
    """Return what a critic explains of returns that follow from the tokens, before its last step."""
    settings = TrainingConfig(
        model=str(model), head="value", lr=3e-3, dtype="float32", schedule=Schedule(kind="constant")
    )
    engine = TorchEngine(settings, where="critic", name=f"scale-{factor}-{is_scaled}")
    engine.open(Ranks())
    scale, found = ReturnScale(), 0.0
    try:
        for _ in range(STEPS):
            step: list[TokenGroup] = []
            for first in range(8):
                tokens = [[5 + first, 6 + place, 7 + first] for place in range(2)]
                bare = TokenGroup(prompt_ids=Buffer.ints([3, 4]), responses=[Buffer.ints(each) for each in tokens])
                values = [scale.mean + scale.unit * row for row in engine.score([bare])[0]]
                returns = [Buffer.floats([factor * (first % 4) + shift] * len(each)) for each in tokens]
                columns = {"values": [Buffer.floats(row) for row in values], "returns": returns}
                step.append(TokenGroup(prompt_ids=Buffer.ints([3, 4]), responses=bare.responses, columns=columns))
            found = explained_variance(step)["critic.explained_variance"]
            before = scale
            scale = scale.seen(sampled(step, "returns").tolist()) if is_scaled else scale
            engine.accumulate([in_units(group, before, scale) for group in step], VALUE)
            engine.apply()
    finally:
        engine.close()
    return found


def test_a_reward_of_any_size_is_explained_as_well(tiny: Path) -> None:
    small = explained(tiny, factor=1.0, shift=0.0, is_scaled=True)
    large = explained(tiny, factor=50.0, shift=100.0, is_scaled=True)
    assert small > 0.5
    assert large == pytest.approx(small, abs=1e-3)
    assert explained(tiny, factor=50.0, shift=100.0, is_scaled=False) < 0.1
