"""A graph whose nodes only take time, as its stages say (`Stage.simulated`, words in flowrl/graph/simulated.py).

Invariants:
- nothing of the user's is called;
- an engine, algorithm or objective is exchanged for one that only takes time;
- a stage runs only if its own class says that it may;
- nothing is read or written;
- optional nodes are left out, but for an evaluation where versions are evaluated in the time that is predicted;
- a checkpoint's cost is spread over its versions.

Used by run.py, which runs the plan.

Tests: tests/unit/simulation/test_run.py
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import random
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_origin

import msgspec

from flowrl.config import Select, load_class
from flowrl.engines.base import Serving
from flowrl.errors import ConfigError
from flowrl.graph.edges import Credits
from flowrl.graph.ports import In, Out
from flowrl.graph.program import GraphPlan, plan_of
from flowrl.graph.simulated import Admits, Itself, PassesOn
from flowrl.graph.stage import Specification, Stage, StageConfig
from flowrl.messages import Buffer, Credit, Message, Prompt, Rollouts, Scored, extend, narrowed
from flowrl.scratch import ScratchDirectory
from flowrl.simulation.costs import CallCost, NodeProfile, Profile, Spread, pace, speedup
from flowrl.simulation.fake import CURRENT, NOTHING, TOKEN_BYTES, is_learned
from flowrl.telemetry.events import Cause, Span

if TYPE_CHECKING:
    from flowrl.graph.graph import Graph
    from flowrl.graph.ports import Port
    from flowrl.graph.stage import Context

C = TypeVar("C")


def lacking(graph: Graph) -> str:
    """Return why a graph is not simulated: "has no Credits edge", "trains nothing"; "" where it can be."""
    if not any(isinstance(edge, Credits) for edge in graph.edges):
        return "has no Credits edge"
    if not any(isinstance(stage.config, Serving) for stage in graph.nodes.values()):
        return "has no node that generates"
    if not hasattr(graph.nodes[graph.until_node].config, "engine"):
        return "trains nothing"
    optional = optional_nodes(graph)
    silent = [name for name, stage in graph.nodes.items() if name not in optional and not _says(stage)]
    kinds = [f"{name} ({type(graph.nodes[name]).__name__})" for name in silent]
    return f"has stages that do not say how they are simulated: {', '.join(kinds)}" if silent else ""


def _says(stage: Stage) -> bool:
    return "simulated" in vars(type(stage))  # a subclass may do what the class above it does not speak of


def optional_nodes(graph: Graph) -> list[str]:
    """Return the nodes that the last one, and whoever it needs, can do without: they may stay unconnected."""
    needed = {graph.until_node}
    for _ in graph.nodes:  # one more may follow from the last each time
        for edge in graph.edges:
            source, target = graph.node_of(edge.source), graph.node_of(edge.target)
            needed |= {source} if target in needed and not edge.target.is_optional else set()
            needed |= {target} if source in needed and not edge.source.is_optional else set()
    return [name for name in graph.nodes if name not in needed]


def left_out(graph: Graph, profile: Profile, *, is_whole: bool) -> list[str]:
    """Return the optional nodes that are not simulated.

    All of them where nothing is evaluated on the way, else those that do not run as they are, and whoever needs them.
    """
    optional = optional_nodes(graph)
    if not is_whole and not getattr(graph.until.config, "evaluate_every", 0):
        return optional
    absent = {name for name in optional if not _says(graph.nodes[name])}
    runs = {
        name: name not in absent and isinstance(stage.simulated(NodeCosts(graph, name, profile, 1)), Itself)
        for name, stage in graph.nodes.items()
    }
    for _ in optional:  # one more may follow from the last each time
        for edge in graph.edges:
            ends = {graph.node_of(edge.source), graph.node_of(edge.target)}
            if any(node in absent or not runs[node] for node in ends):
                absent |= ends & {*optional}
    return [name for name in optional if name in absent]


def timed_plan(graph: Graph, profile: Profile, *, steps: int, is_whole: bool) -> GraphPlan:
    """Return the plan of a graph whose nodes only take time; for what is not in it see `left_out`.

    Raises:
        ConfigError: the graph cannot be simulated, or the profile lacks a node that computes.
    """
    if what := lacking(graph):
        remedy = "name a graph that admits prompts, generates and learns, such as graphs/ppo_async.py"
        if "do not say" in what:
            remedy = "give the class a method `simulated`, see flowrl/graph/simulated.py"
        raise ConfigError("graph", f"{what}, so there is no prediction", remedy)
    plan, absent = plan_of(graph), left_out(graph, profile, is_whole=is_whole)
    nodes: dict[str, Specification] = {}
    left: set[str] = set()  # addresses of ports
    for name in graph.nodes:
        if name not in absent:
            costs = NodeCosts(graph, name, profile, steps)
            nodes[name], ports = _stand_in(costs, plan.nodes[name], graph.nodes[name])
            left |= {f"{name}.{port}" for port in ports}
    versions = {"is_endless": not is_whole}
    edges = [
        msgspec.structs.replace(edge, bounds={**edge.bounds, **versions}) if edge.kind == "credits" else edge
        for edge in plan.edges
        if edge.source in left and edge.target in left
    ]
    return GraphPlan(nodes=nodes, edges=edges, until=plan.until)


def _stand_in(costs: NodeCosts, spec: Specification, stage: Stage) -> tuple[Specification, list[str]]:
    """Return what stands in for a node, and which of its ports are left."""
    match stage.simulated(costs):
        case Itself(arguments, without):
            exchanged = {name: msgspec.to_builtins(value) for name, value in arguments.items()}
            arguments = {**spec.arguments, "config": _quiet(stage.config), **exchanged}
            return msgspec.structs.replace(spec, arguments=arguments), [p for p in stage.ports if p not in without]
        case Admits(num_samples):
            place = _place(costs.node, stage, Credit, Prompt)
            return _specification(TimedPrompts, place, num_samples=num_samples), [place.takes, place.puts]
        case PassesOn(call, seconds, lanes, num_samples, filters):
            place = _place(costs.node, stage, Message, Message)
            if call:
                costs.known(call)
            puts = stage.ports[place.puts].message
            return _specification(
                TimedPass, place, node=costs.node, message=f"{puts.__module__}:{puts.__qualname__}", call=call,
                seconds=seconds, lanes=lanes, num_samples=num_samples, filters=filters,
            ), [place.takes, place.puts]  # fmt: skip
        case None:
            raise ConfigError(f"node {costs.node!r}", "does not say how it is simulated, so there is no prediction")


def _quiet(config: StageConfig) -> dict[str, Any]:
    """Return a node's settings with one rank, and nothing written to disk."""
    quiet = {"save_rollouts": False, "save_every": 0, "ranks": 1}
    return msgspec.to_builtins(config) | {name: value for name, value in quiet.items() if hasattr(config, name)}


