"""Engines that take the time a profile says, on devices they share: what `flowrl simulate` puts in place of real ones.

Invariants: lengths and the scatter of durations are drawn from the request's own seed, never by order of arrival; what
they return holds zeros of the right shape, so messages are as large as in a real run. Zeros of one length are one
object, and what follows from a seed is drawn once: a search simulates thousands of settings on the same seeds. The
devices and the profile of a simulation stand in `CURRENT`, since an engine is built from plain data alone. Used by
simulation/timed_graph.py, on the virtual clock; devices.py says how time passes where several share.
"""

from __future__ import annotations

import asyncio
import functools
import math
import random
from contextvars import ContextVar
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING

from flowrl.algorithms.base import Algorithm, Objective
from flowrl.engines.base import GenerationConfig, Ranks, Sampling, TokenGroup, TrainingConfig, UpdateReport
from flowrl.messages import Buffer, Sample, Weights
from flowrl.simulation.costs import CallCost, DecodeCost, NodeProfile, Profile, Spread
from flowrl.simulation.devices import Decoder, Device

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.config import Select
    from flowrl.graph.stage import Say
    from flowrl.messages import FloatArray

TOKEN_BYTES = 4  # of a buffer's
_NORMAL = NormalDist()


@dataclass
class SimulationState:
    """What the engines of one simulation share."""

    profile: Profile
    devices: dict[str, Device] = field(default_factory=dict[str, Device])
    cores: float = 1.0

    def device(self, host: str, where: str) -> Device:
        """Return what the replica `where` computes on: the machine's "cores", or the GPU of the host's replica."""
        name = host if host == "cores" else f"{host}.{where.rpartition('.')[2]}"
        if name not in self.devices:
            self.devices[name] = Device(self.cores if name == "cores" else 1.0)
        return self.devices[name]


CURRENT: ContextVar[SimulationState] = ContextVar("scene")


class TimedGeneration:
    """A generation engine that decodes zeros at the profile's speed."""

    def __init__(
        self, config: GenerationConfig, *, where: str, receiver_index: int = 0, node: str = "", device: str = "cores"
    ) -> None:
        scene = CURRENT.get()
        costs = scene.profile.nodes[node]
        self.where = where
        self.num_running = 0
        self._config = config
        self._responses = scene.profile.response_tokens
        self._device = scene.device(device, where)
        width = float(config.threads) if device == "cores" else 1.0
        self._decoder = Decoder(costs.decode or DecodeCost(), self._device, max_running=config.max_running, width=width)
        self._pause = costs.calls.get("update_pause", CallCost())
        self._transfer = costs.calls.get("update_transfer", CallCost())

    async def open(self) -> None:
        """Start at once: start-up is no part of a simulation."""

    async def generate(
        self, *, request_id: str, prompt_ids: Sequence[int], num_samples: int, seed: int, sampling: Sampling
    ) -> list[Sample]:
        """Return responses of lengths that follow from the seed, when they have been decoded."""
        lengths = draw_lengths(self._responses, seed=seed, num=num_samples, most=sampling.max_tokens)
        self.num_running += num_samples
        try:
            spans = await self._decoder.decode(lengths, len(prompt_ids))
        finally:
            self.num_running -= num_samples
        return [
            Sample(
                token_ids=_zeros("int32", length),
                logprobs=_zeros("float32", length),
                versions=versions,
                finish="length" if length == sampling.max_tokens else "stop",
                text="",
            )
            for length, versions in zip(lengths, spans, strict=True)
        ]

    async def serve_loaded(self) -> None:
        """Serve version 0 at once."""
        self._decoder.serve(0, again=False)

    async def update_weights(self, weights: Weights) -> UpdateReport:
        """Receive while decoding goes on, pause, and serve the version; requests in flight as `on_update` says."""
        await asyncio.sleep(self._transfer.seconds(0))
        if self._config.on_update == "wait":
            await self._decoder.drain()
        with self._decoder.paused():
            await asyncio.sleep(self._pause.seconds(0))
            self._decoder.serve(weights.version, again=self._config.on_update == "abort")
        return UpdateReport(version=weights.version, pause_s=self._pause.seconds(0),
                            transfer_s=self._transfer.seconds(0), mean_gap=0.0, max_gap=0.0)  # fmt: skip

    async def close(self) -> None:
        """Nothing to release."""


