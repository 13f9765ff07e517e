"""Advantage: what tokens are worth without a critic, from the rewards of a group alone (GRPO, RLOO and kin).

Arithmetic on one group at a time, in the order in which the learner takes them; the step-wide whitening, where an
algorithm has one, is the learner's. A greedy response serves as baseline here and goes no further. A group that the
algorithm does not keep (dynamic sampling) is rejected as filtered: its credit returns, its place is skipped. What an
algorithm learns from step to step (an adaptive KL coefficient) is this node's state, saved with every checkpoint.

Tests: tests/unit/stages/test_advantage.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowrl.engines.checkpoint import checkpoint_version
from flowrl.graph.ports import In, Out
from flowrl.graph.simulated import Itself
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Referenced, Samples, extend
from flowrl.stages.estimation import Estimation, keeps_group, load_algorithm, settled, split_greedy
from flowrl.stages.sampler import Learning, Sampler
from flowrl.stages.trial import try_algorithm

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.algorithms.base import Algorithm
    from flowrl.graph.simulated import Costs
    from flowrl.graph.stage import Context, Say


BY_TURN = "reinforce_pp:ReinforcePPBaseline"  # whose baseline is the group's mean at the same turn


class Advantage(Stage):
    """Finds what every token of a group is worth."""

    class Config(StageConfig):
        """Settings of the advantage node."""

    ordered = frozenset({"referenced"})
    is_stateful = True
    referenced: In[Referenced]  # in the learner's order
    samples: Out[Samples]

    def __init__(self, config: Config, sampler: Sampler, learning: Learning) -> None:
        self.config: Advantage.Config = config
        self.sampler = sampler
        self.algorithm = learning.algorithm
        self.learning = learning

    def check(self, say: Say) -> None:
        """Load the algorithm, hold its needs against this topology and try it on a made-up group."""
        algorithm = self._load()
        sampler = self.sampler
        try_algorithm(algorithm, self.algorithm.use, sampler.group_size, has_turns=sampler.max_turns > 1)
        shaping = getattr(algorithm, "shaping", None)
        if sampler.max_turns == 1 or shaping is None:
            return
        if shaping.clip or shaping.mean:
            say("algorithm.shaping.clip, mean: no effect, for rewards of turns are only divided by shaping.std")
        if algorithm.whitens and not algorithm.needs_group:
            what = "late turns, which have less left to earn, are whitened to less than early ones"
            say(f"warning: where turns are rewarded, {what}; take algorithm=flowrl.algorithms.{BY_TURN}")

    def _load(self) -> Algorithm:
        self.algorithm = settled(self.algorithm, self.sampler.max_response)
        size, has_greedy = self.sampler.group_size, self.sampler.greedy
        return load_algorithm(self.algorithm, group_size=size, has_critic=False, has_greedy=has_greedy)

    def simulated(self, costs: Costs) -> Itself:
        """Credit nothing."""
        return Itself({"learning": costs.learning(self.learning)})

    async def run(self, context: Context) -> None:
        """Find advantages until the edge closes."""
        algorithm = self._load()
        version = 0 if context.resume_from is None else checkpoint_version(context.resume_from)
        estimation = self._estimation = Estimation(self.algorithm, algorithm, version=version)
        if context.resume_from is not None:
            await context.compute(estimation.load, context.resume_from / context.node)
        context.version = version
        num_kept = 0
        async for group in self.referenced:
            start_s = context.now()
            learned, greedy = split_greedy(group)
            if not await context.compute(keeps_group, estimation.algorithm, learned, greedy):
                reason = f"{self.algorithm.use} learns nothing from rewards {group.rewards}"
                await self.referenced.reject(group, kind="filtered", reason=reason)
                continue
            fields = await context.compute(estimation.advantages, learned, None, None, greedy)
            context.span("advantages", start_s, groups=[group.group_id])
            await self.samples.put(extend(Samples, learned, **fields))
            context.done += 1
            num_kept += 1
            if num_kept % self.learning.groups_per_step == 0:
                async with context.stepping():
                    await context.compute(estimation.end_step)

    def save(self, directory: Path, version: int) -> None:
        """Write what the advantages of step `version` are found with."""
        self._estimation.save(directory, version)
