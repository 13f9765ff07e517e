"""What replaying the generator's experts does to the mismatch of generator and learner, on tiny mixtures of experts.

    python -m perf.routing_replay [--families Qwen3MoeForCausalLM ...] [--experts 64] [--top-k 8] [--layers 4]

The generator is the learner's own model in bfloat16, which samples and notes where its routers send each token (vLLM's
build for CPUs does not give that); the learner is the same weights in float32, so that all that is between them is
rounding. Weights are random: what ties there are is what a router without preferences has. The KL is the mean of
exp(d) - 1 - d, d = learner's log-prob minus generator's, over the sampled tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch

from flowrl.engines.base import Ranks, TokenGroup, TrainingConfig
from flowrl.engines.torch import TorchEngine
from flowrl.messages import Buffer, Routes
from perf.machine import machine
from tests.support.families import write_family

if TYPE_CHECKING:
    from collections.abc import Sequence

FAMILIES = ("Qwen3MoeForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM", "DeepseekV3ForCausalLM")
NAMES = {"MixtralForCausalLM": "num_local_experts", "DeepseekV3ForCausalLM": "n_routed_experts"}
PROMPTS, PROMPT_TOKENS, TOKENS = 16, 16, 64


def opened(model: Path, dtype: str) -> TorchEngine:
    """Return an engine that notes where its tokens go."""
    config = TrainingConfig(model=str(model), dtype=dtype, routing="replay", frozen=True)  # pyright: ignore[reportArgumentType]
    engine = TorchEngine(config, where=dtype, name="perf")
    engine.open(Ranks())
    return engine


@torch.no_grad()
def sampled(engine: TorchEngine) -> tuple[list[TokenGroup], np.ndarray]:
    """Return what the generator samples, with its routes, and the log-probs of it."""
    replay = engine.reader.replay
    assert replay is not None
    torch.manual_seed(0)
    ids = torch.randint(3, 320, (PROMPTS, PROMPT_TOKENS))
    replay.use(None)
    logprobs: list[torch.Tensor] = []
    for _ in range(TOKENS):
        logits = engine.model(input_ids=ids, use_cache=False).logits[:, -1].float().log_softmax(-1)
        token = torch.multinomial(logits.exp(), 1)
        logprobs.append(logits.gather(-1, token)[:, 0])
        ids = torch.cat([ids, token], 1)
    engine.model(input_ids=ids[:, :-1], use_cache=False)
    taken = torch.stack([replay.taken.get(layer, torch.zeros(PROMPTS * (ids.shape[1] - 1), replay.top_k))
                         for layer in range(replay.num_layers)], 1).unflatten(0, (PROMPTS, -1))  # fmt: skip
    groups = [
        TokenGroup(
            prompt_ids=Buffer.ints(row[:PROMPT_TOKENS].numpy()),
            responses=[Buffer.ints(row[PROMPT_TOKENS:].numpy())],
            routes=[Routes.of(routes.numpy())],
        )
        for row, routes in zip(ids, taken, strict=True)
    ]
    return groups, torch.stack(logprobs, 1).numpy()


def row(learner: TorchEngine, groups: Sequence[TokenGroup], theirs: np.ndarray) -> list[str]:
    """Return the KL, the greatest difference, the effective sample size and the share of choices changed."""
    replay = learner.reader.replay
    assert replay is not None
    ours = np.concatenate([np.stack(rows) for rows in learner.score(groups)])
    apart = (ours - theirs).astype(np.float64)
    weights = np.exp(apart)
    changed = replay.figures().get("routes_changed")
    ess = weights.mean() ** 2 / (weights**2).mean()
    told = f"{changed[0] / changed[1]:.2%}" if changed else ""
    return [f"{np.mean(weights - 1 - apart):.2e}", f"{np.abs(apart).max():.3f}", f"{ess:.4f}", told]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args(argv)
    print(machine())
    heads = ("family", "routing", "mismatch KL", "max difference, nats", "ess", "choices changed")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for family in options.families:
        with tempfile.TemporaryDirectory() as directory:
            sizes = {NAMES.get(family, "num_experts"): options.experts, "num_experts_per_tok": options.top_k,
                     "num_hidden_layers": options.layers}  # fmt: skip
            write_family(family, Path(directory), **sizes)
            generator, learner = opened(Path(directory), "bfloat16"), opened(Path(directory), "float32")
            groups, theirs = sampled(generator)
            own = [msgspec.structs.replace(group, routes=[]) for group in groups]
            for routing, given in (("own", own), ("replay", groups)):
                print("| " + " | ".join([family, routing, *row(learner, given, theirs)]) + " |", flush=True)
            generator.close()
            learner.close()


if __name__ == "__main__":
    main()
