"""Reward: adds a named score to every sample, by a function (`Reward`) or a reward model (`RewardModel`).

Invariant: a group leaves with exactly one more named score per sample, or is rejected as failed with its input kept on
disk; a reward function's failure never loses a group silently. Several reward nodes in a row each add their own name.
User code runs in this node's process, never in an engine's. Replicas compete for groups.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Literal

from flowrl.config import Meta, widen
from flowrl.data.models import prepare_model
from flowrl.engines.base import Training, TrainingConfig, open_engine
from flowrl.errors import RewardError
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Rollouts, Scored, extend
from flowrl.rewards.function import RewardFunction, quarantine
from flowrl.stages.tokens import token_group
from flowrl.telemetry.events import Notice, Span

if TYPE_CHECKING:
    from flowrl.graph.stage import Context, Say


class Reward(Stage):
    """Scores with a Python function that has TRL's signature."""

    class Config(StageConfig):
        """Settings of a reward-function node."""

        function: str = "flowrl.rewards.verify:reasoning_gym_score"  # module:function
        name: str = ""  # of the score; "" takes the function's own name
        weight: float = 1.0
        timeout_s: Annotated[float, Meta(gt=0)] = 60.0
        retries: Annotated[int, Meta(ge=0)] = 1  # calls after the first that failed
        on_error: Literal["skip", "stop"] = "skip"  # after the retries: quarantine the group, or end the run
        concurrency: Annotated[int, Meta(ge=1)] = 4  # groups scored at a time in one replica

    rollouts: In[Rollouts]
    scored: Out[Scored]

    def __init__(self, config: Config) -> None:
        self.config: Reward.Config = config

    def check(self, say: Say) -> None:
        """Import the function."""
        RewardFunction(self.config.function, where="reward.function")

    async def run(self, context: Context) -> None:
        """Score groups until the edge closes."""
        function = await context.compute(self._load, context.where)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.config.concurrency):
                tasks.create_task(self._lane(context, function))

    def _load(self, where: str) -> RewardFunction:
        return RewardFunction(self.config.function, where=where, timeout_s=self.config.timeout_s)

    async def _lane(self, context: Context, function: RewardFunction) -> None:
        name = self.config.name or self.config.function.rpartition(":")[2]
        async for group in self.rollouts:
            start_s = context.now()
            try:
                scores = await self._call(function, group)
            except RewardError as error:
                path = quarantine(context.run_dir / "quarantine", group, error)
                if self.config.on_error == "stop":
                    raise
                await self.rollouts.reject(group, kind="failed", reason=str(error))
                text = f"group {group.group_id} failed ({error}); its input is in {path}"
                context.recorder.record(Notice(level="warning", where=context.where, text=text, time_s=context.now()))
                continue
            await self.scored.put(add_scores(group, name, [self.config.weight * score for score in scores]))
            context.done += 1
            context.recorder.record(_span(context, "score", start_s, group))

    async def _call(self, function: RewardFunction, group: Rollouts) -> list[float]:
        for _ in range(self.config.retries):
            try:
                return await function(group)
            except RewardError:
                continue
        return await function(group)


class RewardModel(Stage):
    """Scores whole sequences with a reward model (Hugging Face sequence classification, one label)."""

    class Config(Training):
        """Settings of a reward-model node."""

        name: str = "reward_model"  # of the score
        weight: float = 1.0
        clip: Annotated[float, Meta(gt=0)] = 10.0  # scores beyond +- clip are clipped (OpenRLHF paper, section 3.3)
        engine: str = "flowrl.engines.torch:SequenceScoringEngine"

    rollouts: In[Rollouts]
    scored: Out[Scored]

    def __init__(self, config: Config, *, model: str) -> None:
        self.config: RewardModel.Config = config
        self.model = model

    def check(self, say: Say) -> None:
        """Prepare the model."""
        prepare_model(self.model, say=say)

    async def run(self, context: Context) -> None:
        """Score groups until the edge closes."""
        directory = await context.compute(prepare_model, self.model)
        settings = widen(TrainingConfig, self.config, model=str(directory), head="value")
        engine = open_engine(self.config.engine, where=context.where, config=settings,
                             **self.config.engine_options)  # fmt: skip
        await context.compute(engine.open)
        try:
            async for group in self.rollouts:
                start_s = context.now()
                raw = await context.compute(engine.score_sequences, token_group(group))
                scores = [self.config.weight * max(-self.config.clip, min(self.config.clip, s)) for s in raw]
                await self.scored.put(add_scores(group, self.config.name, scores))
                context.done += 1
                context.recorder.record(_span(context, "score", start_s, group))
        finally:
            await context.compute(engine.close)


def add_scores(group: Rollouts, name: str, scores: list[float]) -> Scored:
    """Return the group with one more named score per sample."""
    known = group.scores if isinstance(group, Scored) else {}
    return extend(Scored, group, scores={**known, name: scores})


def _span(context: Context, name: str, start_s: float, group: Rollouts) -> Span:
    return Span(
        node=context.node,
        replica=context.replica,
        name=name,
        start_s=start_s,
        end_s=context.now(),
        groups=[group.group_id],
    )
