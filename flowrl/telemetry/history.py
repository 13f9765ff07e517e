"""A run's past, read back from its directory: the events of all its starts, as far as its files tell.

Steps, evaluations and notices come from metrics.jsonl, spans, causes of time and queue fill from timeline.json and
those of resumed starts. Invariants: events come start by start and in the order of the files; a file that is missing
or was cut short by a kill gives what it has; nothing is held in memory but the metrics. The timeline rounds: causes to
0.1 % of the time between two statuses, and what a replica did before its first status is left out. Called by page.py.

Tests: tests/unit/telemetry/test_history.py
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from flowrl.telemetry.causes import Cause
from flowrl.telemetry.events import EdgeStatus, Span, Status
from flowrl.telemetry.files import UNREADABLE
from flowrl.telemetry.metrics import events_in
from flowrl.telemetry.view import words

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flowrl.telemetry.events import Event

CAUSES = {words(cause): cause for cause in Cause}  # as the timeline writes them


class Happened(NamedTuple):
    """An event, and which start of the run it belongs to: 0 for the first, 1 for the first resumption."""

    start: int
    event: Event


class _Record(msgspec.Struct):
    """The part of a timeline's record that is read back."""

    ph: str
    name: str
    cat: str = ""
    ts: int = 0
    dur: int = 0
    tid: int = 0
    args: dict[str, Any] = {}


_decoder = msgspec.json.Decoder(_Record)


def timelines(run_dir: Path) -> list[Path]:
    """Return the timeline of each start of a run, the first one's first."""
    later = [path for path in run_dir.glob("timeline-*.json") if path.stem.partition("-")[2].isdigit()]
    later.sort(key=lambda path: int(path.stem.partition("-")[2]))
    return [path for path in (run_dir / "timeline.json", *later) if path.exists()]


def read_history(run_dir: Path) -> Iterator[Happened]:
    """Yield a run's events; a metric's event goes in front of the first of its start's timeline that is not older."""
    metrics = run_dir / "metrics.jsonl"
    told = deque(events_in(metrics.read_bytes().splitlines()) if metrics.exists() else ())
    paths = timelines(run_dir)
    begins_s = [begin_s(path) for path in paths]
    for start, path in enumerate(paths):
        until_s = min((each for each in begins_s[start + 1 :] if each is not None), default=float("inf"))
        for event in read_timeline(path):
            while told and told[0].time_s <= min(_time_s(event), until_s):
                yield Happened(start, told.popleft())
            yield Happened(start, event)
        while told and told[0].time_s < until_s:
            yield Happened(start, told.popleft())
    for event in told:
        yield Happened(0, event)  # there is no timeline at all


def begin_s(path: Path) -> float | None:
    """Return the time of the first record of a timeline that has one."""
    return next((record.ts / 1e6 for record in _records(path) if record.ts), None)


def read_timeline(path: Path) -> Iterator[Span | Status | EdgeStatus]:
    """Yield the spans, statuses and queue fills that a timeline shows, in its order."""
    threads: dict[tuple[str, int], int] = {}  # by node and tid: the replica
    replicas: dict[str, _Replica] = {}
    for record in _records(path):
        match record.ph:
            case "M" if record.name == "thread_name":
                node, _, replica = record.args["name"].partition(" lane ")[0].rpartition(".")
                threads[node, record.tid] = int(replica)
            case "X":
                groups = record.args.pop("groups", [])
                yield Span(node=record.cat, replica=threads.get((record.cat, record.tid), 0), name=record.name,
                           start_s=record.ts / 1e6, end_s=(record.ts + record.dur) / 1e6, groups=groups,
                           args=record.args)  # fmt: skip
            case "C" if record.name.endswith(" %"):
                name = record.name.removesuffix(" %")
                if name not in replicas:
                    replicas[name] = _Replica(name)
                yield replicas[name].status(record.ts / 1e6, record.args)
            case "C" if " -> " in record.name:
                edge, _, depth = record.name.rpartition(" (of ")
                yield EdgeStatus(edge=edge, time_s=record.ts / 1e6, items=record.args["items"],
                                 depth=int(depth.rstrip(")")), size_bytes=0)  # fmt: skip


class _Replica:
    """Adds up the seconds of a replica from its shares of the time between two statuses."""

    def __init__(self, name: str) -> None:
        self._node, _, number = name.rpartition(".")
        self._replica = int(number)
        self._last_s: float | None = None
        self._seconds = {cause.value: 0.0 for cause in Cause}

    def status(self, time_s: float, percent: dict[str, float]) -> Status:
        spent_s = 0.0 if self._last_s is None else max(0.0, time_s - self._last_s)
        self._last_s = time_s
        known = {CAUSES[name]: part for name, part in percent.items() if name in CAUSES}
        total = sum(known.values())
        for cause, part in known.items():
            self._seconds[cause] += spent_s * part / total if total else 0.0
        now = max(known, key=lambda cause: known[cause], default=Cause.COMPUTE)
        return Status(node=self._node, replica=self._replica, time_s=time_s, cause=now, seconds=dict(self._seconds),
                      done=0)  # fmt: skip


def _records(path: Path) -> Iterator[_Record]:
    with path.open("rb") as file:
        for line in file:
            if b'"cat":"group"' in line:  # an arrow; half of a timeline are arrows
                continue
            try:
                yield _decoder.decode(line.rstrip(b",\n"))
            except UNREADABLE:  # a bracket, or a line that a kill cut short
                continue


def _time_s(event: Span | Status | EdgeStatus) -> float:
    return event.end_s if isinstance(event, Span) else event.time_s
