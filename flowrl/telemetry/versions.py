"""The policy versions of a run, told by the digests of their tensors: `versions.jsonl`, one line a version.

Two runs that agree in them have published the same weights, bit for bit; where they do not, the first tensor that
differs is known by name. A version that was published again after a rollback has a line for each time; the last one
counts. Written by the learner, read by `flowrl retrain`.
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

import msgspec

from flowrl.telemetry.files import UNREADABLE, RecordFile

if TYPE_CHECKING:
    from pathlib import Path

SHOWN_DIGITS = 16  # of a digest: 64 bits tell any two versions of a run apart


class VersionLine(msgspec.Struct, frozen=True):
    """One published version."""

    version: int
    tensors: dict[str, str]  # name -> first digits of the blake3 digest of its bytes


def write_digests(run_dir: Path, version: int, digests: dict[str, str]) -> None:
    """Append a version; an engine that has no tensors writes nothing.

    Raises:
        OSError: the disk is full; nothing was written.
    """
    if not digests:
        return
    line = VersionLine(version, {name: digest[:SHOWN_DIGITS] for name, digest in digests.items()})
    with contextlib.closing(RecordFile(run_dir / "versions.jsonl")) as file:
        file.append(msgspec.json.encode(line) + b"\n")
        if file.is_waiting:
            raise OSError(errno.ENOSPC, file.trouble)  # whoever writes waits and writes the line again


def read_digests(run_dir: Path) -> dict[int, dict[str, str]]:
    """Return version -> tensor -> digest; a line cut short by a kill is passed over."""
    path = run_dir / "versions.jsonl"
    found: dict[int, dict[str, str]] = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            each = msgspec.json.decode(line, type=VersionLine)
        except UNREADABLE:
            continue
        found[each.version] = each.tensors
    return found
