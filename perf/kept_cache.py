"""What it gains and costs to keep keys and values across weight updates (`generator.keep_cache`), on a real vLLM.

    python -m perf.kept_cache [--model DIR] [--running 8] [--tokens 256] [--every 32] [--change 1e-3]

Answers of `--tokens` tokens are decoded `--running` together while every `--every` steps a version arrives, whose
matrices differ from the last's by `--change` of their own standard deviation, at random. AdamW moves an element by
about its learning rate, so at 1e-5 and a deviation of 0.05 a step's change is 2e-4. Once with the cache emptied at
each update, when all that is in flight is read again, and once with it kept. Gap: the log-prob that vLLM gave a token
against that of the version that is said to have sampled it, which has read all before it itself: mean of the absolute
difference, and the mismatch KL (the mean of exp(-d) - 1 + d); "first version" are tokens before the first update,
where only the engines differ.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flowrl.data.models import prepare_model
from flowrl.engines.base import GenerationConfig, Sampling
from flowrl.engines.vllm import VllmEngine
from flowrl.engines.weights import open_sender
from flowrl.messages import Weights
from perf.machine import machine

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from flowrl.messages import Sample

PROMPT_IDS = [7, 130, 21, 150, 9, 42, 77, 80] * 8


def change(model: Any, amount: float, version: int) -> None:
    """Make the next version's weights of the last's."""
    import torch

    draw = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.add_(torch.randn(weight.shape, generator=draw), alpha=amount * float(weight.std()))


async def decoded(model: Any, options: argparse.Namespace, *, keep_cache: bool) -> tuple[list[Sample], float]:
    """Return the answers and how long they took; the model goes from version to version meanwhile."""
    config = GenerationConfig(
        model=options.model, dtype="float32", max_running=options.running + 1, keep_cache=keep_cache,
        max_model_len=len(PROMPT_IDS) + options.tokens, kv_cache_bytes=512 << 20,
    )  # fmt: skip
    engine = VllmEngine(config, where="perf")
    sender = open_sender("shm", name="perf", num_receivers=1, timeout_s=60.0, device="cpu")

    async def update(version: int) -> None:
        manifest, size_bytes = await asyncio.to_thread(sender.publish, version, model.named_parameters())
        await engine.update_weights(
            Weights(version=version, transport="shm", manifest=manifest, canary=None, size_bytes=size_bytes)
        )
        sender.retire(version)

    def draw(tokens: int, num_samples: int) -> Awaitable[list[Sample]]:
        sampling = Sampling(max_tokens=tokens, ignore_stop=True)
        return engine.generate(
            request_id="a", prompt_ids=PROMPT_IDS, num_samples=num_samples, seed=1, sampling=sampling
        )

    try:
        await engine.open()
        await update(0)
        start_s = time.perf_counter()
        drawing = asyncio.ensure_future(draw(options.tokens, options.running))
        for version in count(1):
            await draw(options.every, 1)  # so many decoding steps, beside the others
            if drawing.done():
                break
            change(model, options.change, version)
            await update(version)
        return await drawing, time.perf_counter() - start_s
    finally:
        await engine.close()
        sender.close()


def gaps(model: Any, samples: Sequence[Sample], options: argparse.Namespace) -> tuple[Any, Any]:
    """Return vLLM's log-probs less the model's, of tokens of version 0 and of all others, each by its version."""
    import numpy as np
    import torch

    found: dict[bool, list[Any]] = {True: [], False: []}
    for version in range(1 + max(span.version for sample in samples for span in sample.versions)):
        if version:
            change(model, options.change, version)
        for sample in samples:
            ids = sample.token_ids.tolist()
            with torch.no_grad():
                logits = model(torch.tensor([[*PROMPT_IDS, *ids]])).logits[0, len(PROMPT_IDS) - 1 : -1]
            ours = logits.float().log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()
            for span in sample.versions:
                if span.version == version:
                    found[version == 0].append((sample.logprobs.numpy() - ours)[span.start : span.end])
    return np.concatenate(found[True]), np.concatenate(found[False])


def main(argv: Sequence[str] | None = None) -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--running", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--every", type=int, default=32, help="decoding steps from one version to the next")
    parser.add_argument("--change", type=float, nargs="+", default=[1e-3])
    options = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options.model = str(prepare_model(options.model))
    print(machine())
    print("| change | cache | tokens/s | gap, first version | gap, later versions | mismatch KL, later versions |")
    print("|---|---|---|---|---|---|")
    for amount in list(options.change):
        options.change = amount
        for keep_cache in (False, True):
            made = [AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval() for _ in range(2)]
            samples, took_s = asyncio.run(decoded(made[0], options, keep_cache=keep_cache))
            first, later = gaps(made[1], samples, options)
            tokens_per_s = sum(len(sample.token_ids) for sample in samples) / took_s
            figures = f"{tokens_per_s:.1f} | {np.abs(first).mean():.2e} | {np.abs(later).mean():.2e}"
            kl = float((np.exp(-later) - 1 + later).mean())
            print(f"| {amount:g} | {'kept' if keep_cache else 'emptied'} | {figures} | {kl:.2e} |", flush=True)


if __name__ == "__main__":
    main()
