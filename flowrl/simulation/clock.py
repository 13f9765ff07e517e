"""An event loop on a virtual clock: when nothing is ready, time jumps to the next timer.

Hours of waiting take milliseconds and the order of events depends only on the program and its seeds. What is ready runs
first come, first served, and timers of one moment ring in the order in which they were set. When nothing is ready and
no timer is set, no event can ever come: that is a deadlock, and it is raised instead of waited for. Simulation and the
concurrency tests run on it; nothing on it may use threads, sockets or real time.

It leaves out what an asyncio loop does for the outside world (a selector call in every round, handles that remember
where they were made). A search through settings spends most of its time here.

Tests: tests/unit/simulation/test_timed.py
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import heapq
import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from flowrl.errors import StallError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

T = TypeVar("T")

RESOLUTION_S = 1e-9  # timers no further apart ring in one round


class Scheduled(asyncio.TimerHandle):
    """Something to be called, soon or at a time."""

    __slots__ = ("arguments", "at_s", "callback", "context", "is_cancelled")

    def __init__(
        self,
        callback: Callable[..., object],
        arguments: tuple[Any, ...],
        context: contextvars.Context | None,
        at_s: float,
    ) -> None:
        self.callback = callback
        self.arguments = arguments
        self.context = contextvars.copy_context() if context is None else context
        self.at_s = at_s
        self.is_cancelled = False

    def __repr__(self) -> str:
        return f"<Scheduled of {self.callback!r} at {self.at_s:g} s>"

    def when(self) -> float:
        """Return the virtual time at which it is due."""
        return self.at_s

    def cancel(self) -> None:
        """Let it not be called."""
        self.is_cancelled = True
        self.arguments = ()

    def cancelled(self) -> bool:
        """Return whether it will not be called."""
        return self.is_cancelled


class VirtualClockLoop(asyncio.BaseEventLoop):
    """An asyncio loop whose `time()` is virtual seconds since it was made.

    It raises a TimeoutError once it has run for `within_s` real seconds.
    """

    def __init__(self, within_s: float = math.inf) -> None:
        super().__init__()
        self._deadline = time.monotonic() + within_s
        self._now_s = 0.0
        self._soon: deque[Scheduled] = deque()
        self._timers: list[tuple[float, int, Scheduled]] = []
        self._count = 0
        self._is_stopping = False

    def time(self) -> float:
        """Return virtual seconds."""
        return self._now_s

    def call_soon(  # type: ignore[override]  # ours are not told what types the arguments have
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """Call after everything that is ready now."""
        call = Scheduled(callback, args, context, self._now_s)
        self._soon.append(call)
        return call

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """Call at a virtual time."""
        call = Scheduled(callback, args, context, when)
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, call))
        return call

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """Call after so many virtual seconds."""
        when = self._now_s + delay
        call = Scheduled(callback, args, context, when)
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, call))
        return call

    def create_task(  # type: ignore[override]
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: object = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[T]:
        """Run a coroutine as a task."""
        return asyncio.Task(coro, loop=self, name=None if name is None else str(name), context=context)

    def stop(self) -> None:
        """Return from `run_forever` after the round that is going on."""
        self._is_stopping = True
        super().stop()

    def _run_once(self) -> None:
        """Run rounds until the loop is stopped: what is ready, then the timers of the next moment.

        `run_forever` calls it, and looks whether the loop was stopped only after it returns.
        """
        soon, timers = self._soon, self._timers
        while True:
            if time.monotonic() > self._deadline:
                self._deadline = math.inf  # what is left is to be cancelled on this loop
                raise TimeoutError
            if not soon:
                self._jump()
            due_s = self._now_s + RESOLUTION_S
            while timers and timers[0][0] <= due_s:  # the two are equal where the clock is past a year
                call = heapq.heappop(timers)[2]
                if not call.is_cancelled:
                    soon.append(call)
            for _ in range(len(soon)):
                call = soon.popleft()
                if call.is_cancelled:
                    continue
                try:
                    call.context.run(call.callback, *call.arguments)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    self.call_exception_handler({"message": f"{call!r} failed", "exception": error, "handle": call})
            if self._is_stopping:
                self._is_stopping = False
                return

    def _jump(self) -> None:
        """Move the clock to the next timer.

        Raises:
            StallError: there is none.
        """
        timers = self._timers
        while timers and timers[0][2].is_cancelled:
            heapq.heappop(timers)
        if timers:
            self._now_s = max(self._now_s, timers[0][0])
        elif not self._is_stopping:
            raise StallError("virtual clock", "nothing is ready and no timer is set: every task waits for another")

    def _write_to_self(self) -> None:
        """Do nothing: the loop never sleeps, so nothing need wake it."""


def run_virtual(main: Coroutine[Any, Any, T], *, within_s: float = math.inf) -> T:
    """Run a coroutine to its end on a fresh virtual clock, like asyncio.run.

    Raises:
        TimeoutError: it has not come to its end within so many real seconds.
    """
    with asyncio.Runner(loop_factory=functools.partial(VirtualClockLoop, within_s)) as runner:
        return runner.run(main)
