"""A generation engine as a user might write it: transformers, a token at a time; and one that breaks its promises."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from flowrl.engines.base import GenerationConfig, UpdateReport
from flowrl.engines.canary import NO_CANARY, compare
from flowrl.engines.weights import Receiver
from flowrl.errors import FlowrlError, StageError
from flowrl.messages import Buffer, Sample, VersionSpan


class PlainEngine:
    """Samples with transformers."""

    def __init__(self, config: GenerationConfig, *, where: str, receiver_index: int = 0) -> None:
        self.config = config
        self.where = where
        self.num_running = 0
        self._version: int | None = None
        self._broken: FlowrlError | None = None
        self._receiver = Receiver(where, replica=receiver_index, timeout_s=config.transfer_timeout_s)

    async def open(self) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(self.config.model, dtype=torch.float32).eval()

    async def generate(self, *, request_id, prompt_ids, num_samples, seed, sampling) -> list[Sample]:
        if self._broken or self._version is None:
            raise self._broken or StageError(self.where, "no version")
        self.num_running += num_samples
        try:
            return list(
                await asyncio.gather(*(self._sample(prompt_ids, seed + i, sampling) for i in range(num_samples)))
            )
        finally:
            self.num_running -= num_samples

    async def _sample(self, prompt_ids, seed, sampling) -> Sample:
        random = torch.Generator().manual_seed(seed)
        ids, logprobs, versions, finish = [], [], [], "length"
        while len(ids) < sampling.max_tokens and finish == "length":
            await asyncio.sleep(0)
            logits = self._logits([*prompt_ids, *ids])[-1] / sampling.temperature
            ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=random)))
            logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
            versions.append(self._version)
            if not sampling.ignore_stop and ids[-1] in {2, *sampling.stop_token_ids}:
                finish = "stop"
        starts = [i for i, version in enumerate(versions) if not i or version != versions[i - 1]]
        spans = [VersionSpan(versions[a], a, b) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
        text = ""
        return Sample(
            token_ids=Buffer.ints(ids), logprobs=Buffer.floats(logprobs), versions=spans, finish=finish, text=text
        )

    async def among(self, prompt_ids, token_ids) -> list[float]:
        return self._logits([*prompt_ids])[-1][[*token_ids]].softmax(-1).tolist()

    @torch.no_grad()
    def _logits(self, ids):
        return self._model(input_ids=torch.tensor([ids])).logits[0]

    async def serve_loaded(self) -> None:
        self._version = 0

    async def update_weights(self, weights) -> UpdateReport:
        start_s = time.monotonic()
        self._load(dict(self._receiver.receive(weights)))
        gap = NO_CANARY
        if weights.canary is not None:
            ids = weights.canary.token_ids.tolist()
            found = self._logits(ids)[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
            try:
                gap = compare(weights.canary, found, version=weights.version, where=self.where)
            except FlowrlError as error:
                self._broken = error
                raise
        self._version = weights.version
        took_s = time.monotonic() - start_s
        return UpdateReport(
            version=weights.version, pause_s=took_s, transfer_s=took_s, mean_gap=gap.mean, max_gap=gap.max
        )

    def _load(self, tensors) -> None:
        missing, unexpected = self._model.load_state_dict(tensors, strict=False)
        assert set(missing) <= {"lm_head.weight"}, missing
        assert not unexpected

    async def close(self) -> None:
        self._receiver.close()


class CarelessEngine(PlainEngine):
    """Draws every sample with one seed, and serves what it was told is wrong."""

    async def _sample(self, prompt_ids, seed, sampling) -> Sample:
        return await super()._sample(prompt_ids, 0, sampling)

    async def update_weights(self, weights) -> UpdateReport:
        try:
            return await super().update_weights(weights)
        except FlowrlError:
            self._broken = None
            return UpdateReport(version=weights.version, pause_s=0.0, transfer_s=0.0, mean_gap=0.0, max_gap=0.0)
