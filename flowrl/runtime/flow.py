"""The flow: the live state of a graph's edges, and the only place where messages, credits and the ledger meet.

One flow serves one run. The local runtime calls it directly, the Ray runtime from within one actor; there is no other
implementation. Invariants: putting a message of a group downstream settles the sender's hold on that group upstream
in the same step, so a group is never in two places; a group enters only against a credit and is in the ledger from
then on; a rejected group leaves a tombstone in every ordered queue and returns its credit (laws 1 to 3).

Any movement resets the stall timer; when nothing has moved for `stall_timeout_s`, every waiter gets a StallError that
names who waits for what.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from flowrl.errors import ChannelClosed, GraphError, StallError
from flowrl.graph.edges import Credits, Latest, Queue
from flowrl.messages import decode
from flowrl.runtime.channels import CreditsChannel, QueueChannel, RegisterChannel
from flowrl.telemetry.events import EdgeStatus

if TYPE_CHECKING:
    from flowrl.graph.graph import Graph
    from flowrl.messages import Credit
    from flowrl.runtime.ledger import Ledger


def replica_name(node: str, replica: int) -> str:
    """Return the name under which a replica holds messages and acknowledges versions."""
    return f"{node}.{replica}"


def node_name(replica: str) -> str:
    """Return the node of a replica's name."""
    return replica.rpartition(".")[0]