def _place(node: str, stage: Stage, takes: type[Message], puts: type[Message]) -> Ends:
    """Return the place of a stage that is exchanged for one that takes and puts such messages.

    Raises:
        ConfigError: it has not one port for each.
    """
    needed = [port for port in stage.ports.values() if not port.is_optional]
    taken = [port for port in needed if isinstance(port, In) and issubclass(port.message, takes)]
    put = [port for port in needed if isinstance(port, Out) and issubclass(port.message, puts)]
    if (len(taken), len(put)) != (1, 1):
        what = f"says that it passes on what it takes, with {len(taken)} ports to take it and {len(put)} to put it"
        raise ConfigError(f"node {node!r}", what, "let `simulated` return Itself(...), or None")
    return Ends(replicas=stage.config.replicas, takes=taken[0].name, puts=put[0].name, is_ordered=taken[0].is_ordered)


def _specification(kind: type[Stage], place: Ends, **arguments: Any) -> Specification:
    arguments = {"place": msgspec.to_builtins(place), **arguments}
    return Specification(stage=f"{__name__}:{kind.__name__}", arguments=arguments)


def with_costs_of(graph: Graph, node: str, profile: Profile) -> Profile:
    """Return a profile in which a generator that its run did not have costs what another of the graph does."""
    alike = [
        name
        for name, stage in graph.nodes.items()
        if isinstance(stage.config, Serving) and name in profile.nodes and profile.nodes[name].decode is not None
    ]
    if node in profile.nodes or not alike or not isinstance(graph.nodes[node].config, Serving):
        return profile
    return msgspec.structs.replace(profile, nodes={**profile.nodes, node: profile.nodes[alike[0]]})


