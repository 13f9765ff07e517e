"""Replay buffer: sends groups that were learned before along with fresh ones, to be learned once more.

A replayed group rides on a fresh group's message. It has no place in any queue, holds no credit and is in no order. So
every law goes on to hold for fresh groups alone, each of which is learned once as such; the ledger notes each replay
apart.

Invariants:
- step v replays round(ratio * groups_per_step) groups, or as many as there are, none twice and none that was not
  learned before step v;
- a group is replayed at most `max_age` versions after its oldest token was sampled;
- which ones follows from the seed, the step and the groups before it, never from timing.

The state of version v is what step v may draw from: a resumed run draws the same. Stands between what credits groups
and the learner, in its order.

Sampling by advantage follows prioritised replay (Schaul 2015, 1511.05952), with exponent 1 and the mean |advantage| of
a group's tokens as its priority; what makes up for the age of the samples is the algorithm's correction.

Tests: tests/unit/stages/test_replay_buffer.py
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec

from flowrl.config import Meta
from flowrl.engines.checkpoint import checkpoint_version
from flowrl.errors import ConfigError
from flowrl.graph.ports import In, Out
from flowrl.graph.simulated import Itself
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Samples, decode, encode
from flowrl.stages.sampler import Learning, Sampler
from flowrl.stages.tokens import mask_of

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.graph.simulated import Costs
    from flowrl.graph.stage import Context, Say

STATE = "groups.msgpack"


class Kept(NamedTuple):
    """A group in the buffer."""

    step: int  # that learned it
    group: Samples
    priority: float  # mean |advantage| of its tokens


class ReplayBuffer(Stage):
    """Keeps the newest groups and has some of them learned again."""

    class Config(StageConfig):
        """Settings of the replay node; a graph has none where `ratio` is 0."""

        ratio: Annotated[float, Meta(ge=0)] = 0.0  # replayed groups for each fresh one
        capacity: Annotated[int, Meta(ge=1)] = 256  # groups, the newest
        max_age: Annotated[int, Meta(ge=1)] = 4  # policy versions since a group's oldest token was sampled
        # uniform; the newest that were learned before; or drawn in proportion to the mean |advantage|
        policy: Literal["uniform", "newest", "priority"] = "uniform"

    ordered = frozenset({"fresh"})
    is_stateful = True
    fresh: In[Samples]  # in the learner's order
    samples: Out[Samples]

    def __init__(self, config: Config, sampler: Sampler, learning: Learning) -> None:
        self.config: ReplayBuffer.Config = config
        self.sampler = sampler
        self.learning = learning
        self._kept: list[Kept] = []

    @property
    def num_replayed(self) -> int:
        """Return how many groups a step replays."""
        return round(self.config.ratio * self.learning.groups_per_step)

    def check(self, say: Say) -> None:
        """Insist on an algorithm that makes up for older policies, which drew what is replayed."""
        if self.num_replayed < 1:
            per_step = self.learning.groups_per_step
            what = f"{self.config.ratio:g} of {per_step} groups_per_step is no whole group"
            raise ConfigError("replay.ratio", what, f"give {1 / per_step:g} or more, or 0 for no replay")
        if not hasattr(self.learning.algorithm.load("algorithm"), "correction"):
            what = f"older policies' samples need a correction, and {self.learning.algorithm.use} has none"
            raise ConfigError("replay", what, "choose another algorithm, or set replay.ratio=0")

    def simulated(self, costs: Costs) -> Itself:
        """Replay by its own rules."""
        return Itself({"learning": costs.learning(self.learning)})

    async def run(self, context: Context) -> None:
        """Send groups on, with others, until the edge closes."""
        version = 0
        if context.resume_from is not None:
            version = checkpoint_version(context.resume_from)
            self._kept = await context.compute(_read, context.resume_from / context.node)
        context.version = version
        kept, num_sent, chosen = self._kept, 0, list[Samples]()
        per_step = self.learning.groups_per_step
        num_ahead = self.learning.admission.most_credits(window=1)
        async for group in self.fresh:
            place = num_sent % per_step
            if place == 0:
                chosen = self._draw(kept, context.version)
            share = slice(*(len(chosen) * end // per_step for end in (place, place + 1)))
            await self.samples.put(msgspec.structs.replace(group, replays=chosen[share]))
            context.done += 1
            num_sent += 1
            async with context.between_steps(context.version):
                kept.append(Kept(context.version, group, priority(group)))
                # A checkpoint may still ask for what an older step drew from: further back by the groups ahead.
                del kept[: -self.config.capacity - num_ahead - per_step]
            if place + 1 == per_step:
                async with context.stepping():
                    chosen = []

    def save(self, directory: Path, version: int) -> None:
        """Write what step `version` may draw from."""
        _write(directory, self._drawable(self._kept, version))

    def _drawable(self, kept: list[Kept], step: int) -> list[Kept]:
        """Return what a step may draw from: the newest groups that were learned before it."""
        return [each for each in kept if each.step < step][-self.config.capacity :]

    def _draw(self, kept: list[Kept], step: int) -> list[Samples]:
        """Return the groups that a step replays."""
        young = [each for each in self._drawable(kept, step) if step - each.group.oldest_version <= self.config.max_age]
        draw = random.Random(f"{self.sampler.seed}/{step}")
        num = min(self.num_replayed, len(young))
        match self.config.policy:
            case "uniform":
                chosen = draw.sample(young, num)
            case "newest":
                chosen = young[len(young) - num :]
            case "priority":
                chosen = weighted_sample(young, num, draw)
        return [each.group for each in chosen]


def weighted_sample(kept: list[Kept], num: int, draw: random.Random) -> list[Kept]:
    """Draw without replacement in proportion to the priorities; a group of priority 0 is never drawn.

    The `num` greatest of u^(1 / priority), u uniform: Efraimidis and Spirakis 2006.
    """
    keys = [(draw.random() ** (1.0 / each.priority), each) for each in kept if each.priority > 0]
    return [each for _, each in sorted(keys, key=lambda pair: -pair[0])[:num]]


def priority(group: Samples) -> float:
    """Return the mean |advantage| of the policy's tokens."""
    import numpy as np

    rows = zip(group.advantages, group.samples, strict=True)
    sizes = np.concatenate([np.abs(row.numpy())[mask_of(sample).numpy() > 0] for row, sample in rows])
    return float(sizes.mean()) if len(sizes) else 0.0


def _write(directory: Path, kept: list[Kept]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    state = [(each.step, encode(each.group)) for each in kept]
    (directory / STATE).write_bytes(msgspec.msgpack.encode(state))


def _read(directory: Path) -> list[Kept]:
    state = msgspec.msgpack.decode((directory / STATE).read_bytes(), type=list[tuple[int, bytes]])
    groups = [(step, decode(wire)) for step, wire in state]
    return [Kept(step, group, priority(group)) for step, group in groups if isinstance(group, Samples)]
