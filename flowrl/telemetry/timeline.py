"""timeline.json: what every replica did when, for https://ui.perfetto.dev or chrome://tracing; written, and read back.

A process for each node and a thread for each replica; where spans of one replica overlap (a generator's requests, a
learner that publishes while it trains) they are laid out on lanes of it. An arrow runs through all spans that handled
one prompt group, from its sampling to the step that learned it. Counters show how full each queue is, and which causes
each replica's time went to.

Invariants:
- spans on one thread never overlap;
- every arrow starts and ends inside a span;
- the file is the array form of the trace format, which readers accept without its closing bracket, so that a killed run
  leaves a readable file.

Times are whole microseconds.

`read_history` gives a run's past as events, start by start and in the order of the files: steps, evaluations and
notices from metrics.jsonl, the others from the timelines. A file that is missing or was cut short by a kill gives what
it has; nothing is held in memory but the metrics. The timeline rounds: causes to 0.1 % of the time between two
statuses, and what a replica did before its first status is left out.

Tests: tests/unit/telemetry/test_timeline.py
Tests: tests/unit/telemetry/test_history.py
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from flowrl.telemetry.events import Cause, EdgeStatus, Evaluation, Notice, Span, Status, Step
from flowrl.telemetry.files import UNREADABLE, RecordFile, read_file
from flowrl.telemetry.metrics import events_in
from flowrl.telemetry.view import shares, words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from flowrl.telemetry.events import Event


MAX_RECORDS = 2_000_000  # about 400 MB, what a browser still opens
SETTLE_US = 5_000_000  # a span may reach the driver this much later than one that ended after it
MOST_WAITING = 64 << 20  # bytes that wait for room on a full disk
MAX_OPEN_GROUPS = 100_000  # groups whose arrow is not drawn yet; the oldest, which were filtered or failed, go first
QUEUES_PID = 1  # the queues' own process; nodes are numbered after it

_encoder = msgspec.json.Encoder()


class Lanes:
    """Gives each span of one replica a lane on which nothing else overlaps it."""

    def __init__(self) -> None:
        self._ends_us: list[int] = []

    def place(self, start_us: int, end_us: int) -> int:
        """Return the lane for a span; with spans in the order they ended, as few lanes as any layout needs.

        The lane that became free last is taken (best fit), which is what makes the number smallest.
        """
        free = [lane for lane, last_us in enumerate(self._ends_us) if last_us <= start_us]
        if not free:
            self._ends_us.append(end_us)
            return len(self._ends_us) - 1
        lane = max(free, key=self._ends_us.__getitem__)
        self._ends_us[lane] = end_us
        return lane


class Timeline:
    """Writes the timeline as events come; `say` is told what is left out, and of a full disk."""

    def __init__(self, path: Path, *, say: Callable[[str], None], max_records: int = MAX_RECORDS) -> None:
        self._path = path
        self._say = say
        self._file = RecordFile(path, is_new=True, most_bytes=MOST_WAITING, tell=say)
        self._written: list[bytes] = [b"[\n"]  # since the last events
        self._left = max_records
        self._max_records = max_records
        self._num_left_out = 0
        self._pids: dict[str, int] = {}
        self._tids: dict[tuple[str, int, int], int] = {}
        self._lanes: dict[tuple[str, int], Lanes] = {}
        self._groups: dict[int, list[tuple[int, int, int]]] = {}  # (start_us, pid, tid) of the spans of a group
        self._finished: dict[int, int] = {}  # group -> end of the step that learned it, oldest first
        self._now_us = 0
        self._fill: dict[str, int] = {}
        self._seconds: dict[tuple[str, int], dict[str, float]] = {}
        self._filled_s: dict[tuple[str, int], float] = {}
        self._with_requests: set[tuple[str, int]] = set()  # replicas that have had requests in flight

    def consume(self, events: list[Event]) -> None:
        """Write the events; arrows follow once their group was learned and its spans have had time to arrive."""
        for event in events:
            match event:
                case Span():
                    self._write_span(event)
                case Status():
                    self._write_shares(event)
                case EdgeStatus():
                    self._write_fill(event)
                case Step():
                    self._write_mark(f"version {event.version}", event.time_s)
                case Evaluation():
                    self._write_mark(f"evaluation of version {event.version}", event.time_s)
                case Notice():
                    self._write_mark(f"{event.where}: {event.text}", event.time_s)
        while self._finished:
            group, end_us = next(iter(self._finished.items()))
            if end_us + SETTLE_US > self._now_us:
                break
            self._draw_arrow(group)
        while len(self._groups) > MAX_OPEN_GROUPS:
            self._draw_arrow(next(iter(self._groups)))
        self._file.append(b"".join(self._written))
        self._written.clear()

    def close(self) -> None:
        """Draw the arrows still open and close the array; says how much was left out, if anything was."""
        try:
            for group in list(self._groups):
                self._draw_arrow(group)
            title = {"name": "process_sort_index", "ph": "M", "pid": QUEUES_PID, "args": {"sort_index": 1}}
            self._file.append(b"".join([*self._written, _encoder.encode(title), b"\n]\n"]))
        finally:
            self._file.close()
        if self._num_left_out:
            self._say(
                f"{self._path.name} holds the first {self._max_records:,} records of the run; "
                f"{self._num_left_out:,} later ones were left out"
            )

    def _write_span(self, span: Span) -> None:
        start_us = _us(span.start_s)
        end_us = max(_us(span.end_s), start_us + 1)  # an arrow cannot hold on to a span of no length
        self._now_us = max(self._now_us, end_us)
        if self._left <= 0:
            self._num_left_out += 1
            return
        lane = self._lanes.setdefault((span.node, span.replica), Lanes()).place(start_us, end_us)
        pid, tid = self._pid(span.node), self._tid(span.node, span.replica, lane)
        args = {"groups": span.groups, **span.args} if span.groups else span.args
        self._write(
            {
                "name": span.name,
                "cat": span.node,
                "ph": "X",
                "ts": start_us,
                "dur": end_us - start_us,
                "pid": pid,
                "tid": tid,
                "args": args,
            }
        )
        for group in span.groups:
            self._groups.setdefault(group, []).append((start_us, pid, tid))
            if span.name.startswith("step "):
                self._finished[group] = end_us

    def _draw_arrow(self, group: int) -> None:
        """Write a group's arrow: start, steps, finish, each at the start of its span and after it in the file."""
        points = sorted(self._groups.pop(group, []))
        self._finished.pop(group, None)
        if len(points) < 2 or self._left < len(points):
            return
        for place, (at_us, pid, tid) in enumerate(points):
            phase = "s" if place == 0 else "f" if place == len(points) - 1 else "t"
            self._write(
                {
                    "name": "group",
                    "cat": "group",
                    "ph": phase,
                    "bp": "e",
                    "id": group,
                    "ts": at_us,
                    "pid": pid,
                    "tid": tid,
                }
            )

    def _write_shares(self, status: Status) -> None:
        """Write, in percent, the causes of a replica's time since its last status, and how full its slots were."""
        key = (status.node, status.replica)
        before = self._seconds.get(key, {})
        spent = {cause: max(0.0, seconds - before.get(cause, 0.0)) for cause, seconds in status.seconds.items()}
        self._seconds[key] = dict(status.seconds)
        seen = {words(cause): round(100 * share, 1) for cause, share in shares(spent).items() if status.seconds[cause]}
        if seen and status.filled_s is not None:
            filled_s = max(0.0, status.filled_s - self._filled_s.get(key, 0.0))
            self._filled_s[key] = status.filled_s
            told = {"filled": round(100 * filled_s / max(1e-9, sum(spent.values())), 1)}
            self._write_counter(f"{status.node}.{status.replica} slots", status.time_s, self._pid(status.node), told)
        if seen:
            self._write_counter(f"{status.node}.{status.replica} %", status.time_s, self._pid(status.node), seen)
        if status.running:
            self._with_requests.add(key)
        if key in self._with_requests:
            name = f"{status.node}.{status.replica} running"
            self._write_counter(name, status.time_s, self._pid(status.node), {"requests": status.running})

    def _write_fill(self, edge: EdgeStatus) -> None:
        if self._fill.get(edge.edge) == edge.items:
            return
        if not self._fill:
            self._name_process(QUEUES_PID, "queues")
        self._fill[edge.edge] = edge.items
        self._write_counter(f"{edge.edge} (of {edge.depth})", edge.time_s, QUEUES_PID, {"items": edge.items})

    def _write_counter(self, name: str, time_s: float, pid: int, values: dict[str, float]) -> None:
        self._write({"name": name, "ph": "C", "ts": _us(time_s), "pid": pid, "args": values})

    def _write_mark(self, name: str, time_s: float) -> None:
        self._write({"name": name, "ph": "i", "s": "g", "ts": _us(time_s), "pid": QUEUES_PID, "tid": 0})

    def _pid(self, node: str) -> int:
        if node not in self._pids:
            self._pids[node] = QUEUES_PID + 1 + len(self._pids)
            self._name_process(self._pids[node], node)
        return self._pids[node]

    def _tid(self, node: str, replica: int, lane: int) -> int:
        key = (node, replica, lane)
        if key not in self._tids:
            tid = self._tids[key] = 1000 * replica + lane + 1 if lane < 999 else 10_000_000 + len(self._tids)
            name = f"{node}.{replica}" + (f" lane {lane + 1}" if lane else "")
            about = {"ph": "M", "pid": self._pid(node), "tid": tid}
            self._write({"name": "thread_name", **about, "args": {"name": name}})
            self._write({"name": "thread_sort_index", **about, "args": {"sort_index": tid}})
        return self._tids[key]

    def _name_process(self, pid: int, name: str) -> None:
        self._write({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}})
        self._write({"name": "process_sort_index", "ph": "M", "pid": pid, "args": {"sort_index": pid}})

    def _write(self, record: dict[str, Any]) -> None:
        if self._left <= 0:
            self._num_left_out += 1
            return
        self._left -= 1
        self._written.append(_encoder.encode(record) + b",\n")


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


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
    later = [path for path in run_dir.glob("timeline-*.json") if path.stem.partition("-")[2].isdecimal()]
    later.sort(key=lambda path: int(path.stem.partition("-")[2]))
    return [path for path in (run_dir / "timeline.json", *later) if path.exists()]