class NodeCosts:
    """The costs of one node, and what stands in for its engine, its algorithm and its model."""

    def __init__(self, graph: Graph, node: str, profile: Profile, steps: int) -> None:
        self.node = node
        self._steps = steps
        self._profile = profile
        host = graph.nodes[node].config.share or node
        self._device = host if graph.nodes[host].config.gpus > 0 else "cores"

    def heldout(self, num: int) -> list[int]:
        """Return the tokens of each prompt of an evaluation: as many as in the profile's run, else `num`."""
        count = self._profile.heldout or num
        return [max(1, round(self._profile.prompt_tokens.at((k + 0.5) / count))) for k in range(count)]

    def known(self, call: str = "") -> NodeProfile:
        """Return the node's costs, which have those of a call.

        Raises:
            ConfigError: they have not.
        """
        remedy = f"take the profile of a run of this graph, or add it under nodes.{self.node}"
        nodes = self._profile.nodes
        if self.node not in nodes:
            what = f"has no costs of node {self.node!r} (it has {', '.join(nodes) or 'none'})"
            raise ConfigError("profile", what, remedy)
        found = nodes[self.node]
        if call and call not in found.calls:
            what = f"node {self.node!r} has no cost of {call!r} (it has {', '.join(found.calls) or 'none'})"
            raise ConfigError("profile", what, remedy)
        if not call and found.decode is None:
            raise ConfigError("profile", f"node {self.node!r} has no `decode`, the cost of a decoding step", remedy)
        return found

    def sampler(self, sampler: C) -> C:
        """Return what the nodes agree on, with a directory that passes for the model's."""
        return cast("C", msgspec.structs.replace(cast("Any", sampler), model=stand_in_model()))

    def learning(self, learning: C, *, is_objective: bool = False) -> C:
        """Return what the learning nodes agree on, of as many steps as are simulated, and nothing of the user's."""
        kind = "BlankObjective" if is_objective else "BlankAlgorithm"
        choice = Select(use=f"flowrl.simulation.fake:{kind}")
        return cast("C", msgspec.structs.replace(cast("Any", learning), algorithm=choice, steps=self._steps))

    def generating(self, config: C) -> C:
        """Return a generator's settings with an engine that only takes time."""
        return self._on(config, "FakeGeneration", speed=self._faster(self.known(), config))

    def training(self, config: C, call: str = "score") -> C:
        """Return a training or scoring node's settings with such an engine."""
        settings: Any = config
        costs = self.known(call)
        publish_s = costs.calls.get("publish", NOTHING).call_s
        if save_every := getattr(settings, "save_every", 0):
            publish_s += costs.calls.get("checkpoint", NOTHING).call_s / save_every
        width = float(settings.ranks * settings.threads) if self._device == "cores" else 1.0
        speed = settings.ranks / costs.ranks * self._faster(costs, config)
        return self._on(config, "FakeTraining", speed=speed, width=width, publish_s=publish_s)

    def _faster(self, costs: NodeProfile, config: Any) -> float:
        """Return how much faster a node alone is taken to be with its threads than with those of the profile."""
        if self._device != "cores":
            return 1.0
        new, old = (
            speedup(threads) * pace(threads, self._profile.cores, self._profile.slowdown)
            for threads in (config.threads, costs.threads)
        )
        return new / old

    def _on(self, config: C, engine: str, **options: Any) -> C:
        options |= {"node": self.node, "device": self._device}
        quiet = msgspec.convert(_quiet(cast("Any", config)), type(config))
        return cast(
            "C",
            msgspec.structs.replace(
                cast("Any", quiet), engine=f"flowrl.simulation.fake:{engine}", engine_options=options
            ),
        )


@functools.cache
def stand_in_model() -> str:
    """Return a directory that passes for a model's: fake engines never open it."""
    scratch = ScratchDirectory("simulate")
    atexit.register(scratch.close)
    directory = scratch.path
    header = b"{}"
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    for name in ("config.json", "tokenizer.json"):
        (directory / name).write_text("{}")
    return str(directory)


class Ends(msgspec.Struct, frozen=True, kw_only=True):
    """Where a node that was exchanged stands: its replicas, and the names of its two ports."""

    replicas: int
    takes: str
    puts: str
    is_ordered: bool  # what it takes


