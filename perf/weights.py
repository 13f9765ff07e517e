"""Time weight updates of a running vLLM engine: publish, pause and transfer, median and spread.

`python -m perf.weights [--model DIR] [--transport shm|broadcast] [--updates 9] [--running 16] [--layout thread]`, and
`python -m perf.weights --path` for what each transport holds, copies and computes on its way to a receiver in another
process that loads nothing: bytes of the version's own size and processor seconds a GB, the least of the updates. Copied
is what torch copies and what is written to or read from the kernel (what gloo receives is not counted); held is memory
of a process's own, and files in shared memory.
Without --model it makes a randomly initialised Llama of SmolLM2-135M's shape (269 MB in bfloat16, tied). Requests are
being decoded during every update (on_update=keep); the first update, before anything is served, is not counted. The
learner and the engine share this process, so "publish" and "transfer" compete with decoding for its cores; "computing"
is what publishing takes of the learner's own thread, which other load on the machine changes little.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flowrl.engines.base import GenerationConfig, Sampling
from flowrl.engines.vllm import VllmEngine
from flowrl.engines.weights import Receiver, open_sender
from flowrl.messages import Weights
from flowrl.scratch import SHARED_MEMORY
from perf.machine import machine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

    from flowrl.engines.base import UpdateReport

PROMPT_TOKENS = 32
WARM_UP_TOKENS = 2


def make_model(directory: Path) -> Path:
    """Write a Llama of SmolLM2-135M's shape with random weights, and a byte-level tokenizer of no consequence."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.tiny import tiny_tokenizer

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


async def measure(
    model: Path, options: argparse.Namespace
) -> tuple[list[tuple[float, float]], list[UpdateReport], int]:
    """Return of each publish the seconds and those its thread computed, each update's report, a version's bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    policy: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, local_files_only=True)
    config = GenerationConfig(
        model=str(model),
        dtype="bfloat16",
        max_running=options.running + 1,  # room for the requests that space the updates
        layout=options.layout,
        kv_cache_bytes=256 << 20,
    )
    engine = VllmEngine(config, where="perf")
    sender = open_sender(options.transport, name="perf", num_receivers=1, timeout_s=60.0, device="cpu")
    publishes: list[tuple[float, float]] = []
    reports: list[UpdateReport] = []

    def publish(version: int) -> tuple[bytes, int]:
        start_s, computed_s = time.perf_counter(), time.thread_time()
        published = sender.publish(version, policy.named_parameters())
        publishes.append((time.perf_counter() - start_s, time.thread_time() - computed_s))
        return published

    async def update(version: int) -> int:
        manifest, size_bytes = await asyncio.to_thread(publish, version)
        weights = Weights(
            version=version, transport=options.transport, manifest=manifest, canary=None, size_bytes=size_bytes
        )
        async with asyncio.TaskGroup() as both:
            both.create_task(asyncio.to_thread(sender.transfer, version))
            reports.append(await engine.update_weights(weights))
        sender.retire(version)
        return size_bytes

    async def decode_for_ever() -> None:
        while True:
            await draw(config.max_model_len - PROMPT_TOKENS, options.running)

    async def draw(max_tokens: int, num_samples: int) -> None:
        await engine.generate(
            request_id="load",
            prompt_ids=[7] * PROMPT_TOKENS,
            num_samples=num_samples,
            seed=0,
            sampling=Sampling(max_tokens=max_tokens),
        )

    try:
        await engine.open()
        size_bytes = await update(0)
        async with asyncio.TaskGroup() as tasks:
            load = tasks.create_task(decode_for_ever())
            for version in range(1, 1 + options.updates):
                await draw(WARM_UP_TOKENS, 1)  # a few steps of decoding between two updates
                await update(version)
            load.cancel()
    finally:
        await engine.close()
        sender.close()
    return publishes[1:], reports[1:], size_bytes


class Copied(TorchDispatchMode):
    """Adds up the bytes that torch copies from one tensor to another in this thread."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("copy_", "clone", "_to_copy"):
            self.num_bytes += found.nbytes
        return found


