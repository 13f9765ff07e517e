"""Critic: values every sampled token, credits the group with them, and trains on the returns it computed.

Invariant: every group is valued by the critic as it stood before any group of its own step was trained on; the
critic takes one optimizer step for each `groups_per_step` groups, in the order in which they leave its input queue,
the order the learner sees. Running ahead of the learner, it adds its state to a checkpoint of version v at its first
step boundary c >= v; after a resume it trains on none of the steps up to c again. It has a model of its own, which may
differ from the policy in size and architecture but not in vocabulary. Uses PPO's generalised advantage estimation
(Schulman 2015) through the algorithm's `credit`. The figures of its own step v reach the learner with the groups of
step v + 1, which that step's critic has valued.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Annotated

from flowrl.config import Meta, Select, widen
from flowrl.data.models import prepare_model
from flowrl.data.vocabulary import check_same_vocabulary
from flowrl.engines.base import TokenGroup, Training, TrainingConfig, TrainingEngine
from flowrl.engines.checkpoint import checkpoint_version
from flowrl.errors import ChannelClosed
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage
from flowrl.messages import Referenced, Samples, Save, extend
from flowrl.stages.credit import Crediting, keeps_group, load_algorithm
from flowrl.stages.saving import add_state
from flowrl.stages.tokens import token_group
from flowrl.stages.training import check_adapter, check_experts, load_state, opened, save_state
from flowrl.telemetry.events import Span

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.graph.stage import Context, Say

CARD = "Value model of version {version}, trained with flowrl. The value before a token is read at the one before it.\n"
MOMENTS = ("value_error", "value_error_sq", "returns", "returns_sq")  # metrics from which variances are made


def critic_figures(metrics: dict[str, float]) -> dict[str, float]:
    """Return a value step's metrics under "critic.", with the explained variance in place of the sums behind it.

    Var(R - V) = 1 where Var(R) = 4: critic.explained_variance is 0.75.
    """
    moments = {name: metrics.get(name, math.nan) for name in MOMENTS}
    figures = {f"critic.{name}": value for name, value in metrics.items() if name not in moments}
    variance = moments["returns_sq"] - moments["returns"] ** 2
    if variance > 0:
        unexplained = moments["value_error_sq"] - moments["value_error"] ** 2
        figures["critic.explained_variance"] = 1.0 - unexplained / variance
    return figures


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
        save_model: bool = False  # with each checkpoint, for `flowrl export --node critic` or a later run's critic

    optional = frozenset({"saves"})
    is_stateful = True
    referenced: In[Referenced]
    samples: Out[Samples]
    saves: In[Save]

    def __init__(self, config: Config, *, model: str, algorithm: Select, groups_per_step: int, group_size: int,
                 steps: int, policy: str = "") -> None:  # fmt: skip
        self.config: Critic.Config = config
        self.model = model
        self.policy = policy  # the model whose tokens it reads; "": its own
        self.algorithm = algorithm
        self.groups_per_step = groups_per_step
        self.group_size = group_size
        self.steps = steps

    def check(self, say: Say) -> None:
        """Prepare the model, which must read the policy's tokens, and load the algorithm."""
        check_adapter(self.config, "critic")
        directory = prepare_model(self.model, say=say)
        check_experts(self.config, directory, "critic")
        if self.policy:
            check_same_vocabulary(prepare_model(self.policy, say=say), directory, "critic_model")
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
            algorithm = load_algorithm(self.algorithm, group_size=self.group_size, has_critic=True)
            crediting = Crediting(self.algorithm, algorithm, version=context.version)
            if context.resume_from is not None:
                await context.compute(crediting.load, context.resume_from / context.node)

            def write(directory: Path, version: int) -> None:
                save_state(engine, directory, context.version)
                if self.config.save_model:
                    engine.save_model(directory / "model", card=CARD.format(version=version))
                crediting.save(directory, version)

            boundary = asyncio.Condition()
            async with asyncio.TaskGroup() as tasks:
                saving = tasks.create_task(add_state(self.saves, context, boundary, write))
                await self._value(context, engine, crediting, boundary, trained)
                saving.cancel()

    async def _value(self, context: Context, engine: TrainingEngine, crediting: Crediting, boundary: asyncio.Condition,
                     trained: int) -> None:  # fmt: skip
        """Value and credit until the edge closes; train at the end of each step after the first `trained`."""
        step: list[TokenGroup] = []
        while True:
            try:
                groups = await self.referenced.get_some(min(self.config.batch_groups, self.groups_per_step - len(step)))
            except ChannelClosed:
                return
            start_s = context.now()
            groups = [group for group in groups if await self._keeps(crediting, group)]
            if not groups:
                continue
            values = await context.compute(engine.score, [token_group(group) for group in groups])
            for group, rows in zip(groups, values, strict=True):
                samples = extend(Samples, group, **crediting.advantages(group, rows))
                step.append(token_group(samples))
                await self.samples.put(samples)
                context.done += 1
            context.recorder.record(self._span(context, "value", start_s, [group.group_id for group in groups]))
            if len(step) == self.groups_per_step:
                async with boundary:
                    if context.version >= trained:
                        crediting.figures = await self._train(context, engine, step)
                    crediting.end_step()
                    context.version += 1
                    boundary.notify_all()
                step = []

    async def _keeps(self, crediting: Crediting, group: Referenced) -> bool:
        """Return whether the algorithm wants to learn a group; one that it does not is rejected as filtered."""
        if keeps_group(crediting.algorithm, group):
            return True
        reason = f"{self.algorithm.use} learns nothing from rewards {group.rewards}"
        await self.referenced.reject(group, kind="filtered", reason=reason)
        return False

    async def _train(self, context: Context, engine: TrainingEngine, step: list[TokenGroup]) -> dict[str, float]:
        """Take a step and return its figures."""
        start_s = context.now()
        metrics = await context.compute(engine.accumulate, step, self.config.objective)
        metrics |= await context.compute(engine.apply)
        context.recorder.record(self._span(context, f"critic step {context.version + 1}", start_s, []))
        return critic_figures(metrics)

    def _span(self, context: Context, name: str, start_s: float, groups: list[int]) -> Span:
        return Span(
            node=context.node, replica=context.replica, name=name, start_s=start_s, end_s=context.now(), groups=groups
        )
