"""Reward: adds a named score to every sample, by a function (`Reward`) or a reward model (`RewardModel`).

Invariant: a group leaves with exactly one more named score per sample, or is rejected as failed with its input kept on
disk; a reward function's failure never loses a group silently. Several reward nodes in a row each add their own name.
User code runs in worker processes of this node, never in an engine's. Replicas compete for groups.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from flowrl.config import ImportPath, Meta, widen
from flowrl.data.models import prepare_model
from flowrl.data.prompts import load_tokenizer
from flowrl.data.steps import StepFinder
from flowrl.data.vocabulary import check_same_vocabulary
from flowrl.engines.base import Training, TrainingConfig, open_engine
from flowrl.errors import ConfigError, RewardError
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Buffer, Prompt, Rollouts, Scored, extend
from flowrl.rewards.adapters import Adapter
from flowrl.rewards.function import RewardFunction
from flowrl.rewards.isolated import IsolatedFunction, check_loads
from flowrl.rewards.worker import Opening
from flowrl.stages.model_scores import SequenceScores, StepScores, read_normalisation
from flowrl.telemetry.causes import Cause
from flowrl.telemetry.events import Notice, Span
from flowrl.telemetry.quarantine import quarantine

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.graph.stage import Context, Say

Score = Callable[[Rollouts], Awaitable[list[float]]]


class Reward(Stage):
    """Scores with a Python function that has TRL's signature, or another library's by an adapter."""

    class Config(StageConfig):
        """Settings of a reward-function node."""

        function: ImportPath = "flowrl.rewards.verify:reasoning_gym_score"  # module:function
        # How it is called; auto: as its parameters say. flowrl.rewards.adapters has the signatures
        adapter: Adapter = "auto"
        label_column: str = "answer"  # for openrlhf's `labels` and verl's `ground_truth`; "": no labels
        name: str = ""  # of the score; "" takes the function's own name
        weight: float = 1.0
        timeout_s: Annotated[float, Meta(gt=0)] = 60.0  # for one group
        retries: Annotated[int, Meta(ge=0)] = 1  # calls after the first that failed
        on_error: Literal["skip", "stop"] = "skip"  # after the retries: quarantine the group, or end the run
        # In worker processes, which are killed when they take too long; or in threads of this process, which are not.
        isolation: Literal["process", "thread"] = "process"
        concurrency: Annotated[int, Meta(ge=1)] = 2  # groups scored at a time in one replica, each in its own process
        memory_bytes: Annotated[int, Meta(ge=0)] = 0  # address space of each worker process; 0: no limit
        start_timeout_s: Annotated[float, Meta(gt=0)] = 120.0  # for a worker process to import the function

        def __post_init__(self) -> None:
            if self.isolation == "thread" and self.memory_bytes:
                raise ConfigError("reward.memory_bytes", "limits a process", "set isolation=process, or memory_bytes=0")
            if self.isolation == "thread" and self.adapter == "verifiers":
                what = "runs a rubric's functions on the event loop, where a slow one holds up everything"
                raise ConfigError("reward.isolation", f"thread {what}", "set isolation=process")

    rollouts: In[Rollouts]
    scored: Out[Scored]

    def __init__(self, config: Config) -> None:
        self.config: Reward.Config = config

    def check(self, say: Say) -> None:
        """Import the function, where it will run."""
        if self.config.isolation == "process":
            check_loads(self._opening("reward.function"), timeout_s=self.config.start_timeout_s)
        else:
            self._load("reward.function")

    async def run(self, context: Context) -> None:
        """Score groups until the edge closes."""
        if self.config.isolation == "thread":
            with context.clock.charge(Cause.START):
                function = await context.compute(self._load, context.where)
            await self._score(context, function)
            return
        isolated = IsolatedFunction(
            self._opening(context.where),
            num_workers=self.config.concurrency,
            start_timeout_s=self.config.start_timeout_s,
            log=context.run_dir / "logs" / f"{context.where}.function.log",
        )
        async with contextlib.AsyncExitStack() as stack:
            with context.clock.charge(Cause.START):
                await stack.enter_async_context(isolated)
            await self._score(context, isolated)

    def _load(self, where: str) -> RewardFunction:
        config = self.config
        return RewardFunction(config.function, where, adapter=config.adapter, label_column=config.label_column,
                              timeout_s=config.timeout_s)  # fmt: skip

    def _opening(self, where: str) -> Opening:
        config = self.config
        return Opening(function=config.function, adapter=config.adapter, label_column=config.label_column, where=where,
                       timeout_s=config.timeout_s, memory_bytes=config.memory_bytes)  # fmt: skip

    async def _score(self, context: Context, function: Score) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.config.concurrency):
                tasks.create_task(self._lane(context, function))

    async def _lane(self, context: Context, function: Score) -> None:
        name = self.config.name or self.config.function.rpartition(":")[2]
        async for group in self.rollouts:
            start_s = context.now()
            try:
                with context.clock.charge(Cause.COMPUTE):
                    scores = await self._call(function, group)
            except RewardError as error:
                await give_up(self.rollouts, context, group, error, on_error=self.config.on_error)
                continue
            await self.scored.put(add_scores(group, name, [self.config.weight * score for score in scores]))
            context.done += 1
            context.recorder.record(score_span(context, start_s, [group]))

    async def _call(self, function: Score, group: Rollouts) -> list[float]:
        for _ in range(self.config.retries):
            try:
                return await function(group)
            except RewardError:
                continue
        return await function(group)


class RewardModel(Stage):
    """Scores sequences, or their steps, with a reward model (Hugging Face sequence classification, one label).

    A model that was trained on this policy's tokenizer: it reads the sampled token ids as they are. With level=step it
    is a process reward model (flowrl.algorithms.process trains one): each step earns the probability that it is right,
    at its last token, and a sample's score is what its steps earn.
    """

    class Config(Training):
        """Settings of a reward-model node."""

        name: str = ""  # of the score; "" takes the node's name
        weight: float = 1.0
        level: Literal["sequence", "step"] = "sequence"
        # level=sequence: scores beyond +- clip are clipped (OpenRLHF paper, section 3.3)
        clip: Annotated[float, Meta(gt=0)] = 10.0
        normalise: bool = True  # level=sequence: by the mean and std in the model's config.json, where it has them
        step_separator: str = "\n"  # level=step: ends a step, as data.step_separator when the model was trained
        # level=step: of what a sample's steps earn; with their sum more steps earn more
        step_total: Literal["mean", "sum"] = "mean"
        engine: str = "flowrl.engines.torch:SequenceScoringEngine"

    rollouts: In[Rollouts]
    scored: Out[Scored]

    def __init__(self, config: Config, *, model: str, policy: str = "") -> None:
        self.config: RewardModel.Config = config
        self.model = model
        self.policy = policy  # the model whose tokens it reads; "": its own

    def check(self, say: Say) -> None:
        """Prepare the model, which must read the policy's tokens."""
        directory = prepare_model(self.model, say=say)
        if self.policy:
            check_same_vocabulary(prepare_model(self.policy, say=say), directory, "reward_models")
        self._scorer(directory, "reward model")

    def _scorer(self, directory: Path, where: str) -> SequenceScores | StepScores:
        if self.config.level == "step":
            finder = StepFinder(load_tokenizer(directory), self.config.step_separator)
            return StepScores(self.config, where, finder)
        mean, std = read_normalisation(directory) if self.config.normalise else (0.0, 1.0)
        return SequenceScores(self.config, where, mean, std)

    async def run(self, context: Context) -> None:
        """Score groups until the edge closes."""
        with context.clock.charge(Cause.START):
            directory = await context.compute(prepare_model, self.model)
            scorer: Any = await context.compute(self._scorer, directory, context.where)
            settings = widen(TrainingConfig, self.config, model=str(directory), head="value")
            engine = open_engine(self.config.engine, where=context.where, config=settings,
                                 **self.config.engine_options)  # fmt: skip
            await context.compute(engine.open)
        name = self.config.name or context.node
        try:
            async for group in self.rollouts:
                start_s = context.now()
                found = await context.compute(*scorer.call(engine, group))
                await self.scored.put(add_scores(group, name, *scorer.scores(found, group)))
                context.done += 1
                context.recorder.record(score_span(context, start_s, [group]))
        finally:
            await context.compute(engine.close)


