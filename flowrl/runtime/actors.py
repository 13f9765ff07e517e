"""The Ray actors of a run: the hub, which holds the flow behind its gate, its proxies, and each replica's ranks.

Invariants:
- messages travel over the wire (wire.py) and what crosses an actor call is bytes and plain values, never a pickled
  object of ours;
- an actor's failure is answered as data with its class, place and remedy, and what it prints lies in the run's logs;
- no method waits longer than it was told to, so that an answer which does not come is a sign of death.

Started by the workers of runtime/ray.py, which asks each process again and again what there is to tell.

Tests: tests/contracts/test_flow_clients.py
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import ray as _ray

from flowrl import errors
from flowrl.engines.ranks import interface_of
from flowrl.errors import FlowrlError
from flowrl.graph.program import GraphPlan, graph_of
from flowrl.graph.stage import Context, Ranks, Specification, from_specification
from flowrl.runtime.calls import CallClient, CallGate
from flowrl.runtime.flow import Flow
from flowrl.runtime.holder import Holder
from flowrl.runtime.lease import Turn
from flowrl.runtime.ledger import Cut, Ledger
from flowrl.runtime.placement import Place
from flowrl.runtime.proxy import Proxy
from flowrl.runtime.replica import Threads, run_replica
from flowrl.runtime.rundir import hold
from flowrl.runtime.wire import Address, Connection, Listener
from flowrl.telemetry import clock
from flowrl.telemetry.events import CauseClock, Recorder, encode_events

if TYPE_CHECKING:
    from flowrl.runtime.calls import FlowCalls

ray: Any = _ray  # its own types are partial


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
    attempt: int  # of the run; a process of an older one writes no more
    token: str  # by which the ranks of this replica know each other
    resume_from: str | None
    folder: str  # the driver's working directory, from which relative paths count
    epoch: clock.Epoch  # the driver's
    turn: Turn | None = None  # in which it has its devices


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A replica's error as plain data."""

    kind: str  # its class in flowrl.errors
    where: str
    what: str
    remedy: str


def seen_devices() -> tuple[str, list[str]]:
    """Return the machine that a process is on and the GPUs that Ray has given to it, as CUDA names them."""
    return ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")


class HubActor:
    """The flow of one attempt, in one process. Ray calls its methods concurrently on one loop."""

    def __init__(self, plan: bytes, run_dir: str, cut: bytes, attempt: int, start_number: int, epoch: bytes) -> None:
        clock.agree(msgspec.json.decode(epoch, type=clock.Epoch))
        _join_run(Path(run_dir), "hub", attempt)
        start = msgspec.json.decode(cut, type=Cut | None)
        self._ledger = Ledger(Path(run_dir) / "ledger.jsonl", cut=start, start=start_number)
        graph = graph_of(msgspec.json.decode(plan, type=GraphPlan))
        self._flow = Flow(graph, self._ledger, cut=start)
        self._gate = CallGate(self._flow)
        self._listener = Listener(self._gate)
        self._stalling: asyncio.Future[str] | None = None

    async def open(self, stall_timeout_s: float) -> tuple[str, int, str]:
        """Take calls to the flow from now on and watch for a stall; returns where it listens."""
        self._stalling = asyncio.ensure_future(self._stall(stall_timeout_s))
        host, port, secret = await self._listener.open(ray.util.get_node_ip_address())
        return host, port, secret

    async def kinds(self, addresses: list[str]) -> dict[str, str]:
        """Return the kind of edge at each address."""
        return {address: self._flow.kind(address) for address in addresses}

    async def listen(self, wait_s: float) -> tuple[bytes, str, list[str]]:
        """Return after `wait_s`, or at a stall, what there is to tell.

        That is the edges' state, at a stall who waits for what, and who is to be ended since it lost its devices.
        """
        assert self._stalling is not None, "open comes first"
        await asyncio.wait([self._stalling], timeout=wait_s)
        stall = self._stalling.result() if self._stalling.done() else ""
        return encode_events(self._flow.report(clock.now())), stall, self._flow.lost()

    async def _stall(self, timeout_s: float) -> str:
        try:
            await self._flow.watch(timeout_s)
        except FlowrlError as error:
            return error.what
        return ""

    async def release(self, replica: str, successor: int, blames: bool) -> tuple[list[int], list[tuple[int, bytes]]]:
        """Fence a replica off that is gone and give back what it held."""
        released = await self._gate.release(replica, successor, blames=blames)
        return released.reissued, released.poisonous

    async def close(self) -> None:
        """Close every edge."""
        self._flow.close()

    async def has_begun(self) -> bool:
        """Return whether anybody was given a message."""
        return self._flow.has_begun

    async def totals(self) -> dict[str, int]:
        """Return the ledger's totals."""
        return self._ledger.totals()


