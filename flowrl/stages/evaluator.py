"""Evaluator: scores the policy on the held-out set at the versions the learner names.

Invariants:
- an evaluation uses one version only: the learner publishes no newer one before it is acknowledged here or, with
  `beside`, sends none to the generators that keep this one;
- the same prompts are drawn with the same seeds each time, so that before and after are paired;
- the score is that of the reward function the policy is trained on, or of one of its own,
  and it runs in a worker process.

Where an agent plays the held-out prompts, it is what their environment gave. Benchmarks of lm-eval (`tasks`) are asked
of the same generators, by lm-eval in a thread of this process; that one fails is said, and costs its score alone.

Tests: tests/unit/stages/test_reward.py
"""

from __future__ import annotations

import asyncio
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from flowrl.config import IMPORT_PATH, Meta
from flowrl.data.models import prepare_model
from flowrl.data.prompts import PromptRow, load_prompts, load_tokenizer
from flowrl.errors import ConfigError, DataError, FlowrlError, said_briefly
from flowrl.graph.ports import In, Out
from flowrl.graph.simulated import Itself
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import FIRST_HELDOUT, Buffer, EvaluationRequest, Prompt, Rollouts, Scored, VersionScore
from flowrl.rewards.isolated import IsolatedFunction
from flowrl.stages.asking import Asking, Bridge
from flowrl.stages.benchmarks import (
    TaskScore,
    aggregates_of,
    check_installed,
    check_safe,
    load_tasks,
    run_tasks,
    scores_in,
)
from flowrl.stages.reward import Reward, call, opening_of, try_function
from flowrl.stages.sampler import Sampler
from flowrl.telemetry.events import Cause, Evaluation
from flowrl.telemetry.intervals import mean_interval, prompt_means

if TYPE_CHECKING:
    from flowrl.graph.simulated import Costs
    from flowrl.graph.stage import Context, Say

SHOWN = 3  # completions kept for the report
RETRIES = 1  # calls after the first that failed
HELDOUT = "heldout"  # what the held-out prompts are called beside further sets and tasks
TASKS_PATH = "evaluation.tasks"


