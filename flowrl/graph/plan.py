"""A graph as plain data, so that it can be shown, stored with a run and rebuilt in another process without pickle."""

from __future__ import annotations

from typing import Any

import msgspec

from flowrl.errors import GraphError
from flowrl.graph.edges import Credits, Latest, Queue
from flowrl.graph.graph import Graph
from flowrl.graph.stage import Specification, from_specification, specification

EDGE_KINDS: dict[str, type[Any]] = {"queue": Queue, "latest": Latest, "credits": Credits}


class EdgePlan(msgspec.Struct, frozen=True, kw_only=True):
    """One edge by the addresses of its ends."""

    kind: str
    source: str
    target: str
    bounds: dict[str, Any]


class GraphPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A whole graph."""

    nodes: dict[str, Specification]
    edges: list[EdgePlan]
    until: str


def plan_of(graph: Graph) -> GraphPlan:
    """Return the graph as plain data."""
    edges: list[EdgePlan] = []
    for edge in graph.edges:
        kind = next(name for name, edge_type in EDGE_KINDS.items() if type(edge) is edge_type)
        bounds = {name: value for name, value in vars(edge).items() if name not in ("source", "target")}
        edges.append(
            EdgePlan(kind=kind, source=graph.address(edge.source), target=graph.address(edge.target), bounds=bounds)
        )
    nodes = {name: specification(stage) for name, stage in graph.nodes.items()}
    return GraphPlan(nodes=nodes, edges=edges, until=graph.until_node)


def graph_of(plan: GraphPlan) -> Graph:
    """Rebuild the graph.

    Raises:
        GraphError: an edge names a port that does not exist.
    """
    nodes = {name: from_specification(spec, name) for name, spec in plan.nodes.items()}

    def port(address: str) -> Any:
        node, _, name = address.partition(".")
        if node not in nodes or name not in nodes[node].ports:
            raise GraphError(address, "is not a port of this graph")
        return nodes[node].ports[name]

    edges = [EDGE_KINDS[e.kind](port(e.source), port(e.target), **e.bounds) for e in plan.edges]
    return Graph(nodes=nodes, edges=edges, until=nodes[plan.until])
