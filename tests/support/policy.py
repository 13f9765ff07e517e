"""Both ends of a weight update without a training engine: a tiny policy that publishes, a vLLM that takes it in."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from flowrl.engines.base import GenerationConfig
from flowrl.engines.publishing import as_saved, carried_buffers
from flowrl.engines.vllm import VllmEngine
from flowrl.engines.weights import open_sender
from flowrl.messages import Buffer, Canary, Sample, Weights

if TYPE_CHECKING:
    from pathlib import Path

CANARY_IDS = [40 + (7 * i) % 200 for i in range(24)]


class Policy:
    """The learner's side: a model at some version, and its sender."""

    def __init__(
        self, model: Path, *, transport: str = "shm", num_receivers: int = 1, timeout_s: float = 120.0,
        max_mean_gap: float = 1e-3,
    ) -> None:  # fmt: skip
        self.hf: Any = AutoModelForCausalLM.from_pretrained(model)
        self.version = -1
        self.transport = transport
        self.max_mean_gap = max_mean_gap  # of the canaries, nats
        self.sender = open_sender(
            transport, name="learner", num_receivers=num_receivers, timeout_s=timeout_s, device="cpu"
        )

    def publish(self, *, seed: int | None = None) -> Weights:
        """Offer the next version, with other weights if a seed is given."""
        if seed is not None:
            draw = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in self.hf.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
        self.version += 1
        tensors = as_saved(self.hf, chain(self.hf.named_parameters(), carried_buffers(self.hf)))
        manifest, size_bytes = self.sender.publish(self.version, tensors)
        canary = Canary(
            token_ids=Buffer.ints(CANARY_IDS),
            logprobs=Buffer.floats(self.logprobs(CANARY_IDS[:1], CANARY_IDS[1:])),
            max_mean_gap=self.max_mean_gap,
        )
        return Weights(
            version=self.version,
            transport=self.transport,
            manifest=manifest,
            canary=canary,
            size_bytes=size_bytes,
        )

    def logprobs(self, prompt: list[int], response: list[int], temperature: float = 1.0) -> np.ndarray:
        with torch.no_grad():
            logits = self.hf(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float()
        picked = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None])
        return picked[:, 0].numpy()

    def gap(self, prompt: list[int], sample: Sample, temperature: float = 1.0, *, start: int = 0) -> float:
        """Return the largest difference between a sample's log-probs and this model's, from token `start` on."""
        ids = sample.token_ids.tolist()
        return float(np.abs(self.logprobs(prompt, ids, temperature) - sample.logprobs.numpy())[start:].max())


def engine_of(
    model: Path, *, receiver_index: int = 0, kind: type[VllmEngine] = VllmEngine, **settings: Any
) -> VllmEngine:
    config = GenerationConfig(
        **{
            "model": str(model),
            "dtype": "float32",
            "kv_cache_bytes": 32 << 20,
            "max_running": 32,
            "transfer_timeout_s": 120.0,
            **settings,
        }
    )
    return kind(config, where=f"generator[{receiver_index}]", receiver_index=receiver_index)


async def opened(model: Path, **settings: Any) -> VllmEngine:
    engine = engine_of(model, **settings)
    await engine.open()
    return engine
