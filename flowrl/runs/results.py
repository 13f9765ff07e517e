"""What an evaluation found: scores of one model or of two, as lines and as results.json.

Invariants:
- two models are compared on the same items, pair by pair, and "better" is said only where the interval leaves out 0;
- results.json is whole or not there.

Called by runs/evaluation.py, mt_bench.py and alpaca_eval.py.

Tests: tests/unit/telemetry/test_scores.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.errors import DataError, ResourceError, one_line
from flowrl.telemetry.files import new_file
from flowrl.telemetry.scores import Aggregate, Bounds, difference_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of one task."""

    task: str
    metric: str
    filter: str = "none"
    bounds: Bounds
    higher_is_better: bool | None = True

    @property
    def key(self) -> str:
        """Return what its items stand under."""
        return f"{self.task}/{self.metric}/{self.filter}"


class Answers(msgspec.Struct, kw_only=True):
    """What came of the tasks for one model."""

    target: str
    scores: list[Score] = []
    items: dict[str, list[Any]] = {}  # by task, metric and filter: each item's value
    digests: dict[str, list[str]] = {}  # of those items


class Results(msgspec.Struct, kw_only=True):
    """What is written to results.json."""

    benchmark: str  # what asked, and its version
    seed: int
    limit: int
    of: Answers
    against: Answers | None = None
    differences: list[Score] = []
    notes: list[str] = []  # on who judged, and how far that can be trusted


def differences(
    ours: Answers, theirs: Answers, aggregates: Mapping[tuple[str, str], Aggregate | None], seed: int
) -> list[Score]:
    """Return ours - theirs for every score, item by item.

    Raises:
        DataError: the two were asked different items.
    """
    found: list[Score] = []
    for score in ours.scores:
        if ours.digests[score.key] != theirs.digests.get(score.key):
            raise DataError(
                f"task {score.task}", "the two models were asked different items", "see the task's function"
            )
        function = aggregates.get((score.task, score.metric))
        bounds = difference_of(ours.items[score.key], theirs.items[score.key], function, seed=seed)
        found.append(msgspec.structs.replace(score, bounds=bounds))
    return found


def conclude(results: Results, out: Path, say: Callable[[str], None]) -> Results:
    """Write results.json, say the table, and return them."""
    with new_file(out / "results.json") as aside:
        aside.write_bytes(msgspec.json.format(msgspec.json.encode(results, enc_hook=_plain), indent=1))
    for line in table(results):
        say(line)
    say(f"written: {out / 'results.json'}")
    return results


def directory(out: Path) -> Path:
    """Make the directory of an evaluation.

    Raises:
        ResourceError: it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(str(out), f"cannot be written ({error.strerror})", "choose another --out") from error
    return out


def table(results: Results) -> list[str]:
    """Return the scores as lines, each with its 95 % interval and the method behind it."""
    head = ("task", "metric", "score [95 % interval]", "items", "method")
    lines: list[str] = []
    for answers in (results.of, results.against):
        if answers is not None and answers.scores:
            rows = [_row(score, score.bounds.said()) for score in answers.scores]
            lines += [f"{answers.target}:", *_aligned([head, *rows])]
    if results.against is not None and results.differences:
        rows = [_row(score, f"{score.bounds.said()} {_verdict(score)}") for score in results.differences]
        lines.append(f"{results.of.target} - {results.against.target}, on the same items:")
        lines += _aligned([(*head[:2], "difference [95 % interval]", *head[3:]), *rows])
    return [*lines, *map(one_line, results.notes)]


def _row(score: Score, said: str) -> tuple[str, ...]:
    metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
    return (one_line(score.task), one_line(metric), said, str(score.bounds.num), score.bounds.method)


def _verdict(score: Score) -> str:
    low, high, better = score.bounds.low, score.bounds.high, score.higher_is_better
    if low is None or high is None or low <= 0 <= high or better is None:
        return "not told apart"
    return "better" if (low > 0) == better else "worse"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _plain(value: Any) -> Any:
    """Return a number of numpy's as Python's, and anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)
