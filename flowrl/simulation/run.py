"""Simulation: the same graph on the virtual clock, with engines that only take the time a profile says.

The stages, edges and credits are those of a real run, on the real channels (stand_ins.py exchanges what takes time or
belongs to the user; fake.py takes the time; prediction.py sees what comes of it). Every replica is a task bound
straight to the flow, since nothing is lost or dies here, and messages are handed over as they are, at most weighed.

Invariants:
- the order of events follows from the graph, the profile and the seeds alone, so the same request gives the same
  prediction;
- whatever the graph, a prediction ends within its seconds of real time;
- `flowrl simulate` prints one;
- tuning/ searches with many.

Tests: tests/unit/simulation/test_run.py
"""

from __future__ import annotations

import asyncio
import functools
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from flowrl.engines.base import Serving
from flowrl.errors import RunError, number_of
from flowrl.graph.edges import Credits
from flowrl.graph.program import graph_of
from flowrl.graph.stage import Context, Ranks, from_specification
from flowrl.graph.staleness import staleness_bound
from flowrl.messages import Rollouts, buffer_fields
from flowrl.runtime.flow import Flow, replica_name
from flowrl.runtime.holder import Holder
from flowrl.runtime.lease import turn_of
from flowrl.runtime.ledger import Ledger
from flowrl.runtime.local import num_readers
from flowrl.runtime.replica import Wire, run_replica
from flowrl.simulation.clock import run_virtual
from flowrl.simulation.costs import PARALLEL, CallCost, NodeProfile, Profile
from flowrl.simulation.fake import CURRENT, FakeTraining, SimulationState
from flowrl.simulation.prediction import Prediction, Watch
from flowrl.simulation.stand_ins import left_out, timed_plan, with_costs_of
from flowrl.telemetry.events import Cause, CauseClock

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from flowrl.graph.graph import Graph
    from flowrl.graph.program import GraphPlan
    from flowrl.messages import Message
    from flowrl.runtime.calls import FlowCalls
    from flowrl.runtime.lease import Turn

T = TypeVar("T")
Detail = Literal["speed", "causes", "queues"]

MEASURED_STEPS = 12  # enough that one slow group is a few percent of them
LOOKS_A_STEP = 8  # at every queue's fill
WITHIN_S = 120.0  # of real time for a prediction that was asked for; one of a large graph takes seconds
NEVER_S = 1e9  # between two statuses of a replica: nobody reads them
STALL_S = 1e7  # virtual; a simulation that stands still for so long is a defect
MESSAGE_BYTES = 120  # of a message's names and numbers
SAMPLE_BYTES = 110  # of a sample's names and numbers
COLUMN_BYTES = 15  # of a buffer's


def simulate(
    graph: Graph,
    profile: Profile,
    *,
    steps: int = MEASURED_STEPS,
    warmup: int | None = None,
    precision: float = 0.0,
    is_whole: bool = False,
    detail: Detail = "queues",
    connect: Callable[[Flow, str, float], DirectFlow] | None = None,
    within_s: float = WITHIN_S,
    on: Graph | None = None,
) -> Prediction:
    """Predict how a graph runs under a profile's costs.

    Of a run without end, `steps` steps are measured after `warmup`, by default until the pipeline has filled; fewer
    where `precision` is given and the half-width of the mean step time's 95 % interval is down to that part of it.
    With `is_whole` the run has `steps` steps in all and is measured between the first and the last, as a run's report
    does. Then the start and the end, when nothing more is admitted, are in it. `detail` says what is looked at, and
    less of it is quicker. It is the "speed" and the staleness alone, the "causes" of each node's time with them, or the
    "queues" and their bytes besides. For the speed alone messages are not weighed, so no queue is full by its bytes.
    `connect` makes what stands between a replica and the flow; by default nothing does. `on` is a graph whose devices
    are taken in place of its own: more replicas of a node than it has then share its cores or GPUs.

    Raises:
        ConfigError: the graph cannot be simulated, or the profile lacks a node.
        RunError: it took more than `within_s` seconds of real time.
        FlowrlError: as the run itself would raise it.
    """
    before = 1 if is_whole else warmup if warmup is not None else _filling(graph)
    total = steps if is_whole else steps + before
    for node in graph.nodes:
        profile = with_costs_of(graph, node, profile)
    plan = timed_plan(graph, profile, steps=total, is_whole=is_whole)
    devices = on or graph
    state = SimulationState(
        profile,
        cores=max(profile.cores, _reserved(devices)),
        gpus={} if on is None else {node: stage.config.replicas for node, stage in on.nodes.items()},
    )
    watch = Watch(before, total, state, precision=precision)
    look_s = _look_s(graph, profile) if detail == "queues" else None
    token = CURRENT.set(state)
    try:
        run_virtual(
            run_timed(graph_of(plan), plan, watch, message_s=profile.message_s, look_s=look_s, connect=connect,
                      is_bare=detail == "speed"),
            within_s=within_s,
        )  # fmt: skip
    except TimeoutError:
        what = f"{within_s:g} s were not enough to simulate {total} steps, {watch.num_steps} of them are done"
        raise RunError("simulation", what, "ask for fewer steps or smaller groups") from None
    finally:
        CURRENT.reset(token)
    return watch.prediction(notes=_notes(graph, profile, state, is_whole=is_whole))