class StandIn(Stage):
    """A node of one input and one output, under the names that the exchanged stage has for them."""

    def __init__(self, place: Ends, takes: type[Message], puts: type[Message]) -> None:
        self.config = StageConfig(replicas=place.replicas)
        self.taken: In[Any] = In(self, place.takes, takes, is_optional=False, is_ordered=place.is_ordered)
        self.put: Out[Any] = Out(self, place.puts, puts, is_optional=False, is_ordered=False)

    @property
    def ports(self) -> dict[str, Port]:
        """Return the two ports by name."""
        return {self.taken.name: self.taken, self.put.name: self.put}


class TimedPrompts(StandIn):
    """Admits groups of zeros, one against each credit; a prompt begins with its group's number."""

    def __init__(self, *, place: Ends, num_samples: int) -> None:
        super().__init__(place, Credit, Prompt)
        self.num_samples = num_samples

    async def run(self, context: Context) -> None:
        """Admit until the edges close."""
        spread = CURRENT.get().profile.prompt_tokens
        while True:
            (group_id,) = (await self.taken.get()).groups
            await self.put.put(_prompt(spread, group_id, self.num_samples))


@functools.lru_cache(maxsize=1 << 14)
def _prompt(spread: Spread, group_id: int, num_samples: int) -> Prompt:
    length = max(1, round(spread.at(random.Random(group_id).random())))
    number = (group_id & 0x7FFFFFFF).to_bytes(4, "little")
    tokens = Buffer("int32", number + bytes(4 * (length - 1)))
    return Prompt(group_id=group_id, token_ids=tokens, columns={}, num_samples=num_samples, seed=group_id)


class TimedPass(StandIn):
    """Passes messages on after the time of a call, which slows nothing else down."""

    def __init__(
        self, *, place: Ends, node: str, message: str, call: str, seconds: float, lanes: int, num_samples: int | None,
        filters: bool,
    ) -> None:  # fmt: skip
        super().__init__(place, Message, load_class(message, node))
        self.node = node
        self.call = call
        self.seconds = seconds
        self.lanes = lanes
        self.num_samples = num_samples
        self.filters = filters

    async def run(self, context: Context) -> None:
        """Pass on until the edges close."""
        cost = CURRENT.get().profile.nodes[self.node].calls[self.call] if self.call else NOTHING
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.lanes):
                tasks.create_task(self._lane(context, cost))

    async def _lane(self, context: Context, cost: CallCost) -> None:
        async for message in self.taken:
            group: Any = message
            if self.filters and not is_learned(group.group_id):
                await self.taken.reject(group, kind="filtered", reason="as often as in the profile")
                continue
            if self.seconds:
                with context.clock.charge(Cause.WAIT_INPUT):
                    await asyncio.sleep(self.seconds)
            if self.call:
                start_s = context.now()
                with context.clock.charge(Cause.COMPUTE):
                    await asyncio.sleep(cost.seconds(_num_tokens(group)))
                context.recorder.record(Span(node=self.node, replica=context.replica, name=self.call, start_s=start_s,
                                             end_s=context.now(), groups=[group.group_id]))  # fmt: skip
            await self.put.put(onward(group, self.put.message, node=self.node, num_samples=self.num_samples))


def _num_tokens(message: Message) -> float:
    if not isinstance(message, Rollouts):
        return len(getattr(message, "token_ids", ()))
    prompt_bytes = len(message.samples) * len(message.token_ids.data)
    return (prompt_bytes + sum([len(sample.token_ids.data) for sample in message.samples])) / TOKEN_BYTES


def onward(message: Message, kind: type[Message], *, node: str, num_samples: int | None = None) -> Message:
    """Return a message as `kind`, with zeros for what it lacks, and of a group the first samples only.

    Raises:
        ConfigError: `kind` has a field that zeros cannot fill.
    """
    if isinstance(message, Rollouts):
        message = narrowed(message, range(len(message.samples))[:num_samples])
    samples = message.samples if isinstance(message, Rollouts) else []
    zeros = {list[Buffer]: [sample.logprobs for sample in samples], list[float]: [0.0] * len(samples)}
    made: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        if not field.required or hasattr(message, field.name):
            continue
        if field.type not in zeros and get_origin(field.type) is not dict:
            what = f"passes on {kind.__name__}, whose field {field.name!r} cannot be made up"
            raise ConfigError(f"node {node!r}", what, "give the field a default value")
        made[field.name] = zeros.get(field.type, {})
    if issubclass(kind, Scored):
        made["scores"] = {**getattr(message, "scores", {}), node: zeros[list[float]]}
    return extend(kind, message, **made)
