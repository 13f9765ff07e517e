"""Runs a timed graph on the virtual clock: the real stages, channels and credits, with as little around them as can be.

Every replica is a task bound straight to the flow; no gate stands between, since nothing is lost or dies in a
simulation. Messages are handed over as they are, and at most weighed: `WeighedMessage` knows how many bytes its message
would be. Invariant: the order of events follows from the graph, the profile and the seeds alone. Used by simulate.py.
"""

from __future__ import annotations

import asyncio
import functools
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from flowrl.graph.stage import Context, Ranks, from_specification
from flowrl.messages import Rollouts, buffer_fields
from flowrl.runtime.binding import Wire
from flowrl.runtime.flow import Flow, replica_name
from flowrl.runtime.ledger import Ledger
from flowrl.runtime.local import num_readers
from flowrl.runtime.replica import run_replica
from flowrl.simulation.timed import TimedTraining
from flowrl.telemetry.causes import Cause, CauseClock

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from flowrl.graph.graph import Graph
    from flowrl.graph.plan import GraphPlan
    from flowrl.messages import Message
    from flowrl.runtime.calls import FlowCalls
    from flowrl.simulation.prediction import Watch

T = TypeVar("T")

NEVER_S = 1e9  # between two statuses of a replica: nobody reads them
STALL_S = 1e7  # virtual; a simulation that stands still for so long is a defect
MESSAGE_BYTES = 120  # of a message's names and numbers
SAMPLE_BYTES = 110  # of a sample's names and numbers
COLUMN_BYTES = 15  # of a buffer's


class WeighedMessage:
    """A message on its way, with the bytes it would take."""

    __slots__ = ("message", "size_bytes")

    def __init__(self, message: Message, size_bytes: int) -> None:
        self.message = message
        self.size_bytes = size_bytes

    def __len__(self) -> int:
        return self.size_bytes


def _weighed(message: Message) -> WeighedMessage:
    return WeighedMessage(message, weight_of(message))


def _unweighed(message: Message) -> WeighedMessage:
    return WeighedMessage(message, MESSAGE_BYTES)


WEIGHED = Wire(encode=_weighed, decode=attrgetter("message"))
UNWEIGHED = Wire(encode=_unweighed, decode=attrgetter("message"))


def weight_of(message: Any) -> int:
    """Return about how many bytes a simulation's message takes on the wire; its buffers are all of full length."""
    if not isinstance(message, Rollouts):
        return MESSAGE_BYTES + len(getattr(message, "token_ids", ())) * 4
    samples = message.samples
    columns = sum(getattr(message, name) is not None for name in buffer_fields(type(message)))
    columns += len(samples[0].columns) if samples else 0
    response_bytes = sum([len(sample.token_ids.data) for sample in samples])
    each = SAMPLE_BYTES + COLUMN_BYTES * columns
    return MESSAGE_BYTES + len(message.token_ids.data) + len(samples) * each + (2 + columns) * response_bytes


class NoCauses(CauseClock):
    """A clock that nobody will ask for the causes of a replica's time."""

    def mark(self, cause: Cause, change: int) -> None:
        """Note nothing."""


class DirectFlow:
    """The flow as a simulated replica reaches it: at once, but for the time a message takes to and out of a queue."""

    def __init__(self, flow: Flow, replica: str, message_s: float) -> None:
        self._flow = flow
        self._replica = replica
        self._message_s = message_s
        self._loop = asyncio.get_running_loop()

    def __getattr__(self, method: str) -> Any:
        call = self.__dict__[method] = functools.partial(getattr(self._flow, method), self._replica)
        return call

    async def put(self, *arguments: Any) -> None:
        if self._message_s > 0:
            await self._travel()
        await self._flow.put(self._replica, *arguments)

    async def get(self, *arguments: Any) -> Any:
        found = await self._flow.get(self._replica, *arguments)
        if self._message_s > 0:
            await self._travel()
        return found

    def _travel(self) -> asyncio.Future[None]:
        """Return what is done when a message has arrived."""
        arrived: asyncio.Future[None] = self._loop.create_future()
        self._loop.call_later(self._message_s, _arrive, arrived)
        return arrived


