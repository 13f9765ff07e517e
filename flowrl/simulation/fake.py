"""Engines that only take time: public fakes for tests, for trying out a graph, and for `flowrl simulate`.

They keep every contract of `engines.base` that does not need a model. They have versions on every token, seeds that
reproduce, updates that take effect between tokens, weights that a learner offers and a generator takes in. Time is the
event loop's, so on the virtual clock hours pass in milliseconds. Alone, a fake takes the `costs` it is given and
samples seeded nonsense. As a node of a simulation (`CURRENT`) it takes the profile's, on devices that it shares
(devices.py), and holds zeros of the right shape.

Invariants:
- what is drawn follows from the request's own seed, never from the order of arrival;
- in a simulation it is drawn once, since a search simulates thousands of settings on the same seeds.

Tests: tests/unit/simulation/test_timed.py
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import random
from contextvars import ContextVar
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.algorithms.base import Algorithm, Objective
from flowrl.engines.base import GenerationConfig, Ranks, Sampling, TokenGroup, TrainingConfig, UpdateReport
from flowrl.messages import Buffer, Canary, Sample, VersionSpan, Weights
from flowrl.simulation.costs import CallCost, DecodeCost, NodeProfile, Profile, Spread
from flowrl.simulation.devices import Decoder, Device

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.config import Select
    from flowrl.graph.stage import Say
    from flowrl.messages import FloatArray

TOKEN_BYTES = 4  # of a buffer's
NOTHING = CallCost()
ALONE = NodeProfile(
    decode=DecodeCost(step_s=0.01, log_sigma=0.5),
    calls={
        "update_transfer": CallCost(call_s=0.05),
        "score": CallCost(call_s=0.01),
        "train": CallCost(call_s=0.02),
    },
)
_NORMAL = NormalDist()


@dataclass
class SimulationState:
    """What the engines of one simulation share."""

    profile: Profile
    devices: dict[str, Device] = field(default_factory=dict[str, Device])
    cores: float = 1.0
    gpus: dict[str, int] = field(default_factory=dict[str, int])  # node -> replicas that have GPUs of their own

    def device(self, host: str, where: str) -> Device:
        """Return what the replica `where` computes on: the machine's "cores", or the GPU of the host's replica."""
        replica = int(where.rpartition(".")[2])
        name = host if host == "cores" else f"{host}.{replica % self.gpus.get(host, replica + 1)}"
        if name not in self.devices:
            is_cores = name == "cores"
            self.devices[name] = Device(self.cores, self.profile.slowdown) if is_cores else Device(1.0)
        return self.devices[name]


CURRENT: ContextVar[SimulationState] = ContextVar("state")


def costs_of(costs: dict[str, Any] | None, node: str) -> NodeProfile:
    """Return a fake's costs: those of its node in the simulation, those it was given, or `ALONE`."""
    if node:
        return CURRENT.get().profile.nodes[node]
    return ALONE if costs is None else msgspec.convert(costs, NodeProfile)


