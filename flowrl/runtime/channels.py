"""The channels behind edges besides the queue (queue.py): credits and registers, and who waits at any of them.

State machines on one event loop. They know keys (group ids) and opaque bodies, no stages and no transport: the flow
calls them, whichever runtime it serves. Waiters are served first come, first served; cancelling a wait loses nothing:
what was handed to the cancelled waiter goes back. Closing wakes every waiter.

Invariants of credits:
- given out = initial + returned;
- a group's right returns once;
- group ids are given out in order, each to one taker, again after a taker died with it;
- no more than `total` are ever learned or on their way.
Invariants of a register:
- a reader sees versions in rising order;
- its writer waits for every live reader.

Tests: tests/unit/runtime/test_channels.py
"""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from flowrl.errors import ChannelClosed, RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


T = TypeVar("T")


class Waiters(Generic[T]):
    """Futures in order of arrival, each with what it waits for."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[asyncio.Future[None], T] = OrderedDict()

    def __iter__(self) -> Iterator[tuple[asyncio.Future[None], T]]:
        """Yield them oldest first; each may be granted as it comes. Copies nothing until one was passed over."""
        while self._waiting:
            first = next(iter(self._waiting.items()))
            yield first
            if first[0] in self._waiting:
                yield from list(self._waiting.items())[1:]
                return

    def __len__(self) -> int:
        return len(self._waiting)

    def requests(self) -> list[T]:
        """Return what is being waited for, oldest first."""
        return list(self._waiting.values())

    def grant(self, future: asyncio.Future[None]) -> None:
        """End one wait."""
        del self._waiting[future]
        if not future.done():
            future.set_result(None)

    def fail(self, error: Exception) -> None:
        """End every wait with an error."""
        for future in list(self._waiting):
            del self._waiting[future]
            if not future.done():
                future.set_exception(error)

    async def wait(self, request: T, undo: Callable[[], None] | None = None) -> None:
        """Wait to be granted; `undo` takes the grant back where the waiter was cancelled just after it."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[future] = request
        try:
            await future
        except asyncio.CancelledError:
            was_granted = self._waiting.pop(future, None) is None and not future.cancelled()
            if was_granted and future.exception() is None and undo is not None:
                undo()
            raise


@dataclass
class Taker:
    """A request for a right and, once granted, the group it is for."""

    name: str
    group_id: int = -1


class CreditsChannel:
    """Rights to admit a group, each for a group id of its own; a group's right returns once."""

    def __init__(
        self,
        name: str,
        *,
        initial: int,
        total: int | None = None,
        num_learned: int = 0,
        first_group: int = 0,
        ended: Iterable[int] = (),
    ) -> None:
        self.name = name
        self.initial = initial
        self.available = initial
        self.total = total  # groups that will ever be learned; None: no end
        self.num_learned = num_learned
        self.out: set[int] = set()  # admitted groups whose credit has not returned
        self.granted: dict[int, str] = {}  # given out, not yet admitted: to whom
        self._next_group = first_group
        self._ended = set(ended)  # groups from `first_group` on that are not to be admitted again
        self._again: list[int] = []  # a heap of ids that were given out and came back unused
        self._takers: Waiters[Taker] = Waiters()
        self._closed = False

    def waits(self) -> list[str]:
        """Say who waits here and for what."""
        out = f"{len(self.out)} groups are out" + (f", the oldest {min(self.out)}" if self.out else "")
        return [f"{taker.name} waits for a credit ({out})" for taker in self._takers.requests()]

    async def get(self, taker: str) -> int:
        """Wait for one right and return the id of the group it is for.

        Raises:
            ChannelClosed: the edge was closed.
        """
        if self._closed:
            raise ChannelClosed(self.name, "is closed")
        request = Taker(taker)
        if self._has_right and not len(self._takers):
            self._grant(request)
        else:
            await self._takers.wait(request, undo=lambda: self.take_back(request.group_id))
        return request.group_id

    def admit(self, group_id: int) -> None:
        """Note that the group of a right that was given out is on its way.

        Raises:
            RunError: a group was admitted without a right.
        """
        if self.granted.pop(group_id, None) is None:
            raise RunError(self.name, f"group {group_id} was admitted without a credit")
        self.out.add(group_id)

    def give_back(self, group_ids: list[int], *, are_learned: bool) -> None:
        """Return the rights of these groups.

        Raises:
            RunError: a group's right is not out (it was returned before, or never given).
        """
        for group_id in group_ids:
            if group_id not in self.out:
                raise RunError(self.name, f"the credit of group {group_id} returned twice")
            self.out.discard(group_id)
            self.num_learned += are_learned
            self.available += 1
        self._serve()

    def release(self, taker: str) -> None:
        """Take back the rights that a dead taker had not used."""
        for group_id in [known for known, holder in self.granted.items() if holder == taker]:
            self.take_back(group_id)

    def take_back(self, group_id: int) -> None:
        """Take back a right that was given out and not used."""
        if self.granted.pop(group_id, None) is not None:
            heapq.heappush(self._again, group_id)
            self.available += 1
            self._serve()

    def close(self) -> None:
        """Wake every waiter."""
        self._closed = True
        self._takers.fail(ChannelClosed(self.name, "is closed"))

    @property
    def _has_right(self) -> bool:
        on_their_way = self.num_learned + len(self.out) + len(self.granted)
        return self.available > 0 and (self.total is None or on_their_way < self.total)

    def _grant(self, taker: Taker) -> None:
        self.available -= 1
        if self._again:
            taker.group_id = heapq.heappop(self._again)
        else:
            while self._next_group in self._ended:
                self._ended.discard(self._next_group)
                self._next_group += 1
            taker.group_id = self._next_group
            self._next_group += 1
        self.granted[taker.group_id] = taker.name

    def _serve(self) -> None:
        for future, taker in self._takers:
            if not self._has_right:
                return
            self._grant(taker)
            self._takers.grant(future)


