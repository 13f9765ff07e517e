"""Run one replica of a stage: bind it, run it, report its state, turn whatever it raises into our errors.

The body is the same in every runtime; only where it runs differs. A stage that ends because its edges were closed has
ended well. Blocking work goes to one worker thread (`Threads`) or, under the virtual clock, runs in place and
then takes the time the fake engine says it took (`VirtualThreads`).

An `EdgeEnd` is a port's, whether the flow is in this process or at the other end of a wire. It translates between
messages and (key, bytes) and charges every wait to the replica's clock: waiting for a message or a newer value is
waiting for input; waiting for room, or for a credit to admit a group, is waiting for room. How long a published value
takes to be acknowledged is charged by the stage that published it, if it waits for that at all.

Tests: tests/unit/runtime/test_laws.py
"""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from flowrl.errors import ChannelClosed, FlowrlError, LastingError, StageError
from flowrl.graph.ports import In, Out
from flowrl.messages import Credit, Message, decode, encode, replays_of
from flowrl.telemetry.events import Cause, CauseClock, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from flowrl.graph.stage import Context, Stage
    from flowrl.runtime.calls import FlowCalls


class Wire(NamedTuple):
    """How a message becomes what a queue or a register holds, and comes out again."""

    encode: Callable[[Any], Any]  # what it returns has a length: its bytes
    decode: Callable[[Any], Any]


WIRE = Wire(encode, decode)


class EdgeEnd:
    """One end of an edge, as one replica sees it."""

    def __init__(self, flow: FlowCalls, address: str, clock: CauseClock, wire: Wire = WIRE) -> None:
        self.flow = flow
        self.address = address
        self.clock = clock
        self.wire = wire


class QueueSend(EdgeEnd):
    async def put(self, message: Any) -> None:
        body = self.wire.encode(message)
        with self.clock.charge(Cause.WAIT_ROOM):
            await self.flow.put(self.address, message.group_id, body)


class QueueReceive(EdgeEnd):
    async def get(self, limit: int) -> list[Message]:
        with self.clock.charge(Cause.WAIT_INPUT):
            bodies = await self.flow.get(self.address, limit)
        return [self.wire.decode(body) for body in bodies]

    async def done(self, messages: Sequence[Any], learned_in: int | None) -> None:
        keys = [message.group_id for message in messages]
        if learned_in is None:
            await self.flow.done(self.address, keys, None, [], [])
            return
        oldest = [message.oldest_version for message in messages]
        replays = [[(each.group_id, each.oldest_version) for each in replays_of(message)] for message in messages]
        await self.flow.done(self.address, keys, learned_in, oldest, replays if any(replays) else [])

    async def reject(self, message: Any, kind: str, reason: str) -> None:
        await self.flow.reject(self.address, message.group_id, kind, reason)


class RegisterSend(EdgeEnd):
    async def put(self, message: Any) -> None:
        await self.flow.publish(self.address, message.version, self.wire.encode(message))


class RegisterReceive(EdgeEnd):
    """Reads a register; `done` acknowledges the version to the writer."""

    newest = -1

    async def get(self, limit: int) -> list[Message]:
        with self.clock.charge(Cause.WAIT_INPUT):
            self.newest, body = await self.flow.read(self.address, self.newest)
        return [self.wire.decode(body)]

    async def done(self, messages: Sequence[Any], learned_in: int | None) -> None:
        for message in messages:
            await self.flow.confirm(self.address, message.version)

    async def reject(self, message: Any, kind: str, reason: str) -> None:
        raise NotImplementedError("a register's value cannot be rejected")


class CreditsSend(EdgeEnd):
    async def put(self, message: Any) -> None:
        await self.flow.give_back(self.address, encode(message))


class CreditsReceive(EdgeEnd):
    async def get(self, limit: int) -> list[Message]:
        with self.clock.charge(Cause.WAIT_ROOM):
            group_id = await self.flow.acquire(self.address)
        return [Credit(groups=[group_id])]

    async def done(self, messages: Sequence[Any], learned_in: int | None) -> None:
        """Nothing to settle: a credit is tied to its group when the group is put."""

    async def reject(self, message: Any, kind: str, reason: str) -> None:
        raise NotImplementedError("a credit cannot be rejected; reject the group")


SENDS: dict[str, type[Any]] = {"queue": QueueSend, "latest": RegisterSend, "credits": CreditsSend}
RECEIVES: dict[str, type[Any]] = {"queue": QueueReceive, "latest": RegisterReceive, "credits": CreditsReceive}


def bind(
    stage: Stage, node: str, *, kinds: Mapping[str, str], flow: FlowCalls, clock: CauseClock, wire: Wire = WIRE
) -> None:
    """Give every connected port its end; `kinds` says by address what kind of edge it is on."""
    for name, port in stage.ports.items():
        kind = kinds.get(f"{node}.{name}", "")
        if not kind:
            continue
        if isinstance(port, Out):
            port.end = SENDS[kind](flow, f"{node}.{name}", clock, wire)
        elif isinstance(port, In):
            port.end = RECEIVES[kind](flow, f"{node}.{name}", clock, wire)


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
            await _in_turns(_lead(stage, context) if context.ranks.rank == 0 else stage.follow(context), context)
    except BaseExceptionGroup as group:
        _closed, other = group.split(ChannelClosed)
        if other is not None:
            raise _ours(_first(other), context.where) from group
    except Exception as error:
        raise _ours(error, context.where) from error
    finally:
        ticker.cancel()
        _record_status(context)


async def _in_turns(body: Coroutine[Any, Any, None], context: Context) -> None:
    """Run a stage, and beside it what takes its devices and gives them back, where it has them in turns."""
    if context.devices is None:
        await body
        return
    async with asyncio.TaskGroup() as tasks:
        attending = tasks.create_task(context.devices.attend(context))
        await body
        attending.cancel()


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
            part = Path(save.directory) / context.node
            await context.compute(stage.save, part, save.version)
            if not await context.compute(_holds_a_file, part):
                what = f"{type(stage).__name__}.save wrote nothing of version {save.version}"
                raise LastingError(context.where, what, f"write what the stage goes on from into {part.name}/")
        await stage.saves.done(save)


def _holds_a_file(directory: Path) -> bool:
    return bool([path for path in directory.rglob("*") if path.is_file()])


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
            filled_s=context.slots.filled_s() if context.slots else None,
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
