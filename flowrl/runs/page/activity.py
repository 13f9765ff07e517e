"""What a run's nodes and queues did over time, gathered from its events and drawn as strips of the page.

The axis is run time: seconds since the first event, with the gaps between the starts of a resumed run taken out.

Invariants:
- a bin of a node holds the seconds that its replicas were charged with in it, no more and no less;
- the sum of a row's bins is the sum of what was added to it;
- there are never more than `most` bins: when time goes beyond the last one, neighbours are added together and every bin
  is twice as wide;
- memory does not grow with the run, but for one entry a policy version;
- a strip has one rectangle for each run of equal bins, in the grid of an SVG that is `Activity.nodes` bins wide and 100
  high.

`Record` gathers all that the page shows in one pass over the run's history. Its `view` is of the newest start that
learned two steps (of the newest one where none did), as its own report was; everything else is of the whole run.

Tests: tests/unit/runs/page/test_activity.py
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from flowrl.telemetry.events import EdgeStatus, Evaluation, Notice, Span, Status, Step
from flowrl.telemetry.timeline import read_history, timelines
from flowrl.telemetry.view import RunView, words

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.telemetry.events import Event
    from flowrl.telemetry.timeline import Happened


FIRST_WIDTH_S = 0.25  # finer than a status, so that a run of a minute has a shape

Row = dict[str, float]  # amounts by key


class Bins:
    """Rows of bins on one axis of time that begins at 0."""

    def __init__(self, most: int) -> None:
        self.width_s = FIRST_WIDTH_S
        self._most = most
        self._rows: defaultdict[str, dict[int, Row]] = defaultdict(dict)  # row -> place of the bin -> amounts

    def add(self, row: str, key: str, start_s: float, end_s: float, amount: float) -> None:
        """Spread an amount evenly over a time; Bins(most=4).add("a", "x", 0, 2, 8) puts 1 into each quarter second.

        (That is 8 bins, so they are made twice as wide first, and hold 2 each.)
        """
        start_s, end_s = max(0.0, start_s), max(0.0, start_s, end_s)
        self.reach(end_s)
        first = min(int(start_s / self.width_s), self._most - 1)
        last = min(int(end_s / self.width_s), self._most - 1)
        for place in range(first, last + 1):
            share = 1.0
            if end_s > start_s:
                low, high = max(start_s, place * self.width_s), min(end_s, (place + 1) * self.width_s)
                share = max(0.0, high - low) / (end_s - start_s)
            if share or first == last:
                into = self._rows[row].setdefault(place, {})
                into[key] = into.get(key, 0.0) + share * amount

    def reach(self, time_s: float) -> None:
        """Make the bins wide enough to hold a time; two sets that reach the same time have bins of one width."""
        while time_s > self.width_s * self._most:
            self._widen()

    @property
    def names(self) -> list[str]:
        """Return the rows in the order in which they came up."""
        return list(self._rows)

    def row(self, name: str) -> dict[int, Row]:
        """Return the bins of a row that have anything, by their place."""
        return dict(sorted(self._rows[name].items()))

    def _widen(self) -> None:
        self.width_s *= 2
        for name, bins in self._rows.items():
            wider: dict[int, Row] = {}
            for place, amounts in bins.items():
                into = wider.setdefault(place // 2, {})
                for key, amount in amounts.items():
                    into[key] = into.get(key, 0.0) + amount
            self._rows[name] = wider


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


MOST_ROWS = 16  # nodes or queues; further ones are left out, and that is said


class Band(msgspec.Struct, frozen=True):
    """One colour of a strip."""

    kind: str  # a cause's value, or "fill"
    name: str
    path: str
    share: str  # of the strip's whole time, in words


class Strip(msgspec.Struct, frozen=True, kw_only=True):
    """A row."""

    name: str
    about: str
    width: int  # of the grid
    bands: list[Band]
    places: list[float]  # of the bins, percent of the width
    labels: list[str]  # what a bin says, in words


def node_strips(activity: Activity, nodes: Sequence[str], causes: Sequence[str]) -> list[Strip]:
    """Return a strip for each node: the shares of its replicas' time by cause, stacked."""
    found: list[Strip] = []
    width = _width(activity)
    for node in [name for name in nodes if name in activity.nodes.names][:MOST_ROWS]:
        bins = {place: row for place, row in activity.nodes.row(node).items() if sum(row.values()) > 0}
        spans: dict[str, list[tuple[int, int, int]]] = {cause: [] for cause in causes}
        for place, row in bins.items():
            level, total = 0.0, sum(row.values())
            for cause in causes:
                top = level + 100 * row.get(cause, 0.0) / total
                spans[cause].append((place, round(level), round(top)))
                level = top
        spent = {cause: sum(row.get(cause, 0.0) for row in bins.values()) for cause in causes}
        whole = sum(spent.values()) or 1.0
        bands = [Band(c, words(c), _path(spans[c]), f"{spent[c] / whole:.0%}") for c in causes if spent[c] > 0]
        about = ", ".join(f"{band.name} {band.share}" for band in bands if band.share != "0%")
        places, labels = _places(bins, width), [_shares_in_words(row, causes) for row in bins.values()]
        found.append(Strip(name=node, about=about, width=width, bands=bands, places=places, labels=labels))
    return found


