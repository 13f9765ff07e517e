"""Episodes of an environment, played in worker processes or in this one.

    async with IsolatedEnvironments(playing, ...) as environments:
        async with environments.episode("group 7, sample 0") as episode:
            observed = await episode.reset(task, seed)
            observed = await episode.step("42")

A worker process holds many episodes and carries out one call at a time, so `num_workers` is how many calls run at once.

Invariants:
- a call returns what the environment said or raises RewardError in its time limit;
- whose call ended the process is named, and the other episodes that were in it raise `Lost`, which is not their fault;
- an episode that is left before its environment ended it is closed there.

Called by the agent stage.

Tests: tests/contracts/test_environment_workers.py
"""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, Self

from flowrl.errors import RewardError
from flowrl.rewards.environments import Close, Environments, Observed, Request, Reset, StepRequest
from flowrl.rewards.function import in_thread, overdue
from flowrl.rewards.isolated import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path
    from types import TracebackType

    from flowrl.rewards.worker import Playing

    Ask = Callable[[Request], Awaitable[Observed]]


class Lost(RewardError):
    """The episode's process ended for another episode's sake."""


class Episode:
    """One episode, from its reset to its end."""

    def __init__(self, number: int, name: str, ask: Ask) -> None:
        self._number = number
        self._name = name
        self._ask = ask
        self._is_open = False

    async def reset(self, task: dict[str, Any], seed: int) -> Observed:
        """Begin; returns the first observation.

        Raises:
            RewardError: the environment raised, took too long, or its process died.
        """
        return await self._tell(Reset(episode=self._number, name=self._name, task=task, seed=seed))

    async def step(self, action: str) -> Observed:
        """Act; returns what comes of it.

        Raises:
            RewardError: as for `reset`.
            Lost: the process has ended since the last call.
        """
        return await self._tell(StepRequest(episode=self._number, action=action))

    async def close(self) -> None:
        """End the episode if it has not ended; what the environment says to that no longer matters."""
        if self._is_open:
            with contextlib.suppress(RewardError):
                await self._tell(Close(episode=self._number))
            self._is_open = False

    async def _tell(self, request: Request) -> Observed:
        self._is_open = False
        observed = await self._ask(request)
        self._is_open = not observed.done
        return observed


class _Seat:
    """A worker and the episodes that are played in it."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.num_playing = 0
        self._turn = asyncio.Lock()

    def asking(self, name: str) -> Ask:
        """Return how one episode asks: always the process in which it began."""
        born = 0

        async def ask(request: Request) -> Observed:
            nonlocal born
            async with self._turn:
                if isinstance(request, Reset):
                    answer = await self.worker.ask(request, name, Observed)
                    born = self.worker.num_starts
                    return answer
                if not self.worker.is_running or self.worker.num_starts != born:
                    raise Lost(name, "its process was ended by another episode", "it is played again")
                return await self.worker.ask(request, name, Observed)

        return ask


class IsolatedEnvironments:
    """An environment class behind worker processes."""

    def __init__(self, playing: Playing, *, log: Path, num_workers: int, start_timeout_s: float) -> None:
        self._seats = [_Seat(Worker(playing, start_timeout_s, log)) for _ in range(num_workers)]
        self._numbers = count()

    async def __aenter__(self) -> Self:
        """Start the first worker.

        Raises:
            ConfigError: the environment does not load.
            RewardError: the worker died or took too long while it loaded.
        """
        await self._seats[0].worker.start()  # what fails to start leaves no process
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every worker."""
        async with asyncio.TaskGroup() as tasks:
            for seat in self._seats:
                tasks.create_task(seat.worker.stop() if kind is None else seat.worker.end())

    @asynccontextmanager
    async def episode(self, name: str) -> AsyncIterator[Episode]:
        """Play one episode, in the process that has the fewest."""
        seat = min(self._seats, key=lambda each: each.num_playing)
        seat.num_playing += 1
        try:
            async with _closing(Episode(next(self._numbers), name, seat.asking(name))) as episode:
                yield episode
        finally:
            seat.num_playing -= 1


class LocalEnvironments:
    """An environment class in this process: async methods on its event loop, plain ones in threads of their own."""

    def __init__(self, playing: Playing) -> None:
        self._timeout_s = playing.timeout_s
        self._environments = Environments(playing.environment, playing.where, options=playing.options, run=in_thread)
        self._where = f"{playing.where} ({playing.environment})"
        self._numbers = count()

    async def __aenter__(self) -> Self:
        """Nothing to start."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing to end."""

    @asynccontextmanager
    async def episode(self, name: str) -> AsyncIterator[Episode]:
        """Play one episode."""

        async def ask(request: Request) -> Observed:
            try:
                async with asyncio.timeout(self._timeout_s) as deadline:
                    return await self._environments.answer(request)
            except (RewardError, TimeoutError) as error:
                if deadline.expired():
                    raise overdue(f"{self._where}, {name}", self._timeout_s) from error
                raise

        async with _closing(Episode(next(self._numbers), name, ask)) as episode:
            yield episode


@asynccontextmanager
async def _closing(episode: Episode) -> AsyncIterator[Episode]:
    try:
        yield episode
    except RewardError:
        await episode.close()
        raise
    await episode.close()
