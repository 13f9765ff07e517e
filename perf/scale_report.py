"""What `flowrl bench scale` found, as data and as Markdown.

A pure function of `Scaling`, which is also what its JSON holds. Called by perf/scale.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flowrl.config import Config
from flowrl.runtime.supervisor import REPORT_S, Options, report_interval_s
from perf.markdown import markdown_table
from perf.paper_rows import SOURCE

if TYPE_CHECKING:
    from collections.abc import Callable

BROKEN = 0.95  # of the linear rate; below it one queue host is taken to be too few
DESIGN = """\
The runtime has one queue host, and nothing shards it yet. What the design does to keep it out of the way: it handles a
message for each group and not for each token or rollout, so its load falls with the group size; a version of the
weights costs it two calls for each generator, while the bytes go past it; waiting costs it nothing, since nothing
polls. What more than one host would need: the queues divided by group, not by edge, because handing a group on ends the
hold upstream in the same step, so that both queues of a hop must be in one place; the credits (which give out group ids
in order) and the ledger's cut on one host that the others report to in batches; the two ordered queues read by asking
the host of the next group; and the signs of life gathered on each machine."""


class Point(Config):
    """The flow on so many GPUs."""

    gpus: int
    group_size: int
    rollouts_per_s: float
    calls_per_s: float  # to the queue host
    processes: int
    generators: int


class Scaling(Config):
    """Everything that was found."""

    size: str
    limit_per_s: float  # calls
    ms_per_rollout: float
    bases: tuple[Point, ...]  # of each group size: the fewest GPUs with a host that takes no time
    points: tuple[Point, ...]
    machine: str
    took_s: float


def markdown(report: Scaling) -> str:
    """Return the whole report."""
    intro = (
        f"Simulated from the stage times of the {report.size} row of {SOURCE}; batch, replicas and ranks grow with the "
        "GPUs, and training is taken to scale linearly with its ranks, which on thousands of GPUs it does not: this is "
        f"about the flow alone. One queue host answers {report.limit_per_s:,.0f} calls/s: what "
        f"{report.ms_per_rollout:g} ms for each rollout make in `python -m perf.channels`. Every process shows that it "
        f"lives, {1 / REPORT_S:g} times a second where there are few and less often where there are many; the "
        "simulated host does not carry that, the last two columns do."
    )
    parts = ["# The flow from 8 to 10,000 GPUs, simulated", intro]
    for base in report.bases:
        parts += [f"## {base.group_size} rollouts in a group", _table(report, base), _broken(report, base)]
    parts += [DESIGN, f"Simulated in {report.took_s:.0f} s on {report.machine}."]
    return "\n\n".join(parts) + "\n"


def _table(report: Scaling, base: Point) -> str:
    heads = ["GPUs", "generators", "linear, rollouts/s", "simulated", "of linear", "calls/s at the linear rate",
             "calls/s simulated", "signs of life/s", "hosts for all of it"]  # fmt: skip
    rows: list[list[str]] = []
    for point in report.points:
        if point.group_size != base.group_size:
            continue
        calls, signs = _offered(point, base), signs_per_s(point.processes)
        rows.append([
            f"{point.gpus:,}", f"{point.generators:,}", f"{_linear(point, base):,.1f}", f"{point.rollouts_per_s:,.1f}",
            f"{point.rollouts_per_s / _linear(point, base):.0%}", f"{calls:,.1f}", f"{point.calls_per_s:,.1f}",
            f"{signs:,.0f}", str(math.ceil((calls + signs) / report.limit_per_s)),
        ])  # fmt: skip
    return markdown_table(heads, rows)


def _linear(point: Point, base: Point) -> float:
    return base.rollouts_per_s * point.gpus / base.gpus


def _offered(point: Point, base: Point) -> float:
    """Return the calls a second that the flow would make at the linear rate."""
    return base.calls_per_s * point.gpus / base.gpus


def signs_per_s(num_processes: float) -> float:
    """Return the signs of life that reach the host each second from so many processes, under the usual settings."""
    return num_processes / report_interval_s(round(num_processes), Options().heartbeat_timeout_s)


def full_at(limit_per_s: float, base: Point) -> tuple[float, float, float]:
    """Return the GPUs at which one host is full: by the flow's calls, by the signs of life, by both."""

    def calls(gpus: float) -> float:
        return base.calls_per_s * gpus / base.gpus

    def signs(gpus: float) -> float:
        return signs_per_s(1 + (base.processes - 1) * gpus / base.gpus)  # the prompts' process is one for all

    def both(gpus: float) -> float:
        return calls(gpus) + signs(gpus)

    return _reaching(calls, limit_per_s), _reaching(signs, limit_per_s), _reaching(both, limit_per_s)


def _reaching(load: Callable[[float], float], limit: float) -> float:
    """Return the GPUs from which a load that never falls is above a limit, to a thousandth."""
    least, most = 0.0, 1.0
    while load(most) < limit:
        least, most = most, 2 * most
    while most - least > most / 1000:
        middle = (least + most) / 2
        least, most = (middle, most) if load(middle) < limit else (least, middle)
    return most


def _broken(report: Scaling, base: Point) -> str:
    by_calls, by_signs, by_both = full_at(report.limit_per_s, base)
    calls_per_rollout = base.calls_per_s / base.rollouts_per_s
    slow = [p.gpus for p in report.points
            if p.group_size == base.group_size and p.rollouts_per_s < BROKEN * _linear(p, base)]  # fmt: skip
    first = "the signs of life" if by_signs < by_calls else "the flow's calls"
    seen = f"the simulated flow falls below {BROKEN:.0%} of linear at {min(slow):,}" if slow else "no size falls behind"
    return (
        f"{calls_per_rollout:.2f} calls for each rollout. One host is full at {by_calls:,.0f} GPUs by the flow's calls "
        f"({seen}), at {by_signs:,.0f} by the signs of life, at {by_both:,.0f} by both. What breaks first: {first}."
    )
