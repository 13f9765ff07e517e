"""Charge every second of a replica to exactly one cause.

A `CauseClock` is in one cause at any moment and the seconds of all causes add up to the time since it was made, so
shares add up to 100 % by construction. Code marks what it does with `with clock.charge(Cause.WAIT_INPUT)`; where
several marks overlap (a generator with many requests in flight), the first in `PRIORITY` wins, and where none is set
the replica is computing. The runtime marks waits on edges; stages mark only what the runtime cannot see.

Tests: tests/unit/telemetry/test_causes.py
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Cause(StrEnum):
    """What a replica's time goes to."""

    START = "start"
    RECOVERY = "recovery"
    UPDATE = "weight_update"
    COMPUTE = "computing"
    WAIT_ROOM = "waiting_for_room"
    WAIT_INPUT = "waiting_for_input"

    __hash__ = str.__hash__  # an Enum's own is a Python function, called for every mark of every clock


# A paused generator is updating even while requests are in flight; one with any request running is computing even
# while other tasks of it wait; a full edge is named before an empty one because it says where the bottleneck is.
PRIORITY = (Cause.START, Cause.RECOVERY, Cause.UPDATE, Cause.COMPUTE, Cause.WAIT_ROOM, Cause.WAIT_INPUT)


class Charge:
    """A mark on a clock for the duration of a block; may be entered again."""

    __slots__ = ("_cause", "_clock")

    def __init__(self, clock: CauseClock, cause: Cause) -> None:
        self._clock = clock
        self._cause = cause

    def __enter__(self) -> None:
        self._clock.mark(self._cause, +1)

    def __exit__(self, *_: object) -> None:
        self._clock.mark(self._cause, -1)


class CauseClock:
    """One replica's time, split by cause; owned by one event loop."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._charges = {cause: Charge(self, cause) for cause in Cause}
        self._marks = dict.fromkeys(Cause, 0)
        self._seconds = dict.fromkeys(Cause, 0.0)
        self._occupied_s = 0.0
        self._since = now()
        self._cause = Cause.COMPUTE

    def charge(self, cause: Cause) -> Charge:
        """Mark `cause` for the duration of the block; marks nest and overlap."""
        return self._charges[cause]

    def mark(self, cause: Cause, change: int) -> None:
        """Set or take back one mark."""
        self._settle()
        self._marks[cause] += change
        if change < 0 and cause is not self._cause:
            return  # another comes before it
        for first in PRIORITY:
            if self._marks[first]:
                self._cause = first
                return
        self._cause = Cause.COMPUTE

    def _settle(self) -> None:
        now = self._now()
        if (spent_s := now - self._since) == 0:
            return
        self._seconds[self._cause] += spent_s
        if self._marks[Cause.COMPUTE]:
            self._occupied_s += spent_s
        self._since = now

    @property
    def cause(self) -> Cause:
        """Return what the replica is charged with now."""
        return self._cause

    def occupied_s(self) -> float:
        """Return the seconds in which a computation was marked, whatever the time was charged to.

        For a generator: with at least one request running, paused for new weights or not.
        """
        self._settle()
        return self._occupied_s

    def seconds(self) -> dict[str, float]:
        """Return the seconds charged to each cause so far; they add up to the clock's age."""
        self._settle()
        return {cause.value: spent for cause, spent in self._seconds.items()}
