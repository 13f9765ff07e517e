"""The channels behind edges: queue, register, credits. State machines on one event loop.

They know keys (group ids) and opaque bodies, no stages and no transport: the local runtime calls them directly, the
Ray runtime from inside one actor, the simulator on the virtual clock. Invariants:

- Queue: an accepted key is accepted once; it is waiting, held by exactly one consumer, or settled; waiting items
  never exceed `depth` or `max_bytes` (one item larger than `max_bytes` passes alone); an ordered queue delivers keys
  in order within its window and always has room for a key it could deliver now.
- Register: a reader sees versions in rising order and never an older one after a newer one.
- Credits: given out = initial + returned; a group's credit returns once.

Fairness: waiting senders and receivers are served first come, first served. Cancelling a wait loses nothing: an item
or credit already handed to the cancelled waiter goes back to the front. Closing wakes every waiter.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from flowrl.errors import ChannelClosed, RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")


class Waiters(Generic[T]):
    """Futures in order of arrival, each with what it waits for."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[asyncio.Future[None], T] = OrderedDict()

    def __iter__(self) -> Iterator[tuple[asyncio.Future[None], T]]:
        return iter(list(self._waiting.items()))

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
class Item:
    """A message in a queue."""

    key: int
    body: bytes
    is_accepted: bool = False


@dataclass
class Want:
    """A receiver's request and, once granted, what it got."""

    consumer: str
    limit: int
    items: list[Item] = field(default_factory=list[Item])


class QueueChannel:
    """A bounded queue with leases; ordered by key where it has a window."""

    def __init__(self, name: str, *, depth: int, max_bytes: int, window: int | None, first_key: int = 0) -> None:
        self.name = name
        self.depth = depth
        self.max_bytes = max_bytes
        self.window = window
        self.head = first_key  # ordered: the oldest key still out
        self.size_bytes = 0
        self._waiting: OrderedDict[int, Item] = OrderedDict()
        self._held: dict[int, tuple[str, Item]] = {}
        self._skipped: set[int] = set()  # ordered: delivered or settled keys ahead of the head
        self._accepted: set[int] = set()
        self._senders: Waiters[Item] = Waiters()
        self._receivers: Waiters[Want] = Waiters()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def held(self) -> dict[int, str]:
        """Return the keys in consumers' hands and whose they are."""
        return {key: consumer for key, (consumer, _) in self._held.items()}

    def waits(self) -> list[str]:
        """Say who waits here and for what."""
        fill = f"{len(self)}/{self.depth}"
        room = [f"group {item.key} waits for room in {self.name} ({fill})" for item in self._senders.requests()]
        head = f" (next in order: group {self.head})" if self.window is not None else ""
        return room + [f"{want.consumer} waits for input from {self.name}{head}" for want in self._receivers.requests()]

    async def put(self, key: int, body: bytes) -> bool:
        """Wait for room and accept the message; False if this key was accepted before (a repeat is not an error).

        Raises:
            ChannelClosed: the queue was closed.
        """
        if self._closed:
            raise ChannelClosed(self.name, "is closed")
        if key in self._accepted:
            return False
        self._accepted.add(key)
        item = Item(key, body)
        if self._has_room(item) and not (len(self._senders) and not self._is_deliverable(key)):
            self._accept(item)
            self._serve()
            return True
        try:
            await self._senders.wait(item)  # _serve grants the wait when it accepts the item
        finally:
            if not item.is_accepted:
                self._accepted.discard(key)
        return True

    async def get(self, consumer: str, limit: int) -> list[Item]:
        """Wait for one message and take all that are ready, at most `limit`; they are held for `consumer`.

        Raises:
            ChannelClosed: the queue was closed and holds nothing more.
        """
        want = Want(consumer, limit)
        if not len(self._receivers):
            self._fill(want)
        if not want.items:
            if self._closed:
                raise ChannelClosed(self.name, "is closed")
            await self._receivers.wait(want, undo=lambda: self.give_back([item.key for item in want.items]))
        self._serve()
        return want.items

    def settle(self, key: int) -> None:
        """Forget a held key: it has been handed on or is finished."""
        self._held.pop(key, None)

    def skip(self, key: int) -> None:
        """Settle a key that will never arrive, or has arrived and must not be delivered (a tombstone)."""
        self._accepted.add(key)
        self._held.pop(key, None)
        item = self._waiting.pop(key, None)
        if item is not None:
            self.size_bytes -= len(item.body)
        for future, waiting in self._senders:
            if waiting.key == key:
                waiting.is_accepted = True
                self._senders.grant(future)
        if self.window is not None:
            self._pass(key)
        self._serve()

    def give_back(self, keys: list[int]) -> None:
        """Put held keys back at the front, in order, for another consumer."""
        for key in sorted(keys, reverse=True):
            if key not in self._held:
                continue
            _, item = self._held.pop(key)
            self._waiting[key] = item
            self._waiting.move_to_end(key, last=False)
            self.size_bytes += len(item.body)
            if self.window is not None:
                self._skipped.discard(key)
                self.head = min(self.head, key)
        self._serve()

    def release(self, consumer: str) -> list[int]:
        """Give back all that a dead consumer holds; returns the keys."""
        for future, want in self._receivers:
            if want.consumer == consumer:
                self._receivers.grant(future)
        keys = [key for key, (holder, _) in self._held.items() if holder == consumer]
        self.give_back(keys)
        return keys

    def close(self) -> None:
        """Refuse new messages; receivers get what is left and then ChannelClosed."""
        self._closed = True
        self._senders.fail(ChannelClosed(self.name, "is closed"))
        self._serve()
        self._receivers.fail(ChannelClosed(self.name, "is closed"))

    def _has_room(self, item: Item) -> bool:
        if self.window is not None and self._is_deliverable(item.key):
            return True  # else items that wait for this one could keep it out
        fits = not self._waiting or self.size_bytes + len(item.body) <= self.max_bytes
        return len(self._waiting) < self.depth and fits

    def _is_deliverable(self, key: int) -> bool:
        return self.window is not None and key < self.head + self.window

    def _accept(self, item: Item) -> None:
        item.is_accepted = True
        self._waiting[item.key] = item
        self.size_bytes += len(item.body)

    def _pass(self, key: int) -> None:
        """Move the head of the order beyond every key that is out of the way."""
        self._skipped.add(key)
        while self.head in self._skipped:
            self._skipped.discard(self.head)
            self.head += 1

    def _next(self) -> Item | None:
        if self.window is None:
            return next(iter(self._waiting.values()), None)
        ready = (key for key in range(self.head, self.head + self.window) if key in self._waiting)
        return self._waiting.get(next(ready, -1))

    def _fill(self, want: Want) -> None:
        while len(want.items) < want.limit and (item := self._next()) is not None:
            del self._waiting[item.key]
            self.size_bytes -= len(item.body)
            self._held[item.key] = (want.consumer, item)
            if self.window is not None:
                self._pass(item.key)
            want.items.append(item)

    def _serve(self) -> None:
        """Match waiting senders and receivers until nothing more fits."""
        moved = True
        while moved:
            moved = False
            for future, want in self._receivers:
                self._fill(want)
                if not want.items:
                    break
                self._receivers.grant(future)
                moved = True
            for future, item in self._senders:
                if self._has_room(item):
                    self._accept(item)
                    self._senders.grant(future)
                    moved = True
                elif self.window is None:
                    break  # first come, first served