def _filling(graph: Graph) -> int:
    """Return the steps until the pipeline is full: as many as a sample may be old, and one."""
    credits = [edge for edge in graph.edges if isinstance(edge, Credits)]
    return 1 + max((staleness_bound(edge.initial, edge.per_version, 1) for edge in credits), default=0)


def _reserved(graph: Graph) -> float:
    """Return the cores that the graph's nodes reserve: on fewer it would not start."""
    configs = [stage.config for stage in graph.nodes.values() if not stage.config.share]
    return sum(config.cpus * config.replicas * config.ranks for config in configs)


def _look_s(graph: Graph, profile: Profile) -> float:
    """Return the time between two looks at the queues, from how long a step takes at least."""
    credits = next(edge for edge in graph.edges if isinstance(edge, Credits))
    response = sum(profile.response_tokens.quantiles) / len(profile.response_tokens.quantiles)
    longest_s = max(1e-3, 10 * profile.message_s)
    for name, stage in graph.nodes.items():
        costs = profile.nodes.get(name)
        if costs is None:
            continue
        config: Any = stage.config
        if costs.decode is not None and isinstance(config, Serving):
            samples = credits.per_version * getattr(config, "group_size", 1)
            speed = costs.decode.tokens_per_s(min(config.max_running, samples))
            longest_s = max(longest_s, samples * response / speed / config.replicas)
        longest_s = max(longest_s, costs.calls.get("train", CallCost()).call_s)
    return longest_s / LOOKS_A_STEP


def _notes(graph: Graph, profile: Profile, state: SimulationState, *, is_whole: bool) -> list[str]:
    """Say where the prediction leaves what the profile has seen."""
    notes: list[str] = []
    if absent := left_out(graph, profile, is_whole=is_whole):
        notes.append(f"left out: {', '.join(absent)}")
    elif any(getattr(stage.config, "tasks", []) for stage in graph.nodes.values()):
        notes.append("left out: what evaluation.tasks ask")
    if state.cores > profile.cores:
        notes.append(f"{number_of(state.cores, 'core')} reserved, the profile's machine has {profile.cores:g}")
    for name, stage in graph.nodes.items():
        config: Any = stage.config
        costs = profile.nodes.get(name, NodeProfile())
        if costs.decode is not None and isinstance(config, Serving) and costs.decode.running[1] > 0:
            most = min(config.max_running, getattr(config, "max_groups", 1) * getattr(config, "group_size", 1))
            low, high = costs.decode.running
            if not 0.8 * low <= most <= 1.25 * high:
                notes.append(f"{name} may run {number_of(most, 'sample')} at once, the profile saw {low:g} to {high:g}")
        if stage.config.ranks > costs.ranks:
            ranks = number_of(stage.config.ranks, "rank")
            notes.append(f"{name}: with {ranks} it is taken to be that much faster than with {costs.ranks}")
        if (threads := getattr(config, "threads", costs.threads)) != costs.threads and not config.gpus:
            shared = f"{PARALLEL:.0%} of its work is taken to be shared"
            notes.append(f"{name}: has {number_of(threads, 'thread')}, the profile's had {costs.threads}; {shared}")
    return notes


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
    connect: Callable[[Flow, str, float], DirectFlow] | None = None,
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
        readers = num_readers(graph, node, {})
        for index in range(stage.config.replicas):
            own = stage if index == 0 else from_specification(plan.nodes[node], node)
            client = (connect or DirectFlow)(flow, replica_name(node, index), message_s)
            clock = (NoCauses if is_bare else CauseClock)(asyncio.get_running_loop().time)
            context = _context(node, index, client, watch, stopping, readers, clock, turn_of(graph, node))
            if not is_bare:
                watch.contexts[node, index] = context
            body = run_replica(
                own,
                context,
                cast("FlowCalls", client),
                kinds=kinds,
                status_interval_s=status_s,
                wire=UNWEIGHED if is_bare else WEIGHED,
            )
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


def _context(
    node: str, replica: int, client: DirectFlow, watch: Watch, stopping: asyncio.Event, readers: int,
    clock: CauseClock, turn: Turn | None,
) -> Context:  # fmt: skip
    now = asyncio.get_running_loop().time

    async def compute(function: Callable[..., T], *arguments: Any) -> T:
        """Run in place and let the engine's work be done, which takes longer where the device is shared."""
        with clock.charge(Cause.COMPUTE):
            result = function(*arguments)
            engine = getattr(function, "__self__", None)
            if isinstance(engine, FakeTraining):
                await engine.device.take(engine.last_duration_s, engine.width)
            return result

    async def background(function: Callable[..., T], *arguments: Any) -> T:
        """Run in place and let the engine's time pass beside its work."""
        result = function(*arguments)
        engine = getattr(function, "__self__", None)
        if isinstance(engine, FakeTraining) and engine.last_duration_s > 0:
            await asyncio.sleep(engine.last_duration_s)
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
        devices=None if turn is None else Holder(turn, cast("FlowCalls", client), clock, compute),
        now=now,
    )
