"""What replicas tell the driver, as messages of their own: telemetry never crosses a graph's edges.

Replicas append events to a `Recorder`; the runtime carries them in batches to the driver, where sinks (metrics file,
timeline, live view, wandb) consume them in order of arrival. Times are seconds of the run's clock (clock.py),
or of the virtual clock in simulation.

A `CauseClock` charges every second of a replica to exactly one cause, so shares add up to 100 % by construction. Code
marks what it does with `with clock.charge(Cause.WAIT_INPUT)`; where several marks overlap, the first in `PRIORITY`
wins, and where none is set the replica is computing. The runtime marks waits on edges; stages mark only what the
runtime cannot see. A generator computes while a single request runs, so how well it is used is told by its `Slots`.

Tests: tests/unit/telemetry/test_causes.py
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.telemetry.scores import Bounds

if TYPE_CHECKING:
    from collections.abc import Callable


class Cause(StrEnum):
    """What a replica's time goes to."""

    START = "start"
    RECOVERY = "recovery"
    UPDATE = "weight_update"
    WAIT_DEVICES = "waiting_for_devices"  # that it has in turns with others, and moving there and away
    COMPUTE = "computing"
    WAIT_ROOM = "waiting_for_room"
    WAIT_INPUT = "waiting_for_input"

    __hash__ = str.__hash__  # an Enum's own is a Python function, called for every mark of every clock


# A paused generator is updating even while requests are in flight; who waits for devices computes nothing there; one
# with any request running is computing even while other tasks of it wait; a full edge is named before an empty one
# because it says where the bottleneck is.
PRIORITY = (
    Cause.START, Cause.RECOVERY, Cause.UPDATE, Cause.WAIT_DEVICES, Cause.COMPUTE, Cause.WAIT_ROOM, Cause.WAIT_INPUT,
)  # fmt: skip


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
        self._since = now

    @property
    def cause(self) -> Cause:
        """Return what the replica is charged with now."""
        return self._cause

    def seconds(self) -> dict[str, float]:
        """Return the seconds charged to each cause so far; they add up to the clock's age."""
        self._settle()
        return {cause.value: spent for cause, spent in self._seconds.items()}


class Slots:
    """The samples that one generator decodes, of as many as it can decode together; owned by one event loop."""

    def __init__(self, num: int, now: Callable[[], float]) -> None:
        self.num = num
        self._now = now
        self._filled = 0
        self._since = 0.0
        self._filled_s = 0.0

    def fill(self, running: int) -> None:
        """Say that so many samples are decoded from now on; those beyond `num` wait for a slot."""
        self._settle()
        self._filled = min(running, self.num)

    def filled_s(self) -> float:
        """Return the seconds so far, each times the part of the slots that was filled: 10 s with 1 of 4 are 2.5."""
        self._settle()
        return self._filled_s / self.num

    def _settle(self) -> None:
        now = self._now()
        self._filled_s += self._filled * (now - self._since)
        self._since = now


class Span(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Something a replica did from `start_s` to `end_s`."""

    node: str
    replica: int
    name: str  # "generate", "step 12", "weight update v3"
    start_s: float
    end_s: float
    groups: list[int] = []  # prompt groups it handled: the timeline draws an arrow through spans sharing a group
    args: dict[str, Any] = {}


class Step(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The learner published a version; `metrics` are that step's figures under dotted names."""

    version: int
    num_steps: int  # versions this run will publish in all
    time_s: float
    metrics: dict[str, float]
    staleness: list[int] = []  # one entry per learned group


class Status(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A replica's state, sent about once a second and at its end."""

    node: str
    replica: int
    time_s: float
    cause: str  # what it is doing now, a `Cause` value
    seconds: dict[str, float]  # by cause, adding up to the replica's age
    done: int  # groups finished so far
    running: int = 0  # requests in flight inside it
    filled_s: float | None = None  # of a generator: seconds, each times the part of its decode slots that was filled
    version: int = -1  # policy version it serves or has published; -1 where it has none


class EdgeStatus(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A queue's fill, sent about once a second."""

    edge: str  # "reward.scored -> reference.scored"
    time_s: float
    items: int
    depth: int
    size_bytes: int


class Evaluation(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Scores on the held-out set at one version."""

    version: int
    time_s: float
    scores: list[list[float]]  # [prompt][sample], same prompts in the same order each time
    completions: list[dict[str, str]]  # a few rows with keys prompt, completion, reward
    sets: dict[str, list[list[float]]] = {}  # scores of further held-out sets, by name
    tasks: dict[str, Bounds] = {}  # of benchmarks, by TASK/METRIC


class Notice(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A line for the user, with where it comes from."""

    level: str  # "info" | "warning" | "error"
    where: str
    text: str
    time_s: float


HINT = "hint"  # where a notice comes from that says which setting would help


class Recovery(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The supervisor brought something back."""

    where: str  # replica, or what took the whole graph down
    kind: str  # "restart" of one replica | "rollback" of the graph to a checkpoint
    reissued: int  # groups that were in the dead replica's hands
    time_s: float


Event = Span | Step | Status | EdgeStatus | Evaluation | Notice | Recovery

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Event])


def encode_events(events: list[Event]) -> bytes:
    """Return the wire form of a batch."""
    return _encoder.encode(events)


def decode_events(wire: bytes) -> list[Event]:
    """Return the batch a wire form holds."""
    return _decoder.decode(wire)


class Recorder:
    """A replica's outbox of events; the runtime drains it."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def record(self, event: Event) -> None:
        """Append one event; never waits."""
        self._events.append(event)

    def drain(self) -> list[Event]:
        """Return and forget what has been recorded since the last call."""
        events, self._events = self._events, []
        return events