class TimedTraining:
    """A training engine, or a scorer of sequences, whose calls take what the profile says.

    The runtime lets `last_work_s` seconds of `device` pass after each call.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        where: str,
        name: str = "",
        num_receivers: int = 1,
        say: Say | None = None,
        node: str = "",
        device: str = "cores",
        speed: float = 1.0,
        publish_s: float = 0.0,
    ) -> None:
        scene = CURRENT.get()
        self.where = where
        self.device = scene.device(device, where)
        self.width = float(config.threads) if device == "cores" else 1.0
        self.last_work_s = 0.0
        self._node = node
        self._costs: NodeProfile = scene.profile.nodes[node]
        self._speed = speed  # of its ranks, against those of the profile
        self._publish_s = publish_s  # what each version costs besides

    def open(self, ranks: Ranks | None = None) -> None:
        """Start at once: start-up is no part of a simulation."""

    def follow(self) -> None:
        """A simulation has rank 0 only."""

    def score(self, groups: Sequence[TokenGroup]) -> list[list[FloatArray]]:
        """Return zeros after the time of one call."""
        self._spend("score", groups)
        return [[_row(len(response.data) // TOKEN_BYTES) for response in group.responses] for group in groups]

    def compare(self, groups: Sequence[TokenGroup], objective: Select) -> list[list[FloatArray]]:
        """Return zeros after the time of one call."""
        return self.score(groups)

    def score_sequences(self, group: TokenGroup) -> list[float]:
        """Return one zero for each response after the time of one call."""
        self._spend("score", [group])
        return [0.0] * len(group.responses)

    def accumulate(self, groups: Sequence[TokenGroup], objective: Select) -> dict[str, float]:
        """Take the time of one optimizer step on the groups; `apply` is part of it."""
        self._spend("train", groups)
        return {"loss": 0.0}

    def learned(self) -> dict[tuple[int, int], FloatArray]:
        """Return nothing: nothing is learned."""
        return {}

    def apply(self) -> dict[str, float]:
        """Take no time of its own."""
        self.last_work_s = 0.0
        return {"lr": 0.0, "grad_norm": 0.0}

    def publish(self, version: int, canary: Buffer | None) -> Weights:
        """Offer the version; there are no bytes to send."""
        self.last_work_s = self._publish_s
        return Weights(version=version, transport="timed", manifest=b"{}", canary=None, size_bytes=0)

    def transfer(self, version: int) -> None:
        """Take the time until the bytes have left, beside the work."""
        self.last_work_s = self._costs.calls.get("transfer", CallCost()).seconds(0)

    def retire(self, version: int) -> None:
        """Nothing to forget."""
        self.last_work_s = 0.0

    def save_model(self, directory: Path, *, card: str) -> None:
        """Write nothing."""

    def save_state(self, directory: Path) -> None:
        """Write nothing."""

    def load_state(self, directory: Path) -> None:
        """Read nothing."""

    def close(self) -> None:
        """Nothing to release."""
        self.last_work_s = 0.0

    def _spend(self, kind: str, groups: Sequence[TokenGroup]) -> None:
        cost = self._costs.calls.get(kind) or self._costs.calls.get("score", CallCost())
        size_bytes = 0
        for group in groups:
            responses = group.responses
            size_bytes += len(responses) * len(group.prompt_ids.data) + sum([len(each.data) for each in responses])
        factor = 1.0
        if cost.log_sigma > 0 and groups:
            first = groups[0].prompt_ids.data[:4].hex()  # a prompt of a simulation begins with its group's number
            factor = scatter(cost.log_sigma, f"{self._node} {kind} {len(groups)} {first}")
        self.last_work_s = cost.seconds(size_bytes / TOKEN_BYTES) * factor / self._speed


class TimedObjective(Objective):
    """Minimises nothing."""


class TimedAlgorithm(Algorithm):
    """Credits nothing and minimises nothing: a simulation learns no weights."""

    @property
    def is_blank(self) -> bool:
        """Return True: no credit is anything but zero."""
        return True

    def keeps_unseen(self, group_id: int) -> bool:
        """Return whether a group is among those that are learned."""
        return is_learned(group_id)


def is_learned(group_id: int) -> bool:
    """Return whether a group is among the part of all groups that the profile says is learned, the same every time."""
    learned = CURRENT.get().profile.learned
    return learned >= 1.0 or random.Random(f"learned {group_id}").random() < learned


@functools.lru_cache(maxsize=1 << 16)
def draw_lengths(spread: Spread, *, seed: int, num: int, most: int) -> tuple[int, ...]:
    """Return `num` response lengths of one prompt, which are alike as far as the spread says; none above `most`."""
    draw = random.Random(seed)
    common = math.sqrt(spread.shared) * draw.gauss(0.0, 1.0)
    own = math.sqrt(1.0 - spread.shared)
    values = (spread.at(_NORMAL.cdf(common + own * draw.gauss(0.0, 1.0))) for _ in range(num))
    return tuple(max(1, min(most, round(value))) for value in values)


@functools.lru_cache(maxsize=1 << 16)
def scatter(log_sigma: float, seed: str) -> float:
    """Return a log-normal factor of mean 1."""
    return math.exp(log_sigma * random.Random(seed).gauss(0.0, 1.0) - log_sigma**2 / 2)


@functools.lru_cache(maxsize=1 << 14)
def _zeros(dtype: str, length: int) -> Buffer:
    return Buffer(dtype, bytes(TOKEN_BYTES * length))


@functools.lru_cache(maxsize=1 << 14)
def _row(length: int) -> FloatArray:
    return _zeros("float32", length).numpy()
