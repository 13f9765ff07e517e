"""Humans: people compare or rate a policy's answers while it goes on learning; what they say is the answers' score.

The stage asks by a line in the run's questions.jsonl and reads what people said from judgments.jsonl; the page that
they sit at is another process (`flowrl feedback RUN`), which may come and go.

Invariants:
- a group leaves with one score per answer that was shown, or is rejected as filtered with the reason;
- the reason is that nobody judged it within `deadline_s`, somebody flagged it, or there was nothing to compare;
- where the graph has a use for it (`passes`), what nobody judged goes on with scores of 0, told apart by the metric
  `judged`;
- at most `in_flight` groups wait for people at a time;
- a judgment counts once it could be taken back for `undo_s`;
- what is on the disk counts for a group that is issued again, so that nobody is asked twice;
- a judgment that comes too late for its group is kept for export, and how many did is said;
- waiting for people is charged as waiting for input, and to the runtime is no stall.

Tests: tests/unit/stages/test_humans.py
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING, Annotated

import msgspec

from flowrl.config import Meta
from flowrl.data.judgments import (
    JUDGMENTS,
    PRIVATE,
    QUESTIONS,
    Closed,
    Judgment,
    Question,
    Said,
    Tail,
    Way,
    ask,
    worths,
)
from flowrl.errors import ConfigError, number_of
from flowrl.graph.ports import In, Out
from flowrl.graph.simulated import PassesOn
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Rollouts, Scored, narrowed
from flowrl.stages.reward import add_scores
from flowrl.telemetry.events import Cause
from flowrl.telemetry.files import RecordFile

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flowrl.data.judgments import Ended
    from flowrl.graph.simulated import Costs
    from flowrl.graph.stage import Context, Say

JUDGED = "judged"  # metric of a group: 1 where people decided it, 0 where it goes on without
LOOK_S = 0.5  # between two looks at what was said: a shared disk tells nobody what is written on another machine


class Humans(Stage):
    """Scores by asking people."""

    class Config(StageConfig):
        """Settings of the humans node."""

        way: Way = "pairs"  # two answers against each other, 1 for the better; or each rated from 1 to 5
        raters: Annotated[int, Meta(ge=1)] = 1  # who must have judged an answer; their mean is its score
        # after which a group that nobody judged is filtered, or goes on without where the graph has a use for it
        deadline_s: Annotated[float, Meta(gt=0)] = 600.0
        # share of the groups that people are asked about; the others go on at once, which needs such a graph
        asked: Annotated[float, Meta(gt=0, le=1)] = 1.0
        undo_s: Annotated[float, Meta(ge=0)] = 5.0  # for which a judgment can be taken back before it counts
        in_flight: Annotated[int, Meta(ge=1)] = 64  # groups that wait for people at a time
        name: str = ""  # of the score; "" takes the node's name
        weight: float = 1.0  # the score is multiplied by it
        people: Annotated[int, Meta(ge=1)] = 1  # for `flowrl simulate`: who judge at a time
        judgment_s: Annotated[float, Meta(gt=0)] = 15.0  # for `flowrl simulate`: what each needs for one

    is_single = True
    rollouts: In[Rollouts]
    scored: Out[Scored]

    def __init__(self, config: Config, *, passes: bool = False) -> None:
        self.config: Humans.Config = config
        self.passes = passes  # groups that nobody judges go on; else they are filtered

    def check(self, say: Say) -> None:
        """Insist on a use for the groups that nobody is asked about."""
        if self.config.asked < 1 and not self.passes:
            what = f"{self.config.asked:g} leaves groups that nobody judges, and nothing takes their place"
            raise ConfigError("humans.asked", what, "leave it 1, or give offline.data.source")

    def simulated(self, costs: Costs) -> PassesOn:
        """Take people's time."""
        seconds = self.config.asked * self.config.judgment_s * self.config.raters
        return PassesOn(seconds=seconds, lanes=self.config.people)

    async def run(self, context: Context) -> None:
        """Ask people until the edge closes."""
        board = await context.compute(partial(_Board, context, self.config, passes=self.passes))
        context.notice(f"answers wait for people: flowrl feedback {context.run_dir}", level="info")
        try:
            async with asyncio.TaskGroup() as tasks:
                looking = tasks.create_task(board.look_on())
                async with asyncio.TaskGroup() as lanes:
                    for _ in range(self.config.in_flight):
                        lanes.create_task(self._lane(context, board))
                looking.cancel()
        finally:
            board.close()

    async def _lane(self, context: Context, board: _Board) -> None:
        async for group in self.rollouts:
            prompt, answers = group.columns.get("prompt", ""), [sample.text for sample in group.samples]
            places, version = range(len(answers)), group.oldest_version
            question = ask(group.group_id, prompt, answers, way=self.config.way, version=version, places=places)
            judgments, why, waited = list[Judgment](), self._why_not(question), dict[str, float]()
            if not why:
                start_s = context.now()
                judgments, how = await board.judged(question)
                args = {"judgments": len(judgments), "ended": how}
                context.span("people", start_s, groups=[group.group_id], args=args)
                waited = {f"{self._name(context)}.wait_s": context.now() - start_s}
                if how != "judged":
                    why = _why(judgments, how, self.config.deadline_s)
            if why and (judgments or not self.passes):  # whatever is flagged is not learned
                await self.rollouts.reject(group, kind="filtered", reason=why)
                continue
            worth = worths(judgments) if judgments else [0.0] * len(group.samples)
            shown = narrowed(group, question.places) if judgments else group
            scored = add_scores(shown, self._name(context), [self.config.weight * each for each in worth])
            told = {**scored.metrics, **waited, JUDGED: float(bool(judgments))}
            await self.scored.put(msgspec.structs.replace(scored, metrics=told))
            context.done += 1

    def _name(self, context: Context) -> str:
        return self.config.name or context.node

    def _why_not(self, question: Question) -> str:
        """Return why people are not asked a question; "" where they are."""
        if int(question.group * self.config.asked) == int((question.group + 1) * self.config.asked):
            return f"people are asked about {self.config.asked:g} of the groups"
        if self.config.way == "pairs" and len(set(question.answers)) < 2:
            return "all answers are the same: nothing to judge"
        return ""


