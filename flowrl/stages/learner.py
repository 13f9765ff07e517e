"""Learner: trains the policy on samples in prompt order, publishes versions, returns credits.

Invariants:
- step v learns exactly `groups_per_step` groups at version v, none staler than `max_staleness`, and makes version v + 1
  (what a replay buffer sent along is learned besides);
- a credit goes back only after every live generator has acknowledged the version that its group was learned into (law
  2);
- version v + 1 is on its way while the next step's forward and backward run, and has left before the next optimizer
  step changes the weights;
- where an evaluator is joined, no version is published while an older one is being evaluated, unless an examiner keeps
  it meanwhile (examinations.py);
- a checkpoint holds the state of every stateful node and the flow's cut between the same two steps.

Where evaluations say which version is the best (`results`), each that is evaluated is saved, and stays at least until
its score is known. Where texts are joined (a pre-training loss), those of step v are learned in it, each loss divided
by its own count; they are asked for a step ahead. Its return ends the run.

Tests: tests/unit/stages/test_step.py
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated

import msgspec

from flowrl.config import ImportPath, Meta, Select, widen
from flowrl.data.models import prepare_model
from flowrl.engines.base import Publishing, RoutingKind, TokenGroup, TrainingConfig, TrainingEngine, unserved
from flowrl.engines.checkpoint import CARD, CheckpointWriter, forget_ratings, read_rated
from flowrl.engines.weights.manifest import tensor_digests
from flowrl.errors import ConfigError, RunError, TransferError
from flowrl.graph.ports import In, Out
from flowrl.graph.simulated import Itself
from flowrl.graph.stage import Stage
from flowrl.messages import (
    FIRST_TEXTS,
    Buffer,
    Credit,
    EvaluationRequest,
    PinnedWeights,
    Samples,
    Texts,
    VersionScore,
    Weights,
    replays_of,
)
from flowrl.stages.estimation import advice, check_sampling, load_algorithm, settled
from flowrl.stages.examinations import Examinations
from flowrl.stages.sampler import Learning, Sampler
from flowrl.stages.saving import save_checkpoint
from flowrl.stages.step import (
    check_divides,
    derived,
    logprob_gap,
    mean_metrics,
    minibatches,
    replay_metrics,
    step_choice,
    step_groups,
    step_metrics,
    with_drift_limit,
    with_proximal,
)
from flowrl.stages.texts import TextSource
from flowrl.stages.tokens import example_group
from flowrl.stages.training import (
    check_masters,
    check_routing,
    check_training,
    load_state,
    opened,
    take_step,
)
from flowrl.telemetry.events import Cause, Notice, Step
from flowrl.telemetry.records import forget_steps, step_path, write_digests, write_rollouts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from flowrl.algorithms.base import Objective
    from flowrl.graph.simulated import Costs
    from flowrl.graph.stage import Context, Say
    from flowrl.graph.staleness import Admission
    from flowrl.messages import FloatArray

NO_TEXTS = TextSource.Config()
CANARY_TOKENS = 32  # long enough that one stale layer shows in the mean, short enough to cost nothing


class Learner(Stage):
    """Trains the policy with an algorithm's loss on a training engine."""

    class Config(Publishing):
        """Settings of the learner node."""

        engine: ImportPath = "flowrl.engines.deepspeed:DeepSpeedEngine"
        epochs: Annotated[int, Meta(ge=1)] = 1  # passes over a step's groups
        minibatches: Annotated[int, Meta(ge=1)] = 1  # optimizer steps in one pass; must divide groups_per_step
        # of a mixture of experts: tokens go to the experts that the generator sent them to (replay), or to its own
        routing: RoutingKind = "own"
        freeze_steps: Annotated[int, Meta(ge=0)] = 0  # first steps in which only the critic learns
        save_every: Annotated[int, Meta(ge=0)] = 10  # versions between checkpoints; 0: only at the end
        keep_checkpoints: Annotated[int, Meta(ge=1)] = 2  # newest ones kept, besides the best
        evaluate_every: Annotated[int, Meta(ge=0)] = 0  # versions between evaluations; 0: before and after
        save_rollouts: bool = True  # write every learned group to Parquet
        min_ess: Annotated[float, Meta(ge=0, le=1)] = 0.3  # warn when the effective sample size falls below

    optional = frozenset({"evaluations", "examined", "results", "wanted", "texts"})
    together = (frozenset({"wanted", "texts"}),)
    ordered = frozenset({"samples"})
    is_stateful = True
    samples: In[Samples]
    wanted: Out[Texts]  # asks for a step's texts
    texts: In[Texts]
    weights: Out[Weights]
    released: Out[Credit]
    evaluations: Out[EvaluationRequest]
    examined: Out[PinnedWeights]  # to generators that keep a version while it is evaluated
    results: In[VersionScore]  # by which the best checkpoint is chosen; unconnected: by the mean reward of its steps

    def __init__(
        self, config: Config, sampler: Sampler, learning: Learning, beside: TextSource.Config = NO_TEXTS
    ) -> None:
        check_divides(config.minibatches, learning.groups_per_step, "learner.minibatches")
        self.config: Learner.Config = config
        self.sampler = sampler
        self.learning = learning
        self.beside = beside  # what comes in each message of `texts`
        self.algorithm = learning.algorithm
        self.pretraining = Select(use="flowrl.algorithms.pretraining:Pretraining", options={"coef": beside.coef})
        self._num_samples, self._sum_rewards = 0, 0.0  # learned since the last checkpoint
        self._awaited: set[int] = set()  # versions that are evaluated, whose scores are still to come
        self._ours: dict[tuple[int, int], FloatArray] = {}  # log-probs of the step's samples as they were first learned

    @property
    def admission(self) -> Admission:
        """Return what a step learns."""
        return self.learning.admission

    def check(self, say: Say) -> None:
        """Prepare the model, load the algorithm, hold the step's division against its size."""
        minibatches = self.config.minibatches
        if 0 < self.beside.per_step < minibatches:
            what = f"{self.beside.per_step} texts a step are too few for {minibatches} learner.minibatches"
            raise ConfigError("texts.per_step", what, "give each minibatch one or more")
        model = check_training(self.config, self.sampler.model, "learner", num_steps=self.num_optimizer_steps, say=say)
        self._check_routing(model, say)
        check_masters(self.sampler.model, say)
        self._check_publishing(model, say)
        objective = self.load_objective()
        self._check_freezing(objective)
        num_updates = self.config.minibatches * self.config.epochs
        for line in advice(objective, max_staleness=self.learning.max_staleness, num_updates=num_updates):
            say(f"warning: {line}")
        for line in objective.idle_settings(num_updates, is_fresh=self.learning.max_staleness == 0):
            say(line)

    def _check_routing(self, model: Path, say: Say) -> None:
        """Insist that samples bring the routes that are to be replayed, and say what they weigh."""
        if self.sampler.routing != self.config.routing:
            what = f"is {self.config.routing}, but the graph's Sampler has {self.sampler.routing}"
            raise ConfigError("learner.routing", what, "give it routing=settings.learner.routing")
        if self.config.routing == "own":
            return
        num_bytes = check_routing(self.config, model, "learner") * self.sampler.longest
        say(f"learner.routing: a sample of {self.sampler.longest} tokens brings {num_bytes / 1e6:.3g} MB of routes")

    def _check_freezing(self, objective: Objective) -> None:
        """Insist that the policy learns at some time, and until then a critic does."""
        frozen, steps = self.config.freeze_steps, self.learning.steps
        what = ""
        if frozen >= steps:
            what = f"{frozen} of {steps} steps, so that the policy would learn nothing"
        elif frozen and not getattr(objective, "needs_critic", False):
            what = f"{frozen} steps in which nothing would learn, for {self.algorithm.use} has no critic"
        if what:
            raise ConfigError("learner.freeze_steps", what, "lower it, or leave it 0")

    def _check_publishing(self, model: Path, say: Say) -> None:
        """Say it where an adapter does not travel as it is, and insist on it where it must."""
        lora = self.config.lora
        if self.sampler.adapter.rank and self.sampler.adapter != lora:
            what = f"has rank {lora.rank}, but the graph's Sampler another adapter, of rank {self.sampler.adapter.rank}"
            raise ConfigError("learner.lora", what, "give it adapter=settings.learner.lora")
        if not lora.rank or lora.publish == "merged" or self.sampler.travelling(model).rank:
            return
        if lora.publish == "adapter":
            what = "is adapter, but the graph's Sampler was not given the learner's adapter"
            raise ConfigError("learner.lora.publish", what, "give it adapter=settings.learner.lora, or set merged")
        why = unserved(lora, engine=self.sampler.engine, model=model)
        say(f"learner.lora: versions travel as whole models, merged and rounded to dtype, for {why}")

    def load_objective(self) -> Objective:
        """Return what is minimised."""
        self.algorithm = settled(self.algorithm, self.sampler.max_response)
        algorithm = load_algorithm(self.algorithm)
        check_sampling(algorithm, is_cut=self.sampler.sampling.is_cut)
        return algorithm

    def _settings(self) -> TrainingConfig:
        model = prepare_model(self.sampler.model)
        publish = "adapter" if self.sampler.travelling(model).rank else "merged"
        lora = msgspec.structs.replace(self.config.lora, publish=publish)
        temperature = self.sampler.sampling.temperature
        return widen(TrainingConfig, self.config, model=str(model), temperature=temperature, lora=lora)

    @property
    def num_optimizer_steps(self) -> int:
        """Return how many optimizer steps the whole run takes, the length of its schedule."""
        steps = max(1, self.learning.steps - self.config.freeze_steps)
        return steps * self.config.epochs * self.config.minibatches

    async def follow(self, context: Context) -> None:
        """Serve as a rank other than 0."""
        async with opened(context, self.config.engine, self._settings, self.num_optimizer_steps) as engine:
            await context.compute(engine.follow)

    def simulated(self, costs: Costs) -> Itself:
        """Train nothing."""
        shared = {"sampler": costs.sampler(self.sampler), "learning": costs.learning(self.learning)}
        return Itself({"config": costs.training(self.config, "train"), **shared}, without=("results",))

    async def run(self, context: Context) -> None:
        """Train until the last version is published, acknowledged and saved, or the user asks to stop."""
        objective = self.load_objective()
        async with opened(context, self.config.engine, self._settings, self.num_optimizer_steps) as engine:
            context.version = 0
            if context.resume_from is not None:
                context.version = await context.compute(load_state, engine, context.resume_from / context.node)
            saved = context.version if context.resume_from else -1
            if self.config.save_rollouts:
                await context.compute(forget_steps, context.run_dir / "rollouts", context.version)
            if self.results.is_connected:
                await self._go_on_rating(context)
            await self._ask_for_texts(context.version)
            self._examinations = Examinations(self.examined, self.evaluations)
            async with self._rating(context), asyncio.TaskGroup() as tasks:
                push = await self._publish(context, engine, [], tasks)
                while context.version < self.learning.steps:
                    batch = await take_step(self.samples, context, self.learning.groups_per_step)
                    if batch is None:
                        break
                    push = await self._step(context, engine, objective, batch, push, tasks)
                    if self._is_saved(context.version):
                        await self._save(context, engine)
                        saved = context.version
                await push
                if saved != context.version:
                    await self._save(context, engine)

    async def _step(self, context: Context, engine: TrainingEngine, objective: Objective, batch: list[Samples],
                    push: asyncio.Task[None], tasks: asyncio.TaskGroup) -> asyncio.Task[None]:  # fmt: skip
        start_s, version = context.now(), context.version
        staleness = [version - group.oldest_version for group in batch]
        if max(staleness) > (limit := self.learning.max_staleness):
            worst = max(zip(staleness, batch, strict=True), key=lambda pair: pair[0])
            what = f"group {worst[1].group_id} is {worst[0]} versions old, more than max_staleness={limit}"
            raise RunError(context.where, what, "this is a defect of the flow: please report the run directory")
        metrics = replay_metrics(batch, version)
        if version == 0:
            metrics |= await context.compute(logprob_gap, engine, batch)
        learned = [each for group in batch for each in (group, *replays_of(group))]
        groups = await context.compute(step_groups, objective, learned, version)
        texts = await self._take_texts(version)
        choice = step_choice(self.algorithm, objective, batch)
        self._ours = {}
        metrics |= await self._train(context, engine, objective, groups, texts, choice, push)
        context.version += 1
        context.done += len(batch)
        await self.samples.done(*batch, learned_in=version)
        self._num_samples += sum(len(group.samples) for group in batch)
        self._sum_rewards += sum(sum(group.rewards) for group in batch)
        context.span(f"step {version}", start_s, groups=[group.group_id for group in batch])
        self._record(context, batch, staleness, metrics, context.now() - start_s)
        push = await self._publish(context, engine, batch, tasks)
        if self.config.save_rollouts:
            path = step_path(context.run_dir / "rollouts", version)
            ours = {(learned[place].group_id, sample): row for (place, sample), row in self._ours.items()}
            await context.write(write_rollouts, path, batch, version, ours)
        return push

    async def _ask_for_texts(self, step: int) -> None:
        if self.wanted.is_connected and step < self.learning.steps:
            await self.wanted.put(Texts(group_id=FIRST_TEXTS + step))

    async def _take_texts(self, step: int) -> list[TokenGroup]:
        """Return the texts of a step, which were asked for before, and ask for the next step's."""
        if not self.texts.is_connected:
            return []
        texts = await self.texts.get()
        await self.texts.done(texts)
        await self._ask_for_texts(step + 1)
        return [example_group(example) for example in texts.examples]

    async def _train(
        self, context: Context, engine: TrainingEngine, objective: Objective, groups: list[TokenGroup],
        texts: list[TokenGroup], choice: Select, push: asyncio.Task[None],
    ) -> dict[str, float]:  # fmt: skip
        """Run the step's optimizer steps; the weights change only after the last version has left."""
        if context.version < self.config.freeze_steps:
            await asyncio.wait([push])
            return {}
        num_parts, epochs = self.config.minibatches, self.config.epochs
        if num_parts * epochs > 1 and objective.needs_proximal:
            groups = with_proximal(groups, await context.compute(engine.score, groups))
        updates: list[dict[str, float]] = []
        dealt = minibatches(len(groups), num_parts, epochs, seed=(self.config.seed, context.version))
        for number, places in enumerate(dealt):
            part = [groups[place] for place in places]
            if objective.needs_drift:
                part = with_drift_limit(objective, part, await context.compute(engine.score, part))
            metrics = await context.compute(engine.accumulate, part, choice)
            if number < num_parts:
                self._ours |= {(places[group], sample): row for (group, sample), row in engine.learned().items()}
            if texts:
                found = await context.compute(
                    engine.accumulate, texts[number % num_parts :: num_parts], self.pretraining
                )
                metrics |= {f"texts.{name}": value for name, value in found.items()}
            if not push.done():
                with context.clock.charge(Cause.UPDATE):
                    await asyncio.wait([push])
            updates.append(metrics | await context.compute(engine.apply))
        return mean_metrics(updates)

    async def _publish(
        self, context: Context, engine: TrainingEngine, learned: list[Samples], tasks: asyncio.TaskGroup
    ) -> asyncio.Task[None]:
        """Offer the current weights and bring them to the generators in the background."""
        start_s = context.now()
        weights = await context.compute(engine.publish, context.version, _canary())
        await context.write(write_digests, context.run_dir, weights.version, tensor_digests(weights.manifest))
        return tasks.create_task(self._push(context, engine, weights, learned, start_s, tasks))

    async def _push(
        self, context: Context, engine: TrainingEngine, weights: Weights, learned: list[Samples], start_s: float,
        tasks: asyncio.TaskGroup,
    ) -> None:  # fmt: skip
        """Wait for every live generator to serve the version, then return the credits of what it was learned from."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self.weights.put(weights))
            both.create_task(self._transfer(context, engine, weights.version))
        if learned:
            await self.released.put(Credit(groups=[group.group_id for group in learned]))
        context.span(f"publish v{weights.version}", start_s, args={"bytes": weights.size_bytes})
        if self.evaluations.is_connected and self._is_evaluated(weights.version):
            is_final = weights.version == self.learning.steps
            if self.results.is_connected:
                self._awaited.add(weights.version)
            if self.examined.is_connected:
                left_out = self._examinations.ask(context, weights, is_final=is_final, tasks=tasks)
                self._awaited -= {left_out}
            else:
                await self.evaluations.put(EvaluationRequest(version=weights.version, is_final=is_final))
        await context.background(engine.retire, weights.version, self._examinations.kept)

    async def _transfer(self, context: Context, engine: TrainingEngine, version: int) -> None:
        """Send the bytes; that no generator is there to take them is not the learner's failure."""
        try:
            await context.background(engine.transfer, version)
        except TransferError as error:
            notice = Notice(level="warning", where=context.where, text=str(error), time_s=context.now())
            context.recorder.record(notice)

    def _is_evaluated(self, version: int) -> bool:
        every = self.config.evaluate_every
        return version in (0, self.learning.steps) or bool(every and version % every == 0)

    def _is_saved(self, version: int) -> bool:
        every = self.config.save_every
        return bool(every and version % every == 0) or (self.results.is_connected and self._is_evaluated(version))

    async def _save(self, context: Context, engine: TrainingEngine) -> None:
        """Write a checkpoint; its score is the mean reward of the steps since the one before, or comes later."""
        score = None if self.results.is_connected else self._sum_rewards / max(1, self._num_samples)
        async with self._keeping:
            await save_checkpoint(
                context, engine, card=CARD, keep=self.config.keep_checkpoints, score=score, saving=self.saving,
                awaited=frozenset(self._awaited),
            )  # fmt: skip
        self._num_samples, self._sum_rewards = 0, 0.0

    async def _go_on_rating(self, context: Context) -> None:
        """Forget what later versions were given before, and say which before this one will have no score."""
        directory = context.run_dir / "checkpoints"
        await context.compute(forget_ratings, directory, context.version)
        rated = read_rated(directory)
        known = rated.scores if rated else {}
        cut = [version for version in range(context.version) if self._is_evaluated(version) and version not in known]
        if cut:
            text = f"versions {', '.join(map(str, cut))} have no score: their evaluation was cut off or left out"
            context.notice(text, level="info")

    @asynccontextmanager
    async def _rating(self, context: Context) -> AsyncIterator[None]:
        """Take in what evaluations gave versions, where they do, until the block ends."""
        self._keeping = asyncio.Lock()  # of the directory of checkpoints
        async with asyncio.TaskGroup() as tasks:
            rating = tasks.create_task(self._rate(context)) if self.results.is_connected else None
            yield
            if rating is not None:
                rating.cancel()

    async def _rate(self, context: Context) -> None:
        async for told in self.results:
            async with self._keeping:
                self._awaited.discard(told.version)
                directory, keep = context.run_dir / "checkpoints", self.config.keep_checkpoints
                writer = CheckpointWriter(directory, keep=keep, awaited=frozenset(self._awaited))
                if await context.write(partial(writer.rate, told.version, told.score, by=told.by)):
                    text = f"version {told.version} is the best so far: {told.by} {told.score:.4g}"
                    context.notice(text, level="info")
            await self.results.done(told)

    def _record(
        self, context: Context, batch: list[Samples], staleness: list[int], metrics: dict[str, float], step_s: float
    ) -> None:
        figures = derived({**step_metrics(batch, staleness), **metrics, "step_s": step_s})
        version, steps, now_s = context.version, self.learning.steps, context.now()
        context.recorder.record(
            Step(version=version, num_steps=steps, time_s=now_s, metrics=figures, staleness=staleness)
        )
        if figures.get("ess", 1.0) < self.config.min_ess:
            found = f"effective sample size {figures['ess']:.2f} in step {context.version - 1}"
            text = f"{found}, below {self.config.min_ess}: generator and learner disagree; lower max_staleness or lr"
            context.notice(text)


def _canary() -> Buffer:
    """Return a fixed token sequence that every vocabulary of 64 or more tokens has."""
    return Buffer.ints([3 + (7 * i) % 61 for i in range(CANARY_TOKENS)])
