"""A bounded queue with leases; it gives out the oldest key it has, and where it has a window no other than in order.

Whoever waits further down in order waits for the oldest group, so a younger one never goes before it here.

Invariants:
- an accepted key is accepted once;
- an accepted key is waiting, held by exactly one consumer, or settled;
- waiting items never exceed `depth` or `max_bytes` (one item larger than `max_bytes` passes alone);
- an ordered queue delivers keys in order within its window and always has room for a key it could deliver now;
- a suspect key is held by a consumer that holds nothing else.

Tests: tests/unit/runtime/test_channels.py
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flowrl.errors import ChannelClosed
from flowrl.runtime.channels import Waiters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@dataclass
class Item:
    """A message in a queue."""

    key: int
    body: bytes
    on_accept: Callable[[], None] | None = None  # runs in the step in which the queue takes the item
    is_accepted: bool = False


@dataclass
class Want:
    """A receiver's request and, once granted, what it got."""

    consumer: str
    limit: int
    items: list[Item] = field(default_factory=list[Item])


class QueueChannel:
    """A bounded queue with leases; ordered by key where it has a window."""

    def __init__(
        self,
        name: str,
        *,
        depth: int,
        max_bytes: int,
        window: int | None,
        first_key: int = 0,
        settled: Iterable[int] = (),
    ) -> None:
        self.name = name
        self.depth = depth
        self.max_bytes = max_bytes
        self.window = window
        self.head = first_key  # ordered: the oldest key still out
        self.size_bytes = 0
        self._waiting: dict[int, Item] = {}
        self._oldest: list[int] = []  # without a window: a heap of the waiting keys, and some that wait no more
        self._held: dict[int, tuple[str, Item]] = {}
        self._skipped = set(settled)  # ordered: delivered or settled keys ahead of the head
        self._suspects: set[int] = set()
        self._accepted: set[int] = set()  # those from `_low` on; every key below has been
        self._low = first_key
        self._senders: Waiters[Item] = Waiters()
        self._receivers: Waiters[Want] = Waiters()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def held(self) -> dict[int, str]:
        """Return the keys in consumers' hands and whose they are."""
        return {key: consumer for key, (consumer, _) in self._held.items()}

    def holder(self, key: int) -> str | None:
        """Return who holds a key."""
        held = self._held.get(key)
        return held[0] if held is not None else None

    def waits(self) -> list[str]:
        """Say who waits here and for what."""
        fill = f"{len(self)}/{self.depth}"
        room = [f"group {item.key} waits for room in {self.name} ({fill})" for item in self._senders.requests()]
        head = f" (next in order: group {self.head})" if self.window is not None else ""
        return room + [f"{want.consumer} waits for input from {self.name}{head}" for want in self._receivers.requests()]

    async def put(self, key: int, body: bytes, on_accept: Callable[[], None] | None = None) -> bool:
        """Wait for room and accept the message; False if this key was accepted before (a repeat is not an error).

        `on_accept` is called in the very step in which the message is accepted, whoever runs then.

        Raises:
            ChannelClosed: the queue was closed.
        """
        if self._closed:
            raise ChannelClosed(self.name, "is closed")
        if key < self._low or key in self._accepted:
            return False
        self._accepted.add(key)
        item = Item(key, body, on_accept)
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
        if self._suspects:
            self._suspects.discard(key)
            self._serve()

    def skip(self, key: int) -> None:
        """Settle a key that will never arrive, or has arrived and must not be delivered (a tombstone)."""
        self._drop(key)
        self._accepted.add(key)
        if self.window is not None:
            self._pass(key)
        self._serve()

    def give_back(self, keys: list[int]) -> None:
        """Put held keys back at the front, in order, for another consumer."""
        for key in sorted(keys, reverse=True):
            if key not in self._held:
                continue
            _, item = self._held.pop(key)
            self._wait(item)
            if self.window is not None:
                self._skipped.discard(key)
                self.head = min(self.head, key)
        self._serve()

    def holds(self, consumer: str) -> list[Item]:
        """Return what a consumer has in hand."""
        return [item for holder, item in self._held.values() if holder == consumer]

    def release(self, consumer: str) -> list[int]:
        """Give back all that a dead consumer holds; returns the keys."""
        for future, want in self._receivers:
            if want.consumer == consumer:
                self._receivers.grant(future)
        keys = [item.key for item in self.holds(consumer)]
        self.give_back(keys)
        return keys

    def suspect(self, key: int) -> None:
        """From now on give this key only to a consumer that holds nothing else."""
        self._suspects.add(key)

    def forget(self, key: int) -> None:
        """Take a key out as if it had never been sent; whoever holds it cannot hand it on."""
        self._drop(key)
        self._accepted.discard(key)
        self._serve()

    def ended_below(self, key: int) -> None:
        """Count every key below this one as accepted, without remembering each."""
        for ended in range(self._low, key):
            self._accepted.discard(ended)
        self._low = max(self._low, key)

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
        self._wait(item)
        if item.on_accept is not None:
            item.on_accept()

    def _wait(self, item: Item) -> None:
        self._waiting[item.key] = item
        self.size_bytes += len(item.body)
        if self.window is None:
            heapq.heappush(self._oldest, item.key)

    def _drop(self, key: int) -> None:
        """Take a key out of everybody's hands."""
        self._suspects.discard(key)
        self._held.pop(key, None)
        item = self._waiting.pop(key, None)
        if item is not None:
            self.size_bytes -= len(item.body)
        for future, waiting in self._senders:
            if waiting.key == key:
                waiting.is_accepted = True
                self._senders.grant(future)

    def _pass(self, key: int) -> None:
        """Move the head of the order beyond every key that is out of the way."""
        self._skipped.add(key)
        while self.head in self._skipped:
            self._skipped.discard(self.head)
            self.head += 1

    def _next(self, want: Want) -> Item | None:
        if self.window is None and not self._suspects:
            while self._oldest and self._oldest[0] not in self._waiting:
                heapq.heappop(self._oldest)
            return self._waiting[self._oldest[0]] if self._oldest else None
        if self.window is None:
            in_hand = [item.key for item in self.holds(want.consumer)]
            if self._suspects.intersection(in_hand):
                return None
            allowed = (key for key in self._waiting if not in_hand or key not in self._suspects)
            return self._waiting.get(min(allowed, default=-1))
        ready = (key for key in range(self.head, self.head + self.window) if key in self._waiting)
        return self._waiting.get(next(ready, -1))

    def _fill(self, want: Want) -> None:
        while len(want.items) < want.limit and (item := self._next(want)) is not None:
            del self._waiting[item.key]
            self.size_bytes -= len(item.body)
            self._held[item.key] = (want.consumer, item)
            if self.window is not None:
                self._pass(item.key)
            want.items.append(item)

    def _serve(self) -> None:
        """Match waiting senders and receivers until nothing more fits."""
        moved = len(self._receivers) > 0 or len(self._senders) > 0
        while moved:
            moved = False
            for future, want in self._receivers:
                self._fill(want)
                if want.items:
                    self._receivers.grant(future)
                    moved = True
                elif not self._suspects:
                    break
            for future, item in self._senders:
                if self._has_room(item):
                    self._accept(item)
                    self._senders.grant(future)
                    moved = True
                elif self.window is None:
                    break  # first come, first served