class RegisterChannel:
    """The newest value, and who has taken it in."""

    def __init__(self, name: str, readers: list[str]) -> None:
        self.name = name
        self.version = -1
        self.body = b""
        self._confirmed = dict.fromkeys(readers, -1)
        self._readers: Waiters[int] = Waiters()
        self._writers: Waiters[int] = Waiters()
        self._closed = False

    def expect(self, readers: list[str]) -> None:
        """Have writers wait for these readers too."""
        self._confirmed |= dict.fromkeys(readers, -1)

    def waits(self) -> list[str]:
        """Say who waits here and for what."""
        behind = ", ".join(f"{reader} (at {seen})" for reader, seen in self._confirmed.items() if seen < self.version)
        return [f"{self.name}: version {v} waits to be acknowledged by {behind}" for v in self._writers.requests()]

    async def put(self, version: int, body: bytes) -> None:
        """Set the value and wait until every live reader has confirmed it or a newer one; a repeat is not an error.

        Raises:
            RunError: `version` is not newer than the present one, and not the same value.
            ChannelClosed: the register was closed.
        """
        if self._closed:
            raise ChannelClosed(self.name, "is closed")
        if version <= self.version and (version, body) != (self.version, self.body):
            raise RunError(self.name, f"version {version} is not newer than {self.version}")
        self.version, self.body = version, body
        for future, seen in self._readers:
            if seen < version:
                self._readers.grant(future)
        if not self._is_confirmed(version):
            await self._writers.wait(version)

    async def get(self, reader: str, newer_than: int) -> tuple[int, bytes]:
        """Wait for a version newer than `newer_than` and return the newest; from now on writers wait for the reader.

        Raises:
            ChannelClosed: the register was closed.
        """
        self._confirmed.setdefault(reader, -1)
        if self.version <= newer_than and not self._closed:
            await self._readers.wait(newer_than)
        if self.version <= newer_than:
            raise ChannelClosed(self.name, "is closed")
        return self.version, self.body

    def confirm(self, reader: str, version: int) -> None:
        """Note that `reader` serves `version`."""
        self._confirmed[reader] = max(version, self._confirmed.get(reader, -1))
        self._wake_writers()

    def release(self, reader: str) -> None:
        """Wait no more for a dead reader."""
        self._confirmed.pop(reader, None)
        self._wake_writers()

    def close(self) -> None:
        """Wake every waiter."""
        self._closed = True
        self._readers.fail(ChannelClosed(self.name, "is closed"))
        self._writers.fail(ChannelClosed(self.name, "is closed"))

    def _is_confirmed(self, version: int) -> bool:
        return all(seen >= version for seen in self._confirmed.values())

    def _wake_writers(self) -> None:
        for future, version in self._writers:
            if self._is_confirmed(version):
                self._writers.grant(future)