class Evaluator(Stage):
    """Sends held-out prompts through the generators and scores what comes back."""

    class Config(StageConfig):
        """Settings of the evaluation node."""

        samples: Annotated[int, Meta(ge=1)] = 4  # responses to each held-out prompt
        # generators of its own, which keep a version while the learner goes on; 0: no version is published meanwhile
        beside: Annotated[int, Meta(ge=0)] = 0
        # further held-out sets by name, each a source as data.source; all of its prompts are asked
        sets: dict[str, str] = {}
        tasks: list[str] = []  # of lm-eval (the extra `eval`): YAML files, directories of them or names; with `beside`
        task_items: Annotated[int, Meta(ge=0)] = 0  # of each task; 0: all
        # what the best checkpoint goes by: heldout, a set's name or TASK/METRIC, each version that is evaluated being
        # saved; "": the mean reward of the steps that made it
        best_by: str = ""
        in_flight: Annotated[int, Meta(ge=1)] = 64  # held-out prompts sent and not yet scored
        # As reward.function; null: the reward's own; "": the scores that the rollouts bring from their environment
        function: Annotated[str, Meta(extra={IMPORT_PATH: "flowrl.rewards.verify:exact_answer"})] | None = None

    is_single = True
    optional = frozenset({"results"})
    requests: In[EvaluationRequest]
    prompts: Out[Prompt]
    rollouts: In[Rollouts]  # at most `in_flight` are on their way here
    results: Out[VersionScore]  # by which the best version is chosen

    def __init__(
        self, config: Config, sampler: Sampler, *, reward: Reward.Config | None = None, blank: list[int] | None = None
    ) -> None:
        self.config: Evaluator.Config = config
        self.sampler = sampler
        self.reward = reward  # what the policy is trained on; None: the scores that the rollouts bring
        self.blank = blank  # tokens of each prompt in a simulation, where nothing is scored; None: real ones

    def simulated(self, costs: Costs) -> Itself:
        """Ask as many prompts as in the profile's run, and score nothing."""
        config = msgspec.structs.replace(self.config, sets={}, tasks=[], function="", best_by="")
        blank = costs.heldout(self.sampler.data.num_heldout)
        arguments = {"config": config, "sampler": costs.sampler(self.sampler), "reward": None, "blank": blank}
        return Itself(arguments, without=("results",))

    def check(self, say: Say) -> None:
        """Load the function where it will run, and try it on a row of the data; read the further sets and the tasks."""
        self._load_sets()
        tasks = self._load_tasks()
        self._check_best(tasks)
        if self.config.task_items and not tasks:
            say("evaluation.task_items: no effect without evaluation.tasks")
        scoring = self._scoring()
        if scoring is not None and self.config.function:
            try_function(scoring, self.sampler.data, where="evaluation.function", say=say)
        if scoring is None and self.reward is not None and (count := self.sampler.data.num_heldout):
            what = f"is not set, nor is reward.function: nothing scores the {count} held-out prompts"
            raise ConfigError("evaluation.function", what, "name a function, or set data.num_heldout=0")

    def _load_tasks(self) -> dict[str, Any]:
        """Return lm-eval's tasks by name.

        Raises:
            ConfigError: one cannot be asked.
            DataError: a task's data cannot be had.
        """
        if not self.config.tasks:
            return {}
        check_installed(TASKS_PATH)
        tasks = load_tasks(self.config.tasks, TASKS_PATH)
        check_safe(tasks, TASKS_PATH)
        return tasks

    def _check_best(self, tasks: dict[str, Any]) -> None:
        """Insist that what the best version is chosen by is evaluated."""
        if not (by := self.config.best_by):
            return
        known = [HELDOUT] if self.sampler.data.num_heldout else []
        known += [*self.config.sets, *(f"{task}/{metric}" for task, metric in aggregates_of(tasks))]
        if by not in known and not any(by.startswith(f"{each}/") for each in known if "/" in each):
            what = f"is {by!r}, but evaluated are: {', '.join(known) or 'nothing'}"
            raise ConfigError("evaluation.best_by", what, "name one of these, or leave it empty")

    def _scoring(self) -> Reward.Config | None:
        """Return how held-out samples are scored; None: by what they bring."""
        reward = self.reward or Reward.Config(function="")
        function = reward.function if self.config.function is None else self.config.function
        return msgspec.structs.replace(reward, function=function, isolation="process") if function else None

    async def run(self, context: Context) -> None:
        """Evaluate every version the learner names until the edge closes."""
        with context.clock.charge(Cause.START):
            prompts = await context.compute(self._load)
            sets = await context.compute(self._load_sets)
            tasks = await context.compute(self._load_tasks)
        scoring = self._scoring()
        log = context.run_dir / "logs" / f"{context.where}.function.log"
        # Behind whatever an evaluator before this one has asked, whose answers may still come.
        num_sent = FIRST_HELDOUT + int(1000 * context.now()) % FIRST_HELDOUT
        isolated = IsolatedFunction(opening_of(scoring, context.where), log=log) if scoring else nullcontext()
        async with isolated as function:
            async for request in self.requests:
                evaluation = await self._evaluate(context, prompts, sets, function, request, num_sent)
                num_asked = len(prompts) + sum(map(len, sets.values()))
                found: list[TaskScore] = []
                if evaluation is not None and tasks:
                    found, num_more = await self._benchmark(context, tasks, request.version, num_sent + num_asked)
                    num_asked += num_more
                    told = {each.name: each.bounds for each in found}
                    evaluation = msgspec.structs.replace(evaluation, tasks=told)
                num_sent += num_asked
                if evaluation is not None and self.blank is None:
                    context.recorder.record(evaluation)
                context.version = request.version
                context.done += num_asked
                if self.results.is_connected:
                    await self.results.put(self._version_score(request.version, evaluation, found))
                await self.requests.done(request)

    def _version_score(self, version: int, evaluation: Evaluation | None, found: list[TaskScore]) -> VersionScore:
        """Return what a version is held against others by, less being turned into more."""
        by, score = self.config.best_by, None
        if evaluation is not None:
            rows = evaluation.scores if by == HELDOUT else evaluation.sets.get(by, [])
            score = mean_interval(prompt_means(rows)).mean if rows else None
        for each in found:
            if score is None and f"{each.name}/".startswith(f"{by}/"):
                is_less = each.higher_is_better is False
                by, score = (f"minus {each.name}", -each.bounds.value) if is_less else (each.name, each.bounds.value)
        is_known = score is not None and math.isfinite(score)
        return VersionScore(version=version, by=by, score=score if is_known else None)

    def _load(self) -> list[PromptRow]:
        """Return the held-out prompts."""
        if self.blank is not None:
            return [
                PromptRow(index=k, place="", token_ids=[0] * n, text="", columns={}) for k, n in enumerate(self.blank)
            ]
        return load_prompts(self.sampler.data, load_tokenizer(prepare_model(self.sampler.model))).heldout

    def _load_sets(self) -> dict[str, list[PromptRow]]:
        """Return the prompts of the further sets.

        Raises:
            ConfigError: one cannot be used.
        """
        found: dict[str, list[PromptRow]] = {}
        for name, source in self.config.sets.items():
            data = msgspec.structs.replace(self.sampler.data, source=source, mix=[], num_heldout=0, num_train=0)
            try:
                found[name] = load_prompts(data, load_tokenizer(prepare_model(self.sampler.model))).train
            except DataError as error:
                raise ConfigError(f"evaluation.sets.{name}", f"{error.where}: {error.what}", error.remedy) from error
        return found

    async def _evaluate(
        self,
        context: Context,
        prompts: list[PromptRow],
        sets: dict[str, list[PromptRow]],
        function: IsolatedFunction | None,
        request: EvaluationRequest,
        first_id: int,
    ) -> Evaluation | None:
        """Return the scores; nothing where nothing is asked, or the generators have moved on meanwhile."""
        asked = [*prompts, *(row for rows in sets.values() for row in rows)]
        if not asked and not self.config.tasks:
            return None
        room = asyncio.Semaphore(self.config.in_flight)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send(asked, first_id, room))
            scores: dict[int, list[float]] = {}
            texts: dict[int, dict[str, str]] = {}
            versions: set[int] = set()
            while len(scores) < len(asked):
                group = await self.rollouts.get()
                place = group.group_id - first_id
                if not 0 <= place < len(asked):  # asked by an evaluator that died
                    await self.rollouts.done(group)
                    continue
                versions |= {span.version for sample in group.samples for span in sample.versions}
                scores[place] = await self._scored(function, group)
                if place < SHOWN:
                    texts[place] = {
                        "prompt": asked[place].text,
                        "completion": group.samples[0].text,
                        "reward": f"{scores[place][0]:g}",
                    }
                await self.rollouts.done(group)
                room.release()
        if asked and versions != {request.version}:  # only after a restart: the learner did not wait for the dead
            text = f"version {request.version} was not evaluated: the generators serve {max(versions)}"
            context.notice(text)
            return None
        ordered = iter([scores[place] for place in range(len(asked))])
        return Evaluation(
            version=request.version,
            time_s=context.now(),
            scores=[next(ordered) for _ in prompts],
            completions=[texts[place] for place in sorted(texts)],
            sets={name: [next(ordered) for _ in rows] for name, rows in sets.items()},
        )

    async def _scored(self, function: IsolatedFunction | None, group: Rollouts) -> list[float]:
        if self.blank is not None:
            return [0.0] * len(group.samples)
        return _brought(group) if function is None else await call(function, group, retries=RETRIES)

    async def _benchmark(
        self, context: Context, tasks: dict[str, Any], version: int, first_id: int
    ) -> tuple[list[TaskScore], int]:
        """Have lm-eval ask its questions of a version; returns the scores, and how many were asked.

        What fails, and what another version answered, is said and has no score.
        """
        from flowrl.stages.harness import EngineLM

        start_s = context.now()
        asking = Asking(self.prompts, self.rollouts, first_id=first_id, in_flight=self.config.in_flight)
        bridge = Bridge()
        try:
            async with asyncio.TaskGroup() as group:
                listening = group.create_task(asking.listen())
                directory = await context.compute(prepare_model, self.sampler.model)
                lm = EngineLM(
                    asking, load_tokenizer(directory), bridge.run, seed=self.sampler.seed,
                    max_length=self.sampler.max_model_len, at_once=self.config.in_flight,
                )  # fmt: skip
                found, failure = await context.background(self._ask_all, lm, tasks)
                listening.cancel()
        finally:
            bridge.close()
        if not failure and asking.versions != {version}:  # as for the held-out prompts
            failure = f"the generators serve {max(asking.versions, default=-1)}"
        if failure:
            context.notice(f"version {version} has no scores of {', '.join(tasks)}: {failure}")
            found = []
        context.span(f"tasks v{version}", start_s, args={"questions": asking.num_asked})
        return found, asking.num_asked

    def _ask_all(self, lm: Any, tasks: dict[str, Any]) -> tuple[list[TaskScore], str]:
        """Return the tasks' scores, or why there are none; blocking."""
        seed = self.sampler.seed
        try:
            results = run_tasks(lm, tasks, limit=self.config.task_items, seed=seed)
            return [*scores_in(results, tasks, seed)], ""
        except FlowrlError as error:
            return [], str(error)
        except Exception as error:  # whatever lm-eval's metrics and the user's functions raise
            return [], said_briefly(error)

    async def _send(self, asked: list[PromptRow], first_id: int, room: asyncio.Semaphore) -> None:
        for place, row in enumerate(asked):
            await room.acquire()
            await self.prompts.put(
                Prompt(
                    group_id=first_id + place,
                    token_ids=Buffer.ints(row.token_ids),
                    columns=row.columns,
                    begun=row.begun,
                    num_samples=self.config.samples,
                    seed=(self.sampler.seed + 1) * 7_919 + place * 4096,
                )
            )


def _brought(group: Rollouts) -> list[float]:
    if isinstance(group, Scored):
        return group.rewards
    what = "is empty, but the held-out rollouts bring no scores"
    raise ConfigError("evaluation.function", what, "name a function, or take a graph with an agent")
