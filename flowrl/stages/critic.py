"""Critic: values every sampled token, credits the group with them, and trains on the returns it computed.

Invariant: every group is valued by the critic as it stood before any group of its own step was trained on; the
critic takes one optimizer step for each `groups_per_step` groups, in the order in which they leave its input queue,
the order the learner sees. Running ahead of the learner, it adds its state to a checkpoint of version v at its first
step boundary c >= v; after a resume it trains on none of the steps up to c again. It has a model of its own, which may
differ from the policy in size and architecture but not in vocabulary. Uses PPO's generalised advantage estimation
(Schulman 2015) through the algorithm's `credit`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from flowrl.config import Meta, Select, widen
from flowrl.data.models import prepare_model
from flowrl.engines.base import TokenGroup, Training, TrainingConfig, TrainingEngine
from flowrl.engines.checkpoint import checkpoint_version
from flowrl.errors import ChannelClosed
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage
from flowrl.messages import Referenced, Samples, Save, extend
from flowrl.stages.credit import credit_group, load_algorithm
from flowrl.stages.tokens import token_group
from flowrl.stages.training import load_state, opened, save_state
from flowrl.telemetry.events import Span

if TYPE_CHECKING:
    from flowrl.graph.stage import Context, Say


class Critic(Stage):
    """Values, credits and trains."""

    class Config(Training):
        """Settings of the critic node."""

        lr: float = 9e-6  # OpenRLHF paper, section 3.3: larger than the policy's
        engine: str = "flowrl.engines.deepspeed:DeepSpeedEngine"
        objective: Select = Select(use="flowrl.algorithms.value:ValueLoss")
        batch_groups: Annotated[int, Meta(ge=1)] = (
            1  # valued together when ready; above 1 the last bits depend on timing
        )

    optional = frozenset({"saves"})
    is_stateful = True
    referenced: In[Referenced]
    samples: Out[Samples]
    saves: In[Save]

    def __init__(self, config: Config, *, model: str, algorithm: Select, groups_per_step: int, group_size: int,
                 steps: int) -> None:  # fmt: skip
        self.config: Critic.Config = config
        self.model = model
        self.algorithm = algorithm
        self.groups_per_step = groups_per_step
        self.group_size = group_size
        self.steps = steps

    def check(self, say: Say) -> None:
        """Prepare the model and load the algorithm."""
        prepare_model(self.model, say=say)
        load_algorithm(self.algorithm, group_size=self.group_size, has_critic=True)
        self.config.objective.load("critic.objective")

    def _settings(self) -> TrainingConfig:
        return widen(TrainingConfig, self.config, model=str(prepare_model(self.model)), head="value")

    @property
    def num_optimizer_steps(self) -> int:
        """Return how many optimizer steps the whole run takes, the length of its schedule."""
        return self.steps

    async def follow(self, context: Context) -> None:
        """Serve as a rank other than 0."""
        async with opened(context, self.config.engine, self._settings, self.num_optimizer_steps) as engine:
            await context.compute(engine.follow)

    async def run(self, context: Context) -> None:
        """Value, credit and train until the edge closes."""
        async with opened(context, self.config.engine, self._settings, self.num_optimizer_steps) as engine:
            context.version = trained = 0
            if context.resume_from is not None:
                trained = await context.compute(load_state, engine, context.resume_from / context.node)
                context.version = checkpoint_version(context.resume_from)
            boundary = asyncio.Condition()
            async with asyncio.TaskGroup() as tasks:
                saving = tasks.create_task(self._add_state(context, engine, boundary))
                await self._value(context, engine, boundary, trained)
                saving.cancel()

    async def _value(self, context: Context, engine: TrainingEngine, boundary: asyncio.Condition, trained: int) -> None:
        """Value and credit until the edge closes; train at the end of each step after the first `trained`."""
        algorithm = load_algorithm(self.algorithm, group_size=self.group_size, has_critic=True)
        step: list[TokenGroup] = []
        while True:
            try:
                groups = await self.referenced.get_some(min(self.config.batch_groups, self.groups_per_step - len(step)))
            except ChannelClosed:
                return
            start_s = context.now()
            values = await context.compute(engine.score, [token_group(group) for group in groups])
            for group, rows in zip(groups, values, strict=True):
                samples = extend(Samples, group, **credit_group(algorithm, group, rows))
                step.append(token_group(samples))
                await self.samples.put(samples)
                context.done += 1
            context.recorder.record(self._span(context, "value", start_s, [group.group_id for group in groups]))
            if len(step) == self.groups_per_step:
                async with boundary:
                    if context.version >= trained:
                        await self._train(context, engine, step)
                    context.version += 1
                    boundary.notify_all()
                step = []

    async def _add_state(self, context: Context, engine: TrainingEngine, boundary: asyncio.Condition) -> None:
        """Add the critic's state to every checkpoint, between two steps of its own."""
        if not self.saves.is_connected:
            return
        async for save in self.saves:
            async with boundary:
                await boundary.wait_for(lambda version=save.version: context.version >= version)
                await context.compute(save_state, engine, Path(save.directory) / context.node, context.version)
            await self.saves.done(save)

    async def _train(self, context: Context, engine: TrainingEngine, step: list[TokenGroup]) -> None:
        start_s = context.now()
        await context.compute(engine.accumulate, step, self.config.objective)
        await context.compute(engine.apply)
        context.recorder.record(self._span(context, f"critic step {context.version + 1}", start_s, []))

    def _span(self, context: Context, name: str, start_s: float, groups: list[int]) -> Span:
        return Span(
            node=context.node, replica=context.replica, name=name, start_s=start_s, end_s=context.now(), groups=groups
        )
