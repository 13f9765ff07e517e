"""Reward: adds a named score to every sample, by a function (`Reward`) or a reward model (`RewardModel`).

Invariants:
- a group leaves with exactly one more named score per sample, or is rejected as failed with its input kept on disk;
- a reward function's failure never loses a group silently, and one that fails group after group ends the run.

Several reward nodes in a row each add their own name. User code runs in worker processes of this node, never in an
engine's. Replicas compete for groups.

Tests: tests/unit/stages/test_reward.py
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from flowrl.config import Count, ImportPath, Meta, widen
from flowrl.data.models import prepare_model
from flowrl.data.prompts import PromptData, load_tokenizer, rows_alike
from flowrl.data.steps import StepFinder
from flowrl.data.vocabulary import check_same_vocabulary
from flowrl.ending import ending_of
from flowrl.engines.base import Scoring, TrainingConfig, open_engine
from flowrl.errors import ConfigError, LastingError, RewardError
from flowrl.graph.ports import In, Out
from flowrl.graph.simulated import Itself, PassesOn
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Buffer, Prompt, Rollouts, Scored, encode, extend
from flowrl.model_files import check_classifier
from flowrl.rewards.function import RewardFunction, made_group
from flowrl.rewards.isolated import IsolatedFunction, check_loads, untaken
from flowrl.rewards.signatures import Adapter
from flowrl.rewards.worker import Opening
from flowrl.stages.model_scores import SequenceScores, StepScores, read_normalisation
from flowrl.stages.sampler import Sampler
from flowrl.stages.tokens import token_group
from flowrl.stages.training import check_engine_of, check_loading, sleeping
from flowrl.telemetry.events import Cause
from flowrl.telemetry.records import quarantine

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.data.prompts import RowsAlike
    from flowrl.graph.simulated import Costs
    from flowrl.graph.stage import Context, Say

Score = Callable[[Rollouts], Awaitable[list[float]]]
MOST_IN_A_ROW = 8  # groups that fail one after the other: by then it is the function, and not the groups


class Reward(Stage):
    """Scores with a Python function that has TRL's signature, or another library's by an adapter."""

    class Config(StageConfig):
        """Settings of a reward-function node."""

        function: ImportPath = "flowrl.rewards.verify:reasoning_gym_score"  # module:function
        # How it is called; auto: as its parameters say. flowrl.rewards.signatures has the signatures
        adapter: Adapter = "auto"
        label_column: str = "answer"  # for openrlhf's `labels` and verl's `ground_truth`; "": no labels
        name: str = ""  # of the score; "" takes the function's own name
        weight: float = 1.0  # the score is multiplied by it
        timeout_s: Annotated[float, Meta(gt=0)] = 60.0  # for one group
        retries: Annotated[int, Meta(ge=0)] = 1  # calls after the first that failed
        on_error: Literal["skip", "stop"] = "skip"  # after the retries: quarantine the group, or end the run
        # In worker processes, which are killed when they take too long; or in threads of this process, which are not.
        isolation: Literal["process", "thread"] = "process"
        concurrency: Count = 2  # groups scored at a time in one replica, each in its own process
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

    def __init__(self, config: Config, sampler: Sampler | None = None) -> None:
        self.config: Reward.Config = config
        self.sampler = sampler  # with what the prompts are made of; None: not known, and the function is not tried

    def check(self, say: Say) -> None:
        """Load the function where it will run, and call it once on a row of the data with completions made up."""
        try_function(self.config, self.sampler and self.sampler.data, where="reward.function", say=say)

    def simulated(self, costs: Costs) -> PassesOn:
        """Take the function's time."""
        return PassesOn("score", lanes=self.config.concurrency)

    async def run(self, context: Context) -> None:
        """Score groups until the edge closes."""
        if self.config.isolation == "thread":
            with context.clock.charge(Cause.START):
                function = await context.compute(loaded, self.config, context.where)
            await self._score(context, function)
            return
        isolated = IsolatedFunction(
            opening_of(self.config, context.where),
            num_workers=self.config.concurrency,
            start_timeout_s=self.config.start_timeout_s,
            log=context.run_dir / "logs" / f"{context.where}.function.log",
        )
        async with contextlib.AsyncExitStack() as stack:
            with context.clock.charge(Cause.START):
                await stack.enter_async_context(isolated)
            await self._score(context, isolated)

    async def _score(self, context: Context, function: Score) -> None:
        failures = Failures(context, on_error=self.config.on_error)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.config.concurrency):
                tasks.create_task(self._lane(context, function, failures))

    async def _lane(self, context: Context, function: Score, failures: Failures) -> None:
        name = self.config.name or self.config.function.rpartition(":")[2]
        async for group in self.rollouts:
            start_s = context.now()
            try:
                with context.clock.charge(Cause.COMPUTE):
                    scores = await call(function, group, retries=self.config.retries)
            except RewardError as error:
                await failures.give_up(self.rollouts, group, error)
                continue
            failures.forget()
            await self.scored.put(add_scores(group, name, [self.config.weight * score for score in scores]))
            context.done += 1
            context.span("score", start_s, groups=[group.group_id])


