"""Trained response tokens per second: prompts shared without a mask, with one, and ordinary padded sequences.

A random model of SmolLM2-135M's shape in bfloat16 trains on groups of one prompt and eight short responses, as
policy and as value model, with the plain torch engine: forward and backward of `accumulate`, no optimizer step. The
layouts alternate within each repeat, so that other load on the machine meets both. Run
`python -m perf.learner --threads 1`; figures to compare with are in the table it prints: median (least to most).
The floor is the arithmetic over the rate of large products of the model's shapes on the same threads: 6 operations for
each parameter and token, a prompt counted once, the policy's head for response tokens only.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch

from flowrl.algorithms.base import Loss, LossBatch, Objective
from flowrl.config import Select
from flowrl.engines.base import Ranks, Schedule, TokenGroup, TrainingConfig
from flowrl.engines.torch import TorchEngine
from flowrl.messages import Buffer
from perf.peers_floor import OPERATIONS, matrix_rate, num_parameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.engines.packing import Layout


VOCABULARY, WIDTH = 49152, 576


class TokenMean(Objective):
    """Mean of the values read, weighted by advantage."""

    def loss(self, batch: LossBatch) -> Loss:
        total = -(batch.logprobs_BT * batch.columns["advantages"] * batch.mask_BT).sum()
        return Loss(total, batch.mask_BT.sum(), {})


class PaddedEngine(TorchEngine):
    """The engine as it treats models that cannot share prompts."""

    def _layout(self, longest: int) -> Layout:
        return "padded"


def write_model(directory: Path, layers: int) -> None:
    """Write a random model of SmolLM2-135M's shape, with a tokenizer file that nothing reads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")


def make_groups(arguments: argparse.Namespace) -> list[TokenGroup]:
    """Return random groups of equal size."""
    rng = np.random.default_rng(0)
    return [
        TokenGroup(
            prompt_ids=Buffer.ints(rng.integers(0, VOCABULARY, arguments.prompt, dtype=np.int32)),
            responses=[
                Buffer.ints(rng.integers(0, VOCABULARY, arguments.response, dtype=np.int32))
                for _ in range(arguments.samples)
            ],
            columns={"advantages": [Buffer.floats(np.ones(arguments.response, dtype=np.float32))] * arguments.samples},
        )
        for _ in range(arguments.groups)
    ]


def measure(model: Path, head: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Return tokens per second of each repeat, by layout."""
    config = TrainingConfig(
        model=str(model),
        head=head,  # pyright: ignore[reportArgumentType]
        dtype="bfloat16",
        schedule=Schedule(kind="constant"),
        threads=arguments.threads,
        micro_batch_tokens=arguments.micro_batch_tokens,
    )
    masked = msgspec.structs.replace(config, attention="sdpa")
    engines = {
        "unmasked": TorchEngine(config, where="perf", name="perf"),
        "masked": TorchEngine(masked, where="perf", name="perf"),
        "padded": PaddedEngine(masked, where="perf", name="perf"),
    }
    groups = make_groups(arguments)
    num_tokens = arguments.groups * arguments.samples * arguments.response
    objective = Select(use="__main__:TokenMean")
    for engine in engines.values():
        engine.open(Ranks())
        engine.accumulate(groups[:1], objective)
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(arguments.repeats):
        for name, engine in engines.items():
            start_s = time.perf_counter()
            engine.accumulate(groups, objective)
            rates[name].append(num_tokens / (time.perf_counter() - start_s))
    for engine in engines.values():
        engine.close()
    return rates


def most_per_s(model: str, head: str, rate: float, arguments: argparse.Namespace) -> float:
    """Return the trained tokens per second that the arithmetic alone allows at `rate` operations per second."""
    of_head = VOCABULARY * WIDTH
    of_body = num_parameters(model) - of_head
    trained = arguments.samples * arguments.response
    multiplied = of_body * (arguments.prompt + trained) + (of_head * trained if head == "policy" else 0)
    return trained * rate / (OPERATIONS["sft"] * multiplied)


def describe_machine(threads: int) -> str:
    """Return processor, cores, threads, load and torch version in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return (
        f"{name}, {os.cpu_count()} cores, {threads} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both heads and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, default in (
        ("layers", 30), ("groups", 4), ("prompt", 60), ("samples", 8), ("response", 6), ("repeats", 5),
        ("threads", 1), ("micro-batch-tokens", 2048),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args(argv)
    shape = f"{arguments.groups} groups of {arguments.prompt} + {arguments.samples} x {arguments.response} tokens"
    print(f"{describe_machine(arguments.threads)}\n{arguments.layers} layers, bfloat16, {shape}")
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch), arguments.layers)
        rate = matrix_rate(Path(scratch), cores=arguments.threads)
        print(f"{rate / 1e9:.0f} GFLOP/s in products of the model's shapes")
        for head in ("policy", "value"):
            rates = measure(Path(scratch), head, arguments)
            most = most_per_s(scratch, head, rate, arguments)
            for name, values in rates.items():
                median = statistics.median(values)
                said = f"({min(values):.0f} to {max(values):.0f}), {median / most:.0%} of the floor's speed"
                print(f"{head:7} {name:8} {median:6.0f} trained tokens/s {said}")
            for other in ("masked", "padded"):
                ratios = sorted(a / b for a, b in zip(rates["unmasked"], rates[other], strict=True))
                said = f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
                print(f"{head:7} unmasked is {statistics.median(ratios):.2f} times {other} {said}", flush=True)


if __name__ == "__main__":
    main()
