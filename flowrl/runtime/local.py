"""The local runtime: every node's replicas as tasks of one event loop, on real engines or fakes.

With the virtual clock (`is_virtual`) hours pass in milliseconds and every schedule is reproducible: so the laws are
tested, and so `flowrl simulate` predicts. A stage is rebuilt from its specification in each replica, as it would be in
another process, and reaches the flow through the same gate.

Invariant: when `run_local` returns or raises, no task of the run is left.

Nodes with several ranks need processes and so the Ray runtime.

Tests reach in at two places: `link` stands between a replica's calls and the gate, `chaos` runs beside an attempt and
may end replicas (`LocalWorkers.kill`) or the flow's host (`lose_host`).

Tests: tests/unit/runtime/test_laws.py
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.engines.base import Serving
from flowrl.errors import ConfigError, GraphError
from flowrl.graph.edges import Latest
from flowrl.graph.program import plan_of
from flowrl.graph.stage import Context, Ranks, from_specification
from flowrl.messages import Weights
from flowrl.runtime.calls import Call, CallClient, CallGate
from flowrl.runtime.flow import Flow, Released, node_name
from flowrl.runtime.holder import Holder
from flowrl.runtime.lease import turn_of
from flowrl.runtime.ledger import Ledger
from flowrl.runtime.replica import Threads, VirtualThreads, run_replica
from flowrl.runtime.supervisor import Death, HostLost, Options, Outcome, Start, Supervisor
from flowrl.telemetry.events import CauseClock, Recorder

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping

    from flowrl.graph.graph import Graph
    from flowrl.runtime.calls import FlowCalls

    Carry = Callable[[Call], Awaitable[Any]]

__all__ = ["LocalOptions", "LocalWorkers", "Outcome", "num_readers", "run_local"]


@dataclass(kw_only=True)
class LocalOptions(Options):
    """How to run in this process."""

    is_virtual: bool = False  # the event loop is a VirtualClockLoop and engines are fakes
    status_interval_s: float = 1.0
    link: Callable[[Carry], Carry] = lambda carry: carry
    chaos: Callable[[LocalWorkers], Coroutine[Any, Any, None]] | None = None


def check_local(graph: Graph) -> None:
    """Insist that one process can hold the graph's engines: vLLM keeps what its forward pass runs on once a process.

    Raises:
        ConfigError: it cannot.
    """
    inside = {
        name: stage.config.replicas
        for name, stage in graph.nodes.items()
        if isinstance(stage.config, Serving)
        and stage.config.layout == "thread"
        and "vllm" in getattr(stage.config, "engine", "")
    }
    if sum(inside.values()) > 1:
        named = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in inside.items())
        what = f"is local, and one process holds one vLLM of layout=thread, not those of {named}"
        raise ConfigError("runtime", what, "set layout=processes for all but one, or runtime=ray")


async def run_local(graph: Graph, options: LocalOptions) -> Outcome:
    """Run a graph to its end in this process.

    Raises:
        GraphError: the graph does not check, or has a node with several ranks.
        FlowrlError: the first failure that is not recovered from, or a StallError.
    """
    graph.check()
    for name, stage in graph.nodes.items():
        if stage.config.ranks > 1:
            raise GraphError(name, f"ranks={stage.config.ranks} needs processes", "use the ray runtime")
    if options.is_virtual:
        options.now = asyncio.get_running_loop().time
    return await Supervisor(graph, LocalWorkers(graph, options), options).run()


class LocalWorkers:
    """Replicas as tasks."""

    def __init__(self, graph: Graph, options: LocalOptions) -> None:
        self._graph = graph
        self._options = options
        self._plan = plan_of(graph)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._beside: list[asyncio.Task[None]] = []
        self._recorder = Recorder()
        self._ledger = Ledger(None)
        self._gate = CallGate(Flow(graph, self._ledger))
        self._host_lost: asyncio.Future[None] | None = None

    @property
    def replicas(self) -> list[str]:
        """Return the replicas that are running."""
        return [name for name, task in self._tasks.items() if not task.done()]

    @property
    def unplaced(self) -> set[str]:
        """Return none: a task has its place at once."""
        return set()

    async def open(self, start: Start) -> None:
        """Make a fresh flow at the start's cut."""
        path = self._options.run_dir / "ledger.jsonl" if self._options.run_dir else None
        self._ledger = Ledger(path, cut=start.cut, start=self._options.start_number)
        self._gate = CallGate(Flow(self._graph, self._ledger, cut=start.cut))
        self._host_lost = asyncio.get_running_loop().create_future()
        self._beside = [asyncio.create_task(self._pump())]
        if self._options.chaos is not None:
            self._beside.append(asyncio.create_task(self._options.chaos(self)))

    async def run(self, replica: str, incarnation: int, start: Start) -> None:
        """Run a replica as a task of its own, which `kill` can end."""
        task = self._tasks[replica] = asyncio.create_task(self._body(replica, incarnation, start), name=replica)
        try:
            await asyncio.wait([task])
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if task.cancelled():
            raise Death(replica, "was killed")
        task.result()

    async def _body(self, replica: str, incarnation: int, start: Start) -> None:
        node, index = node_name(replica), int(replica.rpartition(".")[2])
        stage = from_specification(self._plan.nodes[node], node)
        clock = CauseClock(asyncio.get_running_loop().time)
        threads = VirtualThreads(clock) if self._options.is_virtual else Threads(clock, replica)
        flow = cast("FlowCalls", CallClient(self._options.link(self._gate.call), replica, incarnation))

        async def cut(version: int) -> bytes:
            return msgspec.json.encode(await flow.cut(version))

        turn = turn_of(self._graph, node)
        context = Context(
            node=node,
            replica=index,
            ranks=Ranks(),
            run_dir=self._options.run_dir or Path(),
            clock=clock,
            recorder=self._recorder,
            stopping=self._options.stopping,
            compute=threads.compute,
            background=threads.background,
            cut=cut,
            fewer_out=flow.fewer_out,
            note_wait=flow.note_wait,
            num_readers=num_readers(self._graph, node, self._options.scaling.wanted),
            resume_from=start.checkpoint,
            devices=None if turn is None else Holder(turn, flow, clock, threads.compute),
            now=self._options.now,
        )
        kinds = {f"{node}.{name}": self._gate.flow.kind(f"{node}.{name}") for name in stage.ports}
        try:
            await run_replica(stage, context, flow, kinds=kinds, status_interval_s=self._options.status_interval_s)
        finally:
            threads.close()

    async def watch(self) -> None:
        """Wait for a stall, or for the flow to be lost."""
        assert self._host_lost is not None, "open comes first"
        stalling = asyncio.ensure_future(self._gate.flow.watch(self._options.stall_timeout_s))
        try:
            finished, _ = await asyncio.wait([stalling, self._host_lost], return_when=asyncio.FIRST_COMPLETED)
            for future in finished:
                future.result()
        finally:
            stalling.cancel()
            await asyncio.gather(stalling, return_exceptions=True)

    async def release(self, replica: str, successor: int, *, blames: bool = True) -> Released:
        """Fence a replica off that is gone and give back what it held."""
        return await self._gate.release(replica, successor, blames=blames)

    async def kill(self, replica: str) -> None:
        """End a replica's task, wherever it waits."""
        task = self._tasks.get(replica)
        if task is not None and not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def lose_host(self) -> None:
        """Do as if the flow's process had died."""
        if self._host_lost is not None and not self._host_lost.done():
            self._host_lost.set_exception(HostLost("flow", "its host was killed"))

    async def has_begun(self) -> bool:
        """Return whether anybody was given a message."""
        return self._gate.flow.has_begun

    async def totals(self) -> dict[str, int]:
        """Return the ledger's totals."""
        return self._ledger.totals()

    async def close_edges(self) -> None:
        """Close every edge."""
        self._gate.flow.close()

    async def close(self) -> None:
        """End every task of the attempt."""
        tasks = [*self._tasks.values(), *self._beside]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._gate.close()
        if self._host_lost is not None:
            self._host_lost.cancel()
        self._tasks.clear()
        self._options.consume(self._recorder.drain())
        self._ledger.close()

    async def _pump(self) -> None:
        """Hand events to the consumer as they gather."""
        while True:
            await asyncio.sleep(self._options.status_interval_s)
            self._options.consume([*self._recorder.drain(), *self._gate.flow.report(self._options.now())])
            for replica in self._gate.flow.lost():
                await self.kill(replica)


def num_readers(graph: Graph, node: str, wanted: Mapping[str, int]) -> int:
    """Return how many replicas take the weights that `node` publishes: whom its transport waits for.

    `wanted` has the numbers of replicas that were asked for while the run went on. Those that keep a version fetch it
    later, when nobody waits for them.
    """
    read_by = {
        graph.node_of(edge.target)
        for edge in graph.edges
        if isinstance(edge, Latest) and graph.node_of(edge.source) == node and edge.source.message is Weights
    }
    return sum(wanted.get(reader, graph.nodes[reader].config.replicas) for reader in read_by)
