"""A benchmark's questions travel as messages: each gets its own answer, and a thread that asks comes to its end."""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.messages import Buffer, Inquiry, Prompt, Rollouts, Sample, VersionSpan
from flowrl.stages.asking import LIKELIEST, Asking, Bridge
from flowrl.stages.evaluator import Evaluator
from flowrl.stages.sampler import Sampler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.graph.ports import In, Out

FIRST = 100


def answer(asked: Prompt, version: int) -> Rollouts:
    """Score the k-th token -k, or continue a text with its tokens turned round."""
    tokens = asked.token_ids.tolist()
    assert isinstance(asked, Inquiry)
    found = Sample(
        token_ids=Buffer.ints(tokens[::-1]), logprobs=Buffer.floats([-float(k) for k in range(1, len(tokens))]),
        versions=[VersionSpan(version, 0, 0)], finish="stop", text="",
        columns={LIKELIEST: Buffer.floats([float(k % 2) for k in range(1, len(tokens))])},
    )  # fmt: skip
    known = {name: getattr(asked, name) for name in Prompt.__struct_fields__}
    return Rollouts(**known, samples=[found], generator="examiner.0")


class Ends:
    """Both ends of an examiner that answers the newest question first, and one that nobody asked before."""

    def __init__(self) -> None:
        self.asked: list[Prompt] = []
        self.most = self.settled = 0
        self.stray = True
        self.came = asyncio.Event()

    async def put(self, message: Any) -> None:
        self.asked.append(message)
        self.most = max(self.most, len(self.asked))
        self.came.set()

    async def get(self, limit: int) -> list[Any]:
        while not self.asked:
            self.came.clear()
            await self.came.wait()
        await asyncio.sleep(0)
        if self.stray:
            self.stray = False
            return [answer(Inquiry(group_id=7, token_ids=Buffer.ints([1, 2]), columns={}, num_samples=1, seed=0), 9)]
        return [answer(self.asked.pop(), 3)]

    async def done(self, messages: Sequence[Any], learned_in: int | None) -> None:
        self.settled += len(messages)

    async def reject(self, message: Any, kind: str, reason: str) -> None:
        raise AssertionError


def asking(in_flight: int) -> tuple[Asking, Ends]:
    stage, ends = Evaluator(Evaluator.Config(), Sampler(model="m")), Ends()
    questions: Out[Prompt] = stage.prompts
    answers: In[Rollouts] = stage.rollouts
    questions.end, answers.end = ends, ends
    return Asking(questions, answers, first_id=FIRST, in_flight=in_flight), ends


def test_each_question_has_its_own_answer_and_no_more_are_out_than_may_be() -> None:
    async def ask() -> tuple[list[Any], Asking, Ends]:
        asked, ends = asking(in_flight=3)
        async with asyncio.TaskGroup() as tasks:
            listening = tasks.create_task(asked.listen())
            scored = [tasks.create_task(asked.score([k, 0, 0])) for k in range(5)]
            written = [tasks.create_task(asked.complete([k, 9], until=["x"], max_tokens=4)) for k in range(5)]
            found = [await each for each in [*scored, *written]]
            listening.cancel()
        return found, asked, ends

    found, asked, ends = asyncio.run(ask())
    assert found == [([-1.0, -2.0], [True, False])] * 5 + [[9, k] for k in range(5)]
    assert (asked.versions, asked.num_asked, ends.settled) == (
        {3},
        10,
        11,
    )  # the stray one's version counts for nothing
    assert ends.most <= 3


def test_a_thread_has_its_questions_answered_until_the_bridge_is_closed() -> None:
    found: list[Any] = []

    async def ask() -> None:
        asked, _ = asking(in_flight=1)
        bridge, reached = Bridge(), asyncio.Event()

        async def never() -> None:
            reached.set()
            await asyncio.Event().wait()

        def benchmark() -> None:
            found.append(bridge.run(asked.complete([1, 2], until=[])))
            try:
                bridge.run(never())
            except CancelledError:
                found.append("cut off")

        async with asyncio.TaskGroup() as tasks:
            listening = tasks.create_task(asked.listen())
            thread = tasks.create_task(asyncio.to_thread(benchmark))
            await reached.wait()
            bridge.close()
            await thread
            listening.cancel()
        with pytest.raises(InterruptedError, match="has ended"):
            bridge.run(asked.complete([1], until=[]))

    asyncio.run(ask())
    assert found == [[2, 1], "cut off"]


def test_what_begins_while_the_bridge_is_being_closed_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        bridge, begin = Bridge(), asyncio.run_coroutine_threadsafe

        def begin_late(*arguments: Any) -> Any:
            begun = begin(*arguments)
            bridge.close()  # before the thread can have put down what it runs
            return begun

        monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", begin_late)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.to_thread(bridge.run, asyncio.Event().wait())

    asyncio.run(ask())
