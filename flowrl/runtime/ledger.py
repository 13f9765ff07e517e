"""The ledger: what became of every admitted prompt group.

Invariant: each admitted group ends in exactly one of learned (with the step), filtered or failed (with the reason);
a second ending is an error, not an overwrite. Every entry is one JSON line in `ledger.jsonl`, flushed as it is
written. The flow owns the ledger; nobody else writes to it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, TextIO

from flowrl.errors import RunError

if TYPE_CHECKING:
    from pathlib import Path

ENDINGS = ("learned", "filtered", "failed")


class Ledger:
    """What became of every admitted group; `path` None keeps it in memory only."""

    def __init__(self, path: Path | None) -> None:
        self._endings: dict[int, str] = {}
        self._admitted: set[int] = set()
        self._file: TextIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a")

    def admit(self, group_id: int) -> None:
        """Note that a group entered the flow; the same group again (after a crash) is not a new one."""
        if group_id not in self._admitted:
            self._admitted.add(group_id)
            self._write(group=group_id, event="admitted")

    def end(self, group_id: int, ending: str, *, step: int | None = None, reason: str = "") -> None:
        """Note how a group ended.

        Raises:
            RunError: it was never admitted, or had ended before.
        """
        if ending not in ENDINGS:
            raise RunError("ledger", f"{ending!r} is not an ending", f"use one of {', '.join(ENDINGS)}")
        if group_id not in self._admitted:
            raise RunError("ledger", f"group {group_id} ended as {ending} but was never admitted")
        if group_id in self._endings:
            raise RunError("ledger", f"group {group_id} ended as {ending} after it was {self._endings[group_id]}")
        self._endings[group_id] = ending
        self._write(group=group_id, event=ending, step=step, reason=reason)

    def has_ended(self, group_id: int) -> bool:
        """Return whether a group has its ending."""
        return group_id in self._endings

    def totals(self) -> dict[str, int]:
        """Return how many groups were admitted, ended in each way, and are unfinished."""
        counts = {ending: 0 for ending in ENDINGS}
        for ending in self._endings.values():
            counts[ending] += 1
        return {"admitted": len(self._admitted), **counts, "unfinished": len(self._admitted) - len(self._endings)}

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, **entry: object) -> None:
        if self._file is not None:
            self._file.write(json.dumps({k: v for k, v in entry.items() if v not in (None, "")}) + "\n")
            self._file.flush()
