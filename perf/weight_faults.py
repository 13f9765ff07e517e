"""Weight updates that go wrong, on a real vLLM with a tiny model: which proof finds each, and no false alarm.

    python -m perf.weight_faults [--swaps 1000]

First every fault once, each on an engine of its own that serves version 0: what was done, which error came, and that
nothing is served after it. Then so many clean updates with requests running: alarms, and milliseconds for one update.
See perf/README.md for how to read it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from flowrl.engines.base import Sampling
from flowrl.engines.weights import receiver
from flowrl.errors import FlowrlError, ProofError
from perf.machine import machine
from tests.support.policy import Policy, opened
from tests.support.tiny import tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from flowrl.engines.vllm import VllmEngine
    from flowrl.messages import Weights

LAYER = "model.layers.1.self_attn"


def changed(weights: Weights, change: Callable[[list[Any]], None]) -> Weights:
    """Return the version with the tensors of every bucket changed; each is [name, dtype, shape, offset, ...]."""
    manifest = json.loads(weights.manifest)
    for bucket in manifest["buckets"]:
        change(bucket["tensors"])
    return msgspec.structs.replace(weights, manifest=json.dumps(manifest).encode())


def dropped(weights: Weights) -> Weights:
    """Leave out one tensor: it keeps its old values."""

    def change(tensors: list[Any]) -> None:
        tensors[:] = [tensor for tensor in tensors if tensor[0] != f"{LAYER}.q_proj.weight"]

    return changed(weights, change)


def reordered(weights: Weights) -> Weights:
    """Give two tensors of one shape each other's names."""
    names = {f"{LAYER}.{a}_proj.weight": f"{LAYER}.{b}_proj.weight" for a, b in (("q", "o"), ("o", "q"))}

    def change(tensors: list[Any]) -> None:
        for tensor in tensors:
            tensor[0] = names.get(tensor[0], tensor[0])

    return changed(weights, change)


def mistyped(weights: Weights) -> Weights:
    """Call float32 numbers integers."""

    def change(tensors: list[Any]) -> None:
        for tensor in tensors:
            if tensor[0] == f"{LAYER}.v_proj.weight":
                tensor[1] = "int32"

    return changed(weights, change)


def corrupted(weights: Weights) -> Weights:
    """Flip one bit on its way."""
    with open(json.loads(weights.manifest)["path"], "r+b") as file:
        file.seek(weights.size_bytes // 2)
        old = file.read(1)[0]
        file.seek(weights.size_bytes // 2)
        file.write(bytes([old ^ 1]))
    return weights


def truncated(weights: Weights) -> Weights:
    """Cut the bytes short."""
    with open(json.loads(weights.manifest)["path"], "r+b") as file:
        file.truncate(weights.size_bytes - 64)
    return weights


def lost(weights: Weights) -> Weights:
    """Take the bytes away before they are fetched."""
    Path(json.loads(weights.manifest)["path"]).unlink()
    return weights


@contextmanager
def replaced(owner: Any, name: str, substitute: Any) -> Generator[None]:
    """Put something else in the place of a function."""
    original = getattr(owner, name)
    setattr(owner, name, substitute)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def nothing_replaced() -> Generator[None]:
    """Leave everything as it is."""
    yield


def unchanged(weights: Weights) -> Weights:
    """Return the version as it is."""
    return weights


FAULTS: dict[str, tuple[Callable[[Weights], Weights], Callable[[], Any]]] = {
    "one tensor dropped": (dropped, nothing_replaced),
    "two tensors reordered": (reordered, nothing_replaced),
    "wrong dtype": (mistyped, nothing_replaced),
    "one bit flipped": (corrupted, nothing_replaced),
    "bytes cut short": (truncated, nothing_replaced),
    "bytes never came": (lost, nothing_replaced),
    "generator skipped, yet acknowledges": (
        unchanged,
        lambda: replaced(receiver.FlowrlWeightTransferEngine, "receive_weights", lambda *_: None),
    ),
    "tied head left stale": (unchanged, lambda: replaced(receiver, "repack_tied_head", lambda *_: None)),
}


async def draw(engine: VllmEngine, max_tokens: int) -> list[int]:
    """Sample one response."""
    sampling = Sampling(max_tokens=max_tokens)
    (sample,) = await engine.generate(
        request_id="group", prompt_ids=[5, 6, 7], num_samples=1, seed=1, sampling=sampling
    )
    return sample.token_ids.tolist()


async def strike(model: Path, name: str) -> bool:
    """Commit one fault; prints what was seen, returns whether it was detected and nothing wrong served after it."""
    spoil, meanwhile = FAULTS[name]
    policy, engine = Policy(model), await opened(model)
    seen: FlowrlError | None = None
    try:
        await engine.update_weights(policy.publish())
        before = await draw(engine, 16)
        weights = spoil(policy.publish(seed=1))
        with meanwhile():
            try:
                await engine.update_weights(weights)
            except FlowrlError as error:
                seen = error
        try:  # a version that never touched the model may leave the old one in service
            is_safe = await draw(engine, 16) == before and not isinstance(seen, ProofError)
        except FlowrlError:
            is_safe = True
    finally:
        await engine.close()
        policy.sender.close()
    found = "NOT DETECTED" if seen is None else f"{type(seen).__name__}: {seen.what}"
    print(f"  {name:<36} {found[:110]}{'' if is_safe else '; SERVED WRONGLY AFTER IT'}")
    return seen is not None and is_safe


async def swap(model: Path, num_swaps: int) -> int:
    """Update cleanly so many times while requests run; returns the number of alarms."""
    policy, engine = Policy(model), await opened(model)
    seconds: list[float] = []
    alarms = 0
    try:
        await engine.update_weights(policy.publish())
        for number in range(num_swaps):
            running = asyncio.ensure_future(draw(engine, 8))
            weights = policy.publish(seed=number)
            with torch.no_grad():  # a random walk of a thousand steps would leave the numbers that a model has
                for parameter in policy.hf.parameters():
                    parameter.mul_(0.999)
            start_s = time.monotonic()
            try:
                await engine.update_weights(weights)
            except FlowrlError as error:
                alarms += 1
                print(f"  swap {number}: {error}")
                break
            seconds.append(time.monotonic() - start_s)
            await running
            policy.sender.retire(weights.version)
    finally:
        await engine.close()
        policy.sender.close()
    quantiles = statistics.quantiles([1e3 * each for each in seconds], n=20)
    print(f"clean swaps {len(seconds)}, false alarms {alarms}; {quantiles[9]:.0f} ms each, p95 {quantiles[18]:.0f} ms")
    return alarms


def main() -> int:
    """Commit every fault, then swap cleanly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=1000, help="clean updates (default: 1000)")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as directory, asyncio.Runner() as runner:
        model = tiny_model(Path(directory))
        detected = sum(runner.run(strike(model, name)) for name in FAULTS)
        print(f"faults {len(FAULTS)}, detected {detected}")
        alarms = runner.run(swap(model, options.swaps))
    return 0 if detected == len(FAULTS) and not alarms else 1


if __name__ == "__main__":
    sys.exit(main())