def queue_strips(activity: Activity, queues: Sequence[str]) -> list[Strip]:
    """Return a strip for each queue: how much of its depth was filled."""
    found: list[Strip] = []
    width = _width(activity)
    for queue in [name for name in queues if name in activity.queues.names][:MOST_ROWS]:
        bins = {place: row for place, row in activity.queues.row(queue).items() if row.get(SEEN, 0.0) > 0}
        depth = max(1, activity.depths[queue])
        means = {place: row[FILLED] / row[SEEN] for place, row in bins.items()}
        spans = [(place, 0, min(100, round(100 * mean / depth))) for place, mean in means.items()]
        seen_s = sum(row[SEEN] for row in bins.values())
        mean = sum(row[FILLED] for row in bins.values()) / seen_s if seen_s else 0.0
        about = f"mean {mean:.1f}, greatest {activity.most[queue]}, of {depth}"
        places, labels = _places(bins, width), [f"{mean:.1f} of {depth}" for mean in means.values()]
        bands = [Band("fill", "held", _path(spans), "")]
        found.append(Strip(name=queue, about=about, width=width, bands=bands, places=places, labels=labels))
    return found


def _width(activity: Activity) -> int:
    """Return the bins up to the end of the run; both sets of rows have bins of one width."""
    return max(1, round(activity.end_s / activity.nodes.width_s + 0.5))


def _places(bins: dict[int, Row], width: int) -> list[float]:
    return [round(100 * (place + 0.5) / width, 2) for place in bins]


def _shares_in_words(row: Row, causes: Sequence[str]) -> str:
    total = sum(row.values())
    return ", ".join(f"{words(c)} {row[c] / total:.0%}" for c in causes if row.get(c, 0.0) / total >= 0.005)


def _path(spans: Sequence[tuple[int, int, int]]) -> str:
    """Return rectangles from (place, low, high); neighbours of one height are one rectangle."""
    parts: list[str] = []
    begin = length = low = high = 0
    for place, bottom, top in [*spans, (-2, 0, 0)]:
        if length and place == begin + length and (bottom, top) == (low, high):
            length += 1
            continue
        if length and high > low:
            parts.append(f"M{begin} {100 - high}h{length}v{high - low}h-{length}z")
        begin, length, low, high = place, 1, bottom, top
    return "".join(parts)


MOST_NOTICES = 40  # newest ones kept


class Record:
    """A run as its files tell it."""

    def __init__(self, run_dir: Path, *, nodes: Sequence[str]) -> None:
        """Read it; `nodes` are those of its graph, in the order to show them."""
        self.activity = Activity()
        self.steps: dict[int, Step] = {}  # by version; of one that was made again, the last
        self.evaluations: dict[int, Evaluation] = {}
        self.notices: deque[Notice] = deque(maxlen=MOST_NOTICES)
        self.num_notices = 0
        self.counts: Counter[type] = Counter()
        self.has_timeline = bool(timelines(run_dir))
        self.began_s = 0.0  # wall clock of the first event
        self._nodes = list(nodes)
        self._views: list[RunView] = []
        for happened in read_history(run_dir):
            self._take(happened)
        self.activity.close()
        self.view = next((v for v in reversed(self._views) if v.num_steps_done > 1), None) or (
            self._views[-1] if self._views else RunView(expected=self._nodes)
        )

    def _take(self, happened: Happened) -> None:
        start, event = happened
        while len(self._views) <= start:
            self._views.append(RunView(expected=self._nodes))
        self._views[start].fold([event])
        self.activity.consume(happened)
        self.counts[type(event)] += 1
        self.began_s = self.began_s or (event.start_s if isinstance(event, Span) else event.time_s)
        match event:
            case Step():
                for later in [version for version in self.steps if version >= event.version]:
                    del self.steps[later]  # a history that was given up
                self.steps[event.version] = event
            case Evaluation():
                self.evaluations[event.version] = event
            case Notice():
                self.notices.append(event)
                self.num_notices += 1
            case _:
                pass

    @property
    def last_step(self) -> Step | None:
        """Return the newest step of the history that survived."""
        return self.steps[max(self.steps)] if self.steps else None

    @property
    def elapsed_s(self) -> float:
        """Return the run time: that of all starts, without the time between them."""
        return self.activity.end_s

    @property
    def num_starts(self) -> int:
        """Return how often the run was started or resumed."""
        return max(1, len(self.activity.starts_s))

    @property
    def queues(self) -> list[str]:
        """Return the queues in the order in which the run reported them."""
        return list(self.activity.depths)

    @property
    def has_causes(self) -> bool:
        """Return whether anything says what replicas did with their time."""
        return bool(self.counts[Status] and self.activity.nodes.names)

    @property
    def has_fill(self) -> bool:
        """Return whether anything says how full queues were."""
        return bool(self.counts[EdgeStatus])
