"""Edges: how a message gets from one stage to another. There are three.

`Queue`: bounded in items and bytes; each message reaches exactly one replica, the oldest group's first; full means the
sender waits; nothing is ever dropped. One into an ordered port is ordered: messages leave in the order of their group
ids, at most `window` - 1 places ahead of the oldest group still out. `Latest`: a register, the newest value wins, a
late reader gets the newest; those that start at one port are one register. `Credits`: rights to admit a group, which
flow back; `initial` of them exist from the start.

Invariant: what the staleness bound is made of is the learning stage's own (`Stage.admission`); an edge reads it there.

What an edge does not say (`UNSAID`), the graph that takes it in fills in.

Tests: tests/unit/graph/test_graph.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from flowrl.errors import GraphError
from flowrl.messages import Credit, Message

if TYPE_CHECKING:
    from flowrl.graph.ports import Sink, Source
    from flowrl.graph.staleness import Admission

UNSAID = -1
DEPTH = 64  # groups in a queue that has no order and says nothing: a few steps' worth, and small beside what is sampled
M = TypeVar("M", bound=Message)


@dataclass(frozen=True, init=False)
class Edge:
    """An edge from a source port to a sink port."""

    source: Source[Any]
    target: Sink[Any]

    def _join(self, source: Source[Any], target: Sink[Any], **bounds: Any) -> None:
        for name, value in {"source": source, "target": target, **bounds}.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, init=False)
class Queue(Edge):
    """A bounded queue; `depth` groups and `max_bytes` bytes wait in it at most."""

    depth: int  # unsaid: DEPTH, and in an ordered queue as many as there are credits, so that it never blocks
    max_bytes: int
    window: int | None  # groups; None: whichever is oldest of those that are here; an ordered port has 1 or more
    most: int | None  # messages that can be on their way to it at once; with that much depth it never fills

    def __init__(
        self,
        source: Source[M],
        target: Sink[M],
        *,
        depth: int = UNSAID,
        max_bytes: int = 1 << 30,
        window: int | None = None,
        most: int | None = None,
    ) -> None:
        if window is None and target.is_ordered:
            window = 1
        self._join(source, target, depth=depth, max_bytes=max_bytes, window=window, most=most)

    @property
    def max_staleness(self) -> int | None:
        """Return the policy versions that `check` proves for what leaves here in order; None where none are asked."""
        admission = self.target.owner.admission
        return None if admission is None or self.window is None else admission.max_staleness

    @property
    def never_fills(self) -> bool:
        """Return whether its sender never waits for room, so that it may close a cycle of queues."""
        return self.most is not None and self.depth >= self.most


@dataclass(frozen=True, init=False)
class Latest(Edge):
    """A register that keeps only the newest value."""

    def __init__(self, source: Source[M], target: Sink[M]) -> None:
        self._join(source, target)


@dataclass(frozen=True, init=False)
class Credits(Edge):
    """Rights to admit a group: `initial` at the start, `per_version` given back for each version learned."""

    initial: int  # unsaid: as many as the learning stage's bound allows
    is_endless: bool  # groups are admitted, too, that could not be learned before the run ends

    def __init__(
        self, source: Source[Credit], target: Sink[Credit], *, initial: int = UNSAID, is_endless: bool = False
    ) -> None:
        self._join(source, target, initial=initial, is_endless=is_endless)

    @property
    def admission(self) -> Admission:
        """Return what the stage that gives the credits back learns.

        Raises:
            GraphError: it does not say.
        """
        found = self.source.owner.admission
        if found is None:
            what = "gives credits back, but its stage does not say how many groups it learns into a version"
            raise GraphError(repr(self.source), what, "define its property `admission`")
        return found

    @property
    def per_version(self) -> int:
        """Return the groups that are learned into each version."""
        return self.admission.per_version

    @property
    def total(self) -> int | None:
        """Return the groups that the whole run will learn."""
        versions = None if self.is_endless else self.admission.versions
        return None if versions is None else versions * self.per_version
