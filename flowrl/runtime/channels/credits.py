"""Rights to admit a group.

Invariants: given out = initial + returned; a group's right returns once; group ids are given out in order, each to one
taker, again after a taker died with it; no more than `total` are ever learned or on their way.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowrl.errors import ChannelClosed, RunError
from flowrl.runtime.channels.waiters import Waiters

if TYPE_CHECKING:
    from collections.abc import Iterable


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
