"""One placement of a graph on a site: its processes, what each device and host holds, and whether that is too much.

A value made from settings alone (`place_processes`), so that a search can make thousands. A generator takes the share
of a device that its settings say, whatever it needs: what its weights and passes leave of that is its KV cache.

Invariant: every process of the graph is in it once, and every byte that memory.py knows of stands under one process and
one device or host.

Called by the search, which chooses among placements, and by the planner, which prints one.

Tests: tests/unit/tuning/test_placed.py
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.engines.base import Computing, Serving
from flowrl.engines.savings import DEEPSPEED
from flowrl.graph.stage import StageConfig
from flowrl.runtime.lease import turns_of
from flowrl.runtime.placement import places
from flowrl.tuning.memory import FIXED, OF_RANK_0, PLAIN, Head, Need, Work, asleep, cached, computing, serving, width_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flowrl.graph.graph import Graph
    from flowrl.tuning.machines import Site
    from flowrl.tuning.shapes import Shape

FULL = 0.97  # of a device or a host: what a plan may fill
RESTING = ("sampling", "training")  # the sides that take turns: one of them sleeps
REST = "all else"  # Ray, the driver, and nodes without a model
LEAST_RUNNING = 8  # samples of full length that a generator's cache must hold at once, or as many as may run
# Where parts of memory stand in the table; all others are "other".
COLUMNS = {
    "weights": ("weights", "weights gathered", "teacher"),
    "optimizer": ("float32 weights", "Adam's moments", "average of weights"),
    "gradients": ("gradients", "gradients on their way", "the step's own"),
    "activations": ("activations", "inputs of layers", "a layer's backward", "logits", "head in float32"),
    "KV cache": ("KV cache",),
}


class Models(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan knows of a graph besides its settings."""

    shapes: dict[str, Any]  # node -> Shape, of those that hold a model
    heads: dict[str, Head]
    teachers: dict[str, Any] = {}  # node -> Shape of a further model that it holds
    work: Work


class PlacedProcess(msgspec.Struct, frozen=True, kw_only=True):
    """One process and where it is."""

    node: str
    name: str  # "generator.0", "learner rank 2"
    devices: tuple[int, ...]  # counted over all machines
    machine: int
    need: Need
    side: str = ""  # with which it takes turns on its devices: "sampling" or "training"


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """A placement."""

    configs: dict[str, StageConfig]
    processes: list[PlacedProcess]
    devices: list[float]  # bytes on each
    hosts: list[float]
    running: dict[str, int]  # generator -> samples of full length that its cache holds
    lacks: list[str]  # what is too much, in words; []: it fits


def rough_graph(configs: Mapping[str, StageConfig], until: str) -> Graph:
    """Return what the rules of placement read of a graph: its nodes' settings and its last node."""
    nodes = {name: SimpleNamespace(config=config) for name, config in configs.items()}
    return cast("Graph", SimpleNamespace(nodes=nodes, until_node=until))


def place_processes(configs: Mapping[str, StageConfig], until: str, models: Models, site: Site) -> Placed:
    """Return where the processes of a graph come to be, and what lies in memory there.

    Raises:
        ConfigError: a process is to compute on more GPUs than it can.
    """
    seats, sides = _Seats(site), _sides(configs, until)
    processes: list[PlacedProcess] = []
    lacks: list[str] = []
    running: dict[str, int] = {}
    for each in places(rough_graph(configs, until)):
        config = configs[each.node]
        devices = seats.take(each.node, each.host, each.gpus, each.seats)
        if devices is None:
            break
        need = _need(each.node, config, models, site, on_gpu=bool(devices))
        if each.rank:
            need = msgspec.structs.replace(need, host={n: s for n, s in need.host.items() if n not in OF_RANK_0})
        if isinstance(config, Serving) and devices:
            running[each.node] = _running(config, models, each.node, need)
            least = min(LEAST_RUNNING, config.max_running)
            if running[each.node] < least:
                lacks.append(_no_cache(each.node, config, need, site, running[each.node], least))
        rank = f" rank {each.rank}" if config.ranks > 1 else f".{each.replica}" if config.replicas > 1 else ""
        machine = devices[0] // site.per_machine if devices else 0
        node, side = each.node, sides.get(each.node, "")
        processes.append(
            PlacedProcess(node=node, name=f"{node}{rank}", devices=devices, machine=machine, need=need, side=side)
        )
    moments = [_filled(processes, site, resting) for resting in RESTING]
    on_devices, on_hosts = ([max(sizes) for sizes in zip(*both, strict=True)] for both in zip(*moments, strict=True))
    lacks = [*seats.lacks, *_too_full(on_devices, on_hosts, processes, site), *dict.fromkeys(lacks)]
    return Placed(
        configs=dict(configs), processes=processes, devices=on_devices, hosts=on_hosts, running=running, lacks=lacks
    )


