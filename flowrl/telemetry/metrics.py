"""metrics.jsonl: the figures of a run, one JSON object a line, for plots and for whoever compares runs.

Each object has a `kind`: "step" (version, metrics, how many groups were learned at which staleness), "evaluation"
(mean and interval over prompts, every score, a few completions), "notice", and at the end "status", one for each
replica. Every line is flushed as it is written, so a killed run loses at most the line being written; a resumed run
appends. NaN and infinity become null, which JSON has no other word for.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.telemetry.events import Evaluation, Notice, Status, Step
from flowrl.telemetry.intervals import mean_interval, prompt_means

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.telemetry.events import Event

_encoder = msgspec.json.Encoder()


class MetricsFile:
    """Writes the figures of a run as they come."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        if self._file.tell() and path.read_bytes()[-1:] != b"\n":
            self._file.write(b"\n")  # a kill cut the last line short
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
        self._file.write(_encoder.encode(row) + b"\n")
        self._file.flush()


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


class _Line(msgspec.Struct):
    kind: str


class _EvaluationLine(msgspec.Struct):
    version: int
    time_s: float
    scores: list[list[float]]
    completions: list[dict[str, str]]


def read_evaluations(path: Path) -> list[Evaluation]:
    """Return the evaluations a metrics file holds, oldest first; lines cut short by a kill are passed over."""
    found: list[Evaluation] = []
    for line in path.read_bytes().splitlines():
        try:
            if msgspec.json.decode(line, type=_Line).kind != "evaluation":
                continue
            row = msgspec.json.decode(line, type=_EvaluationLine)
        except msgspec.DecodeError:
            continue
        found.append(Evaluation(version=row.version, time_s=row.time_s, scores=row.scores, completions=row.completions))
    return found


class _StepLine(msgspec.Struct):
    version: int
    metrics: dict[str, float | None]  # null: not a finite number


def read_steps(path: Path) -> dict[int, dict[str, float | None]]:
    """Return version -> figures of the step that made it; of a step that was taken again, those of the last time."""
    found: dict[int, dict[str, float | None]] = {}
    for line in path.read_bytes().splitlines():
        try:
            if msgspec.json.decode(line, type=_Line).kind == "step":
                step = msgspec.json.decode(line, type=_StepLine)
                found[step.version] = step.metrics
        except msgspec.DecodeError:
            continue
    return found
