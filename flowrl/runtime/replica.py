"""Run one replica of a stage: bind it, run it, report its state, turn whatever it raises into our errors.

The body is the same in every runtime; only where it runs differs. A stage that ends because its edges were closed has
ended well. Blocking work goes to one worker thread (`Threads`) or, under the virtual clock, runs in place and
then takes the time the fake engine says it took (`VirtualThreads`).
"""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from flowrl.errors import ChannelClosed, FlowrlError, StageError
from flowrl.runtime.binding import WIRE, Wire, bind
from flowrl.telemetry.causes import Cause, CauseClock
from flowrl.telemetry.events import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flowrl.graph.stage import Context, Stage
    from flowrl.runtime.calls import FlowCalls

T = TypeVar("T")


class Threads:
    """Blocking code in threads: `compute` in one of its own, which engines with thread-bound state rely on."""

    def __init__(self, clock: CauseClock, name: str) -> None:
        self._clock = clock
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._background = ThreadPoolExecutor(max_workers=2, thread_name_prefix=f"{name}-background")

    async def compute(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run in the worker thread, one call after the other, charged as computing."""
        with self._clock.charge(Cause.COMPUTE):
            return await asyncio.get_running_loop().run_in_executor(self._compute, function, *arguments)

    async def background(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run beside the worker thread, not charged."""
        return await asyncio.get_running_loop().run_in_executor(self._background, function, *arguments)

    def close(self) -> None:
        """Let the threads end; waits for what they are doing."""
        self._compute.shutdown(wait=True, cancel_futures=True)
        self._background.shutdown(wait=True, cancel_futures=True)


class VirtualThreads:
    """Fake engines' code, run in place; then the virtual time passes that the engine claims to have taken."""

    def __init__(self, clock: CauseClock) -> None:
        self._clock = clock

    async def compute(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run in place and take the engine's time, charged as computing."""
        with self._clock.charge(Cause.COMPUTE):
            return await self.background(function, *arguments)

    async def background(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run in place and take the engine's time."""
        result = function(*arguments)
        engine = getattr(function, "__self__", None)
        await asyncio.sleep(getattr(engine, "last_duration_s", 0.0))
        return result

    def close(self) -> None:
        """Nothing to release."""


async def run_replica(
    stage: Stage,
    context: Context,
    flow: FlowCalls,
    *,
    kinds: Mapping[str, str],
    status_interval_s: float,
    wire: Wire = WIRE,
) -> None:
    """Run a stage to its end.

    Raises:
        FlowrlError: as the stage raised it, or a StageError around anything else.
    """
    bind(stage, context.node, kinds=kinds, flow=flow, clock=context.clock, wire=wire)
    ticker = asyncio.ensure_future(_report_status(context, status_interval_s))
    try:
        with contextlib.suppress(ChannelClosed):
            await (_lead(stage, context) if context.ranks.rank == 0 else stage.follow(context))
    except BaseExceptionGroup as group:
        _closed, other = group.split(ChannelClosed)
        if other is not None:
            raise _ours(_first(other), context.where) from group
    except Exception as error:
        raise _ours(error, context.where) from error
    finally:
        ticker.cancel()
        _record_status(context)


async def _lead(stage: Stage, context: Context) -> None:
    """Run a stage, and have it save its state with each checkpoint, where it has one."""
    if not (stage.is_stateful and stage.saves.is_connected):
        await stage.run(context)
        return
    async with asyncio.TaskGroup() as tasks:
        saving = tasks.create_task(_save_when_asked(stage, context))
        await stage.run(context)
        saving.cancel()


async def _save_when_asked(stage: Stage, context: Context) -> None:
    async for save in stage.saves:
        async with context.between_steps(save.version):
            await context.compute(stage.save, Path(save.directory) / context.node, save.version)
        await stage.saves.done(save)


async def _report_status(context: Context, interval_s: float) -> None:
    while True:
        _record_status(context)
        await asyncio.sleep(interval_s)


def _record_status(context: Context) -> None:
    context.recorder.record(
        Status(
            node=context.node,
            replica=context.replica,
            time_s=context.now(),
            cause=context.clock.cause.value,
            seconds=context.clock.seconds(),
            occupied_s=context.clock.occupied_s(),
            done=context.done,
            running=context.running,
            version=context.version,
        )
    )


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    first: BaseException = group.exceptions[0]
    return _first(cast("BaseExceptionGroup[Any]", first)) if isinstance(first, BaseExceptionGroup) else first


def _ours(error: BaseException, where: str) -> BaseException:
    if isinstance(error, FlowrlError) or not isinstance(error, Exception):
        return error
    return StageError(where, f"{type(error).__name__}: {error}", "see its log in the run's logs directory")
