"""How near decoding is to what the machine can do: seconds of a decoding step of the generator's vLLM, and its floor.

    python -m perf.generator [--model DIR] [--running 1 4 16 64] [--threads 1] [--repeats 5]

Every size decodes one request of so many samples to a short and to a long length, stop tokens ignored; the difference
of the two times over that of the lengths is a step, free of the prompt and of what a request costs once. The floor of
a step is the greater of two: the bytes of the weights over the bandwidth at which one large matrix is read by a
product with one row, and 2 operations for each parameter and sample over the rate of large products of the model's
shapes, both measured here on the same threads. Attention, norms, sampling and the engine's own Python are left out of
it, so it cannot be reached; what they cost is the gap. One repeat goes through all sizes in turn, so that other load
on the machine meets all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from typing import TYPE_CHECKING

from flowrl.data.models import inspect_model, prepare_model
from flowrl.engines.base import GenerationConfig, Sampling
from flowrl.engines.vllm import VllmEngine
from perf.machine import machine
from perf.markdown import markdown_table
from perf.peers_floor import matrix_rate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PROMPT_TOKENS = 64
SHORT, LONG = 8, 40  # tokens of a response; between them lie the steps that are measured
READ_BYTES = 256 << 20  # of the matrix that is read, beyond any cache


def read_rate(*, threads: int, repeats: int = 9) -> float:
    """Return the bytes per second at which a bfloat16 matrix is read by a product with one row, the best of some."""
    import torch

    torch.set_num_threads(threads)
    matrix = torch.randn(READ_BYTES // 2048, 1024).bfloat16()
    row = torch.randn(1, 1024).bfloat16()
    seconds: list[float] = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        torch.nn.functional.linear(row, matrix)
        seconds.append(time.perf_counter() - start_s)
    return READ_BYTES / min(seconds)


async def measure(model: Path, options: argparse.Namespace) -> dict[int, list[float]]:
    """Return the seconds of a decoding step in each repeat, by the number of samples decoded together."""
    config = GenerationConfig(
        model=str(model), max_running=max(options.running), threads=options.threads, layout=options.layout
    )
    engine = VllmEngine(config, where="perf")

    async def draw(name: str, running: int, num_tokens: int) -> float:
        start_s = time.perf_counter()
        await engine.generate(
            request_id=name,
            prompt_ids=[7 + place for place in range(PROMPT_TOKENS)],
            num_samples=running,
            seed=0,
            sampling=Sampling(max_tokens=num_tokens, ignore_stop=True),
        )
        return time.perf_counter() - start_s

    steps: dict[int, list[float]] = {running: [] for running in options.running}
    try:
        await engine.open()
        await engine.serve_loaded()
        for repeat in range(-1, options.repeats):  # the first is not counted
            for running, found in steps.items():
                short_s = await draw(f"short-{running}-{repeat}", running, SHORT)
                long_s = await draw(f"long-{running}-{repeat}", running, LONG)
                if repeat >= 0:
                    found.append((long_s - short_s) / (LONG - SHORT))
    finally:
        await engine.close()
    return steps


def table(steps: dict[int, list[float]], *, weights_s: float, sample_s: float) -> str:
    """Return a row for each number of samples; the floor is the greater of reading and multiplying."""
    rows: list[list[str]] = []
    for running, seconds in steps.items():
        step_s = statistics.median(seconds)
        floor_s = max(weights_s, running * sample_s)
        rows.append(
            [
                str(running),
                f"{1e3 * step_s:.1f} ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})",
                f"{running / step_s:.0f}",
                f"{1e3 * floor_s:.1f}, {'reading' if weights_s >= running * sample_s else 'arithmetic'}",
                f"{floor_s / step_s:.0%}",
            ]
        )
    heads = ["samples", "step, ms: median (least to most)", "tokens/s", "floor, ms", "of the floor's speed"]
    return markdown_table(heads, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--running", type=int, nargs="+", default=[1, 4, 16, 64], help="samples decoded together")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layout", choices=["thread", "processes"], default="thread")
    options = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    model = prepare_model(options.model)
    num_parameters = inspect_model(model).num_parameters
    bandwidth, rate = read_rate(threads=options.threads), matrix_rate(model, cores=options.threads)
    steps = asyncio.run(measure(model, options))
    print(machine())
    print(
        f"{num_parameters / 1e6:.1f} M parameters in bfloat16, {options.threads} threads; measured: "
        f"{bandwidth / 1e9:.1f} GB/s read, {rate / 1e9:.0f} GFLOP/s in products of the model's shapes\n"
    )
    print(table(steps, weights_s=2 * num_parameters / bandwidth, sample_s=2 * num_parameters / rate))


if __name__ == "__main__":
    main()
