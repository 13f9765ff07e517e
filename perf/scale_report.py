"""What `flowrl bench scale` found, as data and as Markdown.

A pure function of `Scaling`, which is also what its JSON holds. Called by perf/scale.py.
"""

from __future__ import annotations

from flowrl.config import Config
from flowrl.runtime.supervisor import REPORT_S, Options, report_interval_s
from perf.markdown import markdown_table
from perf.paper_rows import SOURCE

BROKEN = 0.95  # of the linear rate; below it a hub without proxies is taken to be full
DESIGN = """\
One hub owns the flow. What the design does to keep it out of the way: it handles a message for each group and not for
each token or rollout, so its load falls with the group size; a version of the weights costs it two calls for each
generator, while the bytes go past it; waiting costs it nothing, since nothing polls. Most of what a call costs is its
packet, so where there are many processes they call proxies (`cluster.proxies`), each of which hands the hub the calls
of many in one piece."""


class Point(Config):
    """The flow on so many GPUs."""

    gpus: int
    group_size: int
    rollouts_per_s: float
    calls_per_s: float  # to the queue host
    processes: int
    proxies: int
    generators: int


class Scaling(Config):
    """Everything that was found."""

    size: str
    call_us: float  # of the hub, or a proxy, for a call over a connection of its own
    bundled_us: float  # of the hub for one that a proxy brings
    bases: tuple[Point, ...]  # of each group size: the fewest GPUs with a hub that takes no time
    points: tuple[Point, ...]
    machine: str
    took_s: float


def markdown(report: Scaling) -> str:
    """Return the whole report."""
    intro = (
        f"Simulated from the stage times of the {report.size} row of {SOURCE}; batch, replicas and ranks grow with the "
        "GPUs, and training is taken to scale linearly with its ranks, which on thousands of GPUs it does not: this is "
        f"about the flow alone. A call takes the hub {report.call_us:g} us, and {report.bundled_us:g} us where a proxy "
        "brings it with others (`python -m perf.hub`). Every process shows that it lives, "
        f"{1 / REPORT_S:g} times a second where there are few and less often where there are many; the simulated hub "
        "does not carry that, the last column does."
    )
    parts = ["# The flow from 8 to 10,000 GPUs, simulated", intro]
    for base in report.bases:
        parts += [f"## {base.group_size} rollouts in a group", _table(report, base), _broken(report, base)]
    parts += [DESIGN, f"Simulated in {report.took_s:.0f} s on {report.machine}."]
    return "\n\n".join(parts) + "\n"


def _table(report: Scaling, base: Point) -> str:
    heads = ["GPUs", "generators", "proxies", "linear, rollouts/s", "simulated", "of linear", "calls/s simulated",
             "signs of life/s"]  # fmt: skip
    rows: list[list[str]] = []
    for point in report.points:
        if point.group_size == base.group_size:
            linear = _linear(point, base)
            rows.append([
                f"{point.gpus:,}", f"{point.generators:,}", str(point.proxies), f"{linear:,.1f}",
                f"{point.rollouts_per_s:,.1f}", f"{point.rollouts_per_s / linear:.0%}", f"{point.calls_per_s:,.1f}",
                f"{signs_per_s(point.processes):,.0f}",
            ])  # fmt: skip
    return markdown_table(heads, rows)


def _linear(point: Point, base: Point) -> float:
    return base.rollouts_per_s * point.gpus / base.gpus


def signs_per_s(num_processes: float) -> float:
    """Return the signs of life that reach the driver each second from so many processes, under the usual settings."""
    return num_processes / report_interval_s(round(num_processes), Options().heartbeat_timeout_s)


def _broken(report: Scaling, base: Point) -> str:
    alone = [point for point in report.points if point.group_size == base.group_size and not point.proxies]
    slow = [point.gpus for point in alone if point.rollouts_per_s < BROKEN * _linear(point, base)]
    seen = f"falls below {BROKEN:.0%} of linear at {min(slow):,} GPUs" if slow else "keeps up at every size"
    full = base.gpus * 1e6 / report.call_us / base.calls_per_s
    return (
        f"{base.calls_per_s / base.rollouts_per_s:.2f} calls for each rollout. Without proxies the hub is full at "
        f"{full:,.0f} GPUs on average, and {seen}: calls come in bursts."
    )
