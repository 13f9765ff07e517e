"""What a benchmark asks about a version, as messages: questions go out on the evaluator's port, answers come back.

Invariants:
- at most `in_flight` questions are out;
- an answer says which version gave it;
- an answer that nobody waits for (of an evaluator that was started again) is settled and forgotten.

A benchmark runs in a thread, which this module lets ask on the stage's event loop until it is closed. Called by the
Evaluator.

Tests: tests/unit/stages/test_asking.py
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from flowrl.messages import Buffer, Inquiry

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from concurrent.futures import Future

    from flowrl.graph.ports import In, Out
    from flowrl.messages import Prompt, Rollouts, Sample

LIKELIEST = "likeliest"  # column of a scored sample: 1 where no other token was likelier


class Asking:
    """Puts questions to whoever is at the other end of two ports, as an engine is asked (stages/harness.py)."""

    def __init__(self, questions: Out[Prompt], answers: In[Rollouts], *, first_id: int, in_flight: int) -> None:
        self.versions: set[int] = set()  # that have answered
        self.num_asked = 0
        self._questions = questions
        self._answers = answers
        self._first_id = first_id
        self._room = asyncio.Semaphore(in_flight)
        self._waiting: dict[int, asyncio.Future[Sample]] = {}

    async def listen(self) -> None:
        """Hand answers to those who wait for them; goes on until it is cancelled."""
        while True:
            group = await self._answers.get()
            waiting = self._waiting.get(group.group_id)
            if waiting is not None and not waiting.done():
                waiting.set_result(group.samples[0])
            await self._answers.done(group)

    async def score(self, token_ids: Sequence[int]) -> tuple[list[float], list[bool]]:
        """Return, of every token after the first, its log-prob and whether no other was likelier."""
        sample = await self._ask(token_ids, is_scored=True)
        likeliest = sample.columns[LIKELIEST]
        assert isinstance(likeliest, Buffer)
        return sample.logprobs.tolist(), [each > 0 for each in likeliest.tolist()]

    async def complete(self, prompt_ids: Sequence[int], *, until: list[str], **sampling: Any) -> list[int]:
        """Return the tokens that follow."""
        return (await self._ask(prompt_ids, until=until, sampling=sampling)).token_ids.tolist()

    async def _ask(self, token_ids: Sequence[int], **asked: Any) -> Sample:
        async with self._room:
            group_id = self._first_id + self.num_asked
            self.num_asked += 1
            self._waiting[group_id] = asyncio.get_running_loop().create_future()
            try:
                await self._questions.put(
                    Inquiry(
                        group_id=group_id, token_ids=Buffer.ints(token_ids), columns={}, num_samples=1, seed=0, **asked
                    )
                )
                sample = await self._waiting[group_id]
            finally:
                del self._waiting[group_id]
        self.versions |= {span.version for span in sample.versions}
        return sample


class Bridge:
    """Lets a thread have coroutines run on the event loop that it was made on, until it is closed."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._running: Future[Any] | None = None
        self._is_closed = False

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine and return what it returns; called in the thread, which waits.

        Raises:
            InterruptedError: the bridge was closed.
        """
        if self._is_closed:
            coroutine.close()
            raise InterruptedError("the evaluation has ended")
        self._running = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        if self._is_closed:  # meanwhile, by who did not see this one run
            self._running.cancel()
        return self._running.result()

    def close(self) -> None:
        """End what runs, and let nothing more begin, so that the thread comes to its end."""
        self._is_closed = True
        if self._running is not None:
            self._running.cancel()
