"""`flowrl bench scale`: the simulated flow on 8 to 10,000 GPUs, with one queue host that takes its time for every call.

    flowrl bench scale
    flowrl bench scale --gpus 8 128 1024 --ms-per-rollout 0.4      # of your machine, by `python -m perf.channels`

The costs are those of the paper's 7B row (paper_rows.py); the batch, the replicas and the ranks grow with the GPUs, so
on a queue host without limits every size runs at the same rate per GPU. The Ray runtime has one queue host. Here it
answers call after call, as many a second as `perf.channels` says one host sustains, and what waits for it shows in the
rollouts per second. Every replica of every size is simulated, nothing is extrapolated; but one simulated message stands
for many groups of its generator, and costs the host as many calls. scale_report.py has the tables.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.graph.program import load_program
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
# The bound of perf/README.md for `python -m perf.channels`, which passes groups of 8 with so many calls: a credit,
# three times into a queue, two gets of one group, and at the end three calls for 16 groups.
MS_PER_ROLLOUT = 1.0
CHANNELS_GROUP = 8
CHANNELS_CALLS = 1 + 3 + 2 + 3 / 16
EACH_GROUP = frozenset({"put", "get", "acquire", "reject"})  # calls about one group; the others are about a batch


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate every size and print how it goes."""
    options = _parser().parse_args(argv)
    if wrong := [gpus for gpus in options.gpus if gpus < UNIT or gpus % UNIT]:
        _parser().error(f"--gpus: {wrong} are not multiples of {UNIT}, which every role's share needs")
    limit = calls_per_s(options.ms_per_rollout)
    began = time.perf_counter()
    bases: list[Point] = []
    points: list[Point] = []
    for group_size in options.group_sizes:
        bases.append(simulated(UNIT, group_size, 0.0))
        for gpus in sorted(options.gpus):
            points.append(simulated(gpus, group_size, 1 / limit))
            said = f"{gpus:,} GPUs, {group_size} rollouts in a group: {points[-1].rollouts_per_s:,.1f} rollouts/s"
            print(f"{said} ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
    report = Scaling(size=SIZE, limit_per_s=limit, ms_per_rollout=options.ms_per_rollout, bases=tuple(bases),
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
    parser.add_argument("--ms-per-rollout", type=float, default=MS_PER_ROLLOUT,
                        help="what `python -m perf.channels` prints (default: its bound, 1)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


def calls_per_s(ms_per_rollout: float) -> float:
    """Return the calls that a queue host sustains where `perf.channels` prints this; 1 ms is 773 calls/s."""
    return CHANNELS_CALLS / (CHANNELS_GROUP * ms_per_rollout / 1000)


class QueueHost:
    """One queue host: calls are answered in the order in which they come, and each takes `call_s`.

    A simulated message stands for `groups` groups, so a call about it takes as often as long.
    """

    def __init__(self, call_s: float, groups: float) -> None:
        self.marks: list[tuple[float, float]] = []  # at each published version: when, and the calls until then
        self._call_s = call_s
        self._groups = groups
        self._calls = 0.0
        self._free_s = 0.0  # when the last call will have been answered

    def connect(self, flow: Flow, replica: str, message_s: float) -> DirectFlow:
        """Return the flow as a replica reaches it through this host."""
        return Through(self, flow, replica, message_s)

    async def serve(self, method: str) -> None:
        """Take a call's turn and its time."""
        now = asyncio.get_running_loop().time()
        calls = self._groups if method in EACH_GROUP else 1.0
        self._calls += calls
        if method == "publish":
            self.marks.append((now, self._calls))
        if self._call_s > 0:
            self._free_s = max(now, self._free_s) + calls * self._call_s
            await asyncio.sleep(self._free_s - now)

    @property
    def calls_per_s(self) -> float:
        """Return the rate of calls over the last whole steps."""
        (start_s, before), (end_s, after) = self.marks[-STEPS - 1], self.marks[-1]
        return (after - before) / (end_s - start_s)


class Through(DirectFlow):
    """The flow behind a queue host."""

    def __init__(self, host: QueueHost, flow: Flow, replica: str, message_s: float) -> None:
        super().__init__(flow, replica, message_s)
        self._host = host

    def __getattr__(self, method: str) -> Callable[..., Any]:
        direct = super().__getattr__(method)

        async def call(*arguments: Any) -> Any:
            await self._host.serve(method)
            return await direct(*arguments)

        self.__dict__[method] = call
        return call

    async def put(self, *arguments: Any) -> None:
        await self._host.serve("put")
        await super().put(*arguments)

    async def get(self, *arguments: Any) -> Any:
        await self._host.serve("get")
        return await super().get(*arguments)


def simulated(gpus: int, group_size: int, call_s: float) -> Point:
    """Return how the flow goes on so many GPUs, where the queue host takes `call_s` for a call; 0 for none."""
    tables, row = _shrunk(MESSAGES)
    rollouts = read_tables().batch * gpus / row.gpus  # of one batch
    tree = scaled(tables, row, gpus)
    with tempfile.TemporaryDirectory() as directory:
        graph = load_program(GRAPH, config=write_settings(Path(directory), tree)).graph
    host = QueueHost(call_s, rollouts / tree["groups_per_step"] / group_size)
    costs = profile(tables, row, "openrlhf")
    found = simulate(graph, costs, steps=STEPS, detail="causes", connect=host.connect)
    return Point(gpus=gpus, group_size=group_size, rollouts_per_s=rollouts * found.steps_per_s,
                 calls_per_s=host.calls_per_s, processes=_processes(tree),
                 generators=tree["generator"]["replicas"])  # fmt: skip


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


def _processes(tree: dict[str, Any]) -> int:
    """Return how many processes a run has: every rank of every replica, and the prompts' own."""
    return 1 + sum(tree[node].get("replicas", 1) * tree[node].get("ranks", 1) for node in ROLES)


if __name__ == "__main__":
    raise SystemExit(main())
