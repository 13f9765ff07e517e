"""A replica's part in the turns on its devices (lease.py): it takes them when they are needed, and gives them back.

Invariants:
- a use of the devices waits for the turn and keeps it while it lasts;
- what is done without one is asleep;
- calls to the flow are made by one task beside the stage, so that a use that is cancelled leaves nothing half taken;
- who lost the lease ends with an error.

The runtimes give one to the context of each replica that takes turns.

Tests: tests/unit/runtime/test_lease.py
"""

from __future__ import annotations

import asyncio
import inspect
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from flowrl.errors import ChannelClosed
from flowrl.telemetry.events import Cause

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from flowrl.graph.stage import Compute, Context
    from flowrl.runtime.calls import FlowCalls
    from flowrl.runtime.lease import Turn
    from flowrl.telemetry.events import CauseClock

LINGER_S = 0.1  # without a use before devices are given back: longer than a message takes to the next node of the side


class Holder:
    """One replica's part in the turns; see graph.stage.Devices."""

    def __init__(self, turn: Turn, flow: FlowCalls, clock: CauseClock, compute: Compute) -> None:
        self._flow = flow
        self._host = turn.host
        self._told_every_s = turn.limit_s / 4
        self._clock = clock
        self._compute = compute
        self._engine: Any = None
        self._is_mine = False
        self._has_left = False
        self._failure: ChannelClosed | None = None
        self._num_uses = 0
        self._num_begun = 0
        self._is_wanted = asyncio.Event()
        self._news = asyncio.Event()  # of any of these

    @asynccontextmanager
    async def use(self) -> AsyncGenerator[None]:
        """Have the devices for the duration of the block; waits for the turn.

        Raises:
            ChannelClosed: the run has ended.
        """
        if not (self._is_mine or self._has_left):
            self._is_wanted.set()
            with self._clock.charge(Cause.WAIT_DEVICES):
                await self._until(lambda: self._is_mine or self._has_left or self._failure is not None)
            if self._failure is not None and not self._has_left:
                raise self._failure
        self._num_uses += 1
        self._num_begun += 1
        try:
            yield
        finally:
            self._num_uses -= 1
            self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            await self._news.wait()

    def join(self, engine: Any) -> None:
        """Have this engine sleep while others have the devices: `sleep` and `wake`, blocking or not."""
        self._engine = engine

    def leave(self) -> None:
        """Wait for no turn any more: the engine is about to be closed."""
        self._has_left = True
        self._engine = None
        self._tell()

    async def attend(self, context: Context) -> None:
        """Take the devices when they are needed and give them back when others wait; runs beside the stage.

        Raises:
            RunError: the lease was lost.
        """
        try:
            while True:
                await self._is_wanted.wait()
                with self._clock.charge(Cause.WAIT_DEVICES):
                    turn = await self._flow.take(self._host)
                    await self._move(context, "wake")
                self._is_mine = True
                self._is_wanted.clear()
                self._tell()
                await self._flow.recalled(self._host, turn)
                await self._run_dry(turn)
                self._is_mine = False
                with self._clock.charge(Cause.WAIT_DEVICES):
                    await self._move(context, "sleep")
                await self._flow.hand_over(self._host, turn)
        except ChannelClosed as closed:
            self._failure = closed
            self._tell()

    async def _move(self, context: Context, name: str) -> None:
        """Have the engine go to sleep, or wake."""
        if self._engine is None:
            return
        start_s, method = context.now(), getattr(self._engine, name)
        if inspect.iscoroutinefunction(method):
            await method()
        else:
            await self._compute(method)
        context.span(name, start_s)

    async def _run_dry(self, turn: int) -> None:
        """Wait until nothing here has used the devices for `LINGER_S`; now and then it is told that a use has ended."""
        told_s = asyncio.get_running_loop().time()
        while True:
            if self._num_uses:
                ended = self._num_begun - self._num_uses
                await self._until(lambda: self._num_begun - self._num_uses > ended)  # noqa: B023  # at once
                if asyncio.get_running_loop().time() - told_s >= self._told_every_s:
                    told_s = asyncio.get_running_loop().time()
                    await self._flow.getting_on(self._host, turn)
                continue
            begun = self._num_begun
            await asyncio.sleep(LINGER_S)
            if self._num_begun == begun:
                return
