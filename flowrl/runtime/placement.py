"""Where replicas go: what each needs, whether the machine has it, and the environment each process gets.

Invariants:
- a GPU is reserved whole or not at all;
- a node with `share` reserves nothing and sits on the GPUs that another node has reserved, its processes spread over
  them one by one;
- whatever the user sets stays, and what is left to `auto` (`place`) uses every visible GPU;
- generators and training apart where there are two or more, on one GPU together where there is one.

Thread counts of processes that share cores must not add up to more than the cores, and OpenMP must not spin while it
waits. Spinning threads slow their neighbours down several times.

Tests: tests/unit/runtime/test_placement.py
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.config import is_given
from flowrl.engines.base import Computing, Serving, Training
from flowrl.errors import ConfigError, ResourceError, number_of
from flowrl.runtime.devices import Machine, check_usable, num_cores, unusable, visible_machine
from flowrl.scratch import socket_root

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flowrl.graph.graph import Graph
    from flowrl.graph.stage import StageConfig

RUNNING_ON_GPU = 256  # samples decoded together: enough to be bound by arithmetic and not by reading the weights
SHARED_UTILIZATION = 0.4  # of a GPU's memory for generation where training has the rest
UTILIZATION = 0.85
KEEP = "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1"  # of jemalloc's
MOST_THREADS = 8  # of a process whose work is on a GPU


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """One process: a rank of a replica of a node, and what it reserves."""

    node: str
    replica: int
    rank: int
    cpus: float
    gpus: int  # reserved for it alone; 0 where it sits on those of another
    host: str  # the node whose devices it sits on; its own name where it has its own
    seats: tuple[int, ...] = ()  # the GPUs that it sees, counted over all that its host has reserved


def place(graph: Graph, paths: Mapping[str, str], given: Mapping[str, Any], *, machine: Machine) -> dict[str, Any]:
    """Return what a machine's GPUs imply for the settings of a graph's nodes; see `load_program`."""
    configs = {path: graph.nodes[node].config for path, node in paths.items()}
    computing = {path: config for path, config in configs.items() if isinstance(config, Serving | Computing)}
    if not machine.gpus or not computing or given.get("runtime") == "local" or given.get("placement") == "given":
        return {}
    copies = {path: sum(1 for node in graph.nodes if _stands_at(path, node, paths)) for path in computing}
    return _Placement(graph.until_node, computing, copies, given, machine).settings()


def _stands_at(path: str, node: str, paths: Mapping[str, str]) -> bool:
    """Return whether a node's settings stand at a path: those of several nodes may."""
    return node == path or (node not in paths and node.rstrip("0123456789").removesuffix("_") == path)