class FakeGeneration:
    """A generation engine that takes time. `costs` are a NodeProfile's fields; the others are a simulation's."""

    def __init__(
        self, config: GenerationConfig, *, where: str, receiver_index: int = 0, costs: dict[str, Any] | None = None,
        node: str = "", device: str = "cores", speed: float = 1.0,
    ) -> None:  # fmt: skip
        self.where = where
        self.version = -1
        self.num_running = 0
        self._config = config
        self._costs = costs_of(costs, node)
        self._responses = CURRENT.get().profile.response_tokens if node else None
        width = float(config.threads) if device == "cores" else 1.0
        decode = (self._costs.decode or DecodeCost()).at_speed(speed)
        self._log_sigma = decode.log_sigma
        on = CURRENT.get().device(device, where) if node else Device(width)
        self._decoder = Decoder(decode, on, max_running=config.max_running, width=width)
        self.slots = self._decoder.slots

    async def open(self) -> None:
        """Start at once."""

    async def generate(
        self, *, request_id: str, prompt_ids: Sequence[int], num_samples: int, seed: int, sampling: Sampling,
        num_spare: int = 0,
    ) -> list[Sample]:  # fmt: skip
        """Return responses of lengths that follow from the seed, when they have been decoded."""
        num_begun = num_samples + num_spare
        if self._responses is None:
            draw = random.Random(seed)
            lengths = tuple(draw.randint(1, sampling.max_tokens) for _ in range(num_begun))
        else:
            lengths = draw_lengths(self._responses, seed=seed, num=num_begun, most=sampling.max_tokens)
        factor = scatter(self._log_sigma, f"decode {seed}") if self._log_sigma > 0 else 1.0
        self.num_running += num_begun
        try:
            spans = await self._decoder.decode(lengths, len(prompt_ids), factor, enough=num_samples)
        finally:
            self.num_running -= num_begun
        ended = [(place, pair) for place, pair in enumerate(zip(lengths, spans, strict=True)) if pair[1]]
        each = ended[:num_samples]
        if self._responses is None:
            return [_nonsense(seed + place, length, versions) for place, (length, versions) in each]
        return [_blank(length, versions, most=sampling.max_tokens) for _, (length, versions) in each]

    async def serve_loaded(self) -> None:
        """Serve version 0 at once."""
        self._serve(0)

    def _serve(self, version: int) -> None:
        goes_on = self._config.on_update in ("keep", "resume")
        self._decoder.serve(
            version, again=self._config.on_update == "abort", rereads=goes_on and not self._config.keep_cache
        )
        self.version = version

    async def update_weights(self, weights: Weights) -> UpdateReport:
        """Receive while decoding goes on, pause, and serve the version; requests in flight as `on_update` says."""
        calls = self._costs.calls
        transfer_s, pause_s = (calls.get(f"update_{name}", NOTHING).call_s for name in ("transfer", "pause"))
        await asyncio.sleep(transfer_s)
        if self._config.on_update == "wait":
            await self._decoder.drain()
        with self._decoder.paused():
            await asyncio.sleep(pause_s)
            self._serve(weights.version)
        return UpdateReport(version=weights.version, pause_s=pause_s, transfer_s=transfer_s, mean_gap=0.0, max_gap=0.0)

    async def sleep(self) -> None:
        """Take the time until its memory is free."""
        await asyncio.sleep(self._costs.calls.get("sleep", NOTHING).call_s)

    async def wake(self) -> None:
        """Take the time until it serves again."""
        await asyncio.sleep(self._costs.calls.get("wake", NOTHING).call_s)

    async def close(self) -> None:
        """Nothing to release."""


