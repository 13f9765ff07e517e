"""What every generation engine keeps, tried on one that is named: `await broken_laws("my_engine:MyEngine", model)`.

The engine is opened on a model, beside a learner of plain torch that publishes versions of it. Each law of
`flowrl.engines.base.GenerationEngine` is tried as a run relies on it. Returned are the laws that it breaks, in words;
none is a pass. A small model serves (seconds); float32, so that two implementations agree closely. Called by tests, the
project's own and those of whoever writes an engine.

Tests: tests/contracts/test_generation_engines.py
"""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from flowrl.engines.base import GenerationConfig, Sampling, TokenGroup, TrainingConfig, open_engine
from flowrl.engines.torch import TorchEngine
from flowrl.errors import FlowrlError, ProofError
from flowrl.graph.stage import Ranks
from flowrl.messages import Buffer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from flowrl.messages import Sample

PROMPTS = ([5, 60, 7, 8], [9, 11, 12, 13, 14, 15], [20, 21])
CANARY = Buffer.ints([40 + (7 * i) % 60 for i in range(16)])
GAP = 1e-3  # nats, the mean over a sample's tokens, as for the canary in float32


async def broken_laws(path: str, model: str | Path, **settings: Any) -> list[str]:
    """Return the laws that the engine `module:Class` breaks; `settings` are further ones of a generator's node."""
    suite = _Suite(path, Path(model), settings)
    try:
        return await suite.run()
    finally:
        suite.learner.close()


