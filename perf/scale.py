"""`flowrl bench scale`: the simulated flow on 8 to 10,000 GPUs, with a hub that takes its time for every call.

    flowrl bench scale
    flowrl bench scale --gpus 8 128 1024 --call-us 40 --bundled-us 20      # of your machine, by `python -m perf.hub`

The costs are those of the paper's 7B row (paper_rows.py); the batch, the replicas and the ranks grow with the GPUs, so
with a hub that takes no time every size runs at the same rate per GPU. Here the hub answers call after call, each in
the processor time that `perf.hub` says it takes. Sizes at which a run has proxies (`cluster.proxies=auto`) are
simulated without them and with them, where a call takes its time at its proxy and the less at the hub. What waits shows
in the rollouts per second. Every replica of every size is simulated, nothing is extrapolated; but one simulated message
stands for many groups of its generator, and costs as many calls. scale_report.py has the tables.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.graph.program import load_program
from flowrl.runtime.proxy import num_proxies
from flowrl.simulation.run import DirectFlow, simulate
from perf.machine import machine
from perf.paper import GRAPH, write_settings
from perf.paper_report import ROLES
from perf.paper_rows import num_messages, profile, read_tables, settings
from perf.scale_report import Point, Scaling, markdown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flowrl.runtime.flow import Flow
    from perf.paper_rows import Row, Tables

SIZE = "7B"
UNIT = 8  # GPUs that every role can be given its share of
GPUS = (8, 64, 256, 512, 1024, 2048, 4096, 10_000)
GROUP_SIZES = (1, 8)  # PPO's in the paper, and what perf.channels passes
MESSAGES = 2  # of a generator in one batch; each stands for its part of the groups
STEPS = 2  # measured, once the pipeline is full; each is as long as the other
CALL_US = 30.0  # of a call that comes over a connection of its own; see docs/benchmarks.md
BUNDLED_US = 20.0  # of one that a proxy brings with others
EACH_GROUP = frozenset({"put", "get", "acquire", "reject"})  # calls about one group; the others are about a batch


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate every size and print how it goes."""
    options = _parser().parse_args(argv)
    if wrong := [gpus for gpus in options.gpus if gpus < UNIT or gpus % UNIT]:
        _parser().error(f"--gpus: {wrong} are not multiples of {UNIT}, which every role's share needs")
    began = time.perf_counter()
    bases: list[Point] = []
    points: list[Point] = []
    for group_size in options.group_sizes:
        bases.append(simulated(UNIT, group_size, Hub(0.0, 0.0)))
        for gpus in sorted(options.gpus):
            for proxies in dict.fromkeys((0, num_proxies(None, processes_of(gpus)))):
                hub = Hub(options.call_us / 1e6, options.bundled_us / 1e6, proxies)
                points.append(simulated(gpus, group_size, hub))
                rate = f"{points[-1].rollouts_per_s:,.1f} rollouts/s ({time.perf_counter() - began:.0f} s)"
                said = f"{gpus:,} GPUs, {group_size} rollouts in a group, {proxies} proxies: {rate}"
                print(said, file=sys.stderr, flush=True)
    report = Scaling(size=SIZE, call_us=options.call_us, bundled_us=options.bundled_us, bases=tuple(bases),
                     points=tuple(points), machine=machine(), took_s=time.perf_counter() - began)  # fmt: skip
    print(markdown(report))
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowrl bench scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", nargs="+", type=int, default=GPUS, help=f"multiples of {UNIT}")
    parser.add_argument("--group-sizes", nargs="+", type=int, default=GROUP_SIZES, help="rollouts of one prompt")
    parser.add_argument("--call-us", type=float, default=CALL_US, help="of the hub for a call, by `perf.hub`")
    parser.add_argument("--bundled-us", type=float, default=BUNDLED_US, help="for one that a proxy brings")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


