"""The Ray runtime: every replica or rank an actor, the flow in an actor of its own, one machine or a cluster.

The driver starts the hub (which holds the `Flow`) and the replicas, carries events to the sinks, and ends the run:
when the `until` node returns the edges are closed and every stage ends by itself; a failure or a second Ctrl-C kills
what is left. Invariants: what crosses an actor call is bytes and plain values, never a pickled object of ours; every
actor of a run is dead when `run_ray` returns; an actor's error names its node and replica and where its log is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import ray as _ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flowrl.errors import ChannelClosed, FlowrlError, ResourceError, StageError
from flowrl.graph.plan import GraphPlan, graph_of, plan_of
from flowrl.graph.stage import Context, Ranks, Specification, from_specification
from flowrl.runtime.flow import Flow
from flowrl.runtime.ledger import Ledger
from flowrl.runtime.local import Outcome, num_readers
from flowrl.runtime.placement import Place, check_resources, environment, num_cores, places
from flowrl.runtime.replica import Threads, run_replica
from flowrl.telemetry.causes import CauseClock
from flowrl.telemetry.events import Event, Recorder, decode_events, encode_events

if TYPE_CHECKING:
    from collections.abc import Generator

    from flowrl.graph.graph import Graph

ray: Any = _ray  # its own types are partial
Handle = Any  # a Ray actor handle; Ray gives it no usable type
FLUSH_S = 0.5  # a replica's events travel to the hub in batches this far apart


class ReplicaPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica's process is told."""

    place: Place
    stage: Specification
    world_size: int
    kinds: dict[str, str]
    run_dir: str
    num_readers: int
    resume_from: str | None


class RayOptions(msgspec.Struct, kw_only=True):
    """How to run on Ray."""

    run_dir: Path
    consume: Any  # Callable[[list[Event]], None]
    stopping: asyncio.Event
    address: str | None = None  # of a running cluster; None starts one on this machine
    stall_timeout_s: float = 1800.0
    grace_s: float = 60.0  # for stages to end by themselves once the run is over
    resume_from: Path | None = None
    first_group: int = 0


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A replica's error as plain data."""

    where: str
    what: str
    remedy: str
    trace: str


class HubActor:
    """The flow and the telemetry of one run, in one process. Ray calls its methods concurrently on one loop."""

    def __init__(self, plan: bytes, run_dir: str, first_group: int) -> None:
        _redirect_output(Path(run_dir), "hub")
        self._ledger = Ledger(Path(run_dir) / "ledger.jsonl")
        graph = graph_of(msgspec.json.decode(plan, type=GraphPlan))
        self._flow = Flow(graph, self._ledger, first_group=first_group)
        self._events: list[Event] = []
        self._arrived = asyncio.Event()

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the flow; a closed edge is answered as such, not raised through Ray."""
        try:
            return await getattr(self._flow, method)(*arguments)
        except ChannelClosed as closed:
            return {"closed": closed.where, "what": closed.what}  # raised, it would arrive wrapped in Ray's own error

    async def kinds(self, addresses: list[str]) -> dict[str, str]:
        """Return the kind of edge at each address."""
        return {address: self._flow.kind(address) for address in addresses}

    async def report(self, batch: bytes) -> None:
        """Take in a replica's events."""
        self._events.extend(decode_events(batch))
        self._arrived.set()

    async def events(self) -> bytes:
        """Wait for events and return all there are, with every queue's fill."""
        await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        return encode_events([*events, *self._flow.edge_status(time.time())])

    async def watch(self, timeout_s: float) -> str:
        """Wait until nothing has moved for so long; returns who waits for what."""
        try:
            await self._flow.watch(timeout_s)
        except FlowrlError as error:
            return error.what
        return ""

    async def close(self) -> None:
        """Close every edge."""
        self._flow.close()

    async def totals(self) -> dict[str, int]:
        """Return the ledger's totals."""
        return self._ledger.totals()

    async def drain(self) -> bytes:
        """Return the events that have not been fetched."""
        events, self._events = self._events, []
        return encode_events(events)


class HubClient:
    """The flow as a replica sees it, through the hub's actor handle."""

    def __init__(self, hub: Handle) -> None:
        self._hub = hub

    async def _call(self, method: str, *arguments: Any) -> Any:
        reference = self._hub.call.remote(method, *arguments)
        try:
            answer = await reference
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        closed = _closed(answer)
        if closed is not None:
            raise closed
        return answer

    async def put(self, address: str, sender: str, key: int, body: bytes) -> None:
        await self._call("put", address, sender, key, body)

    async def get(self, address: str, consumer: str, limit: int) -> list[bytes]:
        return await self._call("get", address, consumer, limit)

    async def done(self, address: str, keys: list[int], learned_in: int | None) -> None:
        await self._call("done", address, keys, learned_in)

    async def reject(self, address: str, key: int, kind: str, reason: str) -> None:
        await self._call("reject", address, key, kind, reason)

    async def publish(self, address: str, version: int, body: bytes) -> None:
        await self._call("publish", address, version, body)

    async def read(self, address: str, newer_than: int) -> tuple[int, bytes]:
        return await self._call("read", address, newer_than)

    async def confirm(self, address: str, reader: str, version: int) -> None:
        await self._call("confirm", address, reader, version)

    async def acquire(self, address: str, taker: str) -> None:
        await self._call("acquire", address, taker)

    async def give_back(self, address: str, body: bytes) -> None:
        await self._call("give_back", address, body)


