"""Real engines whose process dies by SIGKILL in the middle of what they do, once at each point they are told, or waits.

A point is written "MOMENT:NUMBER": "generate:12" in the middle of the twelfth request, "update:3" between the pause and
the proof of version 3, "step:5" inside optimizer step 5, "publish:4" with half of version 4 written; a trailing ":1"
means rank 1. `deaths` is a directory where each death leaves a file, so that nobody dies of the same point twice. At a
point before which "hold:" is written the process waits until there is a file `go`, so that a test can be sure what has
not happened yet.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.engines.deepspeed import DeepSpeedEngine
from flowrl.engines.vllm import VllmEngine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from flowrl.engines.base import UpdateReport
    from flowrl.messages import Sample, Weights

SOON_S = 0.02  # into a request, some tokens of it are sampled
LOOK_S = 0.05


class Deaths:
    """The points at which this process is to die."""

    def __init__(self, deaths: str, points: list[str]) -> None:
        self._directory = Path(deaths)
        self._points = points

    def due(self, point: str) -> bool:
        """Return whether this is one of the points and nobody has died of it yet; from then on somebody has."""
        if point not in self._points:
            return False
        try:
            (self._directory / point).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def is_held(self, point: str) -> bool:
        """Return whether to wait at this point."""
        return f"hold:{point}" in self._points and not (self._directory / "go").exists()


def die() -> None:
    """End this process as a machine does."""
    os.kill(os.getpid(), signal.SIGKILL)


class DyingGeneration(VllmEngine):
    """vLLM that dies in the middle of a request or of a weight update, or waits before it takes one in."""

    def __init__(self, *arguments: Any, deaths: str, points: list[str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._deaths = Deaths(deaths, points)
        self._numbers = count(1)

    async def generate(self, **request: Any) -> list[Sample]:
        if self._deaths.due(f"generate:{next(self._numbers)}"):
            asyncio.get_running_loop().call_later(SOON_S, die)
        return await super().generate(**request)

    async def update_weights(self, weights: Weights) -> UpdateReport:
        while self._deaths.is_held(f"update:{weights.version}"):  # noqa: ASYNC110  a file tells nobody
            await asyncio.sleep(LOOK_S)
        return await super().update_weights(weights)

    async def _send_canary(self, weights: Any) -> Any:
        if self._deaths.due(f"update:{weights.version}"):
            die()
        return await super()._send_canary(weights)


class DyingTrainer(DeepSpeedEngine):
    """DeepSpeed that dies inside an optimizer step or half through a publish, or waits before a step."""

    def __init__(self, *arguments: Any, deaths: str, points: list[str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._deaths = Deaths(deaths, points)

    def _point(self, moment: str, number: int) -> str:
        return f"{moment}:{number}" + (f":{self.link.rank}" if self.link.rank else "")

    def _step(self, lr: float) -> float:
        while self._deaths.is_held(self._point("step", self._num_steps)):
            time.sleep(LOOK_S)
        if self._deaths.due(self._point("step", self._num_steps)):
            die()
        return super()._step(lr)

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for place, named in enumerate(super()._parameters()):
            if place == 3 and self._deaths.due(self._point("publish", self._num_steps)):
                die()
            yield named
