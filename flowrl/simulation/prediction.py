"""Predictions: what a simulated run did between two of its steps, and how that reads as a table.

`Watch` is what the simulated replicas record into. It takes every replica's seconds by cause at both ends of the
measured window, the steps in between, and looks at the queues. Used by simulate.py.

Tests: tests/unit/simulation/test_run.py
"""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from flowrl.telemetry.events import Cause, EdgeStatus, Recorder, Step
from flowrl.telemetry.view import format_duration, words

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flowrl.graph.stage import Context
    from flowrl.simulation.fake import SimulationState
    from flowrl.telemetry.events import Event

LEAST_STEPS = 6  # measured before their scatter says anything
NORMAL_95 = 1.96
SHOWN = (Cause.COMPUTE, Cause.WAIT_INPUT, Cause.WAIT_ROOM, Cause.UPDATE, Cause.WAIT_DEVICES)


class Fill(msgspec.Struct, frozen=True, kw_only=True):
    """How full a queue was, over the looks at it."""

    mean: float
    max: int
    depth: int
    mean_bytes: float
    max_bytes: int


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What a run would do once it is under way."""

    steps_per_s: float
    samples_per_s: float
    tokens_per_s: float
    first_step_s: float  # from the first prompt; starting the processes is not in it
    num_steps: int  # measured, after `num_warmup` that were dropped
    num_warmup: int
    shares: dict[str, dict[str, float]]  # node -> cause -> part of its replicas' time; {}: only the speed
    slots: dict[str, float]  # node -> part of its decode slots filled, by time; only of nodes that decode
    devices: dict[str, float]  # part of its capacity that was used
    staleness: dict[int, int]  # learned groups by policy versions
    queues: dict[str, Fill]
    bottleneck: str  # the node that computes most; "" where only the speed was looked at
    notes: list[str]

    @property
    def mean_staleness(self) -> float:
        """Return the mean over learned groups."""
        total = sum(self.staleness.values())
        return sum(stale * count for stale, count in self.staleness.items()) / total if total else 0.0

    def time_s(self, steps: int) -> float:
        """Return how long the first `steps` steps take; 20 s to the first and 0.5 a second after make 3 take 24."""
        return self.first_step_s + (steps - 1) / self.steps_per_s


class _Mark(NamedTuple):
    """What the replicas had spent at one end of the measured window."""

    time_s: float
    seconds: Mapping[tuple[str, int], dict[str, float]]
    filled_s: Mapping[tuple[str, int], float]
    busy_s: Mapping[str, float]  # of devices


class Watch(Recorder):
    """Takes the replicas' seconds at the ends of the measured window, and everything in between."""

    def __init__(self, warmup: int, total: int, state: SimulationState, *, precision: float = 0.0) -> None:
        super().__init__()
        self.state = state
        self._precision = precision
        self.contexts: dict[tuple[str, int], Context] = {}
        self._warmup = warmup
        self._total = total
        self._steps: list[Step] = []
        self._marks: list[_Mark] = []
        self._fills: defaultdict[str, list[EdgeStatus]] = defaultdict(list)
        self._ended: asyncio.Future[None] | None = None

    @property
    def ended(self) -> asyncio.Future[None]:
        """Return what is done when the last step has been seen."""
        if self._ended is None:
            self._ended = asyncio.get_running_loop().create_future()
        return self._ended

    @property
    def num_steps(self) -> int:
        """Return how many steps have been learned."""
        return len(self._steps)

    def record(self, event: Event) -> None:
        """Note a step; every other event of a replica is let go."""
        if not isinstance(event, Step) or len(self._marks) == 2:
            return
        self._steps.append(event)
        is_last = len(self._steps) == self._total or self._is_precise()
        if len(self._steps) == self._warmup or is_last:
            for device in self.state.devices.values():
                device.progress()
            mark = _Mark(
                event.time_s,
                {replica: context.clock.seconds() for replica, context in self.contexts.items()},
                {key: context.slots.filled_s() for key, context in self.contexts.items() if context.slots},
                {name: device.busy_s for name, device in self.state.devices.items()},
            )
            self._marks.append(mark)
        if is_last and not self.ended.done():
            self.ended.set_result(None)

    def _is_precise(self) -> bool:
        """Return whether the mean time of the measured steps is known well enough."""
        num = len(self._steps) - self._warmup
        if self._precision <= 0 or num < LEAST_STEPS:
            return False
        times_s = [step.time_s for step in self._steps[self._warmup - 1 :]]
        taken_s = [end_s - start_s for start_s, end_s in itertools.pairwise(times_s)]
        half_s = NORMAL_95 * statistics.stdev(taken_s) / math.sqrt(num)
        return half_s <= self._precision * statistics.fmean(taken_s)

    def fail(self, error: Exception) -> None:
        """End the run with what has gone wrong in it, unless it has ended."""
        if not self.ended.done():
            self.ended.set_exception(error)

    def look(self, queues: list[EdgeStatus]) -> None:
        """Keep how full the queues are within the window."""
        if len(self._marks) == 1:
            for status in queues:
                self._fills[status.edge].append(status)

    def prediction(self, *, notes: list[str]) -> Prediction:
        """Return what was seen between the two marks."""
        (start_s, before, filled_before, busy_before), (end_s, after, filled_after, busy_after) = self._marks
        window_s = max(1e-12, end_s - start_s)
        spent: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for (node, replica), seconds in after.items():
            spent[node].update({c: s - before.get((node, replica), {}).get(c, 0.0) for c, s in seconds.items()})
        shares = {
            node: {cause: part / sum(seconds.values()) for cause, part in seconds.items()}
            for node, seconds in spent.items()
            if sum(seconds.values()) > 0
        }
        filled: defaultdict[str, list[float]] = defaultdict(list)
        for (node, replica), filled_s in filled_after.items():
            filled[node].append((filled_s - filled_before.get((node, replica), 0.0)) / window_s)
        steps = self._steps[self._warmup :]
        return Prediction(
            steps_per_s=len(steps) / window_s,
            samples_per_s=sum(step.metrics["samples"] for step in steps) / window_s,
            tokens_per_s=sum(step.metrics["tokens"] for step in steps) / window_s,
            first_step_s=self._steps[0].time_s,
            num_steps=len(steps),
            num_warmup=self._warmup,
            shares=shares,
            slots={node: statistics.fmean(parts) for node, parts in filled.items()},
            devices={name: (busy - busy_before.get(name, 0.0)) / window_s for name, busy in busy_after.items()},
            staleness=dict(sorted(Counter(stale for step in steps for stale in step.staleness).items())),
            queues={edge: _fill(looks) for edge, looks in self._fills.items()},
            bottleneck=max(shares, key=lambda node: shares[node].get(Cause.COMPUTE, 0.0), default=""),
            notes=notes,
        )


