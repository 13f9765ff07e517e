"""Graphs: named nodes, edges, and the node whose return ends the run, checked before anything starts.

Invariants that `check` proves, each refused with its arithmetic:
- every required port is fed exactly once, with messages it takes;
- a number that several nodes are told is one number: an `Agreement`, a value under one name, another node's settings;
- every cycle goes through a Latest or Credits edge, or through a queue that never fills;
- staleness cannot exceed what the learner allows;
- an ordered queue has room for every group that may be ahead of the one it waits for.
`flowrl check` and every runtime call it first.

`RunSettings` are the settings that every graph has, whatever its topology; a graph file's `Settings` extends it.

Tests: tests/unit/graph/test_graph.py
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec

from flowrl.config import AUTO, Config, Meta, idle
from flowrl.errors import GraphError
from flowrl.graph.edges import DEPTH, UNSAID, Credits, Edge, Latest, Queue
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Agreement, Stage, StageConfig
from flowrl.graph.staleness import staleness_bound
from flowrl.telemetry.trackers import WandbConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from flowrl.graph.ports import Port
    from flowrl.graph.staleness import Admission


class ClusterConfig(Config):
    """Where a run's processes go on a cluster of several nodes."""

    nodes: list[str] = []  # addresses of those that may be used; []: all
    # address of the one for the flow, the learner's first rank and what reserves nothing; "": the driver's
    home: str = ""
    strategy: Literal["pack", "spread"] = "pack"  # on as few nodes as hold them, or on as many as there are
    # graph node -> Ray labels of the cluster's nodes that may hold it: cluster.labels.generator.zone=a
    labels: dict[str, dict[str, str]] = {}
    # graph node -> replicas at most, from its `replicas` on, as the cluster's nodes have room: cluster.most.generator=8
    most: dict[str, Annotated[int, Meta(ge=1)]] = {}
    # processes that hand the hub the calls of many replicas in one piece; auto: none for up to 4,000 processes
    proxies: Annotated[Annotated[int, Meta(ge=0)] | None, AUTO] = None
    place_timeout_s: Annotated[float, Meta(gt=0)] = 300.0  # for cores and GPUs to be free: nodes may have to start


class RunSettings(Config):
    """What a run needs to know besides its graph."""

    seed: int = 0  # data order, sampling and initialisation follow from it
    runtime: Literal["ray", "local"] = "ray"  # processes as Ray actors, or tasks of one process
    # auto: what nothing is said about is planned for the machine, see `flowrl plan`; given: it is as in the graph file
    placement: Literal["auto", "given"] = "auto"
    stall_timeout_s: Annotated[float, Meta(gt=0)] = 1800.0  # nothing moves on any edge for so long: stop and say why
    heartbeat_timeout_s: Annotated[float, Meta(gt=0)] = 60.0  # a replica not heard from for so long is replaced
    stop_grace_s: Annotated[float, Meta(gt=0)] = 600.0  # a stop by Ctrl-C, SIGTERM or SIGHUP may take so long
    max_restarts: Annotated[int, Meta(ge=0)] = 3  # of one node, or from a checkpoint, with no learned step between
    # node -> port -> depth of the queue into it, where it is to differ from the graph file's: depths.reward.rollouts=32
    depths: dict[str, dict[str, Annotated[int, Meta(ge=1)]]] = {}
    cluster: ClusterConfig = ClusterConfig()
    needs: dict[str, str] = {}  # directories that other runs make -> the command that makes each
    hints: bool = True  # say while the run goes on which setting would make it quicker
    wandb: WandbConfig = WandbConfig()
    tensorboard: bool = False  # curves into the run directory, for `tensorboard --logdir`
    mlflow: str = ""  # tracking URI such as sqlite:///mlflow.db; "": none
    trackio: str = ""  # project there; "": none
    prometheus_port: Annotated[int, Meta(ge=0, le=65535)] = 0  # figures at http://127.0.0.1:PORT/metrics; 0: none
    sinks: dict[str, str] = {}  # of one's own: name -> module:Class, which is given the run's directory

    def idle_settings(self) -> list[str]:
        """Return which of these have no effect, and why."""
        found: list[str] = []
        if self.wandb.mode == "off":
            found += idle(
                self.wandb, ("project", "name"), "wandb", "while wandb.mode is off; set it to online or offline"
            )
        if self.runtime == "local":
            why = "with runtime=local, which starts no processes"
            found += idle(self, ("heartbeat_timeout_s", "cluster"), "", why, plain=RunSettings())
        return found


__all__ = ["Credits", "Graph", "Latest", "Queue", "Section"]


