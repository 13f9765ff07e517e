"""Knobs: what of a graph's settings may be changed to make it quicker, and the values that are worth a try.

They are found in the graph, not listed by name. They are staleness and batch, replicas and ranks, threads and the cores
that are reserved for them; requests in flight, batches of scoring, where a scorer sits, and the depth of every queue
whose depth is free.

Invariants:
- the first option of a knob is what stands in the settings now;
- options that need more devices than there are, with everything else at its smallest, are left out.

Used by trials.py, tune.py and advisor.py.

Tests: tests/unit/tuning/test_knobs.py
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.engines.base import Computing, Serving
from flowrl.graph.edges import Queue
from flowrl.graph.program import build_graph, get_setting, node_paths
from flowrl.runtime.lease import turns_of
from flowrl.runtime.scaling import check_most

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from flowrl.graph.graph import Graph
    from flowrl.graph.program import Program

Value = int | float | str
Setting = dict[str, Value]  # path -> value

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
FEW = (1, 2, 4)  # of a node that reserves nothing
STALENESS = (0, 1, 2, 3, 4)
FACTORS = (0.25, 0.5, 2.0, 4.0)
BATCH = ("groups_per_step", "group_size")  # by the last part of the path: they change what is learned


class Option(msgspec.Struct, frozen=True):
    """One position of a knob: what it sets."""

    label: str
    changes: dict[str, Value]


class Knob(msgspec.Struct, frozen=True):
    """Something that can be changed; `options[0]` is as it is."""

    name: str
    options: list[Option]
    is_minor: bool = False  # rarely worth much: tried alone, and beside settings that are good already

    @property
    def is_batch(self) -> bool:
        """Return whether it changes what is learned, not only how fast."""
        return self.name.rpartition(".")[2] in BATCH


def knobs_of(settings: Any, graph: Graph, *, cores: float, is_affordable: Callable[[Setting], bool]) -> list[Knob]:
    """Return the knobs of a graph that have more than one position within the devices there are."""
    found = [knob for knob in _all_knobs(settings, graph, cores) if len(knob.options) > 1]
    least = [_least(knob) for knob in found]
    kept: list[Knob] = []
    for place, knob in enumerate(found):
        others: Setting = {}
        for other, changes in enumerate(least):
            if other != place:
                others |= changes
        options = [
            option
            for position, option in enumerate(knob.options)
            if position == 0 or is_affordable(option.changes) or is_affordable({**others, **option.changes})
        ]
        if len(options) > 1:
            kept.append(msgspec.structs.replace(knob, options=options))
    return kept


def graph_with(program: Program, changes: Setting) -> Graph:
    """Return the checked graph of a program with some of its settings changed.

    Raises:
        FlowrlError: the graph refuses them.
    """
    settings: Any = program.settings
    module = sys.modules[type(settings).__module__]
    for path, value in (changes | _followed(settings, changes)).items():
        settings = with_setting(settings, path, value)
    graph = build_graph(module, settings)
    graph.check()
    turns_of(graph)  # who takes turns has somebody to take them with
    check_most(graph, settings.cluster.most)
    return graph


def _followed(settings: Any, changes: Setting) -> Setting:
    """Return what changes along, as it will where the changes are given: settings that still are as others imply."""
    plain = type(settings)()
    before = plain.implied({path: get_setting(settings, path) for path in changes})
    after = plain.implied(changes)
    return {path: value for path, value in after.items() if get_setting(settings, path) == before.get(path)}


def with_setting(settings: Any, path: str, value: Value) -> Any:
    """Return settings with the value at a path; a mapping on the way is made where there is none."""
    first, _, rest = path.partition(".")
    if isinstance(settings, dict):
        known = cast("dict[str, Any]", settings)
        return {**known, first: with_setting(known.get(first, {}), rest, value) if rest else value}
    inner = with_setting(getattr(settings, first), rest, value) if rest else value
    return msgspec.structs.replace(settings, **{first: inner})


def _all_knobs(settings: Any, graph: Graph, cores: float) -> Iterable[Knob]:
    if isinstance(now := get_setting(settings, "max_staleness"), int):
        yield _numbers("max_staleness", now, STALENESS)
    if isinstance(now := get_setting(settings, "groups_per_step"), int):
        yield _numbers("groups_per_step", now, _scaled(now, (0.5, 2.0)))
    for path, node in node_paths(settings, graph).items():
        stage = graph.nodes[node]
        config: Any = stage.config
        if not stage.is_stateful and (isinstance(config, Serving | Computing) or hasattr(config, "batch_groups")):
            counts = COUNTS if config.cpus or config.gpus else FEW
            knob = _numbers(f"{path}.replicas", config.replicas, counts, is_minor=not isinstance(config, Serving))
            knob.options.extend(_on_the_same_cores(path, config))
            yield knob
        if stage.is_stateful and config.gpus > 0:
            yield _numbers(f"{path}.ranks", config.ranks, [2**power for power in range(9)])
        if hasattr(config, "threads") and not graph.nodes[config.share or node].config.gpus:
            counts = [count for count in COUNTS if count <= cores]
            yield _numbers(f"{path}.threads", config.threads, counts, is_minor=bool(config.share))
            if config.cpus:
                shares = [config.cpus / 2, *(float(count) for count in counts)]
                yield _numbers(f"{path}.cpus", config.cpus, shares, is_minor=True)
        for name in ("max_groups", "max_running"):
            if hasattr(config, name):
                now = getattr(config, name)
                yield _numbers(f"{path}.{name}", now, _scaled(now, FACTORS))
        if now := getattr(config, "group_size", 0):
            yield _numbers(f"{path}.group_size", now, _scaled(now, (0.5, 2.0)))
        for name in ("batch_groups", "concurrency"):
            if hasattr(config, name):
                yield _numbers(f"{path}.{name}", getattr(config, name), (1, 2, 4, 8), is_minor=True)
        if (place := _placement(node, graph, path)) is not None:
            yield place
    for edge in graph.edges:
        if isinstance(edge, Queue) and edge.window is None and edge.most is None:
            path = f"depths.{graph.address(edge.target)}"
            yield _numbers(path, edge.depth, _scaled(edge.depth, FACTORS), is_minor=True)


def _placement(node: str, graph: Graph, path: str) -> Knob | None:
    """Return the knob of a node that computes on GPUs and may sit on another's or have its own."""
    config = graph.nodes[node].config
    host = config.share or graph.until_node
    devices = graph.nodes[host].config
    if node == host or not hasattr(config, "engine") or isinstance(config, Serving) or devices.gpus == 0:
        return None
    own = Option("its own GPUs", {f"{path}.share": "", f"{path}.gpus": devices.gpus, f"{path}.cpus": devices.cpus})
    shared = Option(f"on {host}", {f"{path}.share": host, f"{path}.gpus": 0.0, f"{path}.cpus": 0.0})
    return Knob(f"{path}.share", [shared, own] if config.share else [own, shared])