def _fill(looks: list[EdgeStatus]) -> Fill:
    return Fill(
        mean=sum(look.items for look in looks) / len(looks),
        max=max(look.items for look in looks),
        depth=looks[0].depth,
        mean_bytes=sum(look.size_bytes for look in looks) / len(looks),
        max_bytes=max(look.size_bytes for look in looks),
    )


def table(prediction: Prediction, *, steps: int) -> str:
    """Return a prediction for people; `steps` are those of the run that is asked about."""
    p = prediction
    has_turns = any(part.get(Cause.WAIT_DEVICES) for part in p.shares.values())
    shown = SHOWN if has_turns else SHOWN[:-1]
    lines = [
        f"learned: {p.samples_per_s:,.2f} samples/s, {p.tokens_per_s:,.0f} tokens/s, "
        f"{3600 * p.steps_per_s:,.1f} steps/h",
        f"{steps} steps take {format_duration(p.time_s(steps))}, the first {format_duration(p.first_step_s)}",
        "",
        *_aligned(
            [("% of the time", *map(words, shown)), *(_shares(node, p.shares[node], shown) for node in p.shares)]
        ),
        "",
        bottleneck_line(p),
        *(f"  {node}: {part:.0%} of its decode slots filled" for node, part in p.slots.items() if node != p.bottleneck),
        *(f"  {name} {used:.0%} in use" for name, used in sorted(p.devices.items())),
        "",
        f"staleness: mean {p.mean_staleness:.2f}, "
        + ", ".join(f"{stale}: {count / sum(p.staleness.values()):.0%}" for stale, count in p.staleness.items()),
    ]
    if p.queues:
        rows = [("queue", "mean", "max", "depth", "MB")]
        rows += [
            (edge, f"{q.mean:.1f}", str(q.max), str(q.depth), f"{q.mean_bytes / 1e6:.2f}")
            for edge, q in p.queues.items()
        ]
        lines += ["", *_aligned(rows)]
    lines += ["", f"measured over {p.num_steps} simulated steps after {p.num_warmup}"]
    return "\n".join([*lines, *(f"note: {note}" for note in p.notes)])


def bottleneck_line(prediction: Prediction) -> str:
    """Return `bottleneck: generator, computing 93% of the time`; of one that decodes, also how full its slots are."""
    computing = prediction.shares[prediction.bottleneck][Cause.COMPUTE]
    filled = prediction.slots.get(prediction.bottleneck)
    slots = "" if filled is None else f", {filled:.0%} of its decode slots filled"
    return f"bottleneck: {prediction.bottleneck}, computing {computing:.0%} of the time{slots}"


def _shares(node: str, shares: dict[str, float], shown: tuple[Cause, ...]) -> tuple[str, ...]:
    return (node, *(f"{100 * shares.get(cause, 0.0):.1f}" for cause in shown))


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
