"""Those who wait at a channel, in order of arrival; a grant given to a waiter that was cancelled is taken back."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