def opening_of(config: Reward.Config, where: str) -> Opening:
    """Return what a worker process runs."""
    called: dict[str, Any] = {"adapter": config.adapter, "label_column": config.label_column}
    limits: dict[str, Any] = {"timeout_s": config.timeout_s, "memory_bytes": config.memory_bytes}
    return Opening(function=config.function, where=where, **called, **limits)


def loaded(config: Reward.Config, where: str) -> RewardFunction:
    """Load the function into this process."""
    return RewardFunction(
        config.function, where, adapter=config.adapter, label_column=config.label_column, timeout_s=config.timeout_s
    )


async def call(function: Score, group: Rollouts, *, retries: int) -> list[float]:
    """Score a group, calling again where that fails.

    Raises:
        RewardError: the last call failed too.
    """
    for _ in range(retries):
        try:
            return await function(group)
        except RewardError:
            continue
    return await function(group)


def try_function(config: Reward.Config, data: PromptData | None, *, where: str, say: Say) -> None:
    """Load a reward function where it will run, and call it on a row of each kind with completions made up.

    Where the settings let bad rows go it must score a source's first row; what others it cannot score is said.

    Raises:
        UserError: it does not load, or cannot score such a row.
    """
    kinds = [] if data is None else rows_alike(data)
    first, others = [rows[0] for rows in kinds], [each for rows in kinds for each in rows[1:]]
    lenient = others if data is not None and data.on_bad == "skip" else []
    strict = first if lenient else [*first, *others]
    if not _try_on(strict, config, where) and config.label_column != Reward.Config().label_column:
        say("reward.label_column: no effect, for only a function in OpenRLHF's or verl's manner is given labels")
    for each in lenient:
        try:
            _try_on([each], config, where)
        except ConfigError as error:
            say(f"warning: {error.where}: {error.what}; the groups of such rows will fail")


def _try_on(rows: Sequence[RowsAlike], config: Reward.Config, where: str) -> bool:
    """Score rows; returns whether the function asks for labels."""
    if config.isolation == "process":
        groups = [(str(each), encode(made_group(each.columns))) for each in rows]
        tries, timeout_s = 1 + config.retries, config.start_timeout_s
        return check_loads(opening_of(config, where), groups, tries=tries, timeout_s=timeout_s).has_labels
    function = loaded(config, where)
    for each in rows:
        try:
            asyncio.run(call(function, made_group(each.columns), retries=config.retries))
        except RewardError as error:
            raise untaken(config.function, where, str(each), error.what, error.remedy) from error
    return function.has_labels