def _why(judgments: list[Judgment], how: Ended, deadline_s: float) -> str:
    if how == "flagged":
        (flagged, *_) = [each for each in judgments if each.flag]
        return f"flagged by {flagged.rater}: {flagged.flag}"
    return f"not judged within {deadline_s:g} s"


class _Board:
    """The questions that wait for people, and what is known of the answers."""

    def __init__(self, context: Context, config: Humans.Config, *, passes: bool) -> None:
        self._context = context
        self._config = config
        self._ending = "went on" if passes else "were filtered"
        self._questions = RecordFile(context.run_dir / QUESTIONS, mode=PRIVATE, tell=context.notice)
        self._tail = Tail(context.run_dir / JUDGMENTS, Judgment)
        self._said = Said(self._tail.read())  # of before a restart: no longer to be taken back
        self._seen_s: dict[str, float] = {}  # when the last judgment of a question was first seen
        self._waiting: dict[str, asyncio.Future[tuple[list[Judgment], Ended]]] = {}
        self._num_unjudged = 0
        asked = Tail(context.run_dir / QUESTIONS, Question | Closed).read()
        self._ended = {each.id: each.how for each in asked if isinstance(each, Closed)}
        self._late: set[str] = set()  # judged too late, or by too few
        self._note_late(self._said.by_question)
        self._num_told = 0

    async def judged(self, question: Question) -> tuple[list[Judgment], Ended]:
        """Ask, and return what was said until it was enough, or until the deadline."""
        context, found = self._context, self._enough(question.id)
        if found is None:
            self._write(msgspec.structs.replace(question, time_s=context.now()))
            self._waiting[question.id] = asyncio.get_running_loop().create_future()
            await self._tell()
            try:
                with context.clock.charge(Cause.WAIT_INPUT):
                    found = await self._within(self._config.deadline_s, question.id)
                    if found is None and len(self._said.of(question.id)) >= self._config.raters:
                        # It was said in time, but may still be taken back.
                        found = await self._within(self._config.undo_s + 2 * LOOK_S, question.id)
            finally:
                del self._waiting[question.id]
            if found is None:
                found = [], "unjudged"
                self._count_unjudged()
            await self._tell()
        self._write(Closed(id=question.id, how=found[1], time_s=context.now()))
        self._ended[question.id] = found[1]
        self._late.discard(question.id)
        self._note_late([question.id])
        return found

    async def _within(self, limit_s: float, question: str) -> tuple[list[Judgment], Ended] | None:
        """Return what was said within so many seconds; None where it was not enough."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                return await asyncio.shield(self._waiting[question])
        return None

    async def look_on(self) -> None:
        """Look at what people said, and let those go whose questions are judged."""
        while True:
            await asyncio.sleep(LOOK_S)
            new: list[Judgment] = await self._context.background(self._tail.read)
            for judgment in new:
                self._said.add(judgment)
                self._seen_s[judgment.question] = self._context.now()
            self._note_late([judgment.question for judgment in new])
            if new and len(self._late) > 2 * self._num_told:  # 1, 3, 7, 15, ...
                self._tell_late()
            for question, future in self._waiting.items():
                found = self._enough(question)
                if found is not None and not future.done():
                    future.set_result(found)
            self._questions.flush()

    def _enough(self, question: str) -> tuple[list[Judgment], Ended] | None:
        """Return what was said about a question and how it ends; None where too little was said so far."""
        judgments = self._said.of(question)
        if self._context.now() - self._seen_s.get(question, -self._config.undo_s) < self._config.undo_s:
            return None
        if any(each.flag for each in judgments):
            return judgments, "flagged"
        return (judgments, "judged") if len(judgments) >= self._config.raters else None

    def _count_unjudged(self) -> None:
        self._num_unjudged += 1
        if self._num_unjudged & (self._num_unjudged - 1) == 0:  # 1, 2, 4, 8, ...
            groups = number_of(self._num_unjudged, "group")
            what = f"{groups} not judged within {self._config.deadline_s:g} s {self._ending}"
            self._context.notice(f"{what}; open flowrl feedback {self._context.run_dir}, or raise humans.deadline_s")

    def _note_late(self, judged: Iterable[str]) -> None:
        """Take note of those questions that training went on without, for all that was said about them."""
        self._late |= {each for each in judged if self._ended.get(each) == "unjudged" and self._said.of(each)}

    def _tell_late(self) -> None:
        self._num_told = len(self._late)
        what = f"{number_of(self._num_told, 'group')} judged too late or by too few; what was said is kept"
        remedy = f"flowrl feedback {self._context.run_dir} --export trl writes it as data for training"
        self._context.notice(f"{what}: {remedy}")

    async def _tell(self) -> None:
        count = len(self._waiting)
        text = (
            f"people, for {number_of(count, 'answer')} to judge (flowrl feedback {self._context.run_dir})"
            if count
            else ""
        )
        await self._context.note_wait(text)

    def _write(self, line: Question | Closed) -> None:
        self._questions.append(msgspec.json.encode(line) + b"\n")

    def close(self) -> None:
        """Let the files go."""
        if len(self._late) > self._num_told:
            self._tell_late()
        self._questions.close()
