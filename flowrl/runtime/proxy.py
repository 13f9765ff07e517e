"""Proxies of the hub: processes between it and the replicas, which hand it the calls of many of them in one piece.

What a call costs the hub is its packet, not what the flow does about it: 30 microseconds against 4. So a large run's
replicas call proxies, each over a connection of its own, and a proxy calls the hub over one. There is one flow all the
same: its laws, its order and its ledger have one owner (decision 0001).

Invariants:
- a proxy decides nothing and remembers nothing, so a call means what it means at the hub;
- what a replica no longer waits for is taken back at the hub;
- a proxy that is lost is the hub lost: the run goes back to a checkpoint.

An actor of its own holds one (actors.py); the workers of runtime/ray.py start as many as `num_proxies` says.

Tests: tests/contracts/test_flow_clients.py
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowrl.runtime.calls import Call
    from flowrl.runtime.wire import Connection

ALONE = 4000  # processes that the hub serves without proxies: 97 % of the linear rate there (docs/benchmarks.md)
EACH = 2500  # processes behind one proxy


def num_proxies(wanted: int | None, num_processes: int) -> int:
    """Return how many proxies a run has: as many as are wanted, or as its processes need.

    >>> num_proxies(None, 100), num_proxies(None, 10_000), num_proxies(2, 100)
    (0, 4, 2)
    """
    if wanted is not None:
        return wanted
    return math.ceil(num_processes / EACH) if num_processes > ALONE else 0


class Proxy:
    """What a listener asks in the gate's place."""

    def __init__(self, hub: Connection) -> None:
        self._hub = hub

    async def call(self, call: Call) -> Any:
        """Return the hub's answer; cancelling the wait cancels the call."""
        return await self._hub.carry(call)

    def undo(self, call: Call) -> None:
        """Have the hub take back what it has given to a caller that no longer waits."""
        self._hub.undo(call)