class RegisterChannel:
    """A register: the newest value wins, and its writer learns when every live reader has taken it in."""

    def __init__(self, name: str, readers: list[str]) -> None:
        self.name = name
        self.version = -1
        self.body = b""
        self._confirmed = dict.fromkeys(readers, -1)
        self._readers: Waiters[int] = Waiters()
        self._writers: Waiters[int] = Waiters()
        self._closed = False

    def waits(self) -> list[str]:
        """Say who waits here and for what."""
        behind = ", ".join(f"{reader} (at {seen})" for reader, seen in self._confirmed.items() if seen < self.version)
        return [f"{self.name}: version {v} waits to be acknowledged by {behind}" for v in self._writers.requests()]

    async def put(self, version: int, body: bytes) -> None:
        """Set the value and wait until every live reader has confirmed it or a newer one.

        Raises:
            RunError: `version` is not newer than the present one.
            ChannelClosed: the register was closed.
        """
        if self._closed:
            raise ChannelClosed(self.name, "is closed")
        if version <= self.version:
            raise RunError(self.name, f"version {version} is not newer than {self.version}")
        self.version, self.body = version, body
        for future, seen in self._readers:
            if seen < version:
                self._readers.grant(future)
        if not self._is_confirmed(version):
            await self._writers.wait(version)

    async def get(self, newer_than: int) -> tuple[int, bytes]:
        """Wait for a version newer than `newer_than` and return the newest.

        Raises:
            ChannelClosed: the register was closed.
        """
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


class CreditsChannel:
    """Rights to admit a group; each group's right returns once."""

    def __init__(self, name: str, *, initial: int) -> None:
        self.name = name
        self.initial = initial
        self.available = initial
        self.out: set[int] = set()  # admitted groups whose credit has not returned
        self.unused = 0  # given out, not yet tied to a group
        self._takers: Waiters[str] = Waiters()
        self._closed = False

    def waits(self) -> list[str]:
        """Say who waits here and for what."""
        out = f"{len(self.out)} groups are out" + (f", the oldest {min(self.out)}" if self.out else "")
        return [f"{taker} waits for a credit ({out})" for taker in self._takers.requests()]

    async def get(self, taker: str) -> None:
        """Wait for one right.

        Raises:
            ChannelClosed: the edge was closed.
        """
        if self._closed:
            raise ChannelClosed(self.name, "is closed")
        if self.available and not len(self._takers):
            self.available -= 1
        else:
            await self._takers.wait(taker, undo=self._take_back)
        self.unused += 1

    def admit(self, group_id: int) -> None:
        """Tie a right that was given out to the group admitted with it.

        Raises:
            RunError: a group was admitted without a right.
        """
        if not self.unused:
            raise RunError(self.name, f"group {group_id} was admitted without a credit")
        self.unused -= 1
        self.out.add(group_id)

    def give_back(self, group_ids: list[int]) -> None:
        """Return the rights of these groups.

        Raises:
            RunError: a group's right is not out (it was returned before, or never given).
        """
        for group_id in group_ids:
            if group_id not in self.out:
                raise RunError(self.name, f"the credit of group {group_id} returned twice")
            self.out.discard(group_id)
        self.available += len(group_ids)
        self._serve()

    def close(self) -> None:
        """Wake every waiter."""
        self._closed = True
        self._takers.fail(ChannelClosed(self.name, "is closed"))

    def _take_back(self) -> None:
        self.available += 1
        self._serve()

    def _serve(self) -> None:
        for future, _ in self._takers:
            if not self.available:
                return
            self.available -= 1
            self._takers.grant(future)
