"""Critic: values every sampled token, credits the group with them, and trains on the returns it computed.

Invariant: every group is valued by the critic as it stood before any group of its own step was trained on; the
critic takes one optimizer step for each `groups_per_step` groups, in the order in which they leave its input queue,
the order the learner sees. It has a model of its own, which may differ from the policy in size and architecture but
not in vocabulary. Uses PPO's generalised advantage estimation (Schulman 2015) through the algorithm's `credit`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from flowrl.config import Meta, Select, widen
from flowrl.data.models import prepare_model
from flowrl.engines.base import TokenGroup, Training, TrainingConfig, TrainingEngine
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage
from flowrl.messages import Referenced, Samples, extend
from flowrl.stages.credit import credit_group, load_algorithm
from flowrl.stages.tokens import token_group
from flowrl.stages.training import opened
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

    referenced: In[Referenced]
    samples: Out[Samples]

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

    async def follow(self, context: Context) -> None:
        """Serve as a rank other than 0."""
        async with opened(context, self.config.engine, self._settings, self.steps) as engine:
            await context.compute(engine.follow)

    async def run(self, context: Context) -> None:
        """Value, credit and train until the edge closes."""
        algorithm = load_algorithm(self.algorithm, group_size=self.group_size, has_critic=True)
        async with opened(context, self.config.engine, self._settings, self.steps) as engine:
            step: list[TokenGroup] = []
            while True:
                groups = await self.referenced.get_some(min(self.config.batch_groups, self.groups_per_step - len(step)))
                start_s = context.now()
                values = await context.compute(engine.score, [token_group(group) for group in groups])
                for group, rows in zip(groups, values, strict=True):
                    samples = extend(Samples, group, **credit_group(algorithm, group, rows))
                    step.append(token_group(samples))
                    await self.samples.put(samples)
                    context.done += 1
                context.recorder.record(self._span(context, "value", start_s, [group.group_id for group in groups]))
                if len(step) == self.groups_per_step:
                    await self._train(context, engine, step)
                    step = []

    async def _train(self, context: Context, engine: TrainingEngine, step: list[TokenGroup]) -> None:
        start_s = context.now()
        await context.compute(engine.accumulate, step, self.config.objective)
        await context.compute(engine.apply)
        context.version += 1
        context.recorder.record(self._span(context, f"critic step {context.version}", start_s, []))

    def _span(self, context: Context, name: str, start_s: float, groups: list[int]) -> Span:
        return Span(
            node=context.node, replica=context.replica, name=name, start_s=start_s, end_s=context.now(), groups=groups
        )
