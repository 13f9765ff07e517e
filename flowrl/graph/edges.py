"""Edges: how a message gets from one stage to another. There are three.

`Queue`: bounded in items and bytes; each message reaches exactly one replica, the oldest group's first; full means the
sender waits; nothing is ever dropped. With `window=W` it is ordered: messages leave in the order of their group ids, at
most W - 1 places ahead of the oldest group still out. `Latest`: a register, the newest value wins, a late reader gets
the newest; those that start at one port are one register.
`Credits`: rights to admit a group, which flow back; `initial` of them exist from the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from flowrl.messages import Credit, Message

if TYPE_CHECKING:
    from flowrl.graph.ports import Sink, Source

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

    depth: int
    max_bytes: int
    window: int | None  # groups; None: whichever is oldest of those that are here
    max_staleness: int | None  # policy versions; the bound that `check` proves for what leaves this queue
    most: int | None  # messages that can be on their way to it at once; with that much depth it never fills

    def __init__(
        self,
        source: Source[M],
        target: Sink[M],
        *,
        depth: int,
        max_bytes: int = 1 << 30,
        window: int | None = None,
        max_staleness: int | None = None,
        most: int | None = None,
    ) -> None:
        self._join(
            source, target, depth=depth, max_bytes=max_bytes, window=window, max_staleness=max_staleness, most=most
        )

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

    initial: int
    per_version: int
    versions: int | None  # the run ends after so many; no group is admitted that could not be learned by then

    def __init__(
        self,
        source: Source[Credit],
        target: Sink[Credit],
        *,
        initial: int,
        per_version: int,
        versions: int | None = None,
    ) -> None:
        self._join(source, target, initial=initial, per_version=per_version, versions=versions)

    @property
    def total(self) -> int | None:
        """Return the groups that the whole run will learn."""
        return None if self.versions is None else self.versions * self.per_version