class RewardModel(Stage):
    """Scores sequences, or their steps, with a reward model (Hugging Face sequence classification, one label).

    A model that was trained on this policy's tokenizer: it reads the sampled token ids as they are. With level=step it
    is a process reward model (flowrl.algorithms.process trains one). Each step earns the probability that it is right,
    at its last token, and a sample's score is what its steps earn.
    """

    class Config(Scoring):
        """Settings of a reward-model node."""

        name: str = ""  # of the score; "" takes the node's name
        weight: float = 1.0  # the score is multiplied by it
        # scored together when ready; above 1 the last bits depend on timing
        batch_groups: Annotated[int, Meta(ge=1)] = 1
        level: Literal["sequence", "step"] = "sequence"  # one score for an answer, or one for each of its steps
        # level=sequence: scores beyond +- clip are clipped (OpenRLHF paper, section 3.3)
        clip: Annotated[float, Meta(gt=0)] = 10.0
        normalise: bool = True  # level=sequence: by the mean and std in the model's config.json, where it has them
        step_separator: str = "\n"  # level=step: ends a step, as data.step_separator when the model was trained
        # level=step: of what a sample's steps earn; with their sum more steps earn more
        step_total: Literal["mean", "sum"] = "mean"
        engine: ImportPath = "flowrl.engines.torch:SequenceScoringEngine"

    rollouts: In[Rollouts]
    scored: Out[Scored]

    def __init__(self, config: Config, sampler: Sampler, *, model: str = "") -> None:
        self.config: RewardModel.Config = config
        self.sampler = sampler
        self.model = model or sampler.model

    def check(self, say: Say) -> None:
        """Prepare the model, which must read the policy's tokens."""
        check_engine_of(self.config, "reward_model", self.model)
        directory = prepare_model(self.model, say=say)
        if self.model != self.sampler.model:
            policy = prepare_model(self.sampler.model, say=say)
            check_same_vocabulary(policy, directory, "reward_models", longest=self.sampler.longest)
            ours, theirs = ending_of(load_tokenizer(policy)), ending_of(load_tokenizer(directory))
            if ours.end_id not in theirs.stops:
                what = f"{theirs.end or 'nothing'} to it and {ours.end or 'nothing'} to the policy"
                say(f"{self.model} judges an answer at the token that ends it, which is {what}")
        check_classifier(directory, "reward_models")
        check_loading(directory, "reward_models", "reward", trust_remote_code=self.config.trust_remote_code)
        self._scorer(directory, "reward model")

    def _scorer(self, directory: Path, where: str) -> SequenceScores | StepScores:
        if self.config.level == "step":
            finder = StepFinder(load_tokenizer(directory), self.config.step_separator)
            return StepScores(where, self.config.weight, self.config.step_total, finder)
        mean, std = read_normalisation(directory) if self.config.normalise else (0.0, 1.0)
        return SequenceScores(where, self.config.weight, self.config.clip, mean, std)

    def simulated(self, costs: Costs) -> Itself:
        """Score with zeros."""
        config = msgspec.structs.replace(costs.training(self.config), level="sequence", normalise=False)
        return Itself({"config": config, "sampler": costs.sampler(self.sampler), "model": ""})

    async def run(self, context: Context) -> None:
        """Score groups until the edge closes."""
        with context.clock.charge(Cause.START):
            engine, directory = await self._open(context)
            scorer: Any = await context.compute(self._scorer, directory, context.where)
        name = self.config.name or context.node
        try:
            with sleeping(context, engine):
                while True:
                    groups = await self.rollouts.get_some(self.config.batch_groups)
                    start_s = context.now()
                    found = await context.compute(scorer.call(engine), [token_group(group) for group in groups])
                    context.span("score", start_s, groups=[group.group_id for group in groups])
                    for group, rows in zip(groups, found, strict=True):
                        await self.scored.put(add_scores(group, name, *scorer.scores(rows, group)))
                        context.done += 1
        finally:
            await context.compute(engine.close)

    async def follow(self, context: Context) -> None:
        """Serve as a rank other than 0."""
        with context.clock.charge(Cause.START):
            engine, _ = await self._open(context)
        try:
            await context.compute(engine.follow)
        finally:
            await context.compute(engine.close)

    async def _open(self, context: Context) -> tuple[Any, Path]:
        """Return the engine, opened on this rank, and the model's directory."""
        directory = await context.compute(prepare_model, self.model)
        settings = widen(
            TrainingConfig, self.config, lora=self.config.lora, model=str(directory), head="value", frozen=True
        )
        engine = open_engine(self.config.engine, where=context.where, config=settings, **self.config.engine_options)
        await context.compute(engine.open, *([context.ranks] if context.ranks.world_size > 1 else []))
        return engine, directory


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


class Failures:
    """What a replica could not score: kept on disk and rejected, until so many failed in a row that none will not."""

    def __init__(self, context: Context, *, on_error: Literal["skip", "stop"]) -> None:
        self._context = context
        self._on_error = on_error
        self._in_a_row = 0

    def forget(self) -> None:
        """Take note of a group that was scored."""
        self._in_a_row = 0

    async def give_up(self, port: In[Any], group: Prompt, error: RewardError) -> None:
        """Keep a group that could not be scored on disk, then reject it.

        `port` is the one that the group came in at.

        Raises:
            RewardError: `error` itself, where `on_error` is "stop".
            LastingError: one group after the other has failed; the run ends.
        """
        context = self._context
        path = quarantine(context.run_dir, group.group_id, group, where=context.where, error=error)
        if self._on_error == "stop":
            raise error
        await port.reject(group, kind="failed", reason=str(error))
        text = f"group {group.group_id} failed ({error}); its input is in {path}"
        context.notice(text)
        self._in_a_row += 1
        if self._in_a_row >= MOST_IN_A_ROW:
            what = f"{self._in_a_row} groups have failed one after the other, the last with: {error.what}"
            raise LastingError(error.where, what, f"{error.remedy}; what failed is in {path.parent}")