class Flow:
    """The live edges of one run; ports are addressed as "node.port"."""

    def __init__(self, graph: Graph, ledger: Ledger, *, first_group: int = 0) -> None:
        self.ledger = ledger
        self._queues: dict[str, QueueChannel] = {}  # by the address of either end
        self._registers: dict[str, RegisterChannel] = {}
        self._credits: dict[str, CreditsChannel] = {}
        self._queues_into: dict[str, list[QueueChannel]] = {}  # by node
        self._admitting: dict[str, CreditsChannel] = {}  # by the node whose messages need a credit
        self._moves = 0
        self._failure: Exception | None = None
        for edge in graph.edges:
            name, source, target = graph.name(edge), graph.address(edge.source), graph.address(edge.target)
            into = graph.node_of(edge.target)
            if isinstance(edge, Queue):
                queue = QueueChannel(
                    name, depth=edge.depth, max_bytes=edge.max_bytes, window=edge.window, first_key=first_group
                )
                self._queues[source] = self._queues[target] = queue
                self._queues_into.setdefault(into, []).append(queue)
            elif isinstance(edge, Latest):
                readers = [replica_name(into, i) for i in range(graph.nodes[into].config.replicas)]
                self._registers[source] = self._registers[target] = RegisterChannel(name, readers)
            elif isinstance(edge, Credits):
                credits = CreditsChannel(name, initial=edge.initial)
                self._credits[source] = self._credits[target] = credits
                self._admitting[into] = credits
            else:
                raise GraphError(name, f"{type(edge).__name__} is not a kind of edge")

    def kind(self, address: str) -> str:
        """Return "queue", "latest", "credits", or "" where no edge is joined to the port."""
        kinds = {"queue": self._queues, "latest": self._registers, "credits": self._credits}
        return next((kind for kind, edges in kinds.items() if address in edges), "")

    async def put(self, address: str, sender: str, key: int, body: bytes) -> None:
        """Put a group's message into the queue at `address` and settle the sender's hold on the group upstream."""
        self._raise_failure()
        credits = self._admitting.get(node_name(sender))
        if credits is not None and not self.ledger.has_ended(key) and key not in credits.out:
            credits.admit(key)
            self.ledger.admit(key)
        await self._queues[address].put(key, body)
        for upstream in self._queues_into.get(node_name(sender), []):
            if upstream.held.get(key) == sender:
                upstream.settle(key)
        self._moves += 1

    async def get(self, address: str, consumer: str, limit: int) -> list[bytes]:
        """Take up to `limit` messages, at least one; `consumer` holds them until they are settled."""
        self._raise_failure()
        items = await self._queues[address].get(consumer, limit)
        self._moves += 1
        return [item.body for item in items]

    async def done(self, address: str, keys: list[int], learned_in: int | None) -> None:
        """Settle held messages; with `learned_in` the groups end in the ledger as learned in that step."""
        for key in keys:
            self._queues[address].settle(key)
            if learned_in is not None:
                self.ledger.end(key, "learned", step=learned_in)
        self._moves += 1

    async def reject(self, address: str, key: int, kind: str, reason: str) -> None:
        """End a group as filtered or failed: skip its place in every order and return its credit."""
        self._queues[address].settle(key)
        for queue in set(self._queues.values()):
            if queue.window is not None:
                queue.skip(key)
        for credits in self._admitting.values():
            if key in credits.out:
                credits.give_back([key])
                self.ledger.end(key, kind, reason=reason)
        self._moves += 1

    async def publish(self, address: str, version: int, body: bytes) -> None:
        """Set a register and wait until every live reader has confirmed the version or a newer one."""
        self._raise_failure()
        self._moves += 1
        await self._registers[address].put(version, body)
        self._moves += 1

    async def read(self, address: str, newer_than: int) -> tuple[int, bytes]:
        """Wait for a version newer than `newer_than`."""
        self._raise_failure()
        found = await self._registers[address].get(newer_than)
        self._moves += 1
        return found

    async def confirm(self, address: str, reader: str, version: int) -> None:
        """Note that a reader serves a version."""
        self._registers[address].confirm(reader, version)
        self._moves += 1

    async def acquire(self, address: str, taker: str) -> None:
        """Wait for the right to admit one group."""
        self._raise_failure()
        await self._credits[address].get(taker)
        self._moves += 1

    async def give_back(self, address: str, body: bytes) -> None:
        """Return the rights of learned groups."""
        credit: Credit = decode(body)  # type: ignore[assignment]
        self._credits[address].give_back(credit.groups)
        self._moves += 1

    def release(self, replica: str) -> list[int]:
        """Give back all that a dead replica held, and wait for its acknowledgements no more; returns the groups."""
        released = [key for queue in set(self._queues.values()) for key in queue.release(replica)]
        for register in set(self._registers.values()):
            register.release(replica)
        return released

    def close(self, address: str | None = None) -> None:
        """Close the edge at `address`, or every edge."""
        for edges in (self._queues, self._registers, self._credits):
            for end, channel in edges.items():
                if address in (None, end):
                    channel.close()

    def waits(self) -> list[str]:
        """Say who waits for what, oldest first within each edge."""
        channels = [*self._queues.values(), *self._registers.values(), *self._credits.values()]
        lines = [line for channel in dict.fromkeys(channels) for line in channel.waits()]
        held = {k: c for queue in self._queues.values() for k, c in queue.held.items()}
        return lines + [f"{consumer} holds group {key}" for key, consumer in sorted(held.items())]

    def edge_status(self, now_s: float) -> list[EdgeStatus]:
        """Return every queue's fill."""
        queues = dict.fromkeys(self._queues.values())
        return [
            EdgeStatus(edge=q.name, time_s=now_s, items=len(q), depth=q.depth, size_bytes=q.size_bytes) for q in queues
        ]

    async def watch(self, timeout_s: float) -> None:
        """Wait until nothing has moved for `timeout_s`, then fail every wait.

        Raises:
            StallError: always, naming who waits for what.
        """
        seen = -1
        while seen != self._moves:
            seen = self._moves
            await asyncio.sleep(timeout_s)
        error = StallError("flow", f"nothing has moved for {timeout_s:.0f} s: {'; '.join(self.waits()) or 'no waits'}")
        self.fail(error)
        raise error

    def fail(self, error: Exception) -> None:
        """Remember why the run fails and end every wait."""
        self._failure = error
        self.close()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise ChannelClosed("flow", f"the run has failed ({self._failure})")
