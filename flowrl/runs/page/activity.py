"""What a run's nodes and queues did over time, gathered from its events for the page.

The axis is run time: seconds since the first event, with the gaps between the starts of a resumed run taken out.
Invariants: a bin of a node holds the seconds that its replicas were charged with in it, no more and no less; memory
does not grow with the run, but for one entry a policy version. Fed by record.py with the events of history.py.

Tests: tests/unit/runs/page/test_activity.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from flowrl.runs.page.bins import Bins
from flowrl.telemetry.events import EdgeStatus, Span, Status

if TYPE_CHECKING:
    from flowrl.telemetry.events import Event
    from flowrl.telemetry.history import Happened

MOST_BINS = 240  # about one for every four pixels of a wide screen
UPDATE, PUBLISH = "weight update v", "publish v"  # what spans of a new version are called
FILLED, SEEN = "items", "seconds"  # keys of a queue's bins


class Pause(NamedTuple):
    """What an update to a version cost the generator that it cost most."""

    replica: str
    pause_s: float
    transfer_s: float


class Activity:
    """Nodes, queues and weight updates over run time."""

    def __init__(self) -> None:
        self.nodes = Bins(MOST_BINS)  # row: node; key: cause
        self.queues = Bins(MOST_BINS)  # row: queue; keys: item-seconds, and seconds seen
        self.depths: dict[str, int] = {}
        self.most: dict[str, int] = {}  # items that each queue was seen to hold
        self.pauses: dict[int, Pause] = {}  # by version
        self.published_s: dict[int, float] = {}  # version -> from its making to the last generator's word
        self.starts_s: list[float] = []  # run time at which each start began
        self.end_s = 0.0
        self._zero_s = 0.0  # wall clock of run time 0, as of this start
        self._seconds: dict[tuple[str, int], dict[str, float]] = {}
        self._reported_s: dict[tuple[str, int], float] = {}
        self._fill: dict[str, tuple[float, int]] = {}  # since when the queue has held how much

    def consume(self, happened: Happened) -> None:
        """Take in an event of a start."""
        start, event = happened
        while len(self.starts_s) <= start:
            self._begin(_time_s(event))
        now_s = self.run_time(_time_s(event))
        self.end_s = max(self.end_s, now_s)
        match event:
            case Status():
                self._see_status(event, now_s)
            case EdgeStatus():
                self._settle(event.edge, now_s)
                self._fill[event.edge] = now_s, event.items
                self.depths[event.edge] = event.depth
                self.most[event.edge] = max(self.most.get(event.edge, 0), event.items)
            case Span():
                self._see_span(event)
            case _:
                pass

    def close(self) -> None:
        """Count what queues have held until the end, and bring nodes and queues to one width of bins."""
        for edge in list(self._fill):
            self._settle(edge, self.end_s)
        self._fill.clear()
        self.nodes.reach(self.end_s)
        self.queues.reach(self.end_s)

    def run_time(self, time_s: float) -> float:
        """Return a wall-clock time of the present start as run time."""
        return max(0.0, time_s - self._zero_s)

    def _begin(self, time_s: float) -> None:
        self.close()
        self._zero_s = time_s - self.end_s
        self.starts_s.append(self.end_s)
        self._seconds.clear()
        self._reported_s.clear()

    def _see_status(self, status: Status, now_s: float) -> None:
        key = (status.node, status.replica)
        before, then_s = self._seconds.get(key), self._reported_s.get(key, now_s)
        self._seconds[key], self._reported_s[key] = status.seconds, now_s
        if before is None:
            return
        for cause, spent_s in status.seconds.items():
            if (more_s := spent_s - before.get(cause, 0.0)) > 0:
                self.nodes.add(status.node, cause, then_s, now_s, more_s)

    def _settle(self, edge: str, now_s: float) -> None:
        if edge in self._fill:
            since_s, items = self._fill[edge]
            self.queues.add(edge, FILLED, since_s, now_s, items * (now_s - since_s))
            self.queues.add(edge, SEEN, since_s, now_s, now_s - since_s)

    def _see_span(self, span: Span) -> None:
        if span.name.startswith(UPDATE) and "pause_s" in span.args:
            version, pause_s = int(span.name.removeprefix(UPDATE)), span.args["pause_s"]
            if version not in self.pauses or pause_s > self.pauses[version].pause_s:
                name = f"{span.node}.{span.replica}"
                self.pauses[version] = Pause(name, pause_s, span.args.get("transfer_s") or 0.0)
        elif span.name.startswith(PUBLISH):
            self.published_s[int(span.name.removeprefix(PUBLISH))] = span.end_s - span.start_s


def _time_s(event: Event) -> float:
    return event.end_s if isinstance(event, Span) else event.time_s
