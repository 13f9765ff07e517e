"""A fake training engine of several ranks that march together: none takes a step before every other one takes it.

As in a real engine, a rank that is killed or stopped holds up all the others for as long as nobody ends them.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from flowrl.simulation.fake import FakeTraining

if TYPE_CHECKING:
    from flowrl.graph.stage import Ranks

BEAT = b"."


class MarchingTraining(FakeTraining):
    """Rank 0 sends each step to the others and waits for their word."""

    def open(self, ranks: Ranks | None = None) -> None:
        """Meet the other ranks."""
        assert ranks is not None
        if ranks.rank:
            self._others = [socket.create_connection((ranks.address, ranks.port))]
            return
        with socket.socket(fileno=ranks.listener) as listener:
            self._others = [listener.accept()[0] for _ in range(ranks.world_size - 1)]

    def follow(self) -> None:
        """Answer each step until rank 0 closes."""
        (first,) = self._others
        while first.recv(1):
            first.sendall(BEAT)

    def apply(self) -> dict[str, float]:
        """Take one step together."""
        for other in self._others:
            other.sendall(BEAT)
        assert all(other.recv(1) for other in self._others), "a rank has gone"
        return super().apply()

    def close(self) -> None:
        """Let the others go."""
        for other in self._others:
            other.close()
        super().close()
