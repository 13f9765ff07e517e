"""The local runtime: every node a task of one event loop, in one process.

For tests, debugging and simulation: real engines or fakes, wall clock or virtual clock. Nodes have one rank here.
The run ends when the graph's `until` node returns: every edge is closed, the other nodes end by themselves, and
whatever has not ended after `grace_s` is cancelled. The first failure ends the run and is raised.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.errors import GraphError, StallError
from flowrl.graph.edges import Latest
from flowrl.graph.plan import graph_of, plan_of
from flowrl.graph.stage import Context, Ranks, Stage
from flowrl.runtime.flow import Flow
from flowrl.runtime.ledger import Ledger
from flowrl.runtime.replica import Threads, VirtualThreads, run_replica
from flowrl.telemetry.causes import CauseClock
from flowrl.telemetry.events import Event, Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

    from flowrl.graph.graph import Graph


@dataclass
class LocalOptions:
    """How to run locally."""

    run_dir: Path | None = None  # None: nothing is written
    is_virtual: bool = False  # fakes on the virtual clock
    stall_timeout_s: float = 1800.0
    grace_s: float = 30.0
    status_interval_s: float = 1.0
    resume_from: Path | None = None
    first_group: int = 0
    consume: Callable[[list[Event]], None] = lambda events: None
    stopping: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    totals: dict[str, int]  # the ledger's
    was_stopped: bool = False


async def run_local(graph: Graph, options: LocalOptions) -> Outcome:
    """Run a graph to its end in this process.

    Raises:
        GraphError: the graph does not check, or has a node with several ranks.
        FlowrlError: the first failure of any stage, or a StallError.
    """
    graph.check()
    for name, stage in graph.nodes.items():
        if stage.config.ranks > 1:
            raise GraphError(name, f"ranks={stage.config.ranks} needs processes", "use the ray runtime")
    ledger = Ledger(options.run_dir / "ledger.jsonl" if options.run_dir else None)
    flow = Flow(graph, ledger, first_group=options.first_group)
    recorder = Recorder()
    watch: asyncio.Task[None] | None = None
    tasks: dict[asyncio.Task[None], str] = {}
    try:
        watch = asyncio.create_task(flow.watch(options.stall_timeout_s))
        for name, stage in graph.nodes.items():
            for replica in range(stage.config.replicas):
                body = _run_one(graph, name, replica, flow, recorder, options)
                tasks[asyncio.create_task(body, name=f"{name}.{replica}")] = name
        pump = asyncio.create_task(_pump(flow, recorder, options))
        await _until(tasks, graph.until_node, flow, watch, options.grace_s)
        pump.cancel()
    finally:
        for task in [*tasks, *([watch] if watch else [])]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        options.consume(recorder.drain())
        ledger.close()
    return Outcome(totals=ledger.totals(), was_stopped=options.stopping.is_set())


async def _until(
    tasks: dict[asyncio.Task[None], str], until: str, flow: Flow, watch: asyncio.Task[None], grace_s: float
) -> None:
    """Wait for the until node, close the edges, and let the rest end; raises the first failure."""
    pending: set[asyncio.Task[None]] = set(tasks) | {watch}
    while any(tasks.get(task) == until for task in pending):
        finished, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in finished:
            if task is watch or task.exception() is not None:
                _raise_first(finished, watch)
    watch.cancel()
    flow.close()
    rest = pending - {watch}
    if rest:
        finished, _ = await asyncio.wait(rest, timeout=grace_s)
        _raise_first(finished, watch)


def _raise_first(finished: set[asyncio.Task[None]], watch: asyncio.Task[None]) -> None:
    failures = [error for task in finished if not task.cancelled() and (error := task.exception()) is not None]
    failures.sort(key=lambda error: isinstance(error, StallError))  # a stage's own failure says more than the stall
    if failures:
        raise failures[0]


async def _run_one(
    graph: Graph, node: str, replica: int, flow: Flow, recorder: Recorder, options: LocalOptions
) -> None:
    stage: Stage = graph_of(plan_of(graph)).nodes[node]
    loop = asyncio.get_running_loop()
    now = loop.time if options.is_virtual else time.time
    clock = CauseClock(loop.time)
    threads = VirtualThreads(clock) if options.is_virtual else Threads(clock, f"{node}.{replica}")
    context = Context(
        node=node,
        replica=replica,
        ranks=Ranks(),
        run_dir=options.run_dir or Path(),
        clock=clock,
        recorder=recorder,
        stopping=options.stopping,
        compute=threads.compute,
        background=threads.background,
        num_readers=num_readers(graph, node),
        resume_from=options.resume_from,
        now=now,
    )
    kinds = {f"{node}.{name}": flow.kind(f"{node}.{name}") for name in stage.ports}
    try:
        await run_replica(stage, context, flow, kinds=kinds, status_interval_s=options.status_interval_s)
    finally:
        threads.close()


def num_readers(graph: Graph, node: str) -> int:
    """Return how many replicas read the Latest edges that start at `node`."""

    read_by = {
        graph.node_of(e.target) for e in graph.edges if isinstance(e, Latest) and graph.node_of(e.source) == node
    }
    return sum(graph.nodes[reader].config.replicas for reader in read_by)


async def _pump(flow: Flow, recorder: Recorder, options: LocalOptions) -> None:
    """Hand events to the consumer as they gather."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(options.status_interval_s)
        now = loop.time() if options.is_virtual else time.time()
        options.consume([*recorder.drain(), *flow.edge_status(now)])
