"""Bind a stage's ports to a flow, whether it is in this process or at the other end of a wire.

Each end translates between messages and (key, bytes), and charges every wait to the replica's clock: waiting for a
message or a newer value is waiting for input; waiting for room, or for a credit to admit a group, is waiting for room.
How long a published value takes to be acknowledged is charged by the stage that published it, if it waits for that at
all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from flowrl.graph.ports import In, Out
from flowrl.messages import Credit, Message, decode, encode, replays_of
from flowrl.telemetry.causes import Cause, CauseClock

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flowrl.graph.stage import Stage
    from flowrl.runtime.calls import FlowCalls


class Wire(NamedTuple):
    """How a message becomes what a queue or a register holds, and comes out again."""

    encode: Callable[[Any], Any]  # what it returns has a length: its bytes
    decode: Callable[[Any], Any]


WIRE = Wire(encode, decode)


class EdgeEnd:
    """One end of an edge, as one replica sees it."""

    def __init__(self, flow: FlowCalls, address: str, clock: CauseClock, wire: Wire = WIRE) -> None:
        self.flow = flow
        self.address = address
        self.clock = clock
        self.wire = wire


class QueueSend(EdgeEnd):
    async def put(self, message: Any) -> None:
        body = self.wire.encode(message)
        with self.clock.charge(Cause.WAIT_ROOM):
            await self.flow.put(self.address, message.group_id, body)


class QueueReceive(EdgeEnd):
    async def get(self, limit: int) -> list[Message]:
        with self.clock.charge(Cause.WAIT_INPUT):
            bodies = await self.flow.get(self.address, limit)
        return [self.wire.decode(body) for body in bodies]

    async def done(self, messages: Sequence[Any], learned_in: int | None) -> None:
        keys = [message.group_id for message in messages]
        if learned_in is None:
            await self.flow.done(self.address, keys, None, [], [])
            return
        oldest = [message.oldest_version for message in messages]
        replays = [[(each.group_id, each.oldest_version) for each in replays_of(message)] for message in messages]
        await self.flow.done(self.address, keys, learned_in, oldest, replays if any(replays) else [])

    async def reject(self, message: Any, kind: str, reason: str) -> None:
        await self.flow.reject(self.address, message.group_id, kind, reason)


class RegisterSend(EdgeEnd):
    async def put(self, message: Any) -> None:
        await self.flow.publish(self.address, message.version, self.wire.encode(message))


class RegisterReceive(EdgeEnd):
    """Reads a register; `done` acknowledges the version to the writer."""

    newest = -1

    async def get(self, limit: int) -> list[Message]:
        with self.clock.charge(Cause.WAIT_INPUT):
            self.newest, body = await self.flow.read(self.address, self.newest)
        return [self.wire.decode(body)]

    async def done(self, messages: Sequence[Any], learned_in: int | None) -> None:
        for message in messages:
            await self.flow.confirm(self.address, message.version)

    async def reject(self, message: Any, kind: str, reason: str) -> None:
        raise NotImplementedError("a register's value cannot be rejected")


class CreditsSend(EdgeEnd):
    async def put(self, message: Any) -> None:
        await self.flow.give_back(self.address, encode(message))


class CreditsReceive(EdgeEnd):
    async def get(self, limit: int) -> list[Message]:
        with self.clock.charge(Cause.WAIT_ROOM):
            group_id = await self.flow.acquire(self.address)
        return [Credit(groups=[group_id])]

    async def done(self, messages: Sequence[Any], learned_in: int | None) -> None:
        """Nothing to settle: a credit is tied to its group when the group is put."""

    async def reject(self, message: Any, kind: str, reason: str) -> None:
        raise NotImplementedError("a credit cannot be rejected; reject the group")


SENDS: dict[str, type[Any]] = {"queue": QueueSend, "latest": RegisterSend, "credits": CreditsSend}
RECEIVES: dict[str, type[Any]] = {"queue": QueueReceive, "latest": RegisterReceive, "credits": CreditsReceive}


def bind(
    stage: Stage, node: str, *, kinds: Mapping[str, str], flow: FlowCalls, clock: CauseClock, wire: Wire = WIRE
) -> None:
    """Give every connected port its end; `kinds` says by address what kind of edge it is on."""
    for name, port in stage.ports.items():
        kind = kinds.get(f"{node}.{name}", "")
        if not kind:
            continue
        if isinstance(port, Out):
            port.end = SENDS[kind](flow, f"{node}.{name}", clock, wire)
        elif isinstance(port, In):
            port.end = RECEIVES[kind](flow, f"{node}.{name}", clock, wire)
