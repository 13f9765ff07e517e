"""A graph whose nodes only take time: its plan with engines, algorithm and data exchanged for stand-ins.

Stages with an engine stay what they are, on a timed engine; what admits prompts, what calls a reward function and what
selects by rewards are replaced, for they would need data, user code and its rewards. Optional nodes, such as the
evaluation, are left out. Nothing is written to disk; a checkpoint's cost is spread over its versions. Used by
simulate.py; timed_run.py runs the plan.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import random
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.engines.base import Serving
from flowrl.errors import ConfigError
from flowrl.graph.plan import EdgePlan, GraphPlan, plan_of
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Specification, Stage, StageConfig, port_types
from flowrl.messages import Buffer, Credit, Prompt, Rollouts, Scored, extend
from flowrl.simulation.costs import CallCost, NodeProfile, Profile, Spread
from flowrl.simulation.timed import CURRENT, TOKEN_BYTES, is_learned
from flowrl.stages.selection_learner import SelectionLearner
from flowrl.telemetry.causes import Cause
from flowrl.telemetry.events import Span

if TYPE_CHECKING:
    from flowrl.engines.base import Training
    from flowrl.graph.graph import Graph
    from flowrl.graph.stage import Context

# The graph with its engines exchanged.


def timed_plan(graph: Graph, profile: Profile, *, steps: int, is_whole: bool) -> GraphPlan:
    """Return the plan of a graph whose nodes only take time; optional nodes are left out.

    Raises:
        ConfigError: the profile lacks a node that computes.
    """
    plan = plan_of(graph)
    optional = set(optional_nodes(graph))
    nodes = {
        name: _timed_node(name, graph, spec, profile, steps)
        for name, spec in plan.nodes.items()
        if name not in optional
    }
    edges: list[EdgePlan] = []
    for edge in plan.edges:
        if {edge.source.partition(".")[0], edge.target.partition(".")[0]} & optional:
            continue
        if not (_has_port(nodes, edge.source) and _has_port(nodes, edge.target)):
            continue  # optional, of a node that was exchanged
        if edge.kind == "credits":
            edge = msgspec.structs.replace(edge, bounds={**edge.bounds, "is_endless": not is_whole})
        edges.append(edge)
    return GraphPlan(nodes=nodes, edges=edges, until=plan.until)


def _has_port(nodes: dict[str, Specification], address: str) -> bool:
    node, _, port = address.partition(".")
    ports = {"TimedPrompts": TimedPrompts, "TimedReward": TimedReward}
    kind = ports.get(nodes[node].stage.rpartition(":")[2])
    return kind is None or port in port_types(kind)


def optional_nodes(graph: Graph) -> list[str]:
    """Return the nodes that no other needs: every edge of theirs ends in a port that may stay unconnected."""
    needed = {graph.until_node}
    for edge in graph.edges:
        source, target = graph.node_of(edge.source), graph.node_of(edge.target)
        needed |= {source} if not edge.target.is_optional else set()
        needed |= {target} if not edge.source.is_optional else set()
    return [name for name in graph.nodes if name not in needed]


def _timed_node(name: str, graph: Graph, spec: Specification, profile: Profile, steps: int) -> Specification:
    stage = graph.nodes[name]
    needed = {port for port in stage.ports if port not in stage.optional}
    messages = {kind for port, kind in port_types(type(stage)).items() if port in needed}
    if not hasattr(stage.config, "engine"):
        if messages == {(In, Credit), (Out, Prompt)}:
            size = int(spec.arguments["sampler"]["group_size"])
            return _specification("TimedPrompts", placement=_placement(stage.config), group_size=size)
        if messages == {(In, Rollouts), (Out, Scored)}:
            lanes = int(getattr(stage.config, "concurrency", 1))
            _costs(profile, name, "score")
            return _specification("TimedReward", placement=_placement(stage.config), node=name, lanes=lanes)
        if messages == {(In, Scored), (Out, Scored)} and "take" in spec.arguments:
            num = {"best": 1, "pair": 2}[spec.arguments["take"]]
            return _specification("TimedSelector", placement=_placement(stage.config), num_samples=num)
    if hasattr(stage.config, "environment"):
        what = "plays an environment, and how long that takes is in no profile"
        raise ConfigError(f"node {name!r}", what, "simulate the graph with a generator in its place")
    arguments = dict(spec.arguments)
    if "sampler" in arguments:
        arguments["sampler"] = {**arguments["sampler"], "model": stand_in_model()}
    if "learning" in arguments:
        kind = "TimedObjective" if isinstance(stage, SelectionLearner) else "TimedAlgorithm"
        choice = {"use": f"flowrl.simulation.timed:{kind}", "options": {}}
        arguments["learning"] = {**arguments["learning"], "algorithm": choice, "steps": steps}
    if "model" in arguments:
        arguments["model"] = stand_in_model()
    arguments["config"] = _timed_config(name, graph, profile, arguments["config"])
    return Specification(stage=spec.stage, arguments=arguments)


def _timed_config(name: str, graph: Graph, profile: Profile, config: dict[str, Any]) -> dict[str, Any]:
    """Return a node's settings with a timed engine, one rank, and nothing written to disk."""
    settings: Any = graph.nodes[name].config
    known = {
        key: value for key, value in {"save_rollouts": False, "save_every": 0, "ranks": 1}.items() if key in config
    }
    if not hasattr(settings, "engine"):
        return {**config, **known}
    host = settings.share or name
    options: dict[str, Any] = {"node": name, "device": host if graph.nodes[host].config.gpus > 0 else "cores"}
    if isinstance(settings, Serving):
        if _costs(profile, name, "").decode is None:
            raise ConfigError("profile", f"node {name!r} has no `decode`, the cost of a decoding step", _remedy(name))
        return {**config, **known, "engine": "flowrl.simulation.timed:TimedGeneration", "engine_options": options}
    training: Training = settings
    costs = _costs(profile, name, "train" if name == graph.until_node else "score")
    each = costs.calls.get("publish", CallCost()).seconds(0)
    if save_every := getattr(training, "save_every", 0):
        each += costs.calls.get("checkpoint", CallCost()).seconds(0) / save_every
    options |= {"speed": training.ranks / costs.ranks, "publish_s": each}
    return {**config, **known, "engine": "flowrl.simulation.timed:TimedTraining", "engine_options": options}