def _closed(answer: Any) -> ChannelClosed | None:
    """Return the error that a hub's answer stands for, if it does."""
    if not isinstance(answer, dict):
        return None
    said = cast("dict[str, str]", answer)
    return ChannelClosed(said["closed"], said["what"])


class ReplicaActor:
    """One rank of one replica of a node."""

    def __init__(self, plan: bytes, hub: Handle) -> None:
        self._plan = msgspec.json.decode(plan, type=ReplicaPlan)
        place = self._plan.place
        self._name = f"{place.node}.{place.replica}" + (f".rank{place.rank}" if place.rank else "")
        _redirect_output(Path(self._plan.run_dir), self._name)
        self._hub = hub
        self._stopping = asyncio.Event()
        self._recorder = Recorder()

    async def rendezvous(self) -> tuple[str, int]:
        """Return this process's address and a free port on it."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, probe.getsockname()[1]

    async def request_stop(self) -> None:
        """Tell the stage that the user asks for a controlled stop."""
        self._stopping.set()

    async def run(self, address: str, port: int) -> bytes:
        """Run the stage to its end; returns b"" or its failure."""
        plan, place = self._plan, self._plan.place
        clock = CauseClock(asyncio.get_running_loop().time)
        threads = Threads(clock, self._name)
        context = Context(
            node=place.node,
            replica=place.replica,
            ranks=Ranks(rank=place.rank, world_size=plan.world_size, address=address, port=port),
            run_dir=Path(plan.run_dir),
            clock=clock,
            recorder=self._recorder,
            stopping=self._stopping,
            compute=threads.compute,
            background=threads.background,
            num_readers=plan.num_readers,
            resume_from=Path(plan.resume_from) if plan.resume_from else None,
        )
        flushing = asyncio.ensure_future(self._flush())
        try:
            stage = from_specification(plan.stage, place.node)
            await run_replica(stage, context, HubClient(self._hub), kinds=plan.kinds, status_interval_s=1.0)
        except FlowrlError as error:
            trace = traceback.format_exc()
            print(trace, file=sys.stderr, flush=True)
            failure = Failure(where=error.where, what=error.what, remedy=error.remedy, trace=trace)
            return msgspec.json.encode(failure)
        finally:
            flushing.cancel()
            await self._send()
            threads.close()
        return b""

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            await self._send()

    async def _send(self) -> None:
        events = self._recorder.drain()
        if events and self._plan.place.rank == 0:
            await self._hub.report.remote(encode_events(events))


def _redirect_output(run_dir: Path, name: str) -> None:
    """Send everything the process prints, native code included, to its log."""
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = os.open(logs / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


@contextlib.contextmanager
def running_ray(graph: Graph, address: str | None) -> Generator[None]:
    """Connect to a cluster, or start one on this machine with no dashboard, bound to the loopback interface.

    Raises:
        ResourceError: the cluster does not answer, or the machine has too little of something.
    """
    if address is None:
        check_resources(graph)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would let everything else on the machine go first
    local: dict[str, Any] = {
        "num_cpus": num_cores(),
        "include_dashboard": False,
        "object_store_memory": 512 << 20,
        "_node_ip_address": "127.0.0.1",
    }
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=False,
            **({} if address else local),
        )
    except (RayError, ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise ResourceError("ray", f"cannot start or reach Ray ({error})", "see `flowrl doctor`") from error
    try:
        yield
    finally:
        ray.shutdown()


async def run_ray(graph: Graph, options: RayOptions) -> Outcome:
    """Run a graph to its end on Ray, which must have been started.

    Raises:
        FlowrlError: the first failure of any stage, or a StallError.
    """
    run = RayRun(graph, options)
    try:
        return await run.run()
    finally:
        run.kill()


class RayRun:
    """The driver's side of one run."""

    def __init__(self, graph: Graph, options: RayOptions) -> None:
        self._graph = graph
        self._options = options
        self._group: PlacementGroup | None = None
        self._replicas: dict[str, list[Handle]] = {}  # "node.replica" -> its ranks
        plan = msgspec.json.encode(plan_of(graph))
        hub_environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        hub_type = ray.remote(num_cpus=0, max_concurrency=10_000, runtime_env=hub_environment)(HubActor)
        self._hub: Handle = hub_type.remote(plan, str(options.run_dir), options.first_group)

    async def run(self) -> Outcome:
        """Start everything, wait for the end, return the ledger's totals."""
        await self._start()
        events = asyncio.create_task(self._carry_events())
        stop = asyncio.create_task(self._pass_on_stop())
        try:
            await self._wait()
        finally:
            events.cancel()
            stop.cancel()
        self._options.consume(decode_events(await self._hub.drain.remote()))
        totals = await self._hub.totals.remote()
        return Outcome(totals=totals, was_stopped=self._options.stopping.is_set())

    async def _start(self) -> None:
        wanted = places(self._graph)
        own = [p for p in wanted if p.host == p.node and (p.cpus or p.gpus)]
        if own:
            self._group = placement_group([_bundle(p, self._graph) for p in own], strategy="PACK")
            await cast("Any", self._group).ready()
        bundles = {(p.node, p.replica, p.rank): index for index, p in enumerate(own)}
        addresses = [f"{node}.{port}" for node, stage in self._graph.nodes.items() for port in stage.ports]
        kinds = await self._hub.kinds.remote(addresses)
        for place in wanted:
            actor = self._start_one(place, kinds, bundles)
            self._replicas.setdefault(f"{place.node}.{place.replica}", []).append(actor)

    def _start_one(self, place: Place, kinds: dict[str, str], bundles: dict[tuple[str, int, int], int]) -> Handle:
        stage = self._graph.nodes[place.node]
        plan = ReplicaPlan(
            place=place,
            stage=plan_of(self._graph).nodes[place.node],
            world_size=stage.config.ranks,
            kinds={address: kind for address, kind in kinds.items() if address.startswith(f"{place.node}.")},
            run_dir=str(self._options.run_dir),
            num_readers=num_readers(self._graph, place.node),
            resume_from=str(self._options.resume_from) if self._options.resume_from else None,
        )
        variables = environment(stage.config, on_gpu=place.gpus > 0)
        choice: dict[str, Any] = {
            "num_cpus": place.cpus,
            "num_gpus": place.gpus,
            "max_concurrency": 64,
            "runtime_env": {"env_vars": variables},
        }
        bundle = bundles.get(
            (place.node, place.replica, place.rank), bundles.get((place.host, place.replica, place.rank))
        )
        if self._group is not None and bundle is not None:
            choice["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group, bundle)
        actor_type: Any = ray.remote(ReplicaActor)
        return actor_type.options(**choice).remote(msgspec.json.encode(plan), self._hub)

    async def _wait(self) -> None:
        """Wait for the until node, close the edges, let the rest end; raises the first failure."""
        running: dict[asyncio.Future[Any], str] = {}
        for name, ranks in self._replicas.items():
            address, port = await ranks[0].rendezvous.remote() if len(ranks) > 1 else ("127.0.0.1", 0)
            running.update({asyncio.ensure_future(_await(actor.run.remote(address, port))): name for actor in ranks})
        stall = asyncio.ensure_future(_await(self._hub.watch.remote(self._options.stall_timeout_s)))
        running[stall] = "flow"
        until = self._graph.until_node
        try:
            while any(name.rpartition(".")[0] == until for name in running.values()):
                await self._one_ended(running, None)
            running.pop(stall, None)
            await self._hub.close.remote()
            deadline = time.monotonic() + self._options.grace_s
            while running and time.monotonic() < deadline:
                await self._one_ended(running, deadline - time.monotonic())
        finally:
            for future in [*running, stall]:
                future.cancel()

    async def _one_ended(self, running: dict[asyncio.Future[Any], str], timeout_s: float | None) -> None:
        finished, _ = await asyncio.wait(running, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for future in finished:
            name = running.pop(future)
            self._raise_failure(name, future)

    def _raise_failure(self, name: str, future: asyncio.Future[Any]) -> None:
        log = self._options.run_dir / "logs" / f"{name}.log"
        try:
            answer = future.result()
        except RayActorError as error:
            raise StageError(name, "its process died", f"its last words are in {log}") from error
        except RayError as error:
            raise StageError(name, str(error).strip().splitlines()[-1], f"see {log}") from error
        if name == "flow" and answer:
            raise StageError("flow", answer, "see the run's timeline and logs")
        if answer:
            failure = msgspec.json.decode(answer, type=Failure)
            raise StageError(failure.where, failure.what, failure.remedy or f"see {log}")

    async def _carry_events(self) -> None:
        while True:
            self._options.consume(decode_events(await self._hub.events.remote()))

    async def _pass_on_stop(self) -> None:
        await self._options.stopping.wait()
        for ranks in self._replicas.values():
            for actor in ranks:
                actor.request_stop.remote()

    def kill(self) -> None:
        """Kill every actor of the run and free its resources."""
        for actor in [*(a for ranks in self._replicas.values() for a in ranks), self._hub]:
            with contextlib.suppress(RayError):
                ray.kill(actor)
        if self._group is not None:
            with contextlib.suppress(RayError):
                remove_placement_group(self._group)


async def _await(reference: Any) -> Any:
    return await reference


def _bundle(place: Place, graph: Graph) -> dict[str, float]:
    """Return the resources of a host's bundle: its own and its sharers' part of the GPUs."""
    gpus = graph.nodes[place.node].config.gpus
    return {name: amount for name, amount in (("CPU", place.cpus), ("GPU", gpus)) if amount}
