"""Ports: where messages enter and leave a stage, typed by message.

A stage declares `rollouts: In[Rollouts]` and `scored: Out[Scored]`. Until a runtime binds them, ports are only
addresses for edges; afterwards they carry messages.

Invariant: an edge joins an `Out[A]` to an `In[B]` only where every A is a B, which the type checker sees (`Source` is
covariant, `Sink` contravariant) and `Graph.check` repeats.

Semantics by kind of edge. Queue: `put` waits for room; `get` waits for a message and holds it for this replica until
one of the same group is put downstream, or `done` or `reject` settles it; each message reaches exactly one replica, the
oldest group's first. Latest: `put` returns when every live reader has called `done` on that value or on a newer one;
`get` waits for a value newer than the last one this replica got. Credits: `get` waits for the right to admit one group,
`put` gives the rights of the named groups back. Cancelling any of them loses no message. After an edge is closed, `put`
raises ChannelClosed at once and `get` does when nothing is left.

Tests: tests/unit/graph/test_ports.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from flowrl.errors import ChannelClosed
from flowrl.messages import Message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from flowrl.graph.staleness import Admission

M = TypeVar("M", bound=Message)
M_co = TypeVar("M_co", bound=Message, covariant=True)
M_contra = TypeVar("M_contra", bound=Message, contravariant=True)


class SendEnd(Protocol):
    """The runtime's side of an `Out`."""

    async def put(self, message: Message) -> None: ...


class ReceiveEnd(Protocol):
    """The runtime's side of an `In`."""

    async def get(self, limit: int) -> list[Message]: ...

    async def done(self, messages: Sequence[Message], learned_in: int | None) -> None: ...

    async def reject(self, message: Message, kind: str, reason: str) -> None: ...


class Owner(Protocol):
    """The stage that a port belongs to, as far as a port's edges must know it."""

    @property
    def admission(self) -> Admission | None: ...


class Port:
    """The address of one port: the stage it belongs to and its name there."""

    def __init__(self, owner: Owner, name: str, message: type[Message], *, is_optional: bool, is_ordered: bool) -> None:
        self.owner = owner
        self.name = name
        self.message = message
        self.is_optional = is_optional
        self.is_ordered = is_ordered
        self.brings = message  # in a graph: what the edge into it carries, which may be more
        self.leads_to: Owner | None = None  # in a graph: the stage at the other end of the queue that begins here

    def __repr__(self) -> str:
        return f"{type(self.owner).__name__}.{self.name}"


class Source(Port, Generic[M_co]):
    """Something an edge can start at."""

    def _gives(self) -> M_co:  # only for the type checker
        raise NotImplementedError


class Sink(Port, Generic[M_contra]):
    """Something an edge can end at."""

    def _takes(self, message: M_contra) -> None:  # only for the type checker
        raise NotImplementedError


class Out(Source[M], Generic[M]):
    """Messages of type M leave here."""

    end: SendEnd | None = None

    @property
    def is_connected(self) -> bool:
        """Return whether an edge leads away from here; only optional ports may have none."""
        return self.end is not None

    async def put(self, message: M) -> None:
        """Send a message; see the module docstring for what it waits for.

        Raises:
            ChannelClosed: the edge was closed.
        """
        assert self.end is not None, f"{self!r} is not bound"
        await self.end.put(message)


class In(Sink[M], Generic[M]):
    """Messages of type M arrive here; `async for message in port` ends when the edge is closed."""

    end: ReceiveEnd | None = None

    @property
    def is_connected(self) -> bool:
        """Return whether an edge leads here; only optional ports may have none."""
        return self.end is not None

    async def get(self) -> M:
        """Wait for the next message.

        Raises:
            ChannelClosed: the edge was closed and nothing is left.
        """
        return (await self.get_some(1))[0]

    async def get_some(self, limit: int) -> list[M]:
        """Wait for one message, then return all that are ready, at most `limit`."""
        assert self.end is not None, f"{self!r} is not bound"
        messages: list[Any] = await self.end.get(limit)
        return messages

    async def take(self, count: int) -> list[M]:
        """Wait for exactly `count` messages."""
        taken: list[M] = []
        while len(taken) < count:
            taken.extend(await self.get_some(count - len(taken)))
        return taken

    async def done(self, *messages: M, learned_in: int | None = None) -> None:
        """Settle messages that nothing downstream will; `learned_in` is the step that learned them."""
        assert self.end is not None, f"{self!r} is not bound"
        await self.end.done(messages, learned_in)

    async def reject(self, message: M, *, kind: str, reason: str) -> None:
        """Settle a group as "filtered" or "failed": its place is skipped and its credit goes back."""
        assert self.end is not None, f"{self!r} is not bound"
        await self.end.reject(message, kind, reason)

    async def __aiter__(self) -> AsyncIterator[M]:
        while True:
            try:
                message = await self.get()
            except ChannelClosed:
                return
            yield message
