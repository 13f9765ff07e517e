"""The flow: the live state of a graph's edges, and the only place where messages, credits and the ledger meet.

One flow serves one run from one cut on. Every runtime reaches it through its gate (calls.py), which says who is
calling; there is no other implementation.

Invariants:
- a replica hands on, settles or rejects only what it holds;
- its hold on a group ends in the same step in which the group is accepted downstream, so a group is in one place;
- a group enters only against a credit and is in the ledger from then on;
- a rejected group leaves a tombstone in every ordered queue and returns its credit;
- whoever gives credits back learns what the bound was proved of (laws 1 to 3).

Any movement resets the stall timer; when nothing has moved for `stall_timeout_s`, every waiter gets a StallError that
names who waits for what.

Tests: tests/unit/runtime/test_flow.py
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from flowrl.errors import ChannelClosed, GraphError, LastingError, StallError
from flowrl.graph.edges import Credits, Latest, Queue
from flowrl.messages import decode
from flowrl.runtime.channels import CreditsChannel, RegisterChannel, Waiters
from flowrl.runtime.lease import Lease, turns_of
from flowrl.runtime.ledger import Cut
from flowrl.runtime.queue import QueueChannel
from flowrl.telemetry.events import EdgeStatus, Notice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.graph.graph import Graph
    from flowrl.graph.staleness import Admission
    from flowrl.messages import Credit
    from flowrl.runtime.ledger import Ledger
    from flowrl.telemetry.events import Event

ROOM_RETRY_S = 1.0  # between two looks at a full disk, which tells nobody when it has room
SLICES = 10  # of a time limit: a process that was stopped has used up one of them when it goes on
MAX_DEATHS = 3  # holders a group may lose before it is taken to be the cause; at the last one it was held alone


def replica_name(node: str, replica: int) -> str:
    """Return the name under which a replica holds messages and acknowledges versions."""
    return f"{node}.{replica}"


@lru_cache(maxsize=1 << 16)
def node_name(replica: str) -> str:
    """Return the node of a replica's name."""
    return replica.rpartition(".")[0]


@dataclass
class Released:
    """What became of what a dead replica held."""

    reissued: list[int] = field(default_factory=list[int])
    poisonous: list[tuple[int, bytes]] = field(default_factory=list[tuple[int, bytes]])  # with the message it held


class StepLaw:
    """Holds what a node learns against what it said it would, of which the staleness bound was proved."""

    def __init__(self, node: str, admission: Admission) -> None:
        self._node = node
        self._admission = admission
        self._step, self._count = -1, 0  # the present step, and the groups learned in it

    def note(self, group: int, *, step: int, oldest: int) -> None:
        """Note that a group is learned in a step.

        Raises:
            LastingError: it is too old, or the step before had fewer groups than a version should, or this has more.
        """
        most, size = self._admission.max_staleness, self._admission.per_version
        if most is None:
            return
        if step - oldest > most:
            what = f"group {group} is {step - oldest} versions old in step {step}, more than max_staleness={most}"
            raise LastingError(self._node, what, f"learn {size} groups into each version, in their order")
        before, self._count = self._count, self._count + 1 if step == self._step else 1
        if self._count > size or (step != self._step >= 0 and before < size):
            which, count = (step, self._count) if self._count > size else (self._step, before)
            what = f"{count} groups are learned in step {which}, and the staleness bound was proved of {size}"
            raise LastingError(self._node, what, "let its `admission` say how many groups it learns into a version")
        self._step = step


