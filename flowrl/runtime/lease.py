"""Turns on shared devices (decision 0010): nodes that sample and nodes that train have the same devices in turns.

The flow keeps a `Lease` for each set of devices that is used so; each replica there has a `Holder` (holder.py), which
takes the lease when something is to be computed and gives it back when others wait and nothing is.

Invariants:
- one side has the devices at a time: the other gets them when every holder has given them back or is proved dead;
- a side keeps them until none of its replicas needs them; what it can do alone is bounded by the graph's credits;
- who does not hold the lease has its engine asleep, and computes nothing;
- a holder that others wait for and that ends no use of them for `limit_s` loses the lease; it is named by `take_lost`,
the runtime ends its process, and the devices go on when that is done;
- every turn has a number; whoever names another than the present one is told that it lost the lease (RunError).

Called by the flow; the runtimes ask it who takes turns (`turn_of`).

Tests: tests/unit/runtime/test_lease.py
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from flowrl.config import load_class
from flowrl.engines.base import Computing, Serving
from flowrl.errors import ChannelClosed, ConfigError, RunError
from flowrl.runtime.channels import Waiters

if TYPE_CHECKING:
    from flowrl.graph.graph import Graph

ROUNDING_S = 1e-6  # by which a timer may ring too early


class Turns(NamedTuple):
    """Who takes turns on one node's devices."""

    training: frozenset[str]  # nodes; theirs is the first turn
    sampling: frozenset[str]
    limit_s: float


class Turn(msgspec.Struct, frozen=True):
    """What a replica knows of the turns that it takes."""

    host: str  # the node whose devices they are
    limit_s: float


def turns_of(graph: Graph) -> dict[str, Turns]:
    """Return the sets of devices that are used in turns, by the node that they are of.

    Raises:
        ConfigError: there is nobody to take turns with.
    """
    configs = {name: stage.config for name, stage in graph.nodes.items()}
    found: dict[str, Turns] = {}
    for name, config in configs.items():
        if not isinstance(config, Serving) or not config.turns:
            continue
        host = config.share or name
        there = {node: each for node, each in configs.items() if host in (node, each.share)}
        training = frozenset(node for node, each in there.items() if isinstance(each, Computing))
        if not training:
            what = f"no node that trains or scores shares the devices of {host}"
            raise ConfigError(f"{name}.turns", what, f"set {name}.share=NODE to one that does, or leave turns false")
        sampling = frozenset(node for node, each in there.items() if isinstance(each, Serving))
        found[host] = Turns(training, sampling, config.turn_limit_s)
    return found


def turn_of(graph: Graph, node: str) -> Turn | None:
    """Return in which turns a node has its devices; None: it has them to itself, or beside others."""
    for host, turns in turns_of(graph).items():
        if node in turns.training | turns.sampling:
            return Turn(host, turns.limit_s)
    return None


def check_turns(graph: Graph) -> None:
    """Insist that every engine that is to take turns can sleep.

    Raises:
        ConfigError: one cannot, or there is nobody to take turns with.
    """
    for turns in turns_of(graph).values():
        for node in sorted(turns.training | turns.sampling):
            path: str = getattr(graph.nodes[node].config, "engine", "")
            if path and not hasattr(load_class(path, f"{node}.engine"), "sleep"):
                what = f"{path} cannot put aside what it holds: it has no methods `sleep` and `wake`"
                raise ConfigError(f"{node}.engine", what, "take one of flowrl's, or leave turns false")


