"""Recorded: the groups that a run has learned, taken from its files, for `flowrl retrain`. And who takes the weights.

Invariant: the groups come in the order in which they were learned, exactly as the learner got them but for their ids.

Group k here is the k-th group of the steps that are trained again, so that what was filtered or failed leaves no gap.

Tests: tests/contracts/test_retrain.py
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Credit, Samples, Weights
from flowrl.telemetry.records import read_samples, step_path

if TYPE_CHECKING:
    from flowrl.graph.stage import Context


class Recorded(Stage):
    """Source of recorded groups, one against each credit."""

    class Config(StageConfig):
        """Settings of the recorded node."""

    is_single = True
    credits: In[Credit]
    samples: Out[Samples]

    def __init__(self, config: Config, *, directory: str, first: int, last: int) -> None:
        self.config: Recorded.Config = config
        self.directory = directory  # of the run's step files
        self.first = first  # step to begin with
        self.last = last  # the step after the one to end with

    async def run(self, context: Context) -> None:
        """Send every group of the steps, one step in memory at a time; then wait for the end."""
        sent = 0
        for step in range(self.first, self.last):
            for group in await context.compute(read_samples, step_path(Path(self.directory), step)):
                await self.credits.get()
                if context.stopping.is_set():
                    return
                await self.samples.put(msgspec.structs.replace(group, group_id=sent))
                sent += 1
                context.done = sent


class WeightsReader(Stage):
    """Takes every published version in a generator's place; nothing is sampled from it."""

    class Config(StageConfig):
        """Settings of the weights_reader node."""

    weights: In[Weights]

    def __init__(self, config: Config) -> None:
        self.config: WeightsReader.Config = config

    async def run(self, context: Context) -> None:
        """Acknowledge versions until the edge closes."""
        async for weights in self.weights:
            context.version = weights.version
            await self.weights.done(weights)
