"""Why a plan is as it is, what it took for granted, and where nothing fits the changes that would each let it.

The changes are tried out, each by a search of its own. They are what the user sets let go of, a smaller critic, an
adapter in place of full training, more GPUs. Called by the planner.

Tests: tests/unit/tuning/test_planner.py
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.config import is_given
from flowrl.engines.base import Serving, Training
from flowrl.errors import number_of
from flowrl.simulation.prediction import bottleneck_line
from flowrl.stages.critic import Critic
from flowrl.tuning.memory import rounding
from flowrl.tuning.placed import FULL, ranges
from flowrl.tuning.search import SAVINGS, Search, grown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from flowrl.graph.stage import StageConfig
    from flowrl.simulation.prediction import Prediction
    from flowrl.tuning.machines import Site
    from flowrl.tuning.placed import Models
    from flowrl.tuning.search import Tried
    from flowrl.tuning.shapes import Shape

WORDS = {
    "zero_stage": "ZeRO {}",
    "gradient_checkpointing": "gradient checkpointing",
    "offload_optimizer": "offloaded optimizer",
    "offload_parameters": "offloaded parameters",
    "micro_batch_tokens": "{} tokens a micro-batch",
}
# What is placement or saves memory, which a remedy may let go of.
FREED = {*WORDS, "replicas", "ranks", "gpus", "share", "tensor_parallel", "gpu_memory_utilization", "max_running"}


def reasons(
    search: Search, best: Tried, prediction: Prediction | None, others: Sequence[tuple[Tried, Prediction]]
) -> list[str]:
    """Return why it is this placement, in three lines at most."""
    lines = [_where(search, best) + (f": {prediction.samples_per_s:.3g} samples/s simulated" if prediction else "")]
    if search.site.machine.gpus:
        fullest = max(best.placed.devices, default=0.0)
        text = f"the fullest GPU holds {fullest / 1e9:.1f} of {search.site.device_bytes / 1e9:.4g} GB"
        lines.append(text + _why_savings(search, best))
    elif search.site.host_bytes:
        lines.append(f"memory: {max(best.placed.hosts) / 1e9:.1f} of {search.site.host_bytes / 1e9:.3g} GB")
    if prediction and prediction.bottleneck:
        text = bottleneck_line(prediction)
        if others and (other := others[0])[1].samples_per_s > 0:
            text += f"; {_where(search, other[0])} gives {other[1].samples_per_s / prediction.samples_per_s - 1:+.0%}"
        lines.append(text)
    return lines


def _where(search: Search, tried: Tried) -> str:
    """Return who computes where, in words."""
    devices: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for node in dict.fromkeys(process.node for process in tried.placed.processes if process.devices):
        mine = sorted({d for p in tried.placed.processes if p.node == node for d in p.devices})
        devices[tuple(mine)].append(_width(tried.placed.configs[node], node))
    if not devices:
        threads = {
            node: getattr(config, "threads", 1)
            for node, config in tried.placed.configs.items()
            if node in search.models.shapes
        }
        return "on the CPU, " + ", ".join(f"{node} {number_of(count, 'thread')}" for node, count in threads.items())
    return "; ".join(f"{' + '.join(nodes)} on GPU {ranges(mine)}" for mine, nodes in devices.items())


def _width(config: StageConfig, node: str) -> str:
    split: int = getattr(config, "tensor_parallel", 1)
    copies = f" x {config.replicas}" if config.replicas > 1 else ""
    told = [f"tensor parallel {split}"] * (split > 1) + ["by turns"] * bool(getattr(config, "turns", False))
    return f"{node}{copies}" + (f" ({', '.join(told)})" if told else "")


def _why_savings(search: Search, best: Tried) -> str:
    """Return what training does to save memory, and what the next simpler way would take."""
    if not search.trainer:
        return ""
    config: Any = best.placed.configs[search.trainer]
    does = [
        WORDS[name].format(getattr(config, name))
        for name in WORDS
        if name in ("zero_stage", "micro_batch_tokens") or getattr(config, name)
    ]
    text = f"; {search.trainer}: {', '.join(does)}"
    path = search.path_of[search.trainer]
    for saving in reversed(SAVINGS[: best.level // 10]):
        simpler = {
            f"{search.path_of[node]}.{name}": value for node in search.trainers for name, value in saving.items()
        }
        undone = {f"{path}.{name}": False for name in ("offload_optimizer", "offload_parameters")}
        found = search.attempt(best.choice | undone | simpler)
        if found.placed.lacks and max(found.placed.devices) > FULL * search.site.device_bytes:
            less = [WORDS[name].format(value) for name, value in saving.items() if value]
            return text + f" ({max(found.placed.devices) / 1e9:.0f} GB with {' and '.join(less)} only)"
    return text


def assumed(search: Search, best: Tried) -> list[str]:
    """Return what the plan took for granted."""
    work, models = search.models.work, search.models
    sizes = {f"{shape.num_parameters / 1e9:.3g}" for shape in models.shapes.values()}
    found = [
        f"models of {' and '.join(sorted(sizes))} thousand million parameters; {work.prompt} tokens of prompt and "
        f"{work.response} of response, {work.samples} a prompt",
    ]
    if best.placed.running:
        full = ", ".join(f"{count} in {node}" for node, count in best.placed.running.items())
        found.append(f"samples of full length decoded at once: {full}")
    for node, config in best.placed.configs.items():
        if isinstance(config, Serving):
            found += [f"{node}: {each}" for each in rounding(config)]
    if not search.site.host_bytes:
        found.append("memory of the host is not held against anything (say host=1TB)")
    if search.site.is_assumed and search.site.speed is not None:
        found.append(f"GPUs are as fast as {search.site.speed.name}; speeds are a roofline, not a measurement")
    return found


def remedies(search: Search, *, within_s: float = math.inf) -> Iterator[str]:
    """Yield changes each of which would let it fit, the smallest first; after so long no further one is tried."""
    tests: list[tuple[str, Search]] = []
    for address in _addresses(search.given):
        path, _, name = address.rpartition(".")
        if name in FREED and path in search.paths:
            tests.append((f"leave {address} to the plan", _again(search, given=_without(search.given, address))))
    placed = [
        a for a in _addresses(search.given) if a.rpartition(".")[2] in FREED and a.rpartition(".")[0] in search.paths
    ]
    if len(placed) > 1:
        freed = search.given
        for address in placed:
            freed = _without(freed, address)
        tests.append(("leave placement and savings of every node to the plan", _again(search, given=freed)))
    if critic := next((n for n, s in search.graph.nodes.items() if isinstance(s, Critic)), ""):
        for part in (4, 8):
            shape: Shape = search.models.shapes[critic]
            small = _smaller(shape, part)
            shapes = {**search.models.shapes, critic: small}
            models = msgspec.structs.replace(search.models, shapes=shapes)
            size = small.num_parameters / 1e9
            tests.append((f"a critic_model of {size:.2g} thousand million parameters", _again(search, models=models)))
    for node in search.trainers:
        path = search.path_of[node]
        if not is_given(search.given, f"{path}.lora"):
            lora = grown(
                search.given, {f"{p}.lora": {"rank": 16} for p in (search.path_of[n] for n in search.trainers)}
            )
            tests.append((f"--set {path}.lora.rank=16", _again(search, given=lora, lora=True)))
            break
    tests += [
        (f"{factor} times as many GPUs", _again(search, site=_larger(search.site, factor))) for factor in (2, 4, 8)
    ]
    found, until_s = 0, time.monotonic() + within_s
    for words, changed in tests:
        if found == 3 or (found and "times" in words) or time.monotonic() > until_s:
            return
        if not changed.best_fit().placed.lacks:
            found += 1
            yield words


def _again(
    search: Search,
    *,
    given: Mapping[str, Any] | None = None,
    models: Models | None = None,
    site: Site | None = None,
    lora: bool = False,
) -> Search:
    """Return a search in which something is otherwise."""
    told = search.given if given is None else given
    changed = Search(search.graph, search.paths, told, models or search.models, site or search.site)
    if given is not None and not lora:
        blank = {node: type(config)() for node, config in search.configs.items()}
        changed.configs = {
            node: msgspec.structs.replace(
                config,
                **{
                    name: getattr(blank[node], name)
                    for name in FREED
                    if hasattr(config, name) and not is_given(given, f"{search.path_of.get(node, node)}.{name}")
                },
            )
            for node, config in search.configs.items()
        }
    if lora:
        changed.configs = {
            node: msgspec.structs.replace(config, lora=msgspec.structs.replace(config.lora, rank=16))
            if isinstance(config, Training)
            else config
            for node, config in search.configs.items()
        }
    return changed


def _addresses(tree: Mapping[str, Any], at: str = "") -> Iterator[str]:
    for name, value in tree.items():
        here = f"{at}.{name}" if at else name
        if isinstance(value, dict):
            yield from _addresses(cast("dict[str, Any]", value), here)
        else:
            yield here


def _without(tree: Mapping[str, Any], address: str) -> dict[str, Any]:
    first, _, rest = address.partition(".")
    inner = tree.get(first)
    if not rest or not isinstance(inner, dict):
        return {name: value for name, value in tree.items() if name != first}
    return {**tree, first: _without(cast("dict[str, Any]", inner), rest)}


def _smaller(shape: Shape, part: int) -> Shape:
    """Return a shape of about a part of the parameters, with the same embeddings' rows."""
    side = math.sqrt(part)
    narrow = {name: max(1, round(getattr(shape, name) / side)) for name in ("hidden", "query", "key", "inner")}
    return msgspec.structs.replace(shape, num_parameters=shape.num_parameters // part, largest=shape.largest // part,
                                   expert_parameters=0, routed=1.0, kv=shape.kv // part, **narrow)  # fmt: skip


def _larger(site: Site, factor: int) -> Site:
    machine = msgspec.structs.replace(site.machine, gpus=site.machine.gpus * factor)
    return msgspec.structs.replace(site, machine=machine, num_machines=site.num_machines * factor)