def _sides(configs: Mapping[str, StageConfig], until: str) -> dict[str, str]:
    """Return with whom nodes take turns on their devices."""
    found: dict[str, str] = {}
    for turns in turns_of(rough_graph(configs, until)).values():
        found |= dict.fromkeys(turns.sampling, "sampling") | dict.fromkeys(turns.training, "training")
    return found


def held_by(process: PlacedProcess, resting: str) -> Need:
    """Return what a process holds while one side, "sampling" or "training", sleeps."""
    return asleep(process.need) if process.side and process.side == resting else process.need


def _filled(processes: list[PlacedProcess], site: Site, resting: str) -> tuple[list[float], list[float]]:
    """Return the bytes on every device and host while one side sleeps."""
    devices, hosts = [0.0] * len(site.machine.gpus), [FIXED] + [0.0] * (site.num_machines - 1)
    for process in processes:
        need = held_by(process, resting)
        hosts[process.machine] += need.host_bytes
        for device in process.devices:
            devices[device] += need.device_bytes
    return devices, hosts


class _Seats:
    """The GPUs of a site, given out in order; a process's are of one machine."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._next = 0
        self._of: dict[str, list[int]] = defaultdict(list)  # host -> its devices
        self.lacks: list[str] = []

    def take(self, node: str, host: str, gpus: int, seats: Sequence[int]) -> tuple[int, ...] | None:
        """Return a process's devices, () where it computes on none; None where there are not so many."""
        if not gpus:
            return tuple(self._of[host][seat] for seat in seats if seat < len(self._of[host]))
        each, all_of = self._site.per_machine, len(self._site.machine.gpus)
        if each and self._next % each + gpus > each:
            self._next += each - self._next % each
        if self._next + gpus > all_of:
            self.lacks = [f"{node} finds no {gpus} GPUs any more: {all_of} are there"]
            return None
        found = list(range(self._next, self._next + gpus))
        self._next += gpus
        self._of[node] += found
        return tuple(found)


def _need(node: str, config: StageConfig, models: Models, site: Site, *, on_gpu: bool) -> Need:
    shape: Shape | None = models.shapes.get(node)
    if shape is None:
        return Need(host={"process": PLAIN})
    if isinstance(config, Serving):
        need = serving(shape, config, on_gpu=on_gpu)
        if on_gpu:
            left = config.gpu_memory_utilization * site.device_bytes - need.device_bytes
            is_said = config.kv_cache_bytes and config.kv_cache_bytes != type(config)().kv_cache_bytes
            kept = float(config.kv_cache_bytes) if is_said else max(0.0, left)
            need = msgspec.structs.replace(need, device={**need.device, "KV cache": kept})
        return need
    assert isinstance(config, Computing)
    need = computing(shape, config, models.work, models.heads[node], on_gpu=on_gpu)
    if (teacher := models.teachers.get(node)) is not None:
        parts = config.ranks if config.zero_stage == 3 and config.engine == DEEPSPEED else 1
        held = {"teacher": width_of(config.dtype, on_gpu=on_gpu) * teacher.num_parameters / parts}
        place = "device" if on_gpu else "host"
        need = msgspec.structs.replace(need, **{place: {**getattr(need, place), **held}})
    return need


def _running(config: Serving, models: Models, node: str, need: Need) -> int:
    """Return the samples of full length that a replica's cache holds, at most those that may run."""
    shape: Shape = models.shapes[node]
    most = min(config.max_running, getattr(config, "max_groups", 1 << 30) * getattr(config, "group_size", 1))
    whole = cached(shape, config, models.work) / config.num_workers
    return most if whole <= 0 else int(min(most, most * need.device["KV cache"] / whole))


def _no_cache(node: str, config: Serving, need: Need, site: Site, running: int, least: int) -> str:
    share = config.gpu_memory_utilization * site.device_bytes
    fixed = need.device_bytes - need.device["KV cache"]
    return (
        f"{node} has {_gb(share)} GB of each GPU, {_gb(fixed)} are taken before any KV cache: "
        f"{running} samples fit at once, {least} should"
    )