def _costs(profile: Profile, node: str, kind: str) -> NodeProfile:
    found = profile.nodes.get(node)
    if found is None:
        raise ConfigError("profile", f"has no costs of node {node!r} (it has {', '.join(profile.nodes) or 'none'})",
                          _remedy(node))  # fmt: skip
    if kind and kind not in found.calls:
        what = f"node {node!r} has no cost of {kind!r} (it has {', '.join(found.calls) or 'none'})"
        raise ConfigError("profile", what, _remedy(node))
    return found


def _remedy(node: str) -> str:
    return f"take the profile of a run of this graph, or add it under nodes.{node}"


def _specification(kind: str, **arguments: Any) -> Specification:
    return Specification(stage=f"{__name__}:{kind}", arguments=arguments)


def _placement(config: StageConfig) -> dict[str, Any]:
    return {"replicas": config.replicas}


@functools.cache
def stand_in_model() -> str:
    """Return a directory that passes for a model's: timed engines never open it."""
    directory = Path(tempfile.mkdtemp(prefix="flowrl-simulate-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    header = b"{}"
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    for name in ("config.json", "tokenizer.json"):
        (directory / name).write_text("{}")
    return str(directory)


class TimedPrompts(Stage):
    """Admits groups of zeros, one against each credit; a prompt begins with its group's number."""

    Config = StageConfig
    credits: In[Credit]
    prompts: Out[Prompt]

    def __init__(self, *, placement: dict[str, Any], group_size: int) -> None:
        self.config = StageConfig(**placement)
        self.group_size = group_size

    async def run(self, context: Context) -> None:
        """Admit until the edges close."""
        spread = CURRENT.get().profile.prompt_tokens
        while True:
            (group_id,) = (await self.credits.get()).groups
            await self.prompts.put(_prompt(spread, group_id, self.group_size))


@functools.lru_cache(maxsize=1 << 14)
def _prompt(spread: Spread, group_id: int, num_samples: int) -> Prompt:
    length = max(1, round(spread.at(random.Random(group_id).random())))
    number = (group_id & 0x7FFFFFFF).to_bytes(4, "little")
    tokens = Buffer("int32", number + bytes(4 * (length - 1)))
    return Prompt(group_id=group_id, token_ids=tokens, columns={}, num_samples=num_samples, seed=group_id)


class TimedReward(Stage):
    """Gives every sample a zero after the time that scoring takes, which slows nothing else down."""

    Config = StageConfig
    rollouts: In[Rollouts]
    scored: Out[Scored]

    def __init__(self, *, placement: dict[str, Any], node: str, lanes: int) -> None:
        self.config = StageConfig(**placement)
        self.node = node
        self.lanes = lanes

    async def run(self, context: Context) -> None:
        """Score until the edges close."""
        cost = CURRENT.get().profile.nodes[self.node].calls["score"]
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.lanes):
                tasks.create_task(self._lane(context, cost))

    async def _lane(self, context: Context, cost: CallCost) -> None:
        async for group in self.rollouts:
            prompt_bytes = len(group.samples) * len(group.token_ids.data)
            tokens = (prompt_bytes + sum([len(sample.token_ids.data) for sample in group.samples])) / TOKEN_BYTES
            start_s = context.now()
            with context.clock.charge(Cause.COMPUTE):
                await asyncio.sleep(cost.seconds(tokens))
            span = Span(node=self.node, replica=context.replica, name="score", start_s=start_s, end_s=context.now(),
                        groups=[group.group_id])  # fmt: skip
            context.recorder.record(span)
            scores = group.scores if isinstance(group, Scored) else {}
            zeros = [0.0] * len(group.samples)
            await self.scored.put(extend(Scored, group, scores={**scores, self.node: zeros}))


class TimedSelector(Stage):
    """Takes a group's first samples, and filters as large a part of the groups as the profile's run did."""

    Config = StageConfig
    scored: In[Scored]
    selected: Out[Scored]

    def __init__(self, *, placement: dict[str, Any], num_samples: int) -> None:
        self.config = StageConfig(**placement)
        self.num_samples = num_samples

    async def run(self, context: Context) -> None:
        """Select until the edge closes."""
        async for group in self.scored:
            if not is_learned(group.group_id):
                await self.scored.reject(group, kind="filtered", reason="as often as in the profile")
                continue
            scores = {name: rewards[: self.num_samples] for name, rewards in group.scores.items()}
            samples = group.samples[: self.num_samples]
            await self.selected.put(msgspec.structs.replace(group, samples=samples, scores=scores))