class Hub:
    """The hub, and its proxies: calls are answered in the order in which they come, and each takes its time.

    A simulated message stands for `groups` groups, so a call about it takes as often as long.
    """

    def __init__(self, call_s: float, bundled_s: float, proxies: int = 0) -> None:
        self.marks: list[tuple[float, float]] = []  # at each published version: when, and the calls until then
        self.groups = 1.0
        self.num_proxies = proxies
        self._costs_s = (call_s, bundled_s) if proxies else (call_s,)
        self._calls = 0.0
        self._free_s = [0.0] * (1 + proxies)  # when the last call will have been answered: by the hub, by each proxy
        self._num_callers = 0

    def connect(self, flow: Flow, replica: str, message_s: float) -> DirectFlow:
        """Return the flow as a replica reaches it through this hub."""
        self._num_callers += 1
        return Through(self, flow, replica, message_s, 1 + self._num_callers % max(1, self.num_proxies))

    async def serve(self, method: str, proxy: int) -> None:
        """Take a call's turn and its time."""
        now = asyncio.get_running_loop().time()
        calls = self.groups if method in EACH_GROUP else 1.0
        self._calls += calls
        if method == "publish":
            self.marks.append((now, self._calls))
        then_s = now
        for host, cost_s in zip((proxy, 0) if self.num_proxies else (0,), self._costs_s, strict=True):
            then_s = self._free_s[host] = max(then_s, self._free_s[host]) + calls * cost_s
        if then_s > now:
            await asyncio.sleep(then_s - now)

    @property
    def calls_per_s(self) -> float:
        """Return the rate of calls over the last whole steps."""
        (start_s, before), (end_s, after) = self.marks[-STEPS - 1], self.marks[-1]
        return (after - before) / (end_s - start_s)


class Through(DirectFlow):
    """The flow behind a hub."""

    def __init__(self, hub: Hub, flow: Flow, replica: str, message_s: float, proxy: int) -> None:
        super().__init__(flow, replica, message_s)
        self._serve = partial(hub.serve, proxy=proxy)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        direct = super().__getattr__(method)

        async def call(*arguments: Any) -> Any:
            await self._serve(method)
            return await direct(*arguments)

        self.__dict__[method] = call
        return call

    async def put(self, *arguments: Any) -> None:
        await self._serve("put")
        await super().put(*arguments)

    async def get(self, *arguments: Any) -> Any:
        await self._serve("get")
        return await super().get(*arguments)


def simulated(gpus: int, group_size: int, hub: Hub) -> Point:
    """Return how the flow goes on so many GPUs with this hub."""
    tables, row = _shrunk(MESSAGES)
    rollouts = read_tables().batch * gpus / row.gpus  # of one batch
    tree = scaled(tables, row, gpus)
    with tempfile.TemporaryDirectory() as directory:
        graph = load_program(GRAPH, config=write_settings(Path(directory), tree)).graph
    hub.groups = rollouts / tree["groups_per_step"] / group_size
    costs = profile(tables, row, "openrlhf")
    found = simulate(graph, costs, steps=STEPS, detail="causes", connect=hub.connect)
    return Point(gpus=gpus, group_size=group_size, rollouts_per_s=rollouts * found.steps_per_s,
                 calls_per_s=hub.calls_per_s, processes=processes_of(gpus), proxies=hub.num_proxies,
                 generators=tree["generator"]["replicas"])  # fmt: skip


def processes_of(gpus: int) -> int:
    """Return how many processes a run on so many GPUs has: every rank of every replica, and the prompts' own."""
    tree = scaled(*_shrunk(MESSAGES), gpus)
    return 1 + sum(tree[node].get("replicas", 1) * tree[node].get("ranks", 1) for node in ROLES)


def _shrunk(messages: int) -> tuple[Tables, Row]:
    """Return the tables and the row of one size, as though a generator's part of a batch were so many micro-batches."""
    tables = read_tables()
    row = next(row for row in tables.rows if row.size == SIZE)
    engine = row.openrlhf_gpus.vllm
    batch = engine.dp * engine.micro_batch * messages
    return msgspec.structs.replace(tables, hyperparameters={"rollout_batch": batch}), row


def scaled(tables: Tables, row: Row, gpus: int) -> dict[str, Any]:
    """Return a row's asynchronous settings with every role's GPUs, and the batch, in proportion to the GPUs."""
    tree = settings(tables, row, "openrlhf", max_staleness=1)
    tree["groups_per_step"] = num_messages(tables, row) * gpus // row.gpus
    tree["depths"] = {
        "reward_model_0": {"rollouts": tree["groups_per_step"]},
        "reference": {"scored": tree["groups_per_step"]},
    }
    for node in ROLES:
        name = "ranks" if node in ("learner", "critic") else "replicas"
        tree[node] = {**tree[node], name: tree[node][name] * gpus // row.gpus}
    return tree


if __name__ == "__main__":
    raise SystemExit(main())
