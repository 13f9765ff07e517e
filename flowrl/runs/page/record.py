"""What the page shows of a run, gathered in one pass over its history.

Invariant: memory does not grow with the timeline, only with the steps. `view` is of the newest start that learned two
steps (of the newest one where none did), as its own report was; everything else is of the whole run. Called by page.py.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from flowrl.runs.page.activity import Activity
from flowrl.telemetry.events import EdgeStatus, Evaluation, Notice, Span, Status, Step
from flowrl.telemetry.history import read_history, timelines
from flowrl.telemetry.view import RunView

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.telemetry.history import Happened

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