class ProxyActor:
    """A proxy of the hub."""

    def __init__(self, run_dir: str, name: str, attempt: int) -> None:
        _join_run(Path(run_dir), name, attempt)
        self._hub: Connection | None = None

    async def open(self, host: str, port: int, secret: str) -> tuple[str, int, str]:
        """Connect to the hub and take calls for it from now on; returns where it listens."""
        self._hub = await Connection.open(Address(host, port, secret))
        listener = Listener(Proxy(self._hub))
        here = await listener.open(ray.util.get_node_ip_address())
        return here.host, here.port, here.secret

    async def listen(self, wait_s: float) -> bool:
        """Return after `wait_s`, or when the hub is gone, whether it is there."""
        assert self._hub is not None, "open comes first"
        return not await self._hub.is_lost_within(wait_s)


class ReplicaActor:
    """One rank of one replica of a node."""

    def __init__(self, plan: bytes) -> None:
        self._plan = msgspec.json.decode(plan, type=ReplicaPlan)
        place = self._plan.place
        self._name = process_name(place)
        self._address: str = ray.util.get_node_ip_address()
        clock.agree(self._plan.epoch)
        _settle(self._address, self._plan.folder)
        _join_run(Path(self._plan.run_dir), self._name, self._plan.attempt)
        self._stopping = asyncio.Event()
        self._recorder = Recorder()
        self._running: asyncio.Future[bytes] | None = None
        self._meeting: socket.socket | None = None

    async def rendezvous(self) -> tuple[str, int]:
        """Return this process's address and, on the first of several ranks, the port at which it listens for them."""
        if self._plan.world_size == 1 or self._plan.place.rank > 0:
            return self._address, 0
        self._meeting = socket.create_server((self._address, 0))  # handed on as it is: nobody else can take the port
        return self._address, self._meeting.getsockname()[1]

    async def request_stop(self) -> None:
        """Tell the stage that the user asks for a controlled stop."""
        self._stopping.set()

    async def begin(self, address: str, port: int) -> None:
        """Start running the stage."""
        self._running = asyncio.ensure_future(self._run(address, port))

    async def listen(self, wait_s: float) -> tuple[bytes, bytes | None]:
        """Return after `wait_s`, or at the stage's end, its events, and how it ended: b"" or its failure."""
        assert self._running is not None, "begin comes first"
        await asyncio.wait([self._running], timeout=wait_s)
        ended = self._running.result() if self._running.done() else None
        events = self._recorder.drain() if self._plan.place.rank == 0 else []
        return encode_events(events) if events else b"", ended

    async def _run(self, address: str, port: int) -> bytes:
        """Run the stage to its end; returns b"" or its failure."""
        causes = CauseClock(asyncio.get_running_loop().time)
        threads = Threads(causes, self._name)
        wire: Connection | None = None
        try:
            wire = await Connection.open(self._plan.hub)
            stage = from_specification(self._plan.stage, self._plan.place.node)
            flow = cast("FlowCalls", CallClient(wire.carry, self._replica, self._plan.incarnation))
            context = self._context(flow, causes, threads, address, port)
            await run_replica(stage, context, flow, kinds=self._plan.kinds, status_interval_s=1.0)
        except FlowrlError as error:
            print(traceback.format_exc(), file=sys.stderr, flush=True)
            kind = next(k.__name__ for k in type(error).__mro__ if k.__module__ == errors.__name__)
            return msgspec.json.encode(Failure(kind=kind, where=error.where, what=error.what, remedy=error.remedy))
        finally:
            if wire is not None:
                await wire.close()
            threads.close()
        return b""

    @property
    def _replica(self) -> str:
        return f"{self._plan.place.node}.{self._plan.place.replica}"

    def _context(self, flow: FlowCalls, causes: CauseClock, threads: Threads, address: str, port: int) -> Context:
        plan, place = self._plan, self._plan.place
        return Context(
            node=place.node,
            replica=place.replica,
            ranks=Ranks(
                rank=place.rank,
                world_size=plan.world_size,
                address=address,
                port=port,
                listener=-1 if self._meeting is None else self._meeting.detach(),
                token=plan.token,
            ),
            run_dir=Path(plan.run_dir),
            clock=causes,
            recorder=self._recorder,
            stopping=self._stopping,
            compute=threads.compute,
            background=threads.background,
            cut=flow.cut,
            fewer_out=flow.fewer_out,
            note_wait=flow.note_wait,
            num_readers=plan.num_readers,
            resume_from=Path(plan.resume_from) if plan.resume_from else None,
            devices=Holder(plan.turn, flow, causes, threads.compute) if plan.turn and place.rank == 0 else None,
        )


def _settle(address: str, folder: str) -> None:
    """Let libraries that would go by the machine's name use the address that Ray knows, and start where the driver is.

    A name may lead to 127.0.1.1, which is another machine for everybody else, or nowhere, after minutes of looking.
    """
    os.environ.setdefault("VLLM_HOST_IP", address)
    if interface := interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if interface != "lo":
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    if os.path.isdir(folder):
        os.chdir(folder)


def process_name(place: Place) -> str:
    """Return the name of a rank's process: its log, and what the hub hears of it."""
    return f"{place.node}.{place.replica}" + (f".rank{place.rank}" if place.rank else "")


def _join_run(run_dir: Path, name: str, attempt: int) -> None:
    """Send everything the process prints, native code included, to its log; show that the run has a process."""
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    hold(run_dir, attempt)
    log = os.open(logs / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
