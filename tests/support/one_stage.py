"""Runs one stage by itself: given groups come in at a port, what it puts, rejects and says is kept.

The edges are lists: nothing waits for room, and a closed input is an empty one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flowrl.errors import ChannelClosed
from flowrl.graph.stage import Context, Ranks
from flowrl.messages import Buffer, Rollouts, Sample, VersionSpan
from flowrl.runtime.replica import Threads
from flowrl.telemetry.events import CauseClock, Event, Recorder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.messages import Message


@dataclass
class Alone:
    """What became of a stage's input."""

    waiting: list[Any]
    put: list[Any] = field(default_factory=list)
    rejected: list[tuple[int, str, str]] = field(default_factory=list)  # group, kind, reason
    events: list[Event] = field(default_factory=list)

    async def get(self, limit: int) -> list[Any]:
        if not self.waiting:
            raise ChannelClosed("in", "closed")
        taken, self.waiting = self.waiting[:limit], self.waiting[limit:]
        return taken

    async def done(self, messages: Sequence[Message], learned_in: int | None) -> None:
        raise AssertionError("a scorer settles nothing")

    async def reject(self, message: Any, kind: str, reason: str) -> None:
        self.rejected.append((message.group_id, kind, reason))

    async def send(self, message: Any) -> None:
        self.put.append(message)


class _Out:
    def __init__(self, alone: Alone) -> None:
        self.put = alone.send


def run_alone(stage: Any, groups: Sequence[Any], run_dir: Path, *, node: str = "reward") -> Alone:
    """Run a stage with ports `rollouts` and `scored` to its end."""
    return asyncio.run(stage_alone(stage, groups, run_dir, node=node))


async def stage_alone(stage: Any, groups: Sequence[Any], run_dir: Path, *, node: str = "reward") -> Alone:
    """Run a stage with ports `rollouts` and `scored` to its end on this loop."""
    alone = Alone(list(groups))
    stage.rollouts.end, stage.scored.end = alone, _Out(alone)
    clock, recorder = CauseClock(time.monotonic), Recorder()
    threads = Threads(clock, f"{node}.0")

    async def unused(_: Any) -> Any:
        raise AssertionError("a scorer takes no part in checkpoints")

    context = Context(
        node=node, replica=0, ranks=Ranks(), run_dir=run_dir, clock=clock, recorder=recorder, stopping=asyncio.Event(),
        compute=threads.compute, background=threads.background, cut=unused, fewer_out=unused, note_wait=unused,
    )  # fmt: skip
    try:
        with contextlib.suppress(ChannelClosed):  # as a replica takes it
            await stage.run(context)
    finally:
        threads.close()
        alone.events = recorder.drain()
    return alone


def rollouts(*texts: str, group_id: int = 7, **columns: Any) -> Rollouts:
    """Return a group with these responses and columns."""
    samples = [
        Sample(
            token_ids=Buffer.ints([5, place]),
            logprobs=Buffer.floats([-1.0, -1.0]),
            versions=[VersionSpan(0, 0, 2)],
            finish="stop",
            text=text,
        )
        for place, text in enumerate(texts)
    ]
    return Rollouts(
        group_id=group_id,
        token_ids=Buffer.ints([1, 2]),
        columns={"prompt": "count", "answer": "one", **columns},
        num_samples=len(texts),
        seed=0,
        samples=samples,
        generator="generator.0",
    )
