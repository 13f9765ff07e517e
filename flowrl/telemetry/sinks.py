"""Where a run's events go: the view, the early warnings, the metrics file, the timeline, trackers and the terminal.

Invariants:
- every sink sees every event, in order;
- a sink that fails (a full disk, a tracker that is down) is closed and left out with one notice, and the run goes on;
- a notice made by a sink reaches the others like any event.

The launcher opens the sinks around a run, hands `consume` to the runtime, and reads `view` for the report.

Tests: tests/unit/telemetry/test_sinks.py
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

from flowrl.config import load_class
from flowrl.errors import say
from flowrl.telemetry import clock
from flowrl.telemetry.events import Evaluation, Notice
from flowrl.telemetry.files import read_file
from flowrl.telemetry.metrics import MetricsFile, StateFile, events_in
from flowrl.telemetry.symptoms import Symptoms
from flowrl.telemetry.terminal import LiveView, PlainLines, notice_line
from flowrl.telemetry.timeline import Timeline
from flowrl.telemetry.trackers import TrackerSettings, add_trackers
from flowrl.telemetry.view import RunView

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from rich.console import Console

    from flowrl.telemetry.events import Event


class EventSink(Protocol):
    """Takes in a run's events; lives on the driver's event loop and must not block it."""

    def consume(self, events: list[Event]) -> None:
        """Take in events in order of arrival."""
        ...

    def close(self) -> None:
        """Write what is held back and let go of files; called once."""
        ...


class Sinks:
    """All sinks of a run as one."""

    def __init__(
        self, view: RunView, *, say: Callable[[str], None] = say, now: Callable[[], float] = clock.now
    ) -> None:
        self.view = view
        self.say = say
        self._now = now
        self._sinks: dict[str, EventSink] = {}
        self._notices: list[Notice] = []

    def add(self, name: str, open_sink: Callable[[], EventSink]) -> None:
        """Open a sink and add it; events go to the sinks in the order they were added, and they close in it."""
        try:
            self._sinks[name] = open_sink()
        except Exception as error:  # a sink may fail as it likes and must never cost the run
            self._lose(name, error)

    def warn(self, where: str, text: str) -> None:
        """Make a warning that reaches every sink with the next events."""
        self.note(where, text, level="warning")

    def note(self, where: str, text: str, *, level: str = "info") -> None:
        """Make a notice that reaches every sink with the next events."""
        self._notices.append(Notice(level=level, where=where, text=text, time_s=self._now()))

    def consume(self, events: list[Event]) -> None:
        """Fold events, and the notices made since the last call, into the view and pass them to every sink."""
        events = [*events, *self._take_notices()]
        self.view.fold(events)
        for name, sink in list(self._sinks.items()):
            try:
                sink.consume(events)
            except Exception as error:  # see `add`
                del self._sinks[name]
                self._lose(name, error)
                self._close(name, sink)

    def close(self) -> None:
        """Close the sinks one by one; those still open hear what the closed ones had to say."""
        while self._sinks:
            if self._notices:
                self.consume([])
            name = next(iter(self._sinks), None)
            if name is not None:
                self._close(name, self._sinks.pop(name))
        for notice in self._take_notices():
            self.say(notice_line(notice))

    def _close(self, name: str, sink: EventSink) -> None:
        try:
            sink.close()
        except Exception as error:  # see `add`
            self._lose(name, error)

    def _lose(self, name: str, error: Exception) -> None:
        self.warn(name, f"failed ({type(error).__name__}: {error}); the run goes on without it")

    def _take_notices(self) -> list[Notice]:
        notices, self._notices = self._notices, []
        return notices


@contextmanager
def open_sinks(
    run_dir: Path,
    settings: TrackerSettings,
    *,
    title: str,
    nodes: Sequence[str] = (),
    console: Console | None = None,
) -> Iterator[Sinks]:
    """Open a run's sinks and close them when the block ends.

    `nodes` are the names that will report, in the order to show them. A resumed run appends to its metrics, takes the
    evaluations in them into its view, the steps into what it is warned by, and starts a timeline of its own.
    """
    sinks = Sinks(RunView(expected=nodes))
    metrics = run_dir / "metrics.jsonl"
    before = [*events_in((read_file(metrics) or b"").splitlines())]
    sinks.view.recall(event for event in before if isinstance(event, Evaluation))
    symptoms = Symptoms(sinks.warn)
    symptoms.recall(before)
    sinks.add("warnings", lambda: symptoms)
    add_trackers(settings, sinks, run_dir=run_dir, title=title)
    for name, path in settings.sinks.items():
        sinks.add(f"sinks.{name}", partial(load_class(path, f"sinks.{name}"), run_dir))
    sinks.add("timeline", lambda: Timeline(timeline_path(run_dir), say=lambda line: sinks.warn("timeline", line)))
    sinks.add("metrics", lambda: MetricsFile(metrics, say=lambda line: sinks.warn("metrics", line)))
    sinks.add("state", lambda: StateFile(run_dir, sinks.view))
    if console is not None or sys.stdout.isatty():
        live = LiveView(sinks.view, title=title, console=console)
        sinks.say = live.say
        sinks.add("live view", lambda: live)
    else:
        sinks.add("terminal", lambda: PlainLines(sinks.view, say=say))
        sinks.say = say
    try:
        yield sinks
    finally:
        sinks.close()


def timeline_path(run_dir: Path) -> Path:
    """Return where this start of a run writes its timeline: `timeline.json`, after a resume `timeline-2.json`."""
    path, count = run_dir / "timeline.json", 1
    while path.exists():
        count += 1
        path = run_dir / f"timeline-{count}.json"
    return path