def _on_the_same_cores(path: str, config: Any) -> Iterable[Option]:
    """Yield more replicas that reserve no more cores together than they do now."""
    for count in range(config.replicas + 1, 2 * config.replicas + 1):
        if config.cpus:
            cpus = round(config.cpus * config.replicas / count, 3)
            yield Option(f"{count} on the same cores", {f"{path}.replicas": count, f"{path}.cpus": cpus})


def _numbers(path: str, now: float, values: Iterable[float], *, is_minor: bool = False) -> Knob:
    every = [now, *sorted({*values} - {now})]
    words = [str(value) if isinstance(value, int) else f"{value:g}" for value in every]
    return Knob(path, [Option(label, {path: value}) for label, value in zip(words, every, strict=True)], is_minor)


def _scaled(now: int, factors: Iterable[float]) -> list[int]:
    return [max(1, round(factor * now)) for factor in factors]


def _least(knob: Knob) -> Setting:
    """Return the changes that need fewest devices."""
    if knob.name.endswith((".replicas", ".ranks", ".cpus")):
        return min(knob.options, key=lambda option: next(iter(option.changes.values()))).changes
    if knob.name.endswith(".share"):
        return min(knob.options, key=lambda option: option.changes.get(f"{knob.name[:-6]}.gpus", 0.0)).changes
    return {}