def _too_full(devices: list[float], hosts: list[float], processes: list[PlacedProcess], site: Site) -> list[str]:
    found: list[str] = []
    fullest = max(range(len(devices)), key=devices.__getitem__, default=None)
    if fullest is not None and devices[fullest] > FULL * site.device_bytes:
        nodes = dict.fromkeys(process.node for process in processes if fullest in process.devices)
        found.append(f"{_gb(devices[fullest])} GB on a GPU of {_gb(site.device_bytes)} ({', '.join(nodes)})")
    if site.host_bytes and max(hosts) > FULL * site.host_bytes:
        found.append(f"{_gb(max(hosts))} GB in a host of {_gb(site.host_bytes)}")
    return found


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


# The table.


def table(placed: Placed, site: Site) -> list[str]:
    """Return what lies where, like devices and hosts together, in GB."""
    columns = [*COLUMNS, "other"]
    rows: list[tuple[str, ...]] = [("GB", "", *columns, "sum", "free")]
    for label, members, limit in _groups(placed, site):
        sums: dict[str, float] = defaultdict(float)
        own: list[tuple[str, ...]] = []
        for name, parts in members:
            by_column = _by_column(parts)
            for column in columns:
                sums[column] += by_column[column]
            own.append(("", name, *(_cell(by_column[column]) for column in columns), _gb(sum(by_column.values())), ""))
        total = sum(sums.values())
        free = _gb(limit - total) if limit else "?"
        if len(own) == 1:
            rows.append((label, own[0][1], *own[0][2:-1], free))
            continue
        rows += [(label if place == 0 else "", *row[1:]) for place, row in enumerate(own)]
        rows.append(("", "together", *(_cell(sums[column]) for column in columns), _gb(total), free))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _groups(placed: Placed, site: Site) -> list[tuple[str, list[tuple[str, dict[str, float]]], float]]:
    """Return devices that hold the same, with who holds what there; then hosts."""
    kinds: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    members: dict[tuple[Any, ...], list[tuple[str, dict[str, float]]]] = {}
    for device in range(len(placed.devices)):
        here = [process for process in placed.processes if device in process.devices]
        mine = _fullest(here, device=True)
        key = tuple((name, round(sum(parts.values()))) for name, parts in mine)
        kinds[key].append(device)
        members[key] = mine
    found = [
        (f"GPU {ranges(devices)}", members[key] or [("nothing", {})], float(site.device_bytes))
        for key, devices in kinds.items()
    ]
    hosts: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    held: dict[tuple[Any, ...], list[tuple[str, dict[str, float]]]] = {}
    for host in range(site.num_machines):
        by_node: dict[str, dict[str, float]] = {REST: {"other": FIXED}} if host == 0 else {}
        counts: dict[str, int] = defaultdict(int)
        for label, parts in _fullest([each for each in placed.processes if each.machine == host], device=False):
            node = REST if sum(parts.values()) <= PLAIN else label
            counts[node] += node != REST
            mine = by_node.setdefault(node, {})
            for name, size in parts.items():
                mine[name] = mine.get(name, 0.0) + size
        key = tuple((node, round(sum(parts.values()))) for node, parts in by_node.items())
        hosts[key].append(host)
        held[key] = [
            (f"{node} x {counts[node]}" if counts[node] > 1 else node, parts) for node, parts in by_node.items()
        ]
    for key, which in hosts.items():
        label = "host" if site.num_machines == 1 else f"host {ranges(which)}"
        found.append((label, held[key], float(site.host_bytes)))
    return found


def _fullest(processes: list[PlacedProcess], *, device: bool) -> list[tuple[str, dict[str, float]]]:
    """Return who holds what on a device or host in the turn in which it is fullest; who sleeps is named so."""

    def held(resting: str) -> list[tuple[str, dict[str, float]]]:
        return [
            (f"{each.node} (asleep)" if each.side == resting else each.node, need.device if device else need.host)
            for each in processes
            if (need := held_by(each, resting))
        ]

    return max(map(held, RESTING), key=lambda all_of: sum(sum(parts.values()) for _, parts in all_of))


def _by_column(parts: Mapping[str, float]) -> dict[str, float]:
    found = {column: sum(parts.get(name, 0.0) for name in names) for column, names in COLUMNS.items()}
    return found | {"other": sum(parts.values()) - sum(found.values())}


def _cell(size: float) -> str:
    return _gb(size) if size >= 5e7 else "-"


def ranges(numbers: Sequence[int]) -> str:
    """Return 0, 1, 2, 5 as `0-2,5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
