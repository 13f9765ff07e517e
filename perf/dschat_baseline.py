"""Start the baseline of `flowrl bench dschat` in processes of its own and read what they measured.

An `Order` goes to dschat_loop.py as JSON, the steps' times come back as JSON; this module loads no torch, so that
nothing of the command that measures sits beside what is measured. Called by perf/dschat.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from flowrl.config import Config, Meta
from flowrl.errors import ConfigError, RunError
from perf.dschat_workload import Positive, StepTimes, Workload
from perf.runs import ROOT

if TYPE_CHECKING:
    from pathlib import Path


class Order(Config):
    """What the baseline is to do; the settings that only it has."""

    work: Workload
    padding: Annotated[int, Meta(ge=0)] = 256  # P; 0: the longest prompt of each batch
    ranks: Positive = 1  # processes, each with a part of the batch
    threads: Positive = 1  # of each
    cache: Literal["dynamic", "static"] = "dynamic"  # the KV cache of `generate`
    score_rows: Positive = 16  # sequences in one scoring forward
    train_rows: Positive = 8  # sequences in one forward and backward


def run_baseline(order: Order, directory: Path) -> list[StepTimes]:
    """Run the baseline to its end and return every step's times, those of the warm-up first.

    Raises:
        ConfigError: more processes than cores or GPUs.
        RunError: one of the processes failed.
    """
    work = order.work
    if order.ranks > (work.gpus or work.cores):
        have = f"{work.gpus} GPUs" if work.gpus else f"{work.cores} cores"
        raise ConfigError("--ranks", f"{order.ranks} processes on {have}", "give at most one for each")
    stem = directory / f"baseline-{work.mode}-{time.time_ns() // 1_000_000}"
    order_path, answer = stem.with_suffix(".order.json"), stem.with_suffix(".json")
    order_path.write_bytes(msgspec.json.encode(order))
    command = [sys.executable, "-m", "perf.dschat_loop", str(order_path), str(answer)]
    with stem.with_suffix(".out").open("w") as log:
        running = [
            subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                             env={**os.environ, **_environment(order), "RANK": str(rank)})
            for rank in range(order.ranks)
        ]  # fmt: skip
        try:
            codes = [process.wait() for process in running]
        finally:
            for process in running:
                process.kill()
    if any(codes):
        raise RunError("baseline", f"its processes ended with {codes}", f"see {log.name}")
    return msgspec.json.decode(answer.read_bytes(), type=list[StepTimes])


def _environment(order: Order) -> dict[str, str]:
    threads = str(order.threads)
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # Threads that spin between kernels are quicker, where nothing else wants the cores.
        "OMP_WAIT_POLICY": "ACTIVE" if order.ranks == 1 else "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCHDYNAMO_DISABLE": "1",
    }


def try_step(order: Order, directory: Path) -> float:
    """Return the seconds of one step after one that is dropped."""
    work = msgspec.structs.replace(order.work, warmup=1, steps=1)
    return run_baseline(msgspec.structs.replace(order, work=work), directory)[-1].wall_s
