"""Credit without a critic: advantages from the rewards of a group alone (GRPO, RLOO, REINFORCE++ and kin).

Arithmetic on one group at a time; the step-wide whitening, where an algorithm has one, is the learner's. A group that
the algorithm does not keep (DAPO's dynamic sampling) is rejected as filtered: its credit returns, its place is skipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowrl.config import Select
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Referenced, Samples, extend
from flowrl.stages.credit import credit_group, keeps_group, load_algorithm
from flowrl.telemetry.events import Span

if TYPE_CHECKING:
    from flowrl.graph.stage import Context, Say


class Advantage(Stage):
    """Credits every token of a group."""

    class Config(StageConfig):
        """Settings of the advantage node."""

    referenced: In[Referenced]
    samples: Out[Samples]

    def __init__(self, config: Config, *, algorithm: Select, group_size: int) -> None:
        self.config: Advantage.Config = config
        self.algorithm = algorithm
        self.group_size = group_size

    def check(self, say: Say) -> None:
        """Load the algorithm and hold its needs against this topology."""
        load_algorithm(self.algorithm, group_size=self.group_size, has_critic=False)

    async def run(self, context: Context) -> None:
        """Credit groups until the edge closes."""
        algorithm = load_algorithm(self.algorithm, group_size=self.group_size, has_critic=False)
        async for group in self.referenced:
            start_s = context.now()
            if not await context.compute(keeps_group, algorithm, group):
                reason = f"{self.algorithm.use} learns nothing from rewards {group.rewards}"
                await self.referenced.reject(group, kind="filtered", reason=reason)
                continue
            credited = await context.compute(credit_group, algorithm, group, None)
            context.recorder.record(
                Span(node=context.node, replica=context.replica, name="credit", start_s=start_s, end_s=context.now(),
                     groups=[group.group_id])
            )  # fmt: skip
            await self.samples.put(extend(Samples, group, **credited))
            context.done += 1
