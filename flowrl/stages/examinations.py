"""Evaluations beside training: a version stays with a generator of its own while the learner goes on to the next.

Invariants:
- one version is examined at a time;
- the examiner is sent another only when the last prompt of that one has been scored;
- what it was sent is kept until it has taken the next in, so that one which is started again finds it;
- nothing of the learner ever waits here.

Where versions come faster than they are examined, the newest is next and those in between are left out, which is said.
Called by the Learner.

Tests: tests/unit/stages/test_examinations.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowrl.messages import EvaluationRequest, PinnedWeights, extend

if TYPE_CHECKING:
    import asyncio

    from flowrl.graph.ports import Out
    from flowrl.graph.stage import Context
    from flowrl.messages import Weights


class Examinations:
    """Asks for the evaluation of versions, one after the other."""

    def __init__(self, examined: Out[PinnedWeights], evaluations: Out[EvaluationRequest]) -> None:
        self._examined = examined
        self._evaluations = evaluations
        self._next: tuple[PinnedWeights, bool] | None = None
        self._going_on: asyncio.Task[None] | None = None
        self._sent: list[int] = []  # what the examiner has, and what it is taking in

    @property
    def kept(self) -> frozenset[int]:
        """Return the versions whose bytes are still to be held."""
        return frozenset(self._sent) | ({self._next[0].version} if self._next is not None else frozenset())

    def ask(self, context: Context, weights: Weights, *, is_final: bool, tasks: asyncio.TaskGroup) -> int | None:
        """Have a version examined when its turn comes; returns at once, with the version that is left out for it."""
        left_out = None
        if self._next is not None:
            left_out = self._next[0].version
            text = (
                f"version {left_out} is not evaluated: version {self._sent[-1]} still is, and {weights.version} is next"
            )
            context.notice(f"{text}; raise learner.evaluate_every, or evaluation.beside", level="info")
        self._next = extend(PinnedWeights, weights), is_final
        if self._going_on is None or self._going_on.done():
            self._going_on = tasks.create_task(self._go_on(context))
        return left_out

    async def _go_on(self, context: Context) -> None:
        while self._next is not None:
            (weights, is_final), self._next = self._next, None
            start_s = context.now()
            self._sent.append(weights.version)
            await self._examined.put(weights)
            self._sent = [weights.version]
            await self._evaluations.put(EvaluationRequest(version=weights.version, is_final=is_final))
            context.span(f"examined v{weights.version}", start_s)
