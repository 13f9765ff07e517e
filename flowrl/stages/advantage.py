"""Advantage: what tokens are worth without a critic, from the rewards of a group alone (GRPO, RLOO and kin).

Arithmetic on one group at a time, in the order in which the learner takes them; the step-wide whitening, where an
algorithm has one, is the learner's. A group that the algorithm does not keep (dynamic sampling) is rejected as
filtered: its credit returns, its place is skipped. What an algorithm learns from step to step (an adaptive KL
coefficient) is this node's state, saved with every checkpoint.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from flowrl.config import Select
from flowrl.engines.checkpoint import checkpoint_version
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Referenced, Samples, Save, extend
from flowrl.stages.estimation import Estimation, keeps_group, load_algorithm, settled
from flowrl.stages.saving import add_state
from flowrl.telemetry.events import Span

if TYPE_CHECKING:
    from flowrl.algorithms.base import Algorithm
    from flowrl.graph.stage import Context, Say


class Advantage(Stage):
    """Finds what every token of a group is worth."""

    class Config(StageConfig):
        """Settings of the advantage node."""

    optional = frozenset({"saves"})
    is_stateful = True
    referenced: In[Referenced]  # in the learner's order: window=1
    samples: Out[Samples]
    saves: In[Save]

    def __init__(self, config: Config, *, algorithm: Select, group_size: int, groups_per_step: int,
                 max_tokens: int = 0) -> None:  # fmt: skip
        self.config: Advantage.Config = config
        self.algorithm = algorithm
        self.group_size = group_size
        self.groups_per_step = groups_per_step
        self.max_tokens = max_tokens  # of the longest response

    def check(self, say: Say) -> None:
        """Load the algorithm and hold its needs against this topology."""
        self._load()

    def _load(self) -> Algorithm:
        self.algorithm = settled(self.algorithm, self.max_tokens)
        return load_algorithm(self.algorithm, group_size=self.group_size, has_critic=False)

    async def run(self, context: Context) -> None:
        """Find advantages until the edge closes."""
        algorithm = self._load()
        context.version = 0 if context.resume_from is None else checkpoint_version(context.resume_from)
        estimation = Estimation(self.algorithm, algorithm, version=context.version)
        if context.resume_from is not None:
            await context.compute(estimation.load, context.resume_from / context.node)
        boundary = asyncio.Condition()
        async with asyncio.TaskGroup() as tasks:
            saving = tasks.create_task(add_state(self.saves, context, boundary, estimation.save))
            await self._estimate(context, estimation, boundary)
            saving.cancel()

    async def _estimate(self, context: Context, estimation: Estimation, boundary: asyncio.Condition) -> None:
        num_kept = 0
        async for group in self.referenced:
            start_s = context.now()
            if not await context.compute(keeps_group, estimation.algorithm, group):
                reason = f"{self.algorithm.use} learns nothing from rewards {group.rewards}"
                await self.referenced.reject(group, kind="filtered", reason=reason)
                continue
            fields = await context.compute(estimation.advantages, group, None)
            context.recorder.record(
                Span(node=context.node, replica=context.replica, name="advantages", start_s=start_s,
                     end_s=context.now(), groups=[group.group_id])
            )  # fmt: skip
            await self.samples.put(extend(Samples, group, **fields))
            context.done += 1
            num_kept += 1
            if num_kept % self.groups_per_step == 0:
                async with boundary:
                    await context.compute(estimation.end_step)
                    context.version += 1
                    boundary.notify_all()
