"""Engines that only take time: public fakes for tests, simulation and trying out a graph.

They keep every contract of `engines.base` that does not need a model: versions on every token, seeds that reproduce,
updates that take effect between tokens, weights that a learner offers and a generator takes in. Time is the event
loop's, so on the virtual clock hours pass in milliseconds. Durations are drawn from a generator seeded by the request,
never by the order of arrival.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from flowrl.config import Config, Meta, Select
from flowrl.engines.base import GenerationConfig, Ranks, Sampling, TokenGroup, TrainingConfig, UpdateReport
from flowrl.messages import Buffer, Canary, Sample, VersionSpan, Weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.graph.stage import Say
    from flowrl.messages import FloatArray


class FakeTimes(Config):
    """How long fake engines take, in seconds; a log-normal tail where `sigma` is above 0."""

    start_s: Annotated[float, Meta(ge=0)] = 0.0
    token_s: Annotated[float, Meta(ge=0)] = 0.01  # one token of one sample
    sigma: Annotated[float, Meta(ge=0)] = 0.5  # of the log of a request's duration
    update_s: Annotated[float, Meta(ge=0)] = 0.05  # one weight update
    score_s: Annotated[float, Meta(ge=0)] = 0.01  # scoring one group
    train_s: Annotated[float, Meta(ge=0)] = 0.02  # forward and backward of one group


class FakeGeneration:
    """A generation engine that samples seeded nonsense and takes the time it was told to."""

    def __init__(
        self, config: GenerationConfig, *, where: str, receiver_index: int = 0, times: dict[str, float] | None = None
    ) -> None:
        self.where = where
        self.times = msgspec.convert(times or {}, FakeTimes)
        self.version = -1
        self.num_running = 0
        self._receiver_index = receiver_index

    async def open(self) -> None:
        """Take `start_s`."""
        await asyncio.sleep(self.times.start_s)

    async def generate(
        self, *, request_id: str, prompt_ids: Sequence[int], num_samples: int, seed: int, sampling: Sampling
    ) -> list[Sample]:
        """Return `num_samples` seeded responses; the second half of each sees an update that came meanwhile."""
        draw = random.Random(seed)
        lengths = [draw.randint(1, sampling.max_tokens) for _ in range(num_samples)]
        slowness = math.exp(draw.gauss(0.0, self.times.sigma))
        self.num_running += num_samples
        try:
            started = self.version
            await asyncio.sleep(max(lengths) * self.times.token_s * slowness / 2)
            continued = self.version
            await asyncio.sleep(max(lengths) * self.times.token_s * slowness / 2)
        finally:
            self.num_running -= num_samples
        return [self._sample(seed + i, length, started, continued) for i, length in enumerate(lengths)]

    def _sample(self, seed: int, length: int, started: int, continued: int) -> Sample:
        draw = random.Random(seed)
        half = length // 2
        spans = [VersionSpan(started, 0, half), VersionSpan(continued, half, length)]
        return Sample(
            token_ids=Buffer.ints([draw.randint(3, 63) for _ in range(length)]),
            logprobs=Buffer.floats([-draw.random() for _ in range(length)]),
            versions=[span for span in spans if span.end > span.start],
            finish="stop",
            text=str(draw.randint(0, 9)),
        )

    async def serve_loaded(self) -> None:
        """Serve version 0."""
        self.version = 0

    async def update_weights(self, weights: Weights) -> UpdateReport:
        """Take `update_s`, then serve the version."""
        await asyncio.sleep(self.times.update_s)
        self.version = weights.version
        return UpdateReport(
            version=weights.version, pause_s=self.times.update_s, transfer_s=0.0, mean_gap=0.0, max_gap=0.0
        )

    async def close(self) -> None:
        """Nothing to release."""


class FakeTraining:
    """A training engine whose only parameter counts what it was trained on.

    `last_duration_s` is how long the last call claims to have taken; the virtual clock lets that time pass.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        where: str,
        name: str,
        num_receivers: int = 1,
        say: Say | None = None,
        times: dict[str, float] | None = None,
    ) -> None:
        self.where = where
        self.times = msgspec.convert(times or {}, FakeTimes)
        self.last_duration_s = 0.0
        self.steps = 0
        self.loss = 0.0

    def open(self, ranks: Ranks) -> None:
        """Take `start_s`."""
        self.last_duration_s = self.times.start_s

    def follow(self) -> None:
        """Fakes have one rank."""

    def score(self, groups: Sequence[TokenGroup]) -> list[list[FloatArray]]:
        """Return the behaviour log-probs of each group, or zeros where it has none."""
        import numpy as np

        self.last_duration_s = self.times.score_s * len(groups)
        return [[np.zeros(len(response), dtype=np.float32) for response in group.responses] for group in groups]

    def compare(self, groups: Sequence[TokenGroup], objective: Select) -> list[list[FloatArray]]:
        """Return zeros."""
        return self.score(groups)

    def accumulate(self, groups: Sequence[TokenGroup], objective: Select) -> dict[str, float]:
        """Add a number that depends on every token of the groups and on how many steps were taken before."""
        self.last_duration_s = self.times.train_s * len(groups)
        tokens = sum(sum(response.tolist()) for group in groups for response in group.responses)
        self.loss += tokens / (1 + self.steps)
        return {"loss": self.loss}

    def learned(self) -> dict[tuple[int, int], FloatArray]:
        """Return nothing: fakes have no log-probs."""
        return {}

    def apply(self) -> dict[str, float]:
        """Count one step."""
        self.last_duration_s = 0.0
        self.steps += 1
        return {"lr": 0.0, "grad_norm": 0.0}

    def publish(self, version: int, canary: Buffer | None) -> Weights:
        """Offer the version; there are no bytes to send."""
        self.last_duration_s = 0.0
        proof = None
        if canary is not None:
            proof = Canary(token_ids=canary, logprobs=Buffer.floats([0.0] * (len(canary) - 1)), max_mean_gap=1.0)
        return Weights(version=version, transport="fake", manifest=b"{}", canary=proof, size_bytes=0)

    def transfer(self, version: int) -> None:
        """Nothing to send."""
        self.last_duration_s = 0.0

    def retire(self, version: int) -> None:
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

    def close(self) -> None:
        """Nothing to release."""
        self.last_duration_s = 0.0
