"""Scores written into prompts: a model learns what good answers look like and can then be asked for one (SteerLM).

A score becomes a level from 0 to levels - 1 between the least and the greatest score of the data (Dong 2023,
2310.05344). The line "helpfulness: 7, verbosity: 2" goes into the system message, or before a plain string. Asking for
the best later is a system prompt with the highest levels. Called by `load_examples`.

Tests: tests/unit/data/test_examples.py
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flowrl.data.formats import NormalRow


def score_range(name: str, rows: Sequence[NormalRow]) -> tuple[float, float]:
    """Return the least and the greatest score in a column.

    Raises:
        DataError: all are the same.
    """
    scores = [row.scores[name] for row in rows]
    if scores and min(scores) == max(scores):
        what = f"is {scores[0]:g} in all {len(scores)} rows, so there is nothing to condition on"
        raise DataError(f"data.condition_on: column {name!r}", what, "leave it out")
    return min(scores, default=0.0), max(scores, default=0.0)


def with_levels(row: NormalRow, ranges: Mapping[str, tuple[float, float]], *, num_levels: int) -> NormalRow:
    """Return a row whose prompt states the levels of its scores; a row without scores stays as it is.

    A score of 3 between 1 and 5 is level 5 of 10: 9 * (3 - 1) / (5 - 1) = 4.5, rounded up.
    """
    if not row.scores:
        return row
    levels: list[str] = []
    for name, score in row.scores.items():
        low, high = ranges[name]
        levels.append(f"{name}: {math.floor((num_levels - 1) * (score - low) / (high - low) + 0.5)}")
    line = ", ".join(levels)
    if row.prompt:
        return msgspec.structs.replace(row, prompt=_with_line(row.prompt, line))
    if isinstance(row.responses[0], str):
        return msgspec.structs.replace(row, prompt=f"{line}\n")
    return msgspec.structs.replace(row, responses=[_with_line(row.responses[0], line)])


def _with_line(prompt: Any, line: str) -> Any:
    if isinstance(prompt, str):
        return f"{line}\n{prompt}"
    first = prompt[0]
    if first["role"] == "system" and isinstance(first.get("content"), str):
        return [{**first, "content": f"{first['content']}\n{line}"}, *prompt[1:]]
    return [{"role": "system", "content": line}, *prompt]