class Section(NamedTuple):
    """Some nodes of a graph with the edges that join them to it; both may be empty."""

    nodes: Mapping[str, Stage] = {}
    edges: Sequence[Edge] = ()


@dataclass(frozen=True)
class Graph:
    """A program as data; building one starts nothing."""

    nodes: Mapping[str, Stage]
    edges: Sequence[Edge]
    until: Stage  # its return ends the run

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", (*self._filled_in(), *self._saves()))
        for edge in self.edges:
            edge.target.brings = edge.source.message
            if isinstance(edge, Queue):
                edge.source.leads_to = edge.target.owner

    def _filled_in(self) -> Iterator[Edge]:
        """Yield the edges with what they leave unsaid."""
        initial = {id(e): self._initial(e) for e in self.edges if isinstance(e, Credits)}
        num_out = sum(initial.values())
        for edge in self.edges:
            if isinstance(edge, Credits):
                yield with_bounds(edge, initial=initial[id(edge)])
            elif isinstance(edge, Queue) and edge.depth == UNSAID:
                yield with_bounds(edge, depth=num_out if edge.window is not None and num_out else DEPTH)
            else:
                yield edge

    def _saves(self) -> Iterator[Edge]:
        """Yield the edges that are not there yet by which the last node asks the others for their state."""
        known = {id(edge.target) for edge in self.edges}
        for stage in self.nodes.values():
            if (
                stage.is_stateful
                and self.until.is_stateful
                and stage is not self.until
                and id(stage.saves) not in known
            ):
                yield Latest(self.until.saving, stage.saves)

    def _initial(self, credits: Credits) -> int:
        if credits.initial != UNSAID:
            return credits.initial
        owner = credits.source.owner
        windows = [e.window for e in self.edges if isinstance(e, Queue) and e.target.owner is owner and e.window]
        return credits.admission.most_credits(max(windows, default=1))

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id(stage): name for name, stage in self.nodes.items()}

    def node_of(self, port: Port) -> str:
        """Return the node a port belongs to.

        Raises:
            GraphError: the stage is not among the graph's nodes.
        """
        name = self._names.get(id(port.owner))
        if name is None:
            raise GraphError(repr(port), "its stage is not a node of this graph", "add it to nodes=dict(...)")
        return name

    def address(self, port: Port) -> str:
        """Return "node.port"."""
        return f"{self.node_of(port)}.{port.name}"

    def name(self, edge: Edge) -> str:
        """Return "node.port -> node.port", the edge's name in metrics and errors."""
        return f"{self.address(edge.source)} -> {self.address(edge.target)}"

    @cached_property
    def until_node(self) -> str:
        """Return the name of the node whose return ends the run."""
        name = self._names.get(id(self.until))
        if name is None:
            raise GraphError("until", "is not a node of this graph", "name one of " + ", ".join(self.nodes))
        return name

    def check(self) -> None:
        """Prove what can be proved before anything starts.

        Raises:
            GraphError: with the place, the arithmetic and the remedy.
        """
        _ = self.until_node
        self._check_stages()
        self._check_ports()
        self._check_agreement()
        self._check_shares()
        self._check_cycles()
        credits = [edge for edge in self.edges if isinstance(edge, Credits)]
        for edge in self.edges:
            if isinstance(edge, Queue):
                self._check_queue(edge)
            elif isinstance(edge, Credits):
                self._check_credits(edge)
        if len(credits) > 1:
            names = "; ".join(self.name(edge) for edge in credits)
            raise GraphError("credits", f"{len(credits)} edges admit groups ({names})", "keep one: ids are given once")

    def _check_stages(self) -> None:
        for node, stage in self.nodes.items():
            name = type(stage).__name__
            if not stage.ports:
                remedy = "annotate what it takes and gives: rollouts: In[Rollouts], scored: Out[Scored]"
                raise GraphError(node, f"{name} declares no port", remedy)
            self._check_copies(node, stage)
            if not stage.is_stateful and type(stage).save is not Stage.save:
                what = f"{name} defines `save`, which nobody calls: it is not stateful"
                raise GraphError(node, what, "set is_stateful = True in the class")
            if not stage.is_stateful or stage is self.until:
                continue
            if type(stage).save is Stage.save:
                raise GraphError(node, f"{name} is stateful, but does not say how its state is saved", "define `save`")
            if not self.until.is_stateful:
                what = f"keeps state for which {self.until_node} writes no checkpoints"
                raise GraphError(node, what, "let a stateful node end the run")

    def _check_copies(self, node: str, stage: Stage) -> None:
        """Insist that a stage can be as many processes as its settings say."""
        name, config = type(stage).__name__, stage.config
        if config.ranks > 1 and type(stage).follow is Stage.follow:
            what = f"{config.ranks}, but {name} is no stage whose ranks march together"
            raise GraphError(f"{node}.ranks", what, "leave it 1")
        why = "ends the run" if stage is self.until else "keeps state" if stage.is_stateful else "does its work once"
        if config.replicas > 1 and (stage.is_single or stage.is_stateful or stage is self.until):
            is_marching = type(stage).follow is not Stage.follow
            remedy = "leave it 1, and use ranks for more devices" if is_marching else "leave it 1"
            raise GraphError(f"{node}.replicas", f"{config.replicas}, but {name} {why}", remedy)

    def _check_ports(self) -> None:
        joined: dict[str, list[Edge]] = defaultdict(list)
        for edge in self.edges:
            for port in (edge.source, edge.target):
                joined[self.address(port)].append(edge)
            given, taken = edge.source.message, edge.target.message
            if not issubclass(given, taken):
                what = f"carries {given.__name__}, but {self.address(edge.target)} takes {taken.__name__}"
                raise GraphError(self.name(edge), what, "join ports of the same message or put a stage between them")
        ports = [port for stage in self.nodes.values() for port in stage.ports.values()]
        for port in sorted(ports, key=lambda port: isinstance(port, Out)):  # what is not fed explains what is not read
            address = self.address(port)
            edges = joined.get(address, [])
            if not edges and not port.is_optional:
                verb = "fed" if isinstance(port, In) else "read"
                raise GraphError(address, f"is {verb} by no edge", f"join it to an edge of {port.message.__name__}")
            is_shared = isinstance(port, Out) and all(isinstance(edge, Latest) for edge in edges)
            if len(edges) > 1 and not is_shared:
                names = "; ".join(self.name(edge) for edge in edges)
                raise GraphError(address, f"is on {len(edges)} edges ({names})", "keep one of them")
        for node, stage in self.nodes.items():
            for names in stage.together:
                alone = sorted(name for name in names if not joined.get(f"{node}.{name}"))
                if alone and len(alone) < len(names):
                    others = ", ".join(sorted(names - {*alone}))
                    raise GraphError(f"{node}.{alone[0]}", f"is on no edge, but {others} is", "join both or neither")

    def _check_agreement(self) -> None:
        """Insist that what several nodes are told is the same, by its name, its kind or the node whose it is."""
        given: dict[str, tuple[str, msgspec.Struct]] = {}
        for node, stage in self.nodes.items():
            for name, value in stage.arguments.items():
                if name == "config" or not isinstance(value, msgspec.Struct):
                    continue
                first, known = given.setdefault(_agreed_as(name, value), (node, value))
                if value != known:
                    what = f"differs from that of {first}: {_difference(value, known)}"
                    raise GraphError(f"{node}.{name}", what, "make it once, and give it to both")
                if isinstance(value, StageConfig):
                    self._check_settings_of_another(f"{node}.{name}", value)

    def _check_settings_of_another(self, where: str, told: StageConfig) -> None:
        """Insist that settings which a node is told besides its own are those of a node, where one has such settings.

        A critic learns in as many minibatches as the learner that it is told of.
        """
        of_kind = {node: s.config for node, s in self.nodes.items() if type(s.config) is type(told)}
        if of_kind and told not in of_kind.values():
            node, config = next(iter(of_kind.items()))
            what = f"differs from {node}'s own: {_difference(told, config)}"
            raise GraphError(where, what, "give it the same settings")

    def _check_shares(self) -> None:
        for node, stage in self.nodes.items():
            share = stage.config.share
            if share and (share not in self.nodes or share == node or self.nodes[share].config.share):
                hosts = [n for n, s in self.nodes.items() if not s.config.share and n != node]
                raise GraphError(
                    f"{node}.share", f"{share!r} is not a node with devices of its own", f"name one of {hosts}"
                )

    def _check_cycles(self) -> None:
        after: dict[str, set[str]] = defaultdict(set)
        for edge in self.edges:
            if isinstance(edge, Queue) and not edge.never_fills:
                after[self.node_of(edge.source)].add(self.node_of(edge.target))
        finished: set[str] = set()

        def walk(node: str, path: list[str]) -> None:
            if node in path:
                cycle = " -> ".join([*path[path.index(node) :], node])
                raise GraphError(
                    cycle,
                    "is a cycle of queues and would deadlock once they are full",
                    "put a Latest or a Credits edge into it, or bound what is out by most=",
                )
            if node in finished:
                return
            for following in sorted(after[node]):
                walk(following, [*path, node])
            finished.add(node)

        for node in self.nodes:
            walk(node, [])

    def _check_queue(self, queue: Queue) -> None:
        name = self.name(queue)
        if queue.depth < 1 or queue.max_bytes < 1:
            raise GraphError(name, f"depth={queue.depth}, max_bytes={queue.max_bytes}: a queue holds at least one item")
        if queue.window is None:
            return
        if queue.window < 1:
            raise GraphError(name, f"window={queue.window} must be at least 1")
        target = self.nodes[self.node_of(queue.target)]
        if queue.window > 1 and queue.target.is_ordered and target.admission is None:
            what = f"window={queue.window}, but {self.address(queue.target)} takes groups strictly in their order"
            raise GraphError(name, what, "leave the window to the port")
        if target.config.replicas > 1:
            what = f"is ordered (window={queue.window}) but {target.config.replicas} replicas compete for it"
            raise GraphError(name, what, "use ranks for more devices, or replicas=1")
        most_out = max((edge.initial for edge in self.edges if isinstance(edge, Credits)), default=None)
        if most_out is None:
            raise GraphError(name, "is ordered, but no Credits edge bounds how many groups are out", "add one")
        if queue.depth < most_out:
            what = f"depth={queue.depth} with {most_out} credits: up to {most_out - 1} groups may wait for an older one"
            raise GraphError(name, f"{what}, and a full queue would block it", f"set depth to {most_out} or more")

    def _check_credits(self, credits: Credits) -> None:
        """Prove the staleness bound of what the credits admit."""
        name, admission = self.name(credits), credits.admission
        learner, per_version, limit = self.node_of(credits.source), admission.per_version, admission.max_staleness
        for told in self.nodes[learner].arguments.values():
            found = told.admission if isinstance(told, Agreement) else None
            if found is not None and found != admission:
                what = f"says {_in_words(admission)}, but was given {_in_words(found)}"
                raise GraphError(f"{learner}.admission", what, "let it be that of what the stage is given")
        if per_version < 1 or (admission.versions is not None and admission.versions < 1):
            raise GraphError(learner, f"learns {per_version} groups into each of {admission.versions} versions")
        ordered = [
            q for q in self.edges if isinstance(q, Queue) and q.target.owner is credits.source.owner and q.window
        ]
        if limit is None:
            if credits.initial < per_version:
                self._refuse_few(credits, f"raise initial to {per_version} or more")
            return
        if not ordered:
            what = f"is to learn nothing older than max_staleness={limit}, but takes no groups in order"
            raise GraphError(learner, what, "name its port in `ordered`")
        queue = max(ordered, key=lambda each: each.window or 0)
        window = queue.window or 1
        most = admission.most_credits(window)
        if most < per_version:
            self._refuse_few(credits, "lower window or raise max_staleness", of=most)
        if credits.initial < per_version:
            self._refuse_few(credits, f"raise initial to {per_version} or more")
        bound = staleness_bound(credits.initial, per_version, window)
        if bound > limit:
            what = f"{credits.initial} credits, {per_version} per version and window {window} allow staleness {bound}"
            mend = f"leave initial out, lower it to {most} or raise max_staleness"
            raise GraphError(name, f"{what}, more than max_staleness={limit} of {learner}", mend)

    def _refuse_few(self, credits: Credits, mend: str, *, of: int | None = None) -> None:
        num = credits.initial if of is None else of
        what = f"{num} credits can never fill a step of {credits.per_version} groups"
        raise GraphError(self.name(credits), what, mend)


def _in_words(admission: Admission) -> str:
    return ", ".join(f"{name}={value}" for name, value in admission._asdict().items())


def _agreed_as(name: str, value: msgspec.Struct) -> str:
    """Return what a value is held against others by: its kind where it is an `Agreement`, else its name."""
    kinds = (kind.__qualname__ for kind in type(value).__mro__ if Agreement in kind.__bases__)
    return next(kinds, name)


def with_bounds(edge: Edge, **bounds: int) -> Edge:
    """Return a copy of a frozen edge with other bounds."""
    other = copy.copy(edge)
    for name, value in bounds.items():
        object.__setattr__(other, name, value)
    return other


def _difference(ours: msgspec.Struct, theirs: msgspec.Struct) -> str:
    if type(ours) is not type(theirs):
        return f"{type(ours).__name__} and {type(theirs).__name__}"
    pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in ours.__struct_fields__]
    return ", ".join(f"{name} is {one!r} and {two!r}" for name, one, two in pairs if one != two)