class Flow:
    """The live edges of one run; ports are addressed as "node.port", callers named by replica."""

    def __init__(self, graph: Graph, ledger: Ledger, *, cut: Cut | None = None) -> None:
        self.ledger = ledger
        self._all_queues: list[QueueChannel] = []
        self._queues: dict[str, QueueChannel] = {}  # by the address of either end
        self._registers: dict[str, RegisterChannel] = {}
        self._credits: dict[str, CreditsChannel] = {}
        self._steps: dict[str, StepLaw] = {}  # by the node that learns
        self._queues_into: dict[str, list[QueueChannel]] = {}  # by node
        self._admitting: dict[str, CreditsChannel] = {}  # by the node whose messages need a credit
        self._starts = _starts(graph)
        self._sent_by: dict[int, str] = {}  # who began a group that needs no credit: held-out prompts
        self._deaths: Counter[int] = Counter()  # of holders, by group
        self._drains: Waiters[int] = Waiters()
        self._moves = 0
        self.has_begun = False  # whether anybody was given a message
        self._leases = {host: Lease(host, turns) for host, turns in turns_of(graph).items()}
        self._elsewhere: dict[str, str] = {}  # what a replica, or the ledger, waits for outside the flow
        self._is_told = False  # that the ledger's disk is full
        self._failure: Exception | None = None
        begin = cut or Cut()
        first, ahead = begin.next_group, begin.ended_ahead
        for edge in graph.edges:
            name, source, target = graph.name(edge), graph.address(edge.source), graph.address(edge.target)
            into = graph.node_of(edge.target)
            if isinstance(edge, Queue):
                depth, most = edge.depth, edge.max_bytes
                queue = QueueChannel(
                    name, depth=depth, max_bytes=most, window=edge.window, first_key=first, settled=ahead
                )
                self._queues[source] = self._queues[target] = queue
                self._all_queues.append(queue)
                self._queues_into.setdefault(into, []).append(queue)
            elif isinstance(edge, Latest):
                readers = [replica_name(into, i) for i in range(graph.nodes[into].config.replicas)]
                register = self._registers.setdefault(source, RegisterChannel(name, []))
                register.expect(readers)
                self._registers[target] = register
            elif isinstance(edge, Credits):
                initial, learned = edge.initial, begin.learned
                credits = CreditsChannel(
                    name, initial=initial, total=edge.total, num_learned=learned, first_group=first, ended=ahead
                )
                self._credits[source] = self._credits[target] = credits
                self._admitting[into] = credits
                learner = graph.node_of(edge.source)
                self._steps[learner] = StepLaw(learner, edge.admission)
            else:
                raise GraphError(name, f"{type(edge).__name__} is not a kind of edge")

    def kind(self, address: str) -> str:
        """Return "queue", "latest", "credits", or "" where no edge is joined to the port."""
        kinds = {"queue": self._queues, "latest": self._registers, "credits": self._credits}
        return next((kind for kind, edges in kinds.items() if address in edges), "")

    async def put(self, replica: str, address: str, key: int, body: bytes) -> None:
        """Put a group's message into the queue at `address` and end the sender's hold on the group upstream.

        A group that the sender does not hold (any more) is refused in silence: somebody else has it.
        """
        self._raise_failure()
        credits = self._admitting.get(node_name(replica))
        upstream = self._queues_into.get(node_name(replica), [])
        on_accept: partial[None]
        if credits is not None:
            if key in credits.out or self.ledger.has_ended(key):
                return
            on_accept = partial(self._admit, credits, key)
        elif (held := next((queue for queue in upstream if queue.holder(key) == replica), None)) is not None:
            on_accept = partial(self._hand_on, held, self._queues[address], key)
        elif upstream and address not in self._starts:
            return
        else:
            on_accept = partial(self._sent_by.__setitem__, key, replica)
        await self._queues[address].put(key, body, on_accept)
        self._moves += 1

    def _hand_on(self, held: QueueChannel, queue: QueueChannel, key: int) -> None:
        held.settle(key)
        if self._deaths[key] == MAX_DEATHS - 1:
            queue.suspect(key)  # it was given alone so far, and stays so wherever it goes

    def _admit(self, credits: CreditsChannel, key: int) -> None:
        credits.admit(key)
        self.ledger.admit(key)

    async def get(self, replica: str, address: str, limit: int) -> list[bytes]:
        """Take up to `limit` messages, at least one; the caller holds them until they are settled."""
        self._raise_failure()
        items = await self._queues[address].get(replica, limit)
        self.has_begun = True
        self._moves += 1
        return [item.body for item in items]

    async def done(
        self,
        replica: str,
        address: str,
        keys: list[int],
        learned_in: int | None,
        oldest: list[int],
        replays: Sequence[Sequence[tuple[int, int]]] = (),
    ) -> None:
        """Settle held messages; with `learned_in` the groups end in the ledger as learned in that step.

        `replays` are, for each of the messages, the groups learned again with it and their oldest versions.

        Raises:
            LastingError: the step is not one of those that the staleness bound was proved of.
        """
        for place, key in enumerate(keys):
            if self._queues[address].holder(key) != replica:
                continue
            if learned_in is not None and (law := self._steps.get(node_name(replica))) is not None:
                law.note(key, step=learned_in, oldest=oldest[place])
            self._queues[address].settle(key)
            if self._sent_by.pop(key, None) is not None:
                self._forget(key)
            if learned_in is not None:
                self.ledger.end(key, "learned", step=learned_in, oldest=oldest[place])
                for group, version in replays[place] if replays else ():
                    self.ledger.replay(group, step=learned_in, oldest=version)
        self._note_end()
        self._moves += 1

    async def reject(self, replica: str, address: str, key: int, kind: str, reason: str) -> None:
        """End a held group as filtered or failed: skip its place in every order and return its credit."""
        if self._queues[address].holder(key) != replica:
            return
        self._queues[address].settle(key)
        self._end(key, kind, reason)
        self._moves += 1

    def _end(self, key: int, kind: str, reason: str) -> None:
        for queue in self._all_queues:
            if queue.window is not None:
                queue.skip(key)
        for credits in self._admitting.values():
            if key in credits.out:
                self.ledger.end(key, kind, reason=reason)
                credits.give_back([key], are_learned=False)
        self._note_end()

    def undo_get(self, replica: str, address: str, found: list[bytes]) -> None:
        """Take back the messages that were given to a replica which did not wait for them."""
        bodies = {id(body) for body in found}
        queue = self._queues[address]
        queue.give_back([item.key for item in queue.holds(replica) if id(item.body) in bodies])

    def undo_acquire(self, replica: str, address: str, found: int) -> None:
        """Take back the right that was given to a replica which did not wait for it."""
        self._credits[address].take_back(found)

    async def publish(self, replica: str, address: str, version: int, body: bytes) -> None:
        """Set a register and wait until every live reader has confirmed the version or a newer one."""
        self._raise_failure()
        self._moves += 1
        await self._registers[address].put(version, body)
        self._moves += 1

    async def read(self, replica: str, address: str, newer_than: int) -> tuple[int, bytes]:
        """Wait for a version newer than `newer_than`."""
        self._raise_failure()
        found = await self._registers[address].get(replica, newer_than)
        self._moves += 1
        return found

    async def confirm(self, replica: str, address: str, version: int) -> None:
        """Note that the caller serves a version."""
        self._registers[address].confirm(replica, version)
        self._moves += 1

    async def acquire(self, replica: str, address: str) -> int:
        """Wait for the right to admit one group and return the group's id; none is given while the disk is full."""
        self._raise_failure()
        await self._written()
        group_id = await self._credits[address].get(replica)
        self._moves += 1
        return group_id

    async def give_back(self, replica: str, address: str, body: bytes) -> None:
        """Return the rights of learned groups."""
        credit: Credit = decode(body)  # type: ignore[assignment]
        self._credits[address].give_back(credit.groups, are_learned=True)
        self._moves += 1

    async def cut(self, replica: str, version: int) -> Cut:
        """Return where the flow stands, for a checkpoint of `version`; waits for room for the ledger."""
        await self._written()
        return self.ledger.cut(version)

    async def note_wait(self, replica: str, text: str) -> None:
        """Note what a replica waits for outside the flow, a full disk for one, or with "" that it has it.

        As long as somebody does, that nothing moves is no stall.
        """
        if text:
            self._elsewhere[replica] = text
        else:
            self._elsewhere.pop(replica, None)
        self._moves += 1

    async def _written(self) -> None:
        """Wait until the ledger's disk has every entry."""
        while trouble := self.ledger.flush():
            self._elsewhere["ledger"] = trouble
            await asyncio.sleep(ROOM_RETRY_S)
        self._elsewhere.pop("ledger", None)

    async def take(self, replica: str, host: str) -> int:
        """Wait for the turn of the caller's side on a node's devices; returns the turn's number."""
        self._raise_failure()
        turn = await self._leases[host].take(replica)
        self._moves += 1
        return turn

    def undo_take(self, replica: str, host: str, turn: int) -> None:
        """Give devices back for a replica that did not wait for them."""
        self._leases[host].drop(replica)

    async def recalled(self, replica: str, host: str, turn: int) -> None:
        """Wait until others wait for the devices that the caller has."""
        await self._leases[host].recalled(replica, turn)

    async def getting_on(self, replica: str, host: str, turn: int) -> None:
        """Note that the caller ends uses of the devices that others wait for."""
        self._leases[host].getting_on(replica, turn)
        self._moves += 1

    async def hand_over(self, replica: str, host: str, turn: int) -> None:
        """End the caller's part in its side's turn."""
        self._leases[host].give_back(replica, turn)
        self._moves += 1

    def lost(self) -> list[str]:
        """Return who has lost a lease since the last look: the runtime ends it, for it may go on computing."""
        return [replica for lease in self._leases.values() for replica in lease.take_lost()]

    async def fewer_out(self, replica: str, count: int) -> None:
        """Wait until fewer than `count` groups are on their way: admitted and not ended."""
        if self.ledger.num_open >= count:
            await self._drains.wait(count)

    def _note_end(self) -> None:
        for queue in self._all_queues:
            queue.ended_below(self.ledger.oldest_open)
        for future, count in self._drains:
            if self.ledger.num_open < count:
                self._drains.grant(future)

    def release(self, replica: str, *, blames: bool = True) -> Released:
        """Give back all that a replica held which is gone, and wait for its acknowledgements no more.

        What it began itself (held-out prompts) is taken out everywhere: its successor begins it again. A group whose
        holder has died before is given only to a replica that holds nothing else; at `MAX_DEATHS` it ends as failed.
        """
        released = Released()
        self._elsewhere.pop(replica, None)
        for key in [known for known, sender in self._sent_by.items() if sender == replica]:
            del self._sent_by[key]
            self._forget(key)
        for queue in self._all_queues:
            for item in queue.holds(replica) if blames else ():
                self._deaths[item.key] += 1
                if self._deaths[item.key] >= MAX_DEATHS:
                    released.poisonous.append((item.key, item.body))
                    queue.settle(item.key)
                    self._end(item.key, "failed", f"its holder died {MAX_DEATHS} times, last {replica}")
                elif self._deaths[item.key] == MAX_DEATHS - 1:
                    queue.suspect(item.key)
            released.reissued += queue.release(replica)
        for register in set(self._registers.values()):
            register.release(replica)
        for credits in set(self._credits.values()):
            credits.release(replica)
        for lease in self._leases.values():
            lease.release(replica)
        self._moves += 1
        return released

    def _forget(self, key: int) -> None:
        for queue in self._all_queues:
            queue.forget(key)

    def close(self, address: str | None = None) -> None:
        """Close the edge at `address`, or every edge."""
        for edges in (self._queues, self._registers, self._credits):
            for end, channel in edges.items():
                if address in (None, end):
                    channel.close()
        if address is None:
            self._drains.fail(ChannelClosed("flow", "is closed"))
            for lease in self._leases.values():
                lease.close()

    def waits(self) -> list[str]:
        """Say who waits for what, oldest first within each edge."""
        channels = [
            *self._queues.values(),
            *self._registers.values(),
            *self._credits.values(),
            *self._leases.values(),
        ]
        lines = [line for channel in dict.fromkeys(channels) for line in channel.waits()]
        held = {k: c for queue in self._all_queues for k, c in queue.held.items()}
        lines += [f"{replica} waits: {text}" for replica, text in self._elsewhere.items()]
        return lines + [f"{consumer} holds group {key}" for key, consumer in sorted(held.items())]

    def edge_status(self, now_s: float) -> list[EdgeStatus]:
        """Return every queue's fill."""
        return [
            EdgeStatus(edge=q.name, time_s=now_s, items=len(q), depth=q.depth, size_bytes=q.size_bytes)
            for q in self._all_queues
        ]

    def report(self, now_s: float) -> list[Event]:
        """Return every queue's fill and, where that has changed, what the ledger's disk lacks."""
        trouble = self._elsewhere.get("ledger", "")
        told: list[Event] = [*self.edge_status(now_s)]
        if bool(trouble) != self._is_told:
            self._is_told = bool(trouble)
            text = f"{trouble}; no group is admitted until there is room" if trouble else "has room again"
            told.append(Notice(level="warning" if trouble else "info", where="ledger", text=text, time_s=now_s))
        return told

    async def watch(self, timeout_s: float) -> None:
        """Wait until nothing has moved for `timeout_s` in which this process ran, then fail every wait.

        Raises:
            StallError: always, naming who waits for what.
        """
        seen = -1
        while seen != self._moves or self._elsewhere:
            seen = self._moves
            for _ in range(SLICES):
                await asyncio.sleep(timeout_s / SLICES)
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


def _starts(graph: Graph) -> set[str]:
    """Return the ports at which a node begins groups that come back to it, through a queue that says how many (`most`).

    What leaves anywhere else behind a queue is a group that the node was given.
    """
    queues = [edge for edge in graph.edges if isinstance(edge, Queue)]
    found: set[str] = set()
    for first in queues:
        reached, node = {graph.node_of(first.target)}, graph.node_of(first.source)
        for _ in queues:
            reached |= {graph.node_of(q.target) for q in queues if graph.node_of(q.source) in reached - {node}}
        returning = [q for q in queues if q.most is not None and graph.node_of(q.target) == node]
        if any(graph.node_of(q.source) in reached for q in returning):
            found.add(graph.address(first.source))
    return found
