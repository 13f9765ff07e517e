"""Watch a run from the outside: the live view of a process that drives it, in another terminal.

What the view shows is read from the run's own files, the newest state of replicas and queues from state.json, steps,
evaluations and notices from metrics.jsonl; nothing is asked of the run and nothing written, so any number may watch.
Files do not wake a reader, so they are looked at once a second, as often as they change. For how long a run has been
silent is reckoned by the watcher's own monotonic clock, and the run's times by the run's. Called by `flowrl watch`.

Tests: tests/unit/runs/test_watch.py
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Literal

from flowrl.telemetry.events import Evaluation, Notice
from flowrl.telemetry.files import read_file
from flowrl.telemetry.metrics import INTERVAL_S, events_in, read_state
from flowrl.telemetry.terminal import LiveView, PlainLines
from flowrl.telemetry.view import RunView, format_duration

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import Console

    from flowrl.telemetry.events import Event
    from flowrl.telemetry.metrics import State

SILENT_S = 10.0  # a driver that has written no state for so long is said to be silent
SHOWN_BEFORE = 12  # of the events before the watching began, the newest

End = Literal["ended", "killed", "left"]


def watch(
    run_dir: Path,
    *,
    is_held: Callable[[], bool],
    say: Callable[[str], None],
    console: Console | None = None,
    wait: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> End:
    """Show a run until it ends, its last process is gone or the user has seen enough (Ctrl-C); says which it was.

    `is_held` tells whether a process of the run lives; `console` or a terminal gets the table, any other output lines.
    """
    follower = Follower(run_dir, now)
    has_table = console is not None or sys.stdout.isatty()
    screen: LiveView | PlainLines | None = None
    state, end = read_state(run_dir), "left"
    try:
        while end == "left":
            lives = is_held()  # asked before the files are read: what the last process wrote is in them
            state = read_state(run_dir)
            events = follower.read(state)
            if screen is None:
                events = events[-SHOWN_BEFORE:]
                began_s = state.started_s if state else None
                screen = (
                    LiveView(follower.view, title=run_dir.name, console=console, now=follower.run_time, since_s=began_s)
                    if has_table
                    else PlainLines(follower.view, say=say)
                )
            screen.consume(events)
            if lives:
                wait(INTERVAL_S)
            else:
                end = "ended" if _is_ended(run_dir, state) else "killed"
    except KeyboardInterrupt:
        pass
    finally:
        if screen is not None:
            screen.close()
    say(_last_line(run_dir, end, state))
    return end


def _is_ended(run_dir: Path, state: State | None) -> bool:
    return (run_dir / "report.txt").exists() if state is None else state.is_ended


def _last_line(run_dir: Path, end: End, state: State | None) -> str:
    match end:
        case "ended":
            return f"{run_dir} has ended; its report is in {run_dir / 'report.txt'}"
        case "killed":
            ago = f", last heard of {format_duration(max(0.0, time.time() - state.time_s))} ago" if state else ""
            what = f"{run_dir} is dead: it has no process and did not come to its end{ago}"
            return f"{what}; continue it with: flowrl run GRAPH --resume {run_dir}"
        case _:
            return f"no longer watching {run_dir}; the run goes on"


class Follower:
    """Reads what is new in a run's files as events, and keeps the view they make."""

    def __init__(self, run_dir: Path, now: Callable[[], float]) -> None:
        self.view = RunView()
        self._now = now
        self._heard_s = now()  # when the newest state was read
        self._metrics = run_dir / "metrics.jsonl"
        self._offset = 0
        self._seen_s = 0.0  # the run's time in it
        self._is_silent = False

    def run_time(self) -> float:
        """Return the run's time, as far as its newest state tells."""
        return self._seen_s + self._now() - self._heard_s

    def read(self, state: State | None) -> list[Event]:
        """Fold what is new into the view; returns the steps, evaluations and notices among it.

        Of a start of the run before this one only the evaluations are taken, into the view alone.
        """
        told: list[Event] = []
        before, lines = self._new_lines(0 if state is None else state.metrics_bytes)
        self.view.recall(event for event in events_in(before) if isinstance(event, Evaluation))
        told += events_in(lines)
        if state is not None:
            self._read_state(state)
            told += self._silence(state)
        self.view.fold(told)
        return told

    def _read_state(self, state: State) -> None:
        self.view.expected = tuple(state.nodes)
        if state.time_s != self._seen_s:
            self._seen_s, self._heard_s = state.time_s, self._now()
            self.view.fold([*state.statuses, *state.edges])

    def _silence(self, state: State) -> list[Event]:
        """Say it once when the driver falls silent."""
        silent_s = self._now() - self._heard_s
        was_silent, self._is_silent = self._is_silent, silent_s > SILENT_S
        if was_silent or not self._is_silent or state.is_ended:
            return []
        text = f"has not been heard of for {format_duration(silent_s)}"
        return [Notice(level="warning", where="driver", text=text, time_s=state.time_s)]

    def _new_lines(self, begin: int) -> tuple[list[bytes], list[bytes]]:
        """Return the whole lines that were added since the last call: those before byte `begin`, and the others."""
        added = read_file(self._metrics, self._offset) or b""  # None: the run is about to write it
        whole = added[: added.rfind(b"\n") + 1]
        first = max(0, begin - self._offset)
        self._offset += len(whole)
        return whole[:first].splitlines(), whole[first:].splitlines()