class Lease:
    """Who has the devices now; owned by the flow's event loop."""

    def __init__(self, host: str, turns: Turns) -> None:
        self.name = f"devices of {host}"
        self.turn = 0
        self._turns = turns
        self._has_begun = False
        self._is_sampling = False
        self._holders: dict[str, float] = {}  # replica -> when it was last heard to get on
        self._overdue: set[str] = set()  # of these, those that lost the lease and may not be dead yet
        self._lost: list[str] = []  # of these, whom nobody was told of yet
        self._waiting: Waiters[str] = Waiters()
        self._recalls: Waiters[str] = Waiters()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def waits(self) -> list[str]:
        """Say who waits for the devices, and who has them."""
        holders = ", ".join(sorted(self._holders)) or "nobody"
        return [f"{replica} waits for the {self.name} ({holders} has them)" for replica in self._waiting.requests()]

    async def take(self, replica: str) -> int:
        """Wait until the replica's side has its turn and return the turn's number; a holder has it at once.

        Raises:
            RunError: the replica lost the lease.
            ChannelClosed: the run has ended.
        """
        if self._is_closed:
            raise ChannelClosed(self.name, "are closed")
        self._check(replica)
        if replica not in self._holders:
            if self._may_hold(replica):
                self._grant(replica)
            else:
                self._recall()
                await self._waiting.wait(replica, undo=lambda: self.drop(replica))
        return self.turn

    async def recalled(self, replica: str, turn: int) -> None:
        """Wait until the other side waits for the devices; RunError where the replica lost the lease."""
        self._check(replica, turn)
        if not len(self._waiting):
            await self._recalls.wait(replica)

    def getting_on(self, replica: str, turn: int) -> None:
        """Note that a holder has ended a use; RunError where it lost the lease."""
        self._check(replica, turn)
        self._holders[replica] = _now()

    def give_back(self, replica: str, turn: int) -> None:
        """End a holder's part in the turn; RunError where it lost the lease."""
        self._check(replica, turn)
        self.drop(replica)

    def take_lost(self) -> list[str]:
        """Return who lost the lease since the last call."""
        lost, self._lost = self._lost, []
        return lost

    def release(self, replica: str) -> None:
        """Drop a replica that is proved dead."""
        self._overdue.discard(replica)
        self.drop(replica)

    def close(self) -> None:
        """Wake every waiter."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        for waiters in (self._waiting, self._recalls):
            waiters.fail(ChannelClosed(self.name, "are closed"))

    def _check(self, replica: str, turn: int | None = None) -> None:
        if replica in self._overdue or (turn is not None and (turn != self.turn or replica not in self._holders)):
            what = f"the lease of the {self.name} was lost: others waited, and nothing got on for too long"
            raise RunError(replica, what, "raise turn_limit_s where single calls take longer")

    def _samples(self, replica: str) -> bool:
        return replica.rpartition(".")[0] in self._turns.sampling

    def _may_hold(self, replica: str) -> bool:
        if self._holders:
            return self._samples(replica) is self._is_sampling
        return self._has_begun or not self._samples(replica)

    def _grant(self, replica: str) -> None:
        is_sampling = self._samples(replica)
        if not self._has_begun or is_sampling is not self._is_sampling:
            self.turn += 1
        self._has_begun, self._is_sampling = True, is_sampling
        self._holders[replica] = _now()

    def drop(self, replica: str) -> None:
        """Forget a holder; where it was the last, the side that has waited longest has the next turn."""
        self._holders.pop(replica, None)
        if not self._holders:
            for future, waiting in self._waiting:
                if self._may_hold(waiting):
                    self._grant(waiting)
                    self._waiting.grant(future)

    def _recall(self) -> None:
        """Ask the holders for the devices; their time begins with the first who waits."""
        if not len(self._waiting):
            self._holders = dict.fromkeys(self._holders, _now())
            self._look_in(self._turns.limit_s)
        for future, _ in self._recalls:
            self._recalls.grant(future)

    def _look_in(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._end_overdue)

    def _end_overdue(self) -> None:
        """Take the lease from whom others wait for and nothing was heard of within the limit."""
        self._timer = None
        if not len(self._waiting):
            return
        left = {each: since + self._turns.limit_s - _now() for each, since in self._holders.items()}
        for replica in [each for each, left_s in left.items() if left_s <= ROUNDING_S and each not in self._overdue]:
            self._overdue.add(replica)
            self._lost.append(replica)
        if soon := [left_s for each, left_s in left.items() if each not in self._overdue]:
            self._look_in(min(soon))


def _now() -> float:
    return asyncio.get_running_loop().time()