class _Suite:
    """One engine, one learner, and what was found."""

    def __init__(self, path: str, model: Path, settings: dict[str, Any]) -> None:
        config = GenerationConfig(model=str(model), **{"dtype": "float32", "kv_cache_bytes": 32 << 20, **settings})
        publish = "adapter" if config.adapter.rank else "merged"
        lora = msgspec.structs.replace(config.adapter, publish=publish)
        learner = TrainingConfig(model=str(model), dtype="float32", lora=lora)
        self.learner = TorchEngine(learner, where="contract.learner", name=f"contract-{id(self):x}")
        self.learner.open(Ranks())
        self.engine = open_engine(path, config=config, where="contract.engine", **config.engine_options)
        self.broken: list[str] = []

    async def run(self) -> list[str]:
        laws: tuple[tuple[str, Callable[[], Awaitable[bool]]], ...] = (
            ("nothing is served before the first version", self._refuses_at_first),
            ("a version is loaded, proved by its canary and served", self._serves_a_version),
            ("each token has its version, and its log-prob under the distribution sampled from", self._tells_the_truth),
            ("sample i is drawn with seed + i, the same alone and among others", self._draws_by_seed),
            ("a response ends at its stop token or at max_tokens, and says which", self._stops),
            ("a cancelled request leaves nothing running", self._lets_go),
            ("a request survives an update; its tokens tell the versions apart, in order", self._spans_an_update),
            ("weights that the canary contradicts are not served", self._refuses_a_wrong_canary),
        )
        await self.engine.open()
        try:
            for law, holds in laws:
                try:
                    is_kept, why = await holds(), ""
                except Exception as error:  # whatever an engine raises is its answer
                    is_kept, why = False, f" ({type(error).__name__}: {error})"
                if not is_kept:
                    self.broken.append(f"{law}{why}")
        finally:
            await self.engine.close()
            await self.engine.close()  # must be safe
        return self.broken

    async def _draw(self, prompt: Sequence[int], *, seed: int = 1, num_samples: int = 1, **more: Any) -> list[Sample]:
        sampling = Sampling(**{"max_tokens": 12, "ignore_stop": True, **more})
        return await self.engine.generate(
            request_id=f"{seed}-{list(prompt)}",
            prompt_ids=prompt,
            num_samples=num_samples,
            seed=seed,
            sampling=sampling,
        )

    def _publish(self, version: int) -> Any:
        adapts = self.learner.config.lora.rank > 0
        if version:
            with torch.no_grad():
                for parameter in self.learner.model.parameters():
                    noise = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(version))
                    if not adapts:
                        parameter.mul_(1.0 + noise)
                    elif parameter.requires_grad:  # an adapter's half is zero at first
                        parameter.add_(noise)
        weights = self.learner.publish(version, CANARY)
        self.learner.transfer(version)
        return weights

    def _is_true(self, prompt: Sequence[int], samples: list[Sample], version: int) -> bool:
        responses = [sample.token_ids for sample in samples]
        ((*ours,),) = self.learner.score([TokenGroup(prompt_ids=Buffer.ints(prompt), responses=responses)])
        pairs = zip(ours, samples, strict=True)
        spans = [[tuple(msgspec.structs.astuple(span)) for span in sample.versions] for sample in samples]
        whole = [[(version, 0, len(sample.token_ids))] for sample in samples]
        return spans == whole and all(np.abs(mine - theirs.logprobs.numpy()).mean() < GAP for mine, theirs in pairs)

    async def _refuses_at_first(self) -> bool:
        try:
            await self._draw(PROMPTS[0])
        except FlowrlError:
            return True
        return False

    async def _serves_a_version(self) -> bool:
        report = await self.engine.update_weights(self._publish(0))
        return report.version == 0 and report.mean_gap < GAP

    async def _tells_the_truth(self) -> bool:
        first = await self._draw(PROMPTS[0], num_samples=3)
        is_true = self._is_true(PROMPTS[0], first, 0)
        await self.engine.update_weights(self._publish(1))
        return is_true and self._is_true(PROMPTS[1], await self._draw(PROMPTS[1], num_samples=2), 1)

    async def _draws_by_seed(self) -> bool:
        among = await asyncio.gather(
            *(self._draw(prompt, seed=10 * i, num_samples=3) for i, prompt in enumerate(PROMPTS))
        )
        alone = [(await self._draw(prompt, seed=10 * i + 2))[0] for i, prompt in enumerate(PROMPTS)]
        drawn = {tuple(sample.token_ids.tolist()) for sample in among[0]}
        same = all(one.token_ids == several[2].token_ids for one, several in zip(alone, among, strict=True))
        return same and len(drawn) > 1 and self.engine.num_running == 0

    async def _stops(self) -> bool:
        (free,) = await self._draw(PROMPTS[1])
        ids = free.token_ids.tolist()
        (ended,) = await self._draw(PROMPTS[1], ignore_stop=False, stop_token_ids=[ids[4]])
        stopped = ended.token_ids.tolist()
        is_free = (free.finish, len(ids)) == ("length", 12)
        return is_free and ended.finish == "stop" and stopped == ids[: len(stopped)] and len(stopped) <= 5

    async def _lets_go(self) -> bool:
        drawing = asyncio.ensure_future(self._draw(PROMPTS[2], max_tokens=200))
        await self._draw(PROMPTS[0], max_tokens=2)  # by then the other is being decoded
        was_running = self.engine.num_running
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)
        return was_running == 1 and self.engine.num_running == 0 and bool(await self._draw(PROMPTS[2]))

    async def _spans_an_update(self) -> bool:
        drawing = asyncio.ensure_future(self._draw(PROMPTS[2], max_tokens=200))
        await self._draw(PROMPTS[0], max_tokens=2)
        await self.engine.update_weights(self._publish(2))
        (sample,) = await drawing
        spans = sample.versions
        follow = all(one.end == two.start and one.version < two.version for one, two in pairwise(spans))
        return follow and spans[0].start == 0 and spans[-1].end == len(sample.token_ids) == 200

    async def _refuses_a_wrong_canary(self) -> bool:
        weights = self._publish(3)
        wrong = Buffer.floats(weights.canary.logprobs.numpy() - 1.0)
        lying = msgspec.structs.replace(weights, canary=msgspec.structs.replace(weights.canary, logprobs=wrong))
        try:
            await self.engine.update_weights(lying)
        except ProofError:
            return await self._refuses_at_first()
        return False
