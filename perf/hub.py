"""What a call costs the hub, in processor time: made over each process's own connection, and through proxies.

    python -m perf.hub [--processes 200] [--calls 200] [--bytes 8000] [--proxies 0 2] [--rounds 3]

The hub is this process, with a flow, its gate and its ledger on the disk; each proxy is one, as in a run; another makes
the calls of all replicas, over a connection for each: a credit, then a group into a queue, again and again. Processor
time is counted, not time, so that what else the machine does, and the callers, change little. The calls a second that
one processor sustains are one over it. `flowrl bench scale` simulates with these costs.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from flowrl.graph.graph import Credits, Graph, Queue
from flowrl.runtime.calls import CallClient, CallGate
from flowrl.runtime.flow import Flow
from flowrl.runtime.ledger import Ledger
from flowrl.runtime.proxy import Proxy
from flowrl.runtime.wire import Address, Connection, Listener
from perf.channel_stages import Drain, Relay, Source
from perf.machine import machine
from perf.markdown import markdown_table

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = "127.0.0.1"
ENOUGH = 1 << 40
SPAWN = multiprocessing.get_context("spawn")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=200, help="that call, each over a connection of its own")
    parser.add_argument("--calls", type=int, default=200, help="of each process, in a round")
    parser.add_argument("--bytes", type=int, default=8000, help="of a group: 1,000 tokens with their log-probs")
    parser.add_argument("--proxies", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    rows: list[list[str]] = []
    for num_proxies in options.proxies:
        rounds = [uvloop.run(measured(num_proxies, options)) for _ in range(options.rounds)]
        hub, proxies = ([each[place] for each in rounds] for place in (0, 1))
        rows.append([str(num_proxies), _spread(hub), _spread(proxies) if num_proxies else "-"])
    print(machine())
    print(f"{options.processes} processes, {options.processes * options.calls:,} calls a round, {options.bytes} bytes")
    print(markdown_table(["proxies", "hub, us a call", "a proxy, us a call of its own"], rows))


def _spread(found: list[float]) -> str:
    return f"{statistics.median(found):.1f} ({min(found):.1f} to {max(found):.1f})"


def wide_graph() -> Graph:
    """Return a graph in which no call waits."""
    source, relay, drain = Source(Source.Config()), Relay(Relay.Config()), Drain(Drain.Config())
    return Graph(
        nodes={"source": source, "relay": relay, "drain": drain},
        edges=[
            Queue(source.rollouts, relay.rollouts, depth=ENOUGH, max_bytes=ENOUGH),
            Queue(relay.scored, drain.samples, depth=ENOUGH),
            Credits(drain.released, source.credits, initial=ENOUGH),
        ],
        until=drain,
    )


async def measured(num_proxies: int, options: argparse.Namespace) -> tuple[float, float]:
    """Return the microseconds of processor time that a call costs the hub, and the proxy that brings it."""
    with tempfile.TemporaryDirectory() as directory:
        flow = Flow(wide_graph(), Ledger(Path(directory) / "ledger.jsonl"))
        listener = Listener(CallGate(flow))
        address = await listener.open(HERE)
        pipes = [SPAWN.Pipe() for _ in range(num_proxies)]
        proxies = [SPAWN.Process(target=be_proxy, args=(tuple(address), there), daemon=True) for _, there in pipes]
        for each in proxies:
            each.start()
        doors = [Address(*await asyncio.to_thread(here.recv)) for here, _ in pipes] or [address]
        begin, end = SPAWN.Event(), SPAWN.Event()
        arguments = ([tuple(each) for each in doors], options.processes, options.calls // 2, options.bytes, begin, end)
        caller = SPAWN.Process(target=be_callers, args=arguments, daemon=True)
        caller.start()
        await asyncio.to_thread(begin.wait)
        before_s = time.process_time()
        await asyncio.to_thread(end.wait)
        spent_s = time.process_time() - before_s
        num_calls = 2 * flow.ledger.num_open
        for here, _ in pipes:
            here.send(None)
        of_proxies_s = [here.recv() for here, _ in pipes]
        for each in (*proxies, caller):
            each.join()
        listener.close()
    return 1e6 * spent_s / num_calls, 1e6 * sum(of_proxies_s) / num_calls


def be_proxy(hub: tuple[str, int, str], pipe: Any) -> None:
    """Be a proxy until asked how much processor time it took."""

    async def body() -> None:
        listener = Listener(Proxy(await Connection.open(Address(*hub))))
        pipe.send(tuple(await listener.open(HERE)))
        before_s = time.process_time()
        await asyncio.to_thread(pipe.recv)
        pipe.send(time.process_time() - before_s)

    uvloop.run(body())


def be_callers(doors: list[tuple[str, int, str]], processes: int, pairs: int, size: int, begin: Any, end: Any) -> None:
    """Make the calls of so many processes."""

    async def one(wire: Connection, index: int) -> None:
        flow = CallClient(wire.carry, f"source.{index}", 0)
        for _ in range(pairs):
            await flow.put("source.rollouts", await flow.acquire("source.credits"), bytes(size))

    async def body() -> None:
        wires = [await Connection.open(Address(*doors[index % len(doors)])) for index in range(processes)]
        begin.set()
        await asyncio.gather(*(one(wire, index) for index, wire in enumerate(wires)))
        end.set()

    uvloop.run(body())


if __name__ == "__main__":
    main()