def spent(work: Callable[[], Any], passed: str) -> tuple[Any, dict[str, float]]:
    """Return what a call gives, and what it took of this process; `passed` is rchar or wchar, to or from the kernel."""

    def figures() -> dict[str, float]:
        told = (line.split(":") for line in Path("/proc/self/io").read_text().splitlines())
        rows = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
        memory = next(1024.0 * int(row[1]) for row in rows if row[0] == "Anonymous:")
        through = next(float(number) for name, number in told if name == passed)
        return {"copied": through, "held": memory, "seconds": time.process_time()}

    before = figures()
    with Copied() as copied:
        found = work()
    taken = {name: after - before[name] for name, after in figures().items()}
    return found, taken | {"copied": taken["copied"] + copied.num_bytes}


def receive(pipe: Connection) -> None:
    """Be a receiver in a process of its own: take in versions and tell what each took."""
    receiver = Receiver("perf")
    held: list[Any] = []
    pipe.send("here")
    while (weights := pipe.recv()) is not None:
        held.clear()
        found, taken = spent(partial(list, receiver.receive(weights)), "rchar")
        held += found
        pipe.send(taken)
    receiver.close()


def account(transport: str, updates: int) -> list[str]:
    """Return what a transport takes of a learner and of a receiver, for each byte of a version."""
    import torch

    tensors = [(f"layer.{place}", torch.randn(1 << 22).bfloat16()) for place in range(32)]
    size = sum(tensor.nbytes for _, tensor in tensors)
    sender = open_sender(transport, name="perf", num_receivers=1, timeout_s=60.0, device="cpu")
    own, far = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=receive, args=(far,), daemon=True)
    process.start()
    own.recv()  # it is there
    rows: list[tuple[dict[str, float], dict[str, float], float]] = []
    for version in range(updates):

        def send(version: int = version) -> Any:
            wire, size_bytes = sender.publish(version, tensors)
            own.send(Weights(version=version, transport=transport, manifest=wire, canary=None, size_bytes=size_bytes))
            sender.transfer(version)

        shared = shutil.disk_usage(SHARED_MEMORY).used
        _, sent = spent(send, "wchar")
        received = own.recv()
        rows.append((sent, received, shutil.disk_usage(SHARED_MEMORY).used - shared))
        sender.retire(version + 1)
    own.send(None)
    process.join()
    sender.close()
    first = rows[0]
    sides = [[row[0] for row in rows], [row[1] for row in rows]]
    told = [max(0.0, each) / size for each in (first[0]["held"], first[1]["held"], first[2])]
    told += [min(each["copied"] for each in side) / size for side in sides]
    told += [min(each["seconds"] for each in side) / size * 1e9 for side in sides]
    return [transport, *(f"{each:.2f}" for each in told)]


def row(name: str, seconds: Sequence[float]) -> str:
    """Return one line of the table."""
    return f"{name:10} {statistics.median(seconds):8.3f} {min(seconds):8.3f} {max(seconds):8.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="local directory in Hugging Face format")
    parser.add_argument("--transport", choices=["shm", "broadcast"], default="shm")
    parser.add_argument("--layout", choices=["thread", "processes"], default="thread")
    parser.add_argument("--updates", type=int, default=9, help="counted updates, at least 7")
    parser.add_argument("--running", type=int, default=16, help="samples being decoded meanwhile")
    parser.add_argument("--path", action="store_true", help="bytes and seconds of each transport, without an engine")
    options = parser.parse_args(argv)
    if options.path:
        heads = ("transport", "held: learner", "receiver", "shared", "copied: learner", "receiver",
                 "s a GB: learner", "receiver")  # fmt: skip
        print(f"{machine()}\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        for transport in ("shm", "broadcast"):
            print(f"| {' | '.join(account(transport, options.updates))} |", flush=True)
        return
    if options.updates < 7:
        parser.error(f"--updates {options.updates} is too few for a spread; give at least 7")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="flowrl-perf-") as scratch:
        model = options.model or make_model(Path(scratch))
        publishes, reports, size_bytes = asyncio.run(measure(model, options))
    print(machine())
    print(
        f"{size_bytes / 1e6:.0f} MB by {options.transport}, layout {options.layout}, {options.running} samples being "
        f"decoded, {len(reports)} updates"
    )
    print(f"{'seconds':10} {'median':>8} {'least':>8} {'most':>8}")
    print(row("publish", [seconds for seconds, _ in publishes]))
    print(row("computing", [computed_s for _, computed_s in publishes]))
    print(row("transfer", [report.transfer_s for report in reports]))
    print(row("pause", [report.pause_s for report in reports]))


if __name__ == "__main__":
    main()
