"""Quarantine: groups that could not be scored or that kept killing their stage, one readable JSON file each.

Invariant: a file is whole or not there. Written by the reward stages and by the supervisor.

Tests: tests/unit/telemetry/test_quarantine.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.messages import Buffer
from flowrl.telemetry.files import replace_file

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.messages import Message


def quarantine(run_dir: Path, group_id: int, group: Message, *, where: str, error: Exception) -> Path:
    """Write down a group, the replica that could not take it and the last error; returns the file."""
    directory = run_dir / "quarantine"
    directory.mkdir(parents=True, exist_ok=True)
    record = {"group_id": group_id, "where": where, "error": str(error), "input": _plain(group)}
    path = directory / f"group-{group_id}.json"
    replace_file(path, msgspec.json.format(msgspec.json.encode(record)))
    return path


def _plain(value: Any) -> Any:
    """Return a message as dictionaries and lists, with its buffers as numbers."""
    match value:
        case Buffer():
            return value.tolist()
        case msgspec.Struct():
            return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
        case list():
            return [_plain(each) for each in value]
        case dict():
            return {name: _plain(each) for name, each in value.items()}
        case _:
            return value
