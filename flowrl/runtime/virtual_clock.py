"""An event loop on a virtual clock: when nothing is ready, time jumps to the next timer.

Hours of waiting take milliseconds and the order of events depends only on the program and its seeds. When nothing is
ready and no timer is set, no event can ever come: that is a deadlock, and it is raised instead of waited for.
Simulation and the concurrency tests run on it; nothing on it may use threads, sockets or real time.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING, Any, TypeVar

from flowrl.errors import StallError

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")


class _JumpingSelector(selectors.SelectSelector):
    """Instead of sleeping until a timer is due, move the clock there."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise StallError("virtual clock", "nothing is ready and no timer is set: every task waits for another")
        self.now_s += max(timeout, 0.0)
        return []


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An asyncio loop whose `time()` is virtual seconds since it was made."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Return virtual seconds."""
        return self._jumping.now_s


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on a fresh virtual clock, like asyncio.run."""
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(main)
