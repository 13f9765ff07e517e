"""The time of day that events are told with: as it was when the run's driver began, and from then on never set.

Invariants:
- it passes as the monotonic clock does, whoever sets the machine's clock meanwhile, so ages and orders within a run are
  right;
- all processes of a run on one machine tell the same time, those that start after such a change too (`agree`).

Deadlines need no time of day and have none. Used by whatever makes an event or a notice.

Tests: tests/unit/telemetry/test_clock.py
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import msgspec

BOOT = Path("/proc/sys/kernel/random/boot_id")  # tells a start of a machine from every other


class Epoch(msgspec.Struct, frozen=True):
    """When the monotonic clock of a machine was 0, by a time of day."""

    machine: str  # that it is of; "": not known
    began_s: float


def _read() -> Epoch:
    machine = ""
    with contextlib.suppress(OSError):
        machine = BOOT.read_text().strip()
    return Epoch(machine, time.time() - time.monotonic())


_own = [_read()]


def epoch() -> Epoch:
    """Return what this process reckons with."""
    return _own[0]


def agree(other: Epoch) -> None:
    """Reckon with another process's, if it is of this machine."""
    if other.machine and other.machine == epoch().machine:
        _own[0] = other


def now() -> float:
    """Return the seconds since 1970."""
    return epoch().began_s + time.monotonic()
