"""The calls of replicas on the flow, each known by name, replica, incarnation and number.

Invariants:
- a call is carried out at most once, however often it arrives, and a repeated one gets the first answer;
- a call of an incarnation that has been replaced is refused;
- when a replica is released its waiting calls end first, so that nothing is accepted from or granted to the dead.

Links between a replica and the gate may therefore lose, double and delay calls as long as the caller repeats what has
not been answered.

`FlowCalls` is the one table of them; `CallClient` is the caller's side. What carries a call is the runtime's: a direct
call, a connection (wire.py), or a test's lossy link.

Tests: tests/contracts/test_flow_clients.py
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from flowrl.errors import ChannelClosed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Sequence

    from flowrl.runtime.flow import Flow, Released


class FlowCalls(Protocol):
    """The table of calls: every call there is, as a replica makes it. `runtime.flow.Flow` says what each does.

    Client, gate and wire follow from it: the flow has a method of each name, which takes the caller's name first; where
    what a call gives must be taken back from a caller that did not wait for it, the flow has `undo_NAME` too.
    """

    async def put(self, address: str, key: int, body: bytes) -> None: ...
    async def get(self, address: str, limit: int) -> list[bytes]: ...
    async def done(
        self,
        address: str,
        keys: list[int],
        learned_in: int | None,
        oldest: list[int],
        replays: Sequence[Sequence[tuple[int, int]]],
    ) -> None: ...
    async def reject(self, address: str, key: int, kind: str, reason: str) -> None: ...
    async def publish(self, address: str, version: int, body: bytes) -> None: ...
    async def read(self, address: str, newer_than: int) -> tuple[int, bytes]: ...
    async def confirm(self, address: str, version: int) -> None: ...
    async def acquire(self, address: str) -> int: ...
    async def give_back(self, address: str, body: bytes) -> None: ...
    async def cut(self, version: int) -> Any: ...
    async def fewer_out(self, count: int) -> None: ...
    async def note_wait(self, text: str) -> None: ...
    async def take(self, host: str) -> int: ...
    async def recalled(self, host: str, turn: int) -> None: ...
    async def getting_on(self, host: str, turn: int) -> None: ...
    async def hand_over(self, host: str, turn: int) -> None: ...


T = TypeVar("T")


class Gate(Protocol):
    """Where a listener brings calls: the flow's own gate, or a proxy that brings them there."""

    async def call(self, call: Call) -> Any:
        """Return the answer; cancelling the wait cancels the call."""
        ...

    def undo(self, call: Call) -> None:
        """End a call whose caller no longer waits for it; what it was given goes back."""
        ...


METHODS = frozenset(name for name, value in vars(FlowCalls).items() if inspect.iscoroutinefunction(value))


class Call(msgspec.Struct, frozen=True, array_like=True):
    """One call of a replica; the arguments are plain values and bytes."""

    replica: str
    incarnation: int
    number: int  # counts this incarnation's calls
    answered: int  # every call below has its answer: the gate may forget them
    method: str
    arguments: tuple[Any, ...]


@dataclass
class ReplicaCalls:
    """What the gate knows of one replica."""

    incarnation: int = 0
    answers: dict[int, asyncio.Future[Any]] = field(default_factory=dict[int, "asyncio.Future[Any]"])


class _Begun(Coroutine[Any, Any, T]):
    """A coroutine that has been begun and waits, for a task to go on with; what befalls the task befalls it."""

    def __init__(self, body: Coroutine[Any, Any, T], waits_for: Any) -> None:
        self._body = body
        self._waits_for = [waits_for]  # until the task has heard it

    def send(self, value: Any) -> Any:
        return self._waits_for.pop() if self._waits_for else self._body.send(value)

    def throw(self, *error: Any) -> Any:
        self._waits_for.clear()
        return self._body.throw(*error)

    def close(self) -> None:
        self._body.close()

    def __await__(self) -> Generator[Any, Any, T]:
        raise NotImplementedError("a task sends to it")


def begin(body: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
    """Begin a coroutine at once; only one that waits becomes a task, which would cost more than most calls do."""
    ended: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    try:
        waits_for = body.send(None)
    except StopIteration as result:
        ended.set_result(result.value)
    except Exception as error:
        ended.set_exception(error)
        ended.exception()  # whoever looks at it hears of it: it is not lost
    else:
        return asyncio.ensure_future(_Begun(body, waits_for))
    return ended


class CallGate:
    """Carries calls out on the flow."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._replicas: dict[str, ReplicaCalls] = {}

    async def call(self, call: Call) -> Any:
        """Carry out a call, or give the answer it had before. Cancelling the wait cancels the call.

        Raises:
            ChannelClosed: the replica has been replaced, or the flow says so.
        """
        known = self._replicas.setdefault(call.replica, ReplicaCalls(incarnation=call.incarnation))
        if call.incarnation != known.incarnation:
            raise ChannelClosed(call.replica, f"incarnation {call.incarnation} was replaced by {known.incarnation}")
        for number in [number for number in known.answers if number < call.answered]:
            del known.answers[number]
        answer = known.answers.get(call.number)
        if answer is None:
            if call.method not in METHODS:
                raise ValueError(f"{call.method!r} is not a call")
            body = getattr(self.flow, call.method)(call.replica, *call.arguments)
            answer = known.answers[call.number] = begin(body)
        if answer.done():
            return answer.result()
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            answer.cancel()
            raise

    def undo(self, call: Call) -> None:
        """End a call whose caller no longer waits for it; what it was given goes back."""
        known = self._replicas.get(call.replica)
        if known is None or known.incarnation != call.incarnation:
            return
        answer = known.answers.pop(call.number, None)
        if answer is None or answer.cancel() or answer.cancelled() or answer.exception() is not None:
            return
        undo = getattr(self.flow, f"undo_{call.method}", None)
        if undo is not None:
            undo(call.replica, call.arguments[0], answer.result())

    async def release(self, replica: str, successor: int, *, blames: bool = True) -> Released:
        """Refuse the replica's calls from now on, end those that wait, and give back what it held."""
        known = self._replicas.setdefault(replica, ReplicaCalls())
        known.incarnation = successor
        waiting = [answer for answer in known.answers.values() if not answer.done()]
        known.answers.clear()
        for answer in waiting:
            answer.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return self.flow.release(replica, blames=blames)

    async def close(self) -> None:
        """End every call that waits."""
        waiting = [answer for known in self._replicas.values() for answer in known.answers.values()]
        self._replicas.clear()
        for answer in waiting:
            answer.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


class CallClient:
    """The flow as one incarnation of a replica sees it; has a method for each of `METHODS`."""

    def __init__(self, carry: Callable[[Call], Awaitable[Any]], replica: str, incarnation: int) -> None:
        self._carry = carry
        self._replica = replica
        self._incarnation = incarnation
        self._number = 0
        self._unanswered: set[int] = set()

    def __getattr__(self, method: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        if method not in METHODS:
            raise AttributeError(f"{method!r} is not a call of the flow")
        call = self.__dict__[method] = partial(self._call, method)
        return call

    async def _call(self, method: str, *arguments: Any) -> Any:
        number = self._number
        self._number += 1
        self._unanswered.add(number)
        call = Call(self._replica, self._incarnation, number, min(self._unanswered), method, arguments)
        try:
            return await self._carry(call)
        finally:
            self._unanswered.discard(number)
