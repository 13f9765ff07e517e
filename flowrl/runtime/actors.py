"""The Ray actors of a run: the hub, which holds the flow behind its gate, and one for each replica or rank.

Invariants: messages travel over the wire (wire.py) and what crosses an actor call is bytes and plain values, never a
pickled object of ours; an actor's failure is answered as data with its class, place and remedy, and what it prints lies
in the run's logs; every process shows again and again that it lives. Started by the crew of runtime/ray.py.
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
from typing import Any

import msgspec
import ray as _ray
from ray.exceptions import RayActorError

from flowrl import errors
from flowrl.errors import FlowrlError
from flowrl.graph.plan import GraphPlan, graph_of
from flowrl.graph.stage import Context, Ranks, Specification, from_specification
from flowrl.runtime.calls import CallClient, CallGate
from flowrl.runtime.flow import Flow
from flowrl.runtime.ledger import Cut, Ledger
from flowrl.runtime.placement import Place
from flowrl.runtime.replica import Threads, run_replica
from flowrl.runtime.rundir import hold
from flowrl.runtime.wire import Address, Connection, Listener
from flowrl.telemetry.causes import CauseClock
from flowrl.telemetry.events import Event, Recorder, decode_events, encode_events

ray: Any = _ray  # its own types are partial
Handle = Any  # a Ray actor handle; Ray gives it no usable type


class ReplicaPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica's process is told."""

    place: Place
    incarnation: int
    stage: Specification
    world_size: int
    kinds: dict[str, str]
    hub: Address
    run_dir: str
    num_readers: int
    report_interval_s: float  # its events travel to the hub in batches this far apart; each is a sign of life
    resume_from: str | None


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A replica's error as plain data."""

    kind: str  # its class in flowrl.errors
    where: str
    what: str
    remedy: str


class HubActor:
    """The flow and the telemetry of one attempt, in one process. Ray calls its methods concurrently on one loop."""

    def __init__(self, plan: bytes, run_dir: str, cut: bytes) -> None:
        _redirect_output(Path(run_dir), "hub")
        start = msgspec.json.decode(cut, type=Cut | None)
        self._ledger = Ledger(Path(run_dir) / "ledger.jsonl", cut=start)
        graph = graph_of(msgspec.json.decode(plan, type=GraphPlan))
        self._flow = Flow(graph, self._ledger, cut=start)
        self._gate = CallGate(self._flow)
        self._listener = Listener(self._gate)
        self._events: list[Event] = []
        self._arrived = asyncio.Event()
        self._ticks = 0  # seconds in which this process ran; one that was stopped must not take the others for silent
        self._heard: dict[str, int] = {}

    async def listen(self) -> tuple[str, int, str]:
        """Take calls to the flow from now on; returns where."""
        host, port, secret = await self._listener.open(ray.util.get_node_ip_address())
        return host, port, secret

    async def kinds(self, addresses: list[str]) -> dict[str, str]:
        """Return the kind of edge at each address."""
        return {address: self._flow.kind(address) for address in addresses}

    async def report(self, process: str, batch: bytes) -> None:
        """Take in a process's events, none perhaps: it lives."""
        self._heard[process] = self._ticks
        if batch:
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

    async def silent(self, timeout_s: float) -> str:
        """Wait until a process has not been heard from for so long and return its name."""
        while True:
            await asyncio.sleep(1.0)
            self._ticks += 1
            for process, heard in self._heard.items():
                if self._ticks - heard > timeout_s:
                    del self._heard[process]
                    return process

    async def forget(self, process: str) -> None:
        """Expect no more signs of life."""
        self._heard.pop(process, None)

    async def ping(self) -> None:
        """Answer."""

    async def release(self, replica: str, successor: int) -> tuple[list[int], list[tuple[int, bytes]]]:
        """Fence a dead replica off and give back what it held."""
        released = await self._gate.release(replica, successor)
        return released.reissued, released.poisonous

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


class ReplicaActor:
    """One rank of one replica of a node."""

    def __init__(self, plan: bytes, hub: Handle) -> None:
        self._plan = msgspec.json.decode(plan, type=ReplicaPlan)
        place = self._plan.place
        self._name = process_name(place)
        _redirect_output(Path(self._plan.run_dir), self._name)
        self._hub = hub
        self._stopping = asyncio.Event()
        self._recorder = Recorder()

    async def rendezvous(self) -> tuple[str, int, int]:
        """Return this process's address, a free port on it, and its process id."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, probe.getsockname()[1], os.getpid()

    async def request_stop(self) -> None:
        """Tell the stage that the user asks for a controlled stop."""
        self._stopping.set()

    async def run(self, address: str, port: int) -> bytes:
        """Run the stage to its end; returns b"" or its failure."""
        flushing = asyncio.ensure_future(self._flush())
        clock = CauseClock(asyncio.get_running_loop().time)
        threads = Threads(clock, self._name)
        wire: Connection | None = None
        try:
            wire = await Connection.open(self._plan.hub)
            stage = from_specification(self._plan.stage, self._plan.place.node)
            flow = CallClient(wire.carry, self._replica, self._plan.incarnation)
            context = self._context(flow, clock, threads, address, port)
            await run_replica(stage, context, flow, kinds=self._plan.kinds, status_interval_s=1.0)
        except FlowrlError as error:
            print(traceback.format_exc(), file=sys.stderr, flush=True)
            kind = next(k.__name__ for k in type(error).__mro__ if k.__module__ == errors.__name__)
            return msgspec.json.encode(Failure(kind=kind, where=error.where, what=error.what, remedy=error.remedy))
        finally:
            flushing.cancel()
            if wire is not None:
                await wire.close()
            with contextlib.suppress(RayActorError):  # the hub is gone: so is whoever would read them
                await self._send()
            threads.close()
        return b""

    @property
    def _replica(self) -> str:
        return f"{self._plan.place.node}.{self._plan.place.replica}"

    def _context(self, flow: CallClient, clock: CauseClock, threads: Threads, address: str, port: int) -> Context:
        plan, place = self._plan, self._plan.place
        return Context(
            node=place.node,
            replica=place.replica,
            ranks=Ranks(rank=place.rank, world_size=plan.world_size, address=address, port=port),
            run_dir=Path(plan.run_dir),
            clock=clock,
            recorder=self._recorder,
            stopping=self._stopping,
            compute=threads.compute,
            background=threads.background,
            cut=flow.cut,
            fewer_out=flow.fewer_out,
            num_readers=plan.num_readers,
            resume_from=Path(plan.resume_from) if plan.resume_from else None,
        )

    async def _flush(self) -> None:
        while True:
            await self._send()
            await asyncio.sleep(self._plan.report_interval_s)

    async def _send(self) -> None:
        events = self._recorder.drain() if self._plan.place.rank == 0 else []
        await self._hub.report.remote(self._name, encode_events(events) if events else b"")


def process_name(place: Place) -> str:
    """Return the name of a rank's process: its log, and what the hub hears of it."""
    return f"{place.node}.{place.replica}" + (f".rank{place.rank}" if place.rank else "")


def _redirect_output(run_dir: Path, name: str) -> None:
    """Send everything the process prints, native code included, to its log; show that the run has a process."""
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    hold(run_dir)
    log = os.open(logs / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