def read_history(run_dir: Path) -> Iterator[Happened]:
    """Yield a run's events; a metric's event goes in front of the first of its start's timeline that is not older."""
    metrics = run_dir / "metrics.jsonl"
    told = deque(events_in((read_file(metrics) or b"").splitlines()))
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
                node, replica = record.cat, threads.get((record.cat, record.tid), 0)
                start_s, end_s = record.ts / 1e6, (record.ts + record.dur) / 1e6
                yield Span(
                    node=node,
                    replica=replica,
                    name=record.name,
                    start_s=start_s,
                    end_s=end_s,
                    groups=groups,
                    args=record.args,
                )
            case "C" if record.name.endswith((" %", " slots")):
                name, _, of = record.name.rpartition(" ")
                if name not in replicas:
                    replicas[name] = _Replica(name)
                if of == "%":
                    yield replicas[name].status(record.ts / 1e6, record.args)
                else:  # stands before the causes of the same time
                    replicas[name].filled = record.args["filled"]
            case "C" if " -> " in record.name:
                edge, _, depth = record.name.rpartition(" (of ")
                items, most, time_s = record.args["items"], int(depth.rstrip(")")), record.ts / 1e6
                yield EdgeStatus(edge=edge, time_s=time_s, items=items, depth=most, size_bytes=0)


class _Replica:
    """Adds up the seconds of a replica from its shares of the time between two statuses."""

    def __init__(self, name: str) -> None:
        self._node, _, number = name.rpartition(".")
        self._replica = int(number)
        self._last_s: float | None = None
        self._seconds = {cause.value: 0.0 for cause in Cause}
        self.filled: float | None = None  # percent of its decode slots, since the last status
        self._filled_s = 0.0

    def status(self, time_s: float, percent: dict[str, float]) -> Status:
        spent_s = 0.0 if self._last_s is None else max(0.0, time_s - self._last_s)
        self._last_s = time_s
        known = {CAUSES[name]: part for name, part in percent.items() if name in CAUSES}
        total = sum(known.values())
        for cause, part in known.items():
            self._seconds[cause] += spent_s * part / total if total else 0.0
        self._filled_s += spent_s * (self.filled or 0.0) / 100
        now = max(known, key=lambda cause: known[cause], default=Cause.COMPUTE)
        node, replica, seconds = self._node, self._replica, dict(self._seconds)
        filled_s = None if self.filled is None else self._filled_s
        return Status(node=node, replica=replica, time_s=time_s, cause=now, seconds=seconds, done=0, filled_s=filled_s)


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
