"""What the flow itself costs: queues, credits, ledger and wire, through the Ray runtime, nothing computed.

    python -m perf.channels [--tokens 1000] [--group-size 8] [--rounds 5]

A source, two relays and a drain pass groups of ready-made rollouts. Printed: groups and rollouts per second and
milliseconds per rollout, median and spread over the rounds. See perf/README.md for how to read it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from flowrl.graph.graph import Credits, Graph, Queue
from flowrl.runtime.cluster import Cluster
from flowrl.runtime.ray import run_ray
from flowrl.runtime.supervisor import Options
from flowrl.telemetry.events import Event, Notice
from perf.channel_stages import Drain, Relay, Source
from perf.machine import machine

if TYPE_CHECKING:
    from collections.abc import Sequence


def channel_graph(options: argparse.Namespace) -> Graph:
    source = Source(Source.Config(tokens=options.tokens, group_size=options.group_size))
    first, second = Relay(Relay.Config()), Relay(Relay.Config())
    drain = Drain(Drain.Config(rounds=options.rounds, groups=options.groups))
    return Graph(
        nodes={"source": source, "first": first, "second": second, "drain": drain},
        edges=[
            Queue(source.rollouts, first.rollouts, depth=32),
            Queue(first.scored, second.rollouts, depth=32),
            Queue(second.scored, drain.samples),
            Credits(drain.released, source.credits, initial=64),
        ],
        until=drain,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1000, help="of one rollout")
    parser.add_argument("--group-size", type=int, default=8, help="rollouts of one prompt")
    parser.add_argument("--groups", type=int, default=300, help="in one round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    graph = channel_graph(options)
    events: list[Event] = []
    with tempfile.TemporaryDirectory() as directory, Cluster(graph, None) as cluster:

        async def body() -> None:
            await run_ray(graph, Options(run_dir=Path(directory), consume=events.extend, grace_s=2.0), cluster)

        uvloop.run(body())
    rates = [float(e.text) for e in events if isinstance(e, Notice) and e.where == "drain.0"]
    per_rollout = [1000 / (rate * options.group_size) for rate in rates]
    print(machine())
    print(f"{options.group_size} rollouts of {options.tokens} tokens a group, 3 hops, {len(rates)} rounds")
    print(f"groups/s   median {statistics.median(rates):8.1f}  ({min(rates):.1f} to {max(rates):.1f})")
    print(
        f"ms/rollout median {statistics.median(per_rollout):8.3f}  ({min(per_rollout):.3f} to {max(per_rollout):.3f})"
    )


if __name__ == "__main__":
    main()
