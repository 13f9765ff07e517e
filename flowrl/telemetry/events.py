"""What replicas tell the driver, as messages of their own: telemetry never crosses a graph's edges.

Replicas append events to a `Recorder`; the runtime carries them in batches to the driver, where sinks (metrics file,
timeline, live view, wandb) consume them in order of arrival. Times are seconds of the replica's wall clock
(`time.time()`), or of the virtual clock in simulation.
"""

from __future__ import annotations

from typing import Any

import msgspec


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
    occupied_s: float = 0.0  # seconds with something running, pauses for new weights included
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
