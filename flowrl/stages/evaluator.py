"""Evaluator: scores the policy on the held-out set at the versions the learner names.

Invariant: an evaluation uses one version only, because the learner publishes no newer one before it is acknowledged
here; or, with `beside`, sends none to the generators that keep this one; the same prompts are drawn with the same seeds
each time, so that before and after are paired. The score is that of the reward function the policy is trained on, or of
one of its own; it runs in a worker process. Where an agent plays the held-out prompts, it is what their environment
gave.

Tests: tests/unit/stages/test_reward.py
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import msgspec

from flowrl.config import IMPORT_PATH, Meta
from flowrl.data.models import prepare_model
from flowrl.data.prompts import PromptRow, PromptSet, load_prompts, load_tokenizer
from flowrl.errors import ConfigError, DataError
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import FIRST_HELDOUT, Buffer, EvaluationRequest, Prompt, Rollouts, Scored
from flowrl.rewards.isolated import IsolatedFunction
from flowrl.stages.reward import Reward, call, opening_of, try_function
from flowrl.stages.sampler import Sampler
from flowrl.telemetry.events import Cause, Evaluation

if TYPE_CHECKING:
    from flowrl.graph.stage import Context, Say

SHOWN = 3  # completions kept for the report
RETRIES = 1  # calls after the first that failed


class Evaluator(Stage):
    """Sends held-out prompts through the generators and scores what comes back."""

    class Config(StageConfig):
        """Settings of the evaluation node."""

        samples: Annotated[int, Meta(ge=1)] = 4  # responses to each held-out prompt
        # generators of its own, which keep a version while the learner goes on; 0: no version is published meanwhile
        beside: Annotated[int, Meta(ge=0)] = 0
        # further held-out sets by name, each a source as data.source; all of its prompts are asked
        sets: dict[str, str] = {}
        in_flight: Annotated[int, Meta(ge=1)] = 64  # held-out prompts sent and not yet scored
        # As reward.function; null: the reward's own; "": the scores that the rollouts bring from their environment
        function: Annotated[str, Meta(extra={IMPORT_PATH: "flowrl.rewards.verify:exact_answer"})] | None = None

    is_single = True
    requests: In[EvaluationRequest]
    prompts: Out[Prompt]
    rollouts: In[Rollouts]  # at most `in_flight` are on their way here

    def __init__(self, config: Config, sampler: Sampler, *, reward: Reward.Config | None = None) -> None:
        self.config: Evaluator.Config = config
        self.sampler = sampler
        self.reward = reward  # what the policy is trained on; None: the scores that the rollouts bring

    def check(self, say: Say) -> None:
        """Load the function where it will run, and try it on a row of the data; read the further sets."""
        self._load_sets()
        scoring = self._scoring()
        if scoring is not None and self.config.function:
            try_function(scoring, self.sampler.data, where="evaluation.function")
        if scoring is None and self.reward is not None and (count := self.sampler.data.num_heldout):
            what = f"is not set, nor is reward.function: nothing scores the {count} held-out prompts"
            raise ConfigError("evaluation.function", what, "name a function, or set data.num_heldout=0")

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
        scoring = self._scoring()
        log = context.run_dir / "logs" / f"{context.where}.function.log"
        num_sent = FIRST_HELDOUT
        isolated = IsolatedFunction(opening_of(scoring, context.where), log=log) if scoring else nullcontext()
        async with isolated as function:
            async for request in self.requests:
                evaluation = await self._evaluate(context, prompts, sets, function, request, num_sent)
                num_asked = len(prompts.heldout) + sum(map(len, sets.values()))
                num_sent += num_asked
                if evaluation is not None:
                    context.recorder.record(evaluation)
                context.version = request.version
                context.done += num_asked
                await self.requests.done(request)

    def _load(self) -> PromptSet:
        return load_prompts(self.sampler.data, load_tokenizer(prepare_model(self.sampler.model)))

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
        prompts: PromptSet,
        sets: dict[str, list[PromptRow]],
        function: IsolatedFunction | None,
        request: EvaluationRequest,
        first_id: int,
    ) -> Evaluation | None:
        """Return the scores; nothing where no prompt is held out, or the generators have moved on meanwhile."""
        if not prompts.heldout:
            return None
        room = asyncio.Semaphore(self.config.in_flight)
        asked = [*prompts.heldout, *(row for rows in sets.values() for row in rows)]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send(asked, first_id, room))
            scores: dict[int, list[float]] = {}
            texts: dict[int, dict[str, str]] = {}
            versions: set[int] = set()
            while len(scores) < len(asked):
                group = await self.rollouts.get()
                place = group.group_id - first_id
                versions |= {span.version for sample in group.samples for span in sample.versions}
                scores[place] = _brought(group) if function is None else await call(function, group, retries=RETRIES)
                if place < SHOWN:
                    texts[place] = {
                        "prompt": asked[place].text,
                        "completion": group.samples[0].text,
                        "reward": f"{scores[place][0]:g}",
                    }
                await self.rollouts.done(group)
                room.release()
        if versions != {request.version}:  # only after a restart: the learner did not wait for the dead
            text = f"version {request.version} was not evaluated: the generators serve {max(versions)}"
            context.notice(text)
            return None
        ordered = iter([scores[place] for place in range(len(asked))])
        return Evaluation(
            version=request.version,
            time_s=context.now(),
            scores=[next(ordered) for _ in prompts.heldout],
            completions=[texts[place] for place in sorted(texts)],
            sets={name: [next(ordered) for _ in rows] for name, rows in sets.items()},
        )

    async def _send(self, asked: list[PromptRow], first_id: int, room: asyncio.Semaphore) -> None:
        for place, row in enumerate(asked):
            await room.acquire()
            await self.prompts.put(
                Prompt(
                    group_id=first_id + place,
                    token_ids=Buffer.ints(row.token_ids),
                    columns=row.columns,
                    num_samples=self.config.samples,
                    seed=(self.sampler.seed + 1) * 7_919 + place * 4096,
                )
            )


def _brought(group: Rollouts) -> list[float]:
    if isinstance(group, Scored):
        return group.rewards
    what = "is empty, but the held-out rollouts bring no scores"
    raise ConfigError("evaluation.function", what, "name a function, or take a graph with an agent")