class _Placement:
    """The choice for one graph."""

    def __init__(
        self,
        last: str,
        configs: Mapping[str, StageConfig],
        copies: Mapping[str, int],
        given: Mapping[str, Any],
        machine: Machine,
    ) -> None:
        self._configs, self._copies, self._given, self._machine = configs, copies, given, machine
        self._found: dict[str, Any] = {}
        trainers = [path for path, config in configs.items() if isinstance(config, Training)]
        servers = [path for path, config in configs.items() if isinstance(config, Serving)]
        self._trainer = next(iter([*(t for t in trainers if t == last), *trainers]), "")
        self._server = next(iter(servers), "")

    def settings(self) -> dict[str, Any]:
        """Return the values by address."""
        left = len(self._machine.gpus) - sum(self._fixed(path) for path in self._configs)
        free = [path for path in self._configs if not self._is_settled(path)]
        trains, serves = self._trainer in free, self._server in free
        if serves and trains:
            self._split(left) if self._can_split(left) and not self._has_turns else self._together(left)
        elif serves and left >= self._width(self._server):
            self._serve(left)
        elif trains and left >= 1:
            self._train(left)
        elif free and left >= 1 and not (self._trainer or self._server):
            self._own(free[0], replicas=max(1, left))
        for path in free:
            self._follow(path)
        for path in self._configs:
            self._settle(path)
        return self._found

    # What is known.

    def _value(self, path: str, name: str) -> Any:
        return self._found.get(f"{path}.{name}", getattr(self._configs[path], name))

    def _is_given(self, path: str, *names: str) -> bool:
        return any(is_given(self._given, f"{path}.{name}") for name in names)

    @property
    def _has_turns(self) -> bool:
        """Return whether generation and training are to take turns, and so to be together."""
        return bool(self._server) and self._is_given(self._server, "turns") and self._value(self._server, "turns")

    def _is_settled(self, path: str) -> bool:
        """Return whether the user says where a node computes."""
        return self._is_given(path, "gpus") or bool(self._is_given(path, "share") and self._configs[path].share)

    def _fixed(self, path: str) -> int:
        """Return the GPUs that a node has by what the user says."""
        config = self._configs[path]
        if not self._is_given(path, "gpus") or config.share:
            return 0
        return config.gpus * config.ranks * config.replicas * self._copies[path]

    def _width(self, path: str) -> int:
        """Return the GPUs that one process computes on."""
        return devices_of(self._configs[path])

    # The choices.

    def _can_split(self, left: int) -> bool:
        ranks = self._configs[self._trainer].ranks if self._is_given(self._trainer, "ranks") else 1
        replicas = self._configs[self._server].replicas if self._is_given(self._server, "replicas") else 1
        return left >= ranks + replicas * self._width(self._server)

    def _split(self, left: int) -> None:
        """Give half to training and as many to generation as are left of it, whole replicas."""
        width, server = self._width(self._server), self._configs[self._server]
        if self._is_given(self._trainer, "ranks"):
            ranks = self._configs[self._trainer].ranks
            self._serve(left - ranks)
        elif self._is_given(self._server, "replicas"):
            self._serve(width * server.replicas)
            ranks = left - width * server.replicas
        else:
            replicas = max(1, (left - left // 2) // width)
            self._serve(width * replicas)
            ranks = left - width * replicas
        self._train(ranks)

    def _together(self, left: int) -> None:
        """Let generation sit on the GPUs of training."""
        if left < 1:
            return
        self._train(left)
        self._imply(self._server, share=self._trainer, gpus=0)
        self._imply(self._server, replicas=max(1, left // self._width(self._server)))

    def _serve(self, num_gpus: int) -> None:
        width = self._width(self._server)
        self._own(self._server, gpus=width, replicas=max(1, num_gpus // width))

    def _train(self, num_gpus: int) -> None:
        self._own(self._trainer, ranks=num_gpus)

    def _own(self, path: str, *, gpus: int = 1, **counts: int) -> None:
        self._imply(path, gpus=gpus, share="", **counts)

    def _imply(self, path: str, **values: Any) -> None:
        for name, value in values.items():
            if not self._is_given(path, name):
                self._found[f"{path}.{name}"] = value

    def _follow(self, path: str) -> None:
        """Let a node that nobody placed sit on the GPUs of training, or of generation, one process on each."""
        if path in (self._trainer, self._server) and f"{path}.gpus" in self._found:
            return
        if self._is_given(path, "share"):  # given as "": devices of its own
            self._own(path)
            return
        host = self._trainer or self._server
        if path == host or not self._value(host, "gpus") or self._value(host, "share"):
            return
        self._imply(path, share=host, gpus=0)
        seats = self._value(host, "gpus") * self._value(host, "ranks") * self._value(host, "replicas")
        count, other = ("ranks", "replicas") if isinstance(self._configs[path], Training) else ("replicas", "ranks")
        self._imply(path, **{count: max(1, int(seats) // int(self._value(path, other)))})

    def _settle(self, path: str) -> None:
        """Set what a node's engine takes on the devices that it has now."""
        config = self._configs[path]
        host = str(self._value(path, "share")) or path
        if host not in self._configs or not self._value(host, "gpus"):
            return
        beside = [other for other in self._configs if other != path and host in (other, self._value(other, "share"))]
        num_processes = sum(
            int(self._value(each, "ranks") * self._value(each, "replicas")) * self._copies[each]
            for each in self._configs
        )
        cores = self._machine.cores or MOST_THREADS * num_processes  # where nothing is said of them
        threads = max(1, min(MOST_THREADS, cores // max(1, num_processes)))
        self._imply(path, threads=threads)
        self._imply(path, cpus=0)
        if not isinstance(config, Serving):
            self._imply(path, overlap_comm=True)
            return
        seats = int(self._value(host, "gpus") * self._value(host, "ranks") * self._value(host, "replicas"))
        servers = sum(
            -(-int(self._value(each, "replicas")) * self._copies[each] * self._width(each) // max(1, seats))
            for each in (path, *beside)
            if isinstance(self._configs[each], Serving)
        )  # processes on one GPU
        has_trainers = any(not isinstance(self._configs[each], Serving) for each in beside) and not config.turns
        share = (SHARED_UTILIZATION if has_trainers else UTILIZATION) / servers
        self._imply(path, layout="processes", max_running=RUNNING_ON_GPU, kv_cache_bytes=0)
        self._imply(
            path,
            gpu_memory_utilization=round(share, 3),
            tensor_parallel=devices_of(config) * config.tensor_parallel // config.num_workers,
        )


def devices_of(config: StageConfig) -> int:
    """Return the GPUs that one process of a node computes on, were it on GPUs."""
    return max(config.num_workers, config.gpus) if isinstance(config, Serving) else 1


def places(graph: Graph) -> list[Place]:
    """Return every process of a graph, hosts before those that share their devices.

    Raises:
        ConfigError: a process is to compute on more GPUs than it can.
    """
    found: list[Place] = []
    taken: dict[str, int] = {}  # by host: seats that its sharers have
    for name, stage in sorted(graph.nodes.items(), key=lambda pair: bool(pair[1].config.share)):
        config, host = stage.config, stage.config.share or name
        own = 0 if config.share else config.gpus
        _check_width(name, config)
        owner = graph.nodes[host].config
        seats = owner.gpus * owner.ranks * owner.replicas
        width = own or (min(devices_of(config), seats) if seats else 0)
        if seats and width < devices_of(config) and config.share:
            what = f"{devices_of(config)} GPUs, but {host} has {seats}"
            raise ConfigError(f"{name}.tensor_parallel", what, "lower it, or give it GPUs of its own")
        for replica in range(config.replicas):
            for rank in range(config.ranks):
                first = taken.get(name if own else f"{host}/", 0)
                taken[name if own else f"{host}/"] = first + width
                found.append(
                    Place(
                        node=name, replica=replica, rank=rank, cpus=0.0 if config.share else config.cpus, gpus=own,
                        host=host, seats=tuple((first + i) % seats for i in range(width)) if seats else (),
                    )
                )  # fmt: skip
    return found


def _check_width(name: str, config: StageConfig) -> None:
    if isinstance(config, Computing) and config.gpus > 1:
        what = f"{config.gpus} GPUs for one rank, which computes on one"
        raise ConfigError(f"{name}.gpus", what, f"set {name}.gpus=1 and {name}.ranks={config.gpus * config.ranks}")
    if isinstance(config, Serving) and 0 < config.gpus < devices_of(config):
        what = f"{config.gpus} GPUs, but a replica's model is split over {devices_of(config)}"
        raise ConfigError(f"{name}.gpus", what, f"set {name}.gpus={devices_of(config)}, or leave it out")


def places_of(graph: Graph, replica: str) -> list[Place]:
    """Return the processes of one replica, which may be one more than the graph has."""
    node, _, number = replica.rpartition(".")
    stage, index = graph.nodes[node], int(number)
    if index >= stage.config.replicas:
        grown = object.__new__(type(stage))  # its ports know the stage itself, and are not asked
        grown.config = msgspec.structs.replace(stage.config, replicas=index + 1)
        graph = dataclasses.replace(graph, nodes={**graph.nodes, node: grown})
    return [place for place in places(graph) if (place.node, place.replica) == (node, index)]


def check_resources(graph: Graph, machine: Machine | None = None) -> None:
    """Hold what a graph asks of one machine against what it has.

    Raises:
        ResourceError: more cores or GPUs are asked for than there are, node by node; or a GPU cannot be used.
    """
    wanted = places(graph)
    needs_gpus = any(p.gpus for p in wanted)
    machine = machine or (visible_machine() if needs_gpus else Machine(cores=num_cores()))
    present = f"{len(machine.gpus)} present"
    if needs_gpus and not machine.gpus:
        present = f"none present ({machine.why_none})"
    for unit, have, asked, are in (
        ("core", machine.cores, [(p.node, p.cpus) for p in wanted], f"{machine.cores} present"),
        ("GPU", len(machine.gpus), [(p.node, p.gpus) for p in wanted], present),
    ):
        total = sum(amount for _, amount in asked)
        if total > have + 1e-9:
            detail = by_node(asked)
            setting = "cpus" if unit == "core" else "gpus"
            raise ResourceError(
                "placement",
                f"{number_of(total, unit)} asked for ({detail}), {are}",
                f"lower replicas, ranks or {setting}, or let nodes share devices",
            )
    if needs_gpus:
        check_usable(machine)


def check_computes(graph: Graph, machine: Machine | None = None) -> None:
    """Insist that what is placed on GPUs can compute there.

    Raises:
        ResourceError: torch is not built for them, or the driver is too old for it.
    """
    if any(p.gpus for p in places(graph)) and (trouble := unusable(machine or visible_machine())):
        what, _, remedy = trouble.partition(": ")
        raise ResourceError("placement", what, remedy)


def by_node(asked: Sequence[tuple[str, float]]) -> str:
    """Return who asks for how much: `generator 2, learner 1`."""
    by_node = {node: sum(a for n, a in asked if n == node) for node, amount in asked if amount}
    return ", ".join(f"{node} {amount:g}" for node, amount in by_node.items())


def num_gpus() -> int:
    """Return the GPUs that a run here may use."""
    return len(visible_machine().gpus)


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


def module_path() -> str:
    """Return where this process finds its modules, as a PYTHONPATH of others."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path if not path.endswith(".zip"))


def environment(config: StageConfig, *, devices: Sequence[str]) -> dict[str, str]:
    """Return the environment variables of a replica's process, which sees these devices (as CUDA names them)."""
    threads = str(getattr(config, "threads", 1))
    variables = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "CUDA_VISIBLE_DEVICES": ",".join(devices),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # NVML's, by which devices are counted here
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",  # Ray would hide what is shared
        "VLLM_RPC_BASE_PATH": str(socket_root()),
        "PYTHONPATH": module_path(),
    }
    if not devices:
        variables |= {"TORCHDYNAMO_DISABLE": "1", "DS_ACCELERATOR": "cpu"}
        variables |= keeping_memory(os.environ) if isinstance(config, Computing) else {}
    return variables


def keeping_memory(given: Mapping[str, str]) -> dict[str, str]:
    """Return what has a process keep the memory that it frees; {} where the user's own allocator is `given`.

    torch asks for the same large blocks at every step, which glibc gives back to the system and takes anew, page by
    page. Ray brings jemalloc along, which need not. `give_back_to_system` gives back all of it.
    """
    found = importlib.util.find_spec("ray")
    library = Path(str(found and found.origin)).parent / "core" / "libjemalloc.so"
    before = given.get("LD_PRELOAD", "")
    if "malloc" in before or not library.is_file():
        return {}
    return {"LD_PRELOAD": f"{library}:{before}".rstrip(":"), "MALLOC_CONF": given.get("MALLOC_CONF", KEEP)}
