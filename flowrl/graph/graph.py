"""Graphs: named nodes, edges, and the node whose return ends the run, checked before anything starts.

Invariants that `check` proves, each refused with its arithmetic: every required port is fed exactly once, with
messages it takes; every cycle goes through a Latest or Credits edge, or through a queue that never fills; staleness
cannot exceed what the learner's queue allows; an ordered queue has room for every group that may be ahead of the one
it waits for. `flowrl check` and every runtime call it first.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from flowrl.errors import GraphError
from flowrl.graph.edges import Credits, Edge, Latest, Queue
from flowrl.graph.ports import In, Out
from flowrl.graph.staleness import most_credits, staleness_bound

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flowrl.graph.ports import Port
    from flowrl.graph.stage import Stage

__all__ = ["Credits", "Graph", "Latest", "Queue"]


@dataclass(frozen=True)
class Graph:
    """A program as data; building one starts nothing."""

    nodes: Mapping[str, Stage]
    edges: Sequence[Edge]
    until: Stage  # its return ends the run

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
        self._check_ports()
        self._check_shares()
        self._check_cycles()
        for edge in self.edges:
            if isinstance(edge, Queue):
                self._check_queue(edge)
            elif isinstance(edge, Credits) and (edge.initial < 1 or edge.per_version < 1):
                what = f"initial={edge.initial} and per_version={edge.per_version} must be at least 1"
                raise GraphError(self.name(edge), what)
        self._check_staleness()

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
                raise GraphError(cycle, "is a cycle of queues and would deadlock once they are full",
                                 "put a Latest or a Credits edge into it, or bound what is out by most=")  # fmt: skip
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
            if queue.max_staleness is not None:
                raise GraphError(name, "max_staleness needs an order to be bounded in", "give window=1")
            return
        if queue.window < 1:
            raise GraphError(name, f"window={queue.window} must be at least 1")
        target = self.nodes[self.node_of(queue.target)]
        if target.config.replicas > 1:
            what = f"is ordered (window={queue.window}) but {target.config.replicas} replicas compete for it"
            raise GraphError(name, what, "use ranks for more devices, or replicas=1")
        most_out = max((edge.initial for edge in self.edges if isinstance(edge, Credits)), default=None)
        if most_out is None:
            raise GraphError(name, "is ordered, but no Credits edge bounds how many groups are out", "add one")
        if queue.depth < most_out:
            what = f"depth={queue.depth} with {most_out} credits: up to {most_out - 1} groups may wait for an older one"
            raise GraphError(name, f"{what}, and a full queue would block it", f"set depth to {most_out} or more")

    def _check_staleness(self) -> None:
        for queue in self.edges:
            if not isinstance(queue, Queue) or queue.max_staleness is None or queue.window is None:
                continue
            learner = self.node_of(queue.target)
            credits = [e for e in self.edges if isinstance(e, Credits) and self.node_of(e.source) == learner]
            if not credits:
                what = f"max_staleness={queue.max_staleness} but {learner} returns no credits"
                raise GraphError(self.address(queue.target), what, "add Credits(...) from it to the prompts")
            for edge in credits:
                self._check_bound(queue, edge, queue.max_staleness, queue.window)

    def _check_bound(self, queue: Queue, credits: Credits, limit: int, window: int) -> None:
        if credits.initial < credits.per_version:
            what = f"{credits.initial} credits can never fill a step of {credits.per_version} groups"
            raise GraphError(self.name(credits), what, f"raise initial to {credits.per_version} or more")
        bound = staleness_bound(credits.initial, credits.per_version, window)
        if bound > limit:
            most = most_credits(limit, credits.per_version, window)
            mend = f"lower initial to {most} or raise max_staleness"
            if most < credits.per_version:
                mend = "lower window or raise max_staleness"
            raise GraphError(
                self.address(queue.target),
                f"{credits.initial} credits, {credits.per_version} per version and window {window} allow staleness "
                f"{bound}, more than max_staleness={limit}",
                mend,
            )
