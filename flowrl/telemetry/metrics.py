"""The run in figures: metrics.jsonl with all of them, and state.json with the newest state of every replica and queue.

Each line of metrics.jsonl is a JSON object with a `kind`. It is "step" (version, metrics, how many groups were learned
at which staleness) or "evaluation" (mean and interval over prompts, every score, a few completions). Besides there are
"notice" and, at the end, "status", one for each replica. Every line is written whole as it comes, so a killed run loses
none; on a full disk lines wait, `MOST_WAITING` bytes of them; a resumed run appends. NaN and infinity become null,
which JSON has no other word for. The file state.json is for whoever looks from the outside: it is whole at any moment
and at most `INTERVAL_S` behind. The last one says that the run has ended, so one that does not say so and does not
change is of a run that was killed.

Tests: tests/unit/telemetry/test_metrics.py
Tests: tests/unit/telemetry/test_state.py
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.telemetry import clock
from flowrl.telemetry.events import EdgeStatus, Evaluation, Notice, Status, Step
from flowrl.telemetry.files import UNREADABLE, RecordFile, is_full, read_file, replace_file
from flowrl.telemetry.intervals import mean_interval, prompt_means
from flowrl.telemetry.scores import Bounds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from flowrl.telemetry.events import Event
    from flowrl.telemetry.view import RunView


MOST_WAITING = 64 << 20  # bytes: days of a run

_encoder = msgspec.json.Encoder()


class MetricsFile:
    """Writes the figures of a run as they come."""

    def __init__(self, path: Path, *, say: Callable[[str], None] = lambda text: None) -> None:
        self._file = RecordFile(path, most_bytes=MOST_WAITING, tell=say)
        self._newest: dict[tuple[str, int], Status] = {}

    def consume(self, events: list[Event]) -> None:
        """Write the steps, evaluations and notices among the events; remember each replica's newest status."""
        for event in events:
            if isinstance(event, Status):
                self._newest[event.node, event.replica] = event
            elif (row := row_of(event)) is not None:
                self._write(row)

    def close(self) -> None:
        """Write each replica's last status."""
        try:
            for status in self._newest.values():
                self._write({"kind": "status", **msgspec.structs.asdict(status)})
        finally:
            self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.append(_encoder.encode(row) + b"\n")


def row_of(event: Event) -> dict[str, Any] | None:
    """Return an event's line as plain data, or None where it has none."""
    match event:
        case Step():
            histogram = {str(stale): count for stale, count in sorted(Counter(event.staleness).items())}
            return {
                "kind": "step",
                "version": event.version,
                "num_steps": event.num_steps,
                "time_s": event.time_s,
                "metrics": event.metrics,
                "staleness": histogram,
            }
        case Evaluation():
            means = prompt_means(event.scores)
            interval = mean_interval(means) if means else None
            return {
                "kind": "evaluation",
                "version": event.version,
                "time_s": event.time_s,
                "mean": interval.mean if interval else None,
                "half_width": interval.half_width if interval else None,
                "num_prompts": len(means),
                "scores": event.scores,
                "completions": event.completions,
                **({"sets": event.sets} if event.sets else {}),
                **({"tasks": msgspec.to_builtins(event.tasks)} if event.tasks else {}),
            }
        case Notice():
            return {
                "kind": "notice",
                "level": event.level,
                "where": event.where,
                "text": event.text,
                "time_s": event.time_s,
            }
        case _:
            return None


class _StepLine(msgspec.Struct, tag_field="kind", tag="step"):
    version: int
    metrics: dict[str, float | None]  # null: not a finite number
    time_s: float = 0.0
    num_steps: int = 0
    staleness: dict[int, int] = {}


class _EvaluationLine(msgspec.Struct, tag_field="kind", tag="evaluation"):
    version: int
    time_s: float
    scores: list[list[float]]
    completions: list[dict[str, str]]
    sets: dict[str, list[list[float]]] = {}
    tasks: dict[str, Bounds] = {}


class _NoticeLine(msgspec.Struct, tag_field="kind", tag="notice"):
    level: str
    where: str
    text: str
    time_s: float


_Line = _StepLine | _EvaluationLine | _NoticeLine
_decoder = msgspec.json.Decoder(_Line)


def events_in(lines: Iterable[bytes]) -> Iterator[Step | Evaluation | Notice]:
    """Yield the steps, evaluations and notices that lines of a metrics file stand for; other lines are passed over.

    Figures that were not finite are left out of a step.
    """
    for row in _rows(lines):
        match row:
            case _StepLine():
                known = {name: value for name, value in row.metrics.items() if value is not None}
                stale = [age for age, count in row.staleness.items() for _ in range(count)]
                yield Step(
                    version=row.version, num_steps=row.num_steps, time_s=row.time_s, metrics=known, staleness=stale
                )
            case _EvaluationLine():
                yield Evaluation(**msgspec.structs.asdict(row))
            case _NoticeLine():
                yield Notice(level=row.level, where=row.where, text=row.text, time_s=row.time_s)


def read_evaluations(path: Path) -> list[Evaluation]:
    """Return the evaluations a metrics file holds, oldest first; lines cut short by a kill are passed over."""
    return [event for event in events_in((read_file(path) or b"").splitlines()) if isinstance(event, Evaluation)]


def read_steps(path: Path) -> dict[int, dict[str, float | None]]:
    """Return version -> figures of the step that made it; of a step that was taken again, those of the last time."""
    rows = _rows((read_file(path) or b"").splitlines())
    return {row.version: row.metrics for row in rows if isinstance(row, _StepLine)}


def _rows(lines: Iterable[bytes]) -> Iterator[_Line]:
    for line in lines:
        try:
            yield _decoder.decode(line)
        except UNREADABLE:  # a status, or a line that a kill cut short
            continue


INTERVAL_S = 1.0  # the rate at which replicas report, and the live view changes


class State(msgspec.Struct, frozen=True, kw_only=True):
    """A run at one moment."""

    started_s: float  # of this start of the run
    time_s: float
    is_ended: bool
    nodes: list[str]  # that will report, in the order to show them
    statuses: list[Status]  # one for each replica, the lives before its restarts included
    edges: list[EdgeStatus]
    metrics_bytes: int = 0  # that metrics.jsonl had when this start began: of those before it


class StateFile:
    """Writes the state of a view as it changes."""

    def __init__(self, run_dir: Path, view: RunView, *, now: Callable[[], float] = clock.now) -> None:
        self._path = state_path(run_dir)
        self._view = view
        self._now = now
        self._started_s = now()
        metrics = run_dir / "metrics.jsonl"
        self._metrics_bytes = metrics.stat().st_size if metrics.exists() else 0
        self._write(is_ended=False)

    def consume(self, events: list[Event]) -> None:
        """Write the state, unless it was written a moment ago."""
        if self._now() - self._written_s >= INTERVAL_S:
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
            metrics_bytes=self._metrics_bytes,
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
        return msgspec.json.decode(read_file(state_path(run_dir)) or b"", type=State)
    except UNREADABLE:
        return None
