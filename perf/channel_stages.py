"""Stages for perf/channels.py that do nothing but pass messages on, so that only the flow is measured."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig
from flowrl.graph.staleness import Admission
from flowrl.messages import Buffer, Credit, Prompt, Rollouts, Sample, Scored, VersionSpan, extend
from flowrl.telemetry.events import Notice

if TYPE_CHECKING:
    from flowrl.graph.stage import Context


class Source(Stage):
    """Admits groups of ready-made rollouts as fast as credits come."""

    class Config(StageConfig):
        tokens: int = 1000  # of one rollout
        group_size: int = 8

    credits: In[Credit]
    rollouts: Out[Rollouts]

    def __init__(self, config: Config) -> None:
        self.config: Source.Config = config

    async def run(self, context: Context) -> None:
        tokens = self.config.tokens
        sample = Sample(
            token_ids=Buffer.ints(list(range(tokens))),
            logprobs=Buffer.floats([-0.5] * tokens),
            versions=[VersionSpan(0, 0, tokens)],
            finish="length",
            text="",
        )
        prompt = Prompt(group_id=0, token_ids=Buffer.ints([1] * 64), columns={}, num_samples=1, seed=0)
        group = extend(Rollouts, prompt, samples=[sample] * self.config.group_size, generator="source.0")
        async for credit in self.credits:
            (group_id,) = credit.groups
            await self.rollouts.put(extend(Rollouts, group, group_id=group_id))


class Relay(Stage):
    """Passes a group on, with a score if it has none."""

    class Config(StageConfig):
        lanes: int = 4

    rollouts: In[Rollouts]
    scored: Out[Scored]

    def __init__(self, config: Config) -> None:
        self.config: Relay.Config = config

    async def run(self, context: Context) -> None:
        async for group in self.rollouts:
            await self.scored.put(extend(Scored, group, scores={"one": [1.0] * len(group.samples)}))


class Drain(Stage):
    """Takes groups in order, returns their credits, and reports groups per second after a warm-up."""

    class Config(StageConfig):
        warmup_groups: int = 100
        groups: int = 500
        batch: int = 16
        rounds: int = 5

    ordered = frozenset({"samples"})
    samples: In[Scored]
    released: Out[Credit]

    def __init__(self, config: Config) -> None:
        self.config: Drain.Config = config

    @property
    def admission(self) -> Admission:
        return Admission(self.config.batch)

    async def run(self, context: Context) -> None:
        await self._drain(self.config.warmup_groups)
        for _ in range(self.config.rounds):
            start_s = time.perf_counter()
            await self._drain(self.config.groups)
            rate = self.config.groups / (time.perf_counter() - start_s)
            context.recorder.record(Notice(level="info", where=context.where, text=f"{rate:.3f}", time_s=context.now()))

    async def _drain(self, count: int) -> None:
        taken = 0
        while taken < count:
            groups = await self.samples.get_some(self.config.batch)
            taken += len(groups)
            await self.samples.done(*groups, learned_in=0)
            await self.released.put(Credit(groups=[group.group_id for group in groups]))
