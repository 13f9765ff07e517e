"""How far a judge agrees with people: asked about preferences that somebody labelled, before a run believes it.

Every pair is judged as in a graph, in whichever way the rubric says, by a server or by a model that runs here; a pair
whose two answers score alike counts half.

Invariants:
- which answer people preferred does not show in how the judge is asked;
- what it cannot judge is counted, and counts neither for nor against it.

Called by `flowrl judge`.

Tests: tests/contracts/test_judges.py
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated

from flowrl.config import Config, Meta, resolve
from flowrl.data.examples import ExampleData, read_source
from flowrl.data.formats import detect, normalise
from flowrl.errors import ConfigError, DataError, LastingError, RewardError, number_of
from flowrl.rewards.chat import ChatServer, chatting
from flowrl.rewards.http import Unreachable
from flowrl.rewards.judging import Asked, Judgement, Rubric
from flowrl.stages.judge import ModelJudge, model_voice, text_of
from flowrl.telemetry.intervals import mean_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flowrl.data.formats import NormalRow

SHOWN = 3  # pairs on which judge and people part
SHOWN_CHARS = 160


class JudgeSettings(Config):
    """What `flowrl judge --set` takes; names are those of a judge's node."""

    server: ChatServer = ChatServer()
    model_judge: ModelJudge.Config = ModelJudge.Config()  # a model here in place of the server; model="": none
    rubric: Rubric = Rubric(way="pairs")
    data: ExampleData = ExampleData()
    most: Annotated[int, Meta(ge=0)] = 200  # pairs, drawn from all by data.seed; 0: all
    in_flight: Annotated[int, Meta(ge=1)] = 8  # pairs judged at a time


def judge_preferences(source: str, overrides: Sequence[str], say: Callable[[str], None]) -> None:
    """Ask the judge about every pair, and say how often it agrees.

    Raises:
        ConfigError: a setting is unknown, or the server's or the model's are wrong.
        DataError: these are no preferences.
        Unreachable: the server does not answer.
    """
    settings = resolve(JudgeSettings, overrides=[f"data.source={source}", *overrides])
    pairs = _pairs(settings)
    who = settings.model_judge.model or settings.server.model or "nobody"
    if settings.model_judge.model:
        if settings.model_judge.rubric != Rubric():
            raise ConfigError("model_judge.rubric", "is not what is asked by here", "set rubric")
        ModelJudge(settings.model_judge).check(say)
    say(f"{number_of(len(pairs), 'pair')}, judged by {who} ({settings.rubric.way})")
    asyncio.run(_judged(settings, pairs, say))


def _pairs(settings: JudgeSettings) -> list[NormalRow]:
    def bad(error: DataError) -> None:
        raise error

    (origin,) = settings.data.sources
    rows: list[NormalRow] = []
    format = None
    for raw in read_source(settings.data, origin, bad):
        format = format or detect(raw, origin.format)
        if format.kind != "preference":
            what = f"is {format}: nobody said which of two answers is better"
            raise DataError(raw.place, what, "give rows with prompt, chosen and rejected")
        rows.append(normalise(raw, format, origin.format))
    if not rows:
        raise DataError(origin.source, "holds no rows", "give preferences")
    random.Random(settings.data.seed).shuffle(rows)
    return rows[: settings.most or None]


async def _judged(settings: JudgeSettings, pairs: list[NormalRow], say: Callable[[str], None]) -> None:
    agreed: list[float] = []
    parted: list[str] = []
    refused: list[str] = []
    spent: set[str] = set()
    waiting = iter(enumerate(pairs))

    async def lane(judgement: Judgement) -> None:
        for number, row in waiting:
            turned = random.Random(number).random() < 0.5
            answers = [text_of(each) for each in row.responses]
            asked = Asked(text_of(row.asked), answers[::-1] if turned else answers)
            try:
                scores = await judgement(asked)
            except Unreachable:
                raise
            except RewardError as error:
                refused.append(error.what)
                continue
            except LastingError as error:  # what was judged counts
                spent.add(str(error))
                return
            chosen, rejected = reversed(scores) if turned else scores
            agreed.append(0.5 if chosen == rejected else float(chosen > rejected))
            if chosen < rejected:
                parted.append(
                    f"{row.place}: the judge prefers {answers[1][:SHOWN_CHARS]!r} to {answers[0][:SHOWN_CHARS]!r}"
                )
            if (done := len(agreed) + len(refused)) % 50 == 0:
                say(f"{done} of {len(pairs)} pairs")

    async with AsyncExitStack() as stack:
        chat, weigh = None, None
        if settings.model_judge.model:
            voice = await stack.enter_async_context(model_voice(settings.model_judge, "judge"))
            weigh = voice.weigh if settings.model_judge.verdict == "expected" else None
        else:
            voice = chat = await stack.enter_async_context(chatting(settings.server, "judge", now=time.monotonic))
        judgement = Judgement(voice, settings.rubric, "judge", weigh=weigh)
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(settings.in_flight):
                    tasks.create_task(lane(judgement))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        for line in [*spent, *_outcome(agreed, parted, refused)]:
            say(line)
        say(judgement.tally.said())
        if chat is not None:
            say(f"the judge: {chat.said()}")


def _outcome(agreed: list[float], parted: list[str], refused: list[str]) -> list[str]:
    lines = (
        [f"{number_of(len(refused), 'pair')} could not be judged, the first because {refused[0]}"] if refused else []
    )
    if not agreed:
        because = f"the first because {refused[0]}" if refused else "see the judge's limits"
        raise RewardError("judge", "could not judge any pair", because)
    mean = mean_interval(agreed)
    ties = sum(each == 0.5 for each in agreed)
    low, high = max(0.0, mean.low), min(1.0, mean.high)
    share = f"{mean.mean:.1%} of {number_of(len(agreed), 'pair')} [{low:.1%}, {high:.1%}]"
    lines.append(f"agrees with the labels in {share}; {number_of(ties, 'tie')} count half")
    return lines + parted[:SHOWN]
