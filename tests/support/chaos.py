"""Faults for the local runtime: links that lose, double and delay calls; deaths of replicas and of the flow's host.

Everything is drawn from one seed, so that a schedule that breaks a law can be run again alone.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flowrl.errors import ChannelClosed

if TYPE_CHECKING:
    from flowrl.runtime.calls import Call
    from flowrl.runtime.local import Carry, LocalWorkers

RETRY_S = 0.5  # after which a caller repeats what has not been answered


@dataclass
class Chaos:
    """One schedule's faults; give `link` and `strike` to LocalOptions."""

    seed: int
    deaths: int = 3  # left to strike, over all attempts
    mean_s: float = 0.3  # between two of them
    loss: float = 0.05  # chance that a call is lost; that it is late; that its answer is lost; that it comes twice
    fatal: float = 0.2  # chance that a death is the learner's or the host's
    struck: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)
        self._astray: set[asyncio.Future[Any]] = set()

    def link(self, carry: Carry) -> Carry:
        """Return a link that loses, doubles and delays."""

        async def through(call: Call) -> Any:
            if self._draw.random() > 4 * self.loss:
                return await carry(call)  # nothing happens to it
            mine: set[asyncio.Future[Any]] = set()
            try:
                while True:
                    fate = 4 * self.loss * self._draw.random()
                    if fate < self.loss:
                        await asyncio.sleep(RETRY_S)
                        continue
                    if fate < 2 * self.loss:
                        await asyncio.sleep(self._draw.expovariate(20.0))
                    for _ in range(2 if fate > 3 * self.loss else 1):
                        mine.add(asyncio.ensure_future(carry(call)))
                    answered, _ = await asyncio.wait(mine, return_when=asyncio.FIRST_COMPLETED)
                    if 2 * self.loss < fate < 3 * self.loss and not _is_closed(next(iter(answered))):
                        await asyncio.sleep(RETRY_S)  # the answer is lost: ask again
                        continue
                    return next(iter(answered)).result()
            finally:
                for future in mine:
                    future.cancel()
                await asyncio.gather(*mine, return_exceptions=True)

        return through

    async def strike(self, workers: LocalWorkers) -> None:
        """Kill somebody every now and then."""
        while self.deaths > 0:
            await asyncio.sleep(self._draw.expovariate(1 / self.mean_s))
            self.deaths -= 1
            if self._draw.random() < self.fatal:
                victim = self._draw.choice(["learner.0", "host"])
            else:
                victim = self._draw.choice([name for name in workers.replicas if name != "learner.0"] or ["host"])
            self.struck.append(victim)
            if victim == "host":
                workers.lose_host()
            else:
                await workers.kill(victim)


def _is_closed(future: asyncio.Future[Any]) -> bool:
    return future.exception() is not None and isinstance(future.exception(), ChannelClosed)