def add_scores(group: Rollouts, name: str, scores: list[float], placed: list[Buffer] | None = None) -> Scored:
    """Return the group with one more named score per sample; `placed` says which part of it which token earned.

    Raises:
        ConfigError: it has a score of that name.
    """
    known = group.scores if isinstance(group, Scored) else {}
    if name in known:
        raise ConfigError(f"score {name!r}", "two nodes in a row give it", "set the name of one of them")
    if placed is None:
        return extend(Scored, group, scores={**known, name: scores})
    if isinstance(group, Scored) and group.placed is not None:
        both = zip(group.placed, placed, strict=True)
        placed = [Buffer.floats(before.numpy() + more.numpy()) for before, more in both]
    return extend(Scored, group, scores={**known, name: scores}, placed=placed)


async def give_up(
    port: In[Any],
    context: Context,
    group: Prompt,
    error: RewardError,
    *,
    on_error: Literal["skip", "stop"],
) -> None:
    """Keep a group that could not be scored on disk, then reject it, or raise the error where `on_error` is "stop".

    `port` is the one that the group came in at.
    """
    path = quarantine(context.run_dir, group.group_id, group, where=context.where, error=error)
    if on_error == "stop":
        raise error
    await port.reject(group, kind="failed", reason=str(error))
    text = f"group {group.group_id} failed ({error}); its input is in {path}"
    context.recorder.record(Notice(level="warning", where=context.where, text=text, time_s=context.now()))


def score_span(context: Context, start_s: float, groups: list[Rollouts]) -> Span:
    """Return the timeline's span for scoring these groups, from `start_s` until now."""
    return Span(
        node=context.node,
        replica=context.replica,
        name="score",
        start_s=start_s,
        end_s=context.now(),
        groups=[group.group_id for group in groups],
    )


def check_scorers(function: str, models: Sequence[str], weights: Sequence[float]) -> None:
    """Insist that something scores a graph's samples, and that weights are none or one for each reward model.

    Raises:
        ValueError: for a graph's settings, whose `__post_init__` calls this.
    """
    if weights and len(weights) != len(models):
        raise ValueError(f"reward_weights has {len(weights)} for {len(models)} reward_models; give one each")
    if not (function or models):
        raise ValueError("nothing scores the samples; give reward.function or reward_models")


def scorers_of(
    reward: Reward.Config, reward_model: RewardModel.Config, models: Sequence[str], *, policy: str,
    weights: Sequence[float] = (),
) -> dict[str, Reward | RewardModel]:  # fmt: skip
    """Return the nodes that score a policy's samples, by name, in the order in which samples pass them.

    The function's comes first where there is one; a model without a weight of its own has `reward_model.weight`.
    """
    found: dict[str, Reward | RewardModel] = {"reward": Reward(reward)} if reward.function else {}
    for k, (name, weight) in enumerate(zip(models, weights or [reward_model.weight] * len(models), strict=True)):
        weighted = msgspec.structs.replace(reward_model, weight=weight)
        found[f"reward_model_{k}"] = RewardModel(weighted, model=name, policy=policy)
    return found