class FakeTraining:
    """A training engine, or a scorer of sequences, whose only parameter counts what it was trained on.

    `last_duration_s` is how long the last call takes alone on `device`; the virtual clock lets that time pass.
    """

    def __init__(
        self, config: TrainingConfig, *, where: str, name: str = "", num_receivers: int = 1, say: Say | None = None,
        costs: dict[str, Any] | None = None, node: str = "", device: str = "cores", width: float = 1.0,
        speed: float = 1.0, publish_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.where = where
        self.steps = 0
        self.loss = 0.0
        self.last_duration_s = 0.0
        self.width = width  # of the device
        self.device = CURRENT.get().device(device, where) if node else Device(width)
        self._node = node
        self._costs = costs_of(costs, node)
        self._speed = speed  # against that of the costs
        self._publish_s = publish_s  # what each version costs besides

    def open(self, ranks: Ranks | None = None) -> None:
        """Start at once."""

    def follow(self) -> None:
        """Fakes have one rank."""

    def score(self, groups: Sequence[TokenGroup]) -> list[list[FloatArray]]:
        """Return zeros after the time of one call."""
        self._spend("score", groups)
        return [[_row(len(response)) for response in group.responses] for group in groups]

    def compare(self, groups: Sequence[TokenGroup], objective: Select) -> list[list[FloatArray]]:
        """Return zeros after the time of one call."""
        return self.score(groups)

    def score_groups(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        """Return one zero for each response after the time of one call."""
        self._spend("score", groups)
        return [[0.0] * len(group.responses) for group in groups]

    def accumulate(self, groups: Sequence[TokenGroup], objective: Select) -> dict[str, float]:
        """Take the time of a step; add a number that depends on every token and on how many steps were before."""
        self._spend("train", groups)
        if not self._node:
            tokens = sum(sum(response.tolist()) for group in groups for response in group.responses)
            self.loss += tokens / (1 + self.steps)
        return {"loss": self.loss}

    def learned(self) -> dict[tuple[int, int], FloatArray]:
        """Return nothing: fakes have no log-probs."""
        return {}

    def apply(self) -> dict[str, float]:
        """Count one step; it takes no time of its own."""
        self.last_duration_s = 0.0
        self.steps += 1
        return {"lr": 0.0, "grad_norm": 0.0}

    def publish(self, version: int, canary: Buffer | None) -> Weights:
        """Offer the version; there are no bytes to send."""
        self.last_duration_s = self._publish_s
        proof = None
        if canary is not None and not self._node:
            proof = Canary(token_ids=canary, logprobs=Buffer.floats([0.0] * (len(canary) - 1)), max_mean_gap=1.0)
        return Weights(version=version, transport="fake", manifest=b"{}", canary=proof, size_bytes=0)

    def transfer(self, version: int) -> None:
        """Take the time until the bytes would have left, beside the work."""
        self.last_duration_s = self._costs.calls.get("transfer", NOTHING).call_s

    def retire(self, version: int, keep: frozenset[int] = frozenset()) -> None:
        """Nothing to forget."""
        self.last_duration_s = 0.0

    def save_model(self, directory: Path, *, card: str) -> None:
        """Write the card only."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "README.md").write_text(card)

    def save_state(self, directory: Path) -> None:
        """Write the step count and the loss."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "state.json").write_text(json.dumps({"steps": self.steps, "loss": self.loss}))

    def load_state(self, directory: Path) -> None:
        """Read what `save_state` wrote."""
        state: dict[str, Any] = msgspec.json.decode((directory / "state.json").read_bytes())
        self.steps, self.loss = state["steps"], state["loss"]

    def sleep(self) -> None:
        """Take the time until its memory is free."""
        self.last_duration_s = self._costs.calls.get("sleep", NOTHING).call_s

    def wake(self) -> None:
        """Take the time until its memory is filled again."""
        self.last_duration_s = self._costs.calls.get("wake", NOTHING).call_s

    def close(self) -> None:
        """Nothing to release."""
        self.last_duration_s = 0.0

    def _spend(self, kind: str, groups: Sequence[TokenGroup]) -> None:
        cost = self._costs.calls.get(kind) or self._costs.calls.get("score", NOTHING)
        size_bytes = 0
        for group in groups:
            responses = group.responses
            size_bytes += len(responses) * len(group.prompt_ids.data) + sum([len(each.data) for each in responses])
        factor = 1.0
        if cost.log_sigma > 0 and groups:
            first = groups[0].prompt_ids.data[:4].hex()  # a prompt of a simulation begins with its group's number
            factor = scatter(cost.log_sigma, f"{self._node} {kind} {len(groups)} {first}")
        self.last_duration_s = cost.seconds(size_bytes / TOKEN_BYTES) * factor / self._speed


class BlankObjective(Objective):
    """Minimises nothing."""


class BlankAlgorithm(Algorithm):
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


def _nonsense(seed: int, length: int, versions: list[VersionSpan]) -> Sample:
    draw = random.Random(seed)
    return Sample(
        token_ids=Buffer.ints([draw.randint(3, 63) for _ in range(length)]),
        logprobs=Buffer.floats([-draw.random() for _ in range(length)]),
        versions=versions,
        finish="stop",
        text=str(draw.randint(0, 9)),
    )


def _blank(length: int, versions: list[VersionSpan], *, most: int) -> Sample:
    token_ids, logprobs = _zeros("int32", length), _zeros("float32", length)
    finish = "length" if length == most else "stop"
    return Sample(token_ids=token_ids, logprobs=logprobs, versions=versions, finish=finish, text="")


@functools.lru_cache(maxsize=1 << 14)
def _zeros(dtype: str, length: int) -> Buffer:
    return Buffer(dtype, bytes(TOKEN_BYTES * length))


@functools.lru_cache(maxsize=1 << 14)
def _row(length: int) -> FloatArray:
    return _zeros("float32", length).numpy()
