"""The search for a placement: candidates, what each comes to, and the one to take.

A candidate says a few things by their addresses: how many GPUs generate, over how many a generator's model is split,
how training saves memory. The rules of runtime/placement.py complete it. Savings are tried from the least nuisance on,
each with the largest micro-batch that has room; those that fit are ranked by arithmetic (speeds.py), one of each kind,
and the best are simulated. Called by the planner; reasons.py searches again with something changed.

Tests: tests/unit/tuning/test_planner.py
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec

from flowrl.config import is_given
from flowrl.engines.base import LEAST_CACHE_BYTES, Scoring, Serving, Training
from flowrl.errors import FlowrlError
from flowrl.graph.program import graph_of, plan_of
from flowrl.runtime.placement import place
from flowrl.simulation.costs import pace, speedup
from flowrl.simulation.run import simulate
from flowrl.simulation.stand_ins import lacking
from flowrl.stages.reward import RewardModel
from flowrl.stages.sampler import Course, Learning
from flowrl.tuning.memory import cache_width, served_weights
from flowrl.tuning.placed import FULL, Models, Placed, held_by, place_processes, rough_graph
from flowrl.tuning.speeds import profile_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from flowrl.graph.graph import Graph
    from flowrl.graph.stage import StageConfig
    from flowrl.simulation.prediction import Prediction
    from flowrl.tuning.machines import Site

Choice = dict[str, Any]  # address -> value

SIMULATED = 3  # candidates that are
EQUAL = 0.02  # of throughput
SPLITS = (1, 2, 4, 8)  # of a generator's model
SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)  # of the GPUs for generation
MICRO_BATCHES = (32768, 16384, 8192, 4096, 2048, 1024)
DEEPSPEED = "flowrl.engines.deepspeed:DeepSpeedEngine"
SAVINGS: list[Choice] = [  # of memory in training, the quickest first
    {"zero_stage": 2, "gradient_checkpointing": False},
    {"zero_stage": 3, "gradient_checkpointing": False},
    {"zero_stage": 2, "gradient_checkpointing": True},
    {"zero_stage": 3, "gradient_checkpointing": True},
    {"zero_stage": 3, "gradient_checkpointing": True, "offload_optimizer": True},
    {"zero_stage": 3, "gradient_checkpointing": True, "offload_optimizer": True, "offload_parameters": True},
]
LEAST_TOKENS, SERVING = 8192, 4e9  # of a few samples in a cache; bytes of all else that a generator holds
LEAST_SHARED = 30e6  # parameters of a model for which a second thread is worth having
ENOUGH = 3  # places in MICRO_BATCHES: with so large a micro-batch nothing is gained by saving more
SIMULATED_WITHIN_S = 20.0


class Tried(NamedTuple):
    """One candidate."""

    choice: Choice  # what it says itself
    values: Choice  # all that it implies
    placed: Placed
    step_s: float  # by arithmetic
    level: int  # of its savings: the simpler, the smaller


class Search:
    """The candidates of one graph."""

    def __init__(
        self, graph: Graph, paths: Mapping[str, str], given: Mapping[str, Any], models: Models, site: Site, *,
        simulates: bool = True,
    ) -> None:  # fmt: skip
        self.graph, self.given, self.models, self.site = graph, given, models, site
        self.path_of = {
            node: path for path, first in paths.items() for node in graph.nodes if _stands(path, node, first)
        }
        self.paths = dict(paths)
        self.configs = {name: stage.config for name, stage in graph.nodes.items()}
        servers = [n for n, c in self.configs.items() if isinstance(c, Serving) and n in self.path_of]
        trainers = [n for n, c in self.configs.items() if isinstance(c, Training) and n in self.path_of]
        self.server = next(iter(servers), "")
        self.trainer = graph.until_node if graph.until_node in trainers else next(iter(trainers), "")
        self.trainers = trainers
        self.scorers = [n for n, c in self.configs.items() if isinstance(c, Scoring) and n in self.path_of]
        self.simulates = simulates

    # One candidate.

    def attempt(self, choice: Choice, level: int = 0) -> Tried:
        """Complete a choice by the rules, and say what it comes to."""
        chosen = {address: value for address, value in choice.items() if not is_given(self.given, address)}
        configs = self._with(self.configs, chosen)
        given = grown(self.given, chosen)
        found = dict(place(rough_graph(configs, self.graph.until_node), self.paths, given, machine=self.site.whole))
        values = {**found, **chosen, **self._sharded(found, chosen)}
        configs = self._with(self.configs, values)
        values |= (shared := self._utilization(configs))
        configs = self._with(configs, shared)
        placed = place_processes(configs, self.graph.until_node, self.models, self.site)
        return Tried(choice, values, placed, self._step_s(placed), level)

    def _with(self, configs: Mapping[str, StageConfig], values: Choice) -> dict[str, StageConfig]:
        changes: dict[str, Choice] = defaultdict(dict)
        for address, value in values.items():
            path, _, name = address.rpartition(".")
            changes[path][name] = value
        return {
            node: msgspec.structs.replace(config, **mine)
            if (mine := changes.get(self.path_of.get(node, ""), {}))
            else config
            for node, config in configs.items()
        }

    def _sharded(self, found: Choice, chosen: Choice) -> Choice:
        """Return that scorers whose weights are to be sharded march as ranks where they else were copies."""
        values: Choice = {}
        for node in self.scorers:
            path = self.path_of[node]
            if chosen.get(f"{path}.zero_stage") != 3 or (copies := found.get(f"{path}.replicas", 1)) < 2:
                continue
            values |= {f"{path}.ranks": copies, f"{path}.replicas": 1}
            if not isinstance(self.graph.nodes[node], RewardModel):
                values[f"{path}.engine"] = DEEPSPEED
        return {address: value for address, value in values.items() if not is_given(self.given, address)}

    def _utilization(self, configs: Mapping[str, StageConfig]) -> Choice:
        """Return the share of its GPUs that a generator which is not alone there may take: what others leave.

        Its cache is said in bytes: what vLLM would find free depends on what others are loading at that moment. Where
        they take turns, nobody is there when it looks.
        """
        path = self.path_of.get(self.server, "")
        if not path or not self.site.machine.gpus or is_given(self.given, f"{path}.gpu_memory_utilization"):
            return {}
        placed = place_processes(configs, self.graph.until_node, self.models, self.site)
        servers = [process for process in placed.processes if process.node == self.server]
        mine = {device for process in servers for device in process.devices}
        together = max((sum(device in each.devices for each in servers) for device in mine), default=1)
        theirs = [
            sum(
                held_by(p, "training").device_bytes
                for p in placed.processes
                if device in p.devices and p.node != self.server
            )
            for device in mine
        ]
        if not theirs or (not max(theirs) and together == 1):
            return {}
        left = ((FULL - 0.02) - max(theirs) / self.site.device_bytes) / together
        share = round(min(0.85, max(0.05, left)), 2)
        found: Choice = {f"{path}.gpu_memory_utilization": share}
        server: Any = configs[self.server]
        if not server.turns and not is_given(self.given, f"{path}.kv_cache_bytes"):
            fixed = max(each.need.device_bytes - each.need.device.get("KV cache", 0.0) for each in servers)
            found[f"{path}.kv_cache_bytes"] = max(LEAST_CACHE_BYTES, int(share * self.site.device_bytes - fixed))
        return found

    def _step_s(self, placed: Placed) -> float:
        """Return the seconds of a step by arithmetic: the busiest devices, or all in turn where nothing overlaps."""
        profile = profile_of(placed.configs, self.models.shapes, self.models.work, self.site, running=placed.running)
        learning = argument_of(self.graph, Learning)
        course = argument_of(self.graph, Course)
        work = self.models.work
        samples = learning.groups_per_step * work.samples if learning else course.examples_per_step if course else 64
        response = profile.response_tokens.at(0.5)
        tokens = samples * (profile.prompt_tokens.at(0.5) + response)
        per_host: dict[str, float] = defaultdict(float)
        shares_s = 0.0  # of all cores
        for node, costs in profile.nodes.items():
            config: Any = placed.configs[node]
            if node not in self.models.shapes:
                continue
            width = config.replicas * config.ranks
            if costs.decode is not None:
                most = max(1, placed.running.get(node) or int(config.max_running))
                at_once = min(most, max(1, samples // config.replicas))
                seconds = samples * response / costs.decode.tokens_per_s(at_once) / config.replicas
                prompts = samples / work.samples  # each is read once for its samples
                seconds += prompts * profile.prompt_tokens.at(0.5) * costs.decode.prompt_token_s / config.replicas
            else:
                kinds = (
                    ["train", "score"]
                    if isinstance(config, Training) and node != self.trainer
                    else (["train"] if isinstance(config, Training) else ["score"])
                )
                passes = max(1, getattr(config, "epochs", 1))
                seconds = (
                    sum(
                        (
                            costs.calls[kind].call_s
                            + costs.calls[kind].token_s * tokens * (passes if kind == "train" else 1)
                        )
                        for kind in kinds
                    )
                    / width
                )
            if self.site.speed is None:
                seconds /= speedup(config.threads) * pace(config.threads, profile.cores, profile.slowdown)
                shares_s += seconds * min(1.0, config.threads * width / profile.cores)
            per_host[config.share or node] += seconds
        overlaps = learning is not None and learning.max_staleness > 0
        server: Any = placed.configs.get(self.server)
        if server is not None and server.turns:
            moves = ("sleep", "wake") * 2
            per_host[server.share or self.server] += sum(
                max((costs.calls[name].call_s for costs in profile.nodes.values() if name in costs.calls), default=0.0)
                for name in moves
            )
        if self.site.speed is None and overlaps:
            return max(shares_s, *per_host.values())  # whoever has work has the cores
        return max(per_host.values(), default=0.0) if overlaps else sum(per_host.values())

    # The candidates.

    def best(self) -> tuple[Tried, Prediction | None, list[tuple[Tried, Prediction]]]:
        """Return the candidate to take, what a simulation says of it, and of the best of the other kinds."""
        if not self.site.machine.gpus:
            return self._on_cores()
        tried = list(self._all()) or [self.attempt({})]
        fitting = [each for each in tried if not each.placed.lacks]
        if not fitting:
            return min(tried, key=self._missing), None, []
        by_kind: dict[Any, Tried] = {}
        for each in sorted(fitting, key=lambda t: (t.step_s, t.level)):
            by_kind.setdefault(self._kind(each), each)
        ranked = sorted(by_kind.values(), key=lambda t: (t.step_s, t.level))
        ranked = [self._simplest(each, fitting) for each in ranked]
        return self._simulated(ranked)

    def _simplest(self, chosen: Tried, fitting: Sequence[Tried]) -> Tried:
        """Return the candidate of the same kind that is as fast with the fewest savings."""
        same = [t for t in fitting if self._kind(t) == self._kind(chosen) and t.step_s <= (1 + EQUAL) * chosen.step_s]
        return min(same, key=lambda t: (t.level, t.step_s))

    def _simulated(self, ranked: list[Tried]) -> tuple[Tried, Prediction | None, list[tuple[Tried, Prediction]]]:
        looked = [] if lacking(self.graph) else [(each, self._simulate(each)) for each in ranked[:SIMULATED]]
        found = [(each, prediction) for each, prediction in looked if prediction is not None]
        if not found:
            return ranked[0], None, []
        most = max(prediction.samples_per_s for _, prediction in found)
        best = next(each for each in found if each[1].samples_per_s >= (1 - EQUAL) * most)
        return *best, [each for each in found if each is not best]

    def _simulate(self, tried: Tried) -> Prediction | None:
        """Return what a simulation says of a candidate; None where it cannot say it in time."""
        profile = profile_of(
            tried.placed.configs, self.models.shapes, self.models.work, self.site, running=tried.placed.running
        )
        plan = plan_of(self.graph)
        nodes = {
            name: msgspec.structs.replace(
                spec, arguments=spec.arguments | {"config": msgspec.to_builtins(self._that_runs(tried.placed, name))}
            )
            for name, spec in plan.nodes.items()
        }
        try:
            graph = graph_of(msgspec.structs.replace(plan, nodes=nodes))
            return simulate(graph, profile, steps=2, warmup=1, detail="causes", within_s=SIMULATED_WITHIN_S)
        except FlowrlError:
            return None

    def _that_runs(self, placed: Placed, node: str) -> StageConfig:
        config: Any = placed.configs[node]
        if node not in placed.running:
            return config
        return msgspec.structs.replace(config, max_running=max(1, min(config.max_running, placed.running[node])))

    def _kind(self, tried: Tried) -> Any:
        """Return what tells placements apart, whatever memory they save."""
        return tuple(
            (n, c.replicas, c.ranks, c.gpus, c.share, getattr(c, "tensor_parallel", 1), getattr(c, "turns", False))
            for n, c in tried.placed.configs.items()
            if n in (self.server, *self.trainers)
        )

    def _missing(self, tried: Tried) -> tuple[float, ...]:
        """Order candidates that do not fit: the least beyond what there is first."""
        over = max(tried.placed.devices, default=0.0) / max(1, self.site.device_bytes)
        host = max(tried.placed.hosts) / self.site.host_bytes if self.site.host_bytes else 0.0
        return (
            any("finds no" in lack for lack in tried.placed.lacks),
            max(over, host),
            len(tried.placed.lacks),
            tried.level,
        )

    def _all(self) -> Iterator[Tried]:
        """Yield candidates: of every layout the ways to save memory, until one leaves room for a large micro-batch."""
        seen: set[Any] = set()
        for layout in self._layouts():
            for choices in self._savings():
                found: Tried | None = None
                for level, saving in choices:
                    choice = layout | saving
                    key = tuple(sorted((a, str(v)) for a, v in choice.items() if not is_given(self.given, a)))
                    if key in seen:
                        continue
                    seen.add(key)
                    with suppress(FlowrlError):  # what the user sets does not go with it
                        found = self.attempt(choice, level)
                        yield found
                    if found is None:
                        break
                    if not found.placed.lacks:
                        break
                if found is not None and not found.placed.lacks and found.level % 10 < ENOUGH:
                    break

    def _layouts(self) -> Iterator[Choice]:
        """Yield how the GPUs are dealt out: {} leaves it all to the rules."""
        num, server, trainer = (
            len(self.site.machine.gpus),
            self.path_of.get(self.server),
            self.path_of.get(self.trainer),
        )
        config: Any = self.configs.get(self.server)
        stages = config.pipeline_parallel if isinstance(config, Serving) else 1
        widths = [width for width in self._widths() if width * stages <= num] or self._widths()[:1]
        if not server or not trainer:
            if server:
                yield from (_own_gpus(server, num, width, stages) for width in widths)
            yield {}
            return
        critics = [self.path_of[node] for node in self.trainers if node != self.trainer]
        for width in widths:
            each = width * stages
            counts = sorted({max(each, round(share * num / each) * each) for share in SHARES} - {num})
            for count in [count for count in counts if count < num]:
                split = _own_gpus(server, count, width, stages)
                rest = num - count
                yield split | {f"{trainer}.ranks": rest, f"{trainer}.gpus": 1}
                if critics and rest >= 2:
                    half = rest // 2
                    apart = {f"{critics[0]}.ranks": half, f"{critics[0]}.gpus": 1, f"{critics[0]}.share": ""}
                    yield split | apart | {f"{trainer}.ranks": rest - half, f"{trainer}.gpus": 1}
            if is_given(self.given, f"{server}.gpus") and config.gpus and not config.share:
                continue  # the user gives it devices of its own
            for turns in (False, True):
                shared = {f"{server}.share": trainer, f"{server}.gpus": 0, f"{server}.turns": turns}
                split = {f"{server}.tensor_parallel": width, f"{server}.replicas": max(1, num // each)}
                yield {f"{trainer}.ranks": num, f"{trainer}.gpus": 1, **shared, **split}

    def _widths(self) -> list[int]:
        """Return over how many GPUs a generator's model may be split: the fewest that hold it, and twice as many.

        vLLM deals out heads: how many there are must be divided.
        """
        widths = [width for width in SPLITS if width <= self.site.per_machine]
        shape, config = self.models.shapes.get(self.server), self.configs.get(self.server)
        if shape is None or not isinstance(config, Serving):
            return widths[:1]
        if is_given(self.given, f"{self.path_of[self.server]}.tensor_parallel"):
            return [config.tensor_parallel]
        widths = [width for width in widths if shape.heads % width == 0]
        room = config.gpu_memory_utilization * self.site.device_bytes
        held = served_weights(shape, config, on_gpu=True) + cache_width(config) * LEAST_TOKENS * shape.kv
        least = [width for width in widths if held / width + SERVING < room]
        return (least or widths[-1:])[:2]

    def _savings(self) -> Iterator[list[tuple[int, Choice]]]:
        """Yield ways in which nodes save memory, the least nuisance first: each by the size of the micro-batch."""
        trainers = [self.path_of[node] for node in self.trainers]
        scorers = [self.path_of[node] for node in self.scorers]
        longest = self.models.work.whole
        sizes = [size for size in MICRO_BATCHES if size >= longest] or [longest]
        for rank, saving in enumerate(SAVINGS if trainers else [{}]):
            for sharded in (False, True) if scorers else (False,):
                choice: Choice = {f"{path}.{name}": value for path in trainers for name, value in saving.items()}
                if sharded:
                    choice |= {f"{path}.zero_stage": 3 for path in scorers}
                yield [
                    (10 * rank + step, choice | {f"{path}.micro_batch_tokens": size for path in (*trainers, *scorers)})
                    for step, size in enumerate(sizes)
                ]

    # Without GPUs.

    def _on_cores(self) -> tuple[Tried, Prediction | None, list[tuple[Tried, Prediction]]]:
        """Return how many threads each role is best given: a core each, or all cores to whoever has work."""
        cores = max(1, self.site.machine.cores)
        if max(shape.num_parameters for shape in self.models.shapes.values()) < LEAST_SHARED:
            cores = 1  # its products are too small to share
        roles = [self.path_of[node] for node in (self.server, *self.trainers, *self.scorers) if node]
        counts = sorted({1, max(1, cores // 2), cores})
        choices: list[Choice] = [{}]
        choices += [{f"{path}.threads": count for path in dict.fromkeys(roles)} for count in counts]
        tried = [self.attempt(choice, level=sum(choice.values())) for choice in choices]
        ranked = sorted(tried, key=lambda t: (t.step_s, t.level))
        best = self._simplest(ranked[0], ranked)
        if not self.simulates:
            return best, None, []
        return self._simulated([best, *(each for each in ranked if each.placed.configs != best.placed.configs)])

    def best_fit(self) -> Tried:
        """Return a candidate that fits, or the one that comes nearest."""
        candidates: list[Tried] = []
        with suppress(FlowrlError):  # what the user sets does not go with the rules; it may with something else
            candidates.append(self.attempt({}))
        for each in self._all() if self.site.machine.gpus else ():
            if not each.placed.lacks:
                return each
            candidates.append(each)
        return min(candidates, key=self._missing) if candidates else self.attempt({})


def argument_of(graph: Graph, kind: type[Any]) -> Any:
    """Return what a graph's nodes are given of a kind, which is one and the same for all; None: nothing."""
    values = (value for stage in graph.nodes.values() for value in stage.arguments.values())
    return next((value for value in values if isinstance(value, kind)), None)


def _stands(path: str, node: str, first: str) -> bool:
    return node == first or node.rstrip("0123456789").removesuffix("_") == path


def grown(tree: Mapping[str, Any], values: Choice) -> dict[str, Any]:
    """Return a tree of what is given with further values at their addresses."""
    found: dict[str, Any] = dict(tree)
    for address, value in values.items():
        path, _, name = address.rpartition(".")
        inner = found.get(path)
        found[path] = {**(cast("dict[str, Any]", inner) if isinstance(inner, dict) else {}), name: value}
    return found


def _own_gpus(server: str, count: int, width: int, stages: int) -> Choice:
    """Return a server's replicas on so many GPUs of its own, each split over `width` in every stage of its pipeline."""
    on_each = {f"{server}.tensor_parallel": width, f"{server}.gpus": width * stages}
    return {**on_each, f"{server}.share": "", f"{server}.replicas": max(1, count // (width * stages))}
