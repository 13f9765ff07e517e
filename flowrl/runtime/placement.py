"""Where replicas go: what each needs, whether the machine has it, and the environment each process gets.

A node's replicas and ranks take `cpus` and `gpus` each; a node with `share` sits on another node's devices and takes
no cores of its own. Thread counts of processes that share cores must not add up to more than the cores, and OpenMP
must not spin while it waits: spinning threads slow their neighbours down several times.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import msgspec

from flowrl.errors import ResourceError

if TYPE_CHECKING:
    from flowrl.graph.graph import Graph
    from flowrl.graph.stage import StageConfig


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """One process: a rank of a replica of a node, and what it reserves."""

    node: str
    replica: int
    rank: int
    cpus: float
    gpus: float
    host: str  # the node whose devices it sits on; its own name where it has its own


def num_cores() -> int:
    """Return the cores this process may use."""
    return len(os.sched_getaffinity(0))


def num_gpus() -> int:
    """Return the GPUs that NVML reports; 0 where there is no driver."""
    import pynvml  # pyright: ignore[reportMissingTypeStubs]

    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0


def places(graph: Graph) -> list[Place]:
    """Return every process of a graph, hosts before those that share their devices."""
    found: list[Place] = []
    sharers: dict[str, int] = {}
    for stage in graph.nodes.values():
        if stage.config.share:
            sharers[stage.config.share] = sharers.get(stage.config.share, 0) + 1
    for name, stage in sorted(graph.nodes.items(), key=lambda pair: bool(pair[1].config.share)):
        config = stage.config
        host = config.share or name
        gpus = graph.nodes[host].config.gpus / (1 + sharers.get(host, 0))
        cpus = 0.0 if config.share else config.cpus
        found.extend(
            Place(node=name, replica=replica, rank=rank, cpus=cpus, gpus=gpus, host=host)
            for replica in range(config.replicas)
            for rank in range(config.ranks)
        )
    return found


def check_resources(graph: Graph) -> None:
    """Hold what a graph asks of one machine against what it has.

    Raises:
        ResourceError: more cores or GPUs are asked for than there are, node by node.
    """
    wanted = places(graph)
    for unit, have, asked in (
        ("cores", num_cores(), [(p.node, p.cpus) for p in wanted]),
        ("GPUs", num_gpus() if any(p.gpus for p in wanted) else 0, [(p.node, p.gpus) for p in wanted]),
    ):
        total = sum(amount for _, amount in asked)
        if total > have + 1e-9:
            by_node = {node: sum(a for n, a in asked if n == node) for node, amount in asked if amount}
            detail = ", ".join(f"{node} {amount:g}" for node, amount in by_node.items())
            setting = "cpus" if unit == "cores" else "gpus"
            raise ResourceError("placement", f"{total:g} {unit} are asked for ({detail}), {have} are present",
                                f"lower replicas, ranks or {setting}, or let nodes share devices")  # fmt: skip


def quiet_libraries(*, has_engines: bool = False) -> None:
    """Keep what libraries would say out of a run's lines: DeepSpeed that a CPU is all there is, progress bars.

    `has_engines`: engines run in this process.
    """
    if not num_gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if has_engines:
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()


def environment(config: StageConfig, *, on_gpu: bool) -> dict[str, str]:
    """Return the environment variables of a replica's process."""
    threads = str(getattr(config, "threads", 1))
    variables = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path if not path.endswith(".zip")),
    }
    if not on_gpu:
        variables |= {"TORCHDYNAMO_DISABLE": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return variables