def _arrive(arrived: asyncio.Future[None]) -> None:
    if not arrived.done():
        arrived.set_result(None)


async def run_timed(
    graph: Graph,
    plan: GraphPlan,
    watch: Watch,
    *,
    message_s: float = 0.0,
    look_s: float | None = None,
    status_s: float = NEVER_S,
    connect: Callable[[Flow, str, float], DirectFlow] = DirectFlow,
    is_bare: bool = False,
) -> None:
    """Run until the watch has seen enough; it looks at the queues every `look_s` seconds.

    With `is_bare` messages are not weighed and no causes of time are noted.
    `graph` is what `plan` builds; a replica records its status every `status_s`, and reaches the flow by what `connect`
    makes of the flow, its name and `message_s`. Raises what a stage raises.
    """
    flow = Flow(graph, Ledger(None))
    stopping = asyncio.Event()
    tasks: list[asyncio.Future[None]] = [asyncio.ensure_future(_watched(flow.watch(STALL_S), watch))]
    if look_s is not None:
        tasks.append(asyncio.ensure_future(_look(flow, watch, look_s)))
    for node, stage in graph.nodes.items():
        kinds = {f"{node}.{name}": flow.kind(f"{node}.{name}") for name in stage.ports}
        readers = num_readers(graph, node)
        for index in range(stage.config.replicas):
            own = stage if index == 0 else from_specification(plan.nodes[node], node)
            client = connect(flow, replica_name(node, index), message_s)
            clock = (NoCauses if is_bare else CauseClock)(asyncio.get_running_loop().time)
            if not is_bare:
                watch.clocks[node, index] = clock
            context = _context(node, index, client, watch, stopping, readers, clock)
            body = run_replica(
                own, context, cast("FlowCalls", client), kinds=kinds, status_interval_s=status_s,
                wire=UNWEIGHED if is_bare else WEIGHED,
            )  # fmt: skip
            tasks.append(asyncio.ensure_future(_watched(body, watch)))
    try:
        await watch.ended
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _watched(body: Coroutine[Any, Any, None], watch: Watch) -> None:
    """Let what goes wrong in one task end the run."""
    try:
        await body
    except Exception as error:
        watch.fail(error)


async def _look(flow: Flow, watch: Watch, interval_s: float) -> None:
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(interval_s)
        watch.look(flow.edge_status(loop.time()))


def _context(node: str, replica: int, client: DirectFlow, watch: Watch, stopping: asyncio.Event, readers: int,
             clock: CauseClock) -> Context:  # fmt: skip
    now = asyncio.get_running_loop().time

    async def compute(function: Callable[..., T], *arguments: Any) -> T:
        """Run in place and let the engine's work be done, which takes longer where the device is shared."""
        with clock.charge(Cause.COMPUTE):
            result = function(*arguments)
            engine = getattr(function, "__self__", None)
            if isinstance(engine, TimedTraining):
                await engine.device.take(engine.last_work_s, engine.width)
            return result

    async def background(function: Callable[..., T], *arguments: Any) -> T:
        """Run in place and let the engine's time pass beside its work."""
        result = function(*arguments)
        engine = getattr(function, "__self__", None)
        if isinstance(engine, TimedTraining) and engine.last_work_s > 0:
            await asyncio.sleep(engine.last_work_s)
        return result

    async def cut(version: int) -> bytes:
        raise AssertionError(f"a simulation writes no checkpoint, not of version {version} either")

    return Context(
        node=node,
        replica=replica,
        ranks=Ranks(),
        run_dir=Path(),
        clock=clock,
        recorder=watch,
        stopping=stopping,
        compute=compute,
        background=background,
        cut=cut,
        fewer_out=client.fewer_out,
        note_wait=client.note_wait,
        num_readers=readers,
        now=now,
    )
