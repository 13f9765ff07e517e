"""state.json: the newest state of every replica and queue, for whoever looks at a run from the outside.

Invariants: the file is whole at any moment; it is at most `INTERVAL_S` behind the process that drives the run, and the
last one written says that the run has ended, so that one which does not say so and does not change is of a run that was
killed. `Sinks` feeds it; watch.py reads it.

Tests: tests/unit/telemetry/test_state.py
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from flowrl.telemetry.events import EdgeStatus, Status
from flowrl.telemetry.files import UNREADABLE, is_full, replace_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flowrl.telemetry.events import Event
    from flowrl.telemetry.view import RunView

INTERVAL_S = 1.0  # the rate at which replicas report, and the live view changes


class State(msgspec.Struct, frozen=True, kw_only=True):
    """A run at one moment."""

    started_s: float  # of this start of the run; a resumed run has a later one than its first metrics
    time_s: float
    is_ended: bool
    nodes: list[str]  # that will report, in the order to show them
    statuses: list[Status]  # one for each replica, the lives before its restarts included
    edges: list[EdgeStatus]


class StateFile:
    """Writes the state of a view as it changes."""

    def __init__(self, run_dir: Path, view: RunView, *, now: Callable[[], float] = time.time) -> None:
        self._path = state_path(run_dir)
        self._view = view
        self._now = now
        self._started_s = now()
        self._write(is_ended=False)

    def consume(self, events: list[Event]) -> None:
        """Write the state, unless it was written a moment ago."""
        if not 0.0 <= self._now() - self._written_s < INTERVAL_S:  # a clock may be set back
            self._write(is_ended=False)

    def close(self) -> None:
        """Write the last state."""
        self._write(is_ended=True)

    def _write(self, *, is_ended: bool) -> None:
        self._written_s = self._now()
        state = State(
            started_s=self._started_s,
            time_s=self._written_s,
            is_ended=is_ended,
            nodes=list(self._view.expected),
            statuses=[replica.status for replica in self._view.replicas],
            edges=list(self._view.edges.values()),
        )
        try:
            replace_file(self._path, msgspec.json.encode(state), is_synced=False)
        except OSError as error:
            if not is_full(error):
                raise  # a full disk has the state of a while ago until there is room again


def state_path(run_dir: Path) -> Path:
    """Return where a run's state lies."""
    return run_dir / "state.json"


def read_state(run_dir: Path) -> State | None:
    """Return a run's newest state, or None where it has none that can be read."""
    try:
        return msgspec.json.decode(state_path(run_dir).read_bytes(), type=State)
    except (OSError, *UNREADABLE):
        return None
