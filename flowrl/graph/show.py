"""A graph for people: the edge table, the plan of what would start, and a Mermaid diagram.

Tests: tests/unit/graph/test_graph.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowrl.graph.edges import Credits, Latest, Queue
from flowrl.graph.staleness import staleness_bound
from flowrl.messages import Weights

if TYPE_CHECKING:
    from flowrl.graph.edges import Edge
    from flowrl.graph.graph import Graph


def edge_table(graph: Graph) -> str:
    """Return one aligned line an edge: kind, ends, message, bounds."""
    rows = [("edge", "from", "to", "message", "bounds")]
    rows += [
        (
            type(edge).__name__,
            graph.address(edge.source),
            graph.address(edge.target),
            edge.source.message.__name__,
            bounds(edge),
        )
        for edge in graph.edges
    ]
    return _aligned(rows)


def node_table(graph: Graph) -> str:
    """Return one aligned line a node: stage, processes, devices."""
    rows = [("node", "stage", "processes", "cores", "GPUs", "shares")]
    for name, stage in graph.nodes.items():
        config = stage.config
        processes = f"{config.replicas} x {config.ranks} ranks" if config.ranks > 1 else str(config.replicas)
        count = config.replicas * config.ranks
        shares = f"{config.share or 'its own'} in turns" if getattr(config, "turns", False) else config.share or "-"
        cores = "-" if config.share else f"{config.cpus * count:g}"
        rows.append((name, type(stage).__name__, processes, cores, f"{config.gpus * count:g}", shares))
    return _aligned(rows)


def staleness_line(graph: Graph) -> str:
    """Say what staleness the credits allow, with the arithmetic."""
    credits = next((edge for edge in graph.edges if isinstance(edge, Credits)), None)
    queue = next((e for e in graph.edges if isinstance(e, Queue) and e.max_staleness is not None), None)
    if not any(isinstance(edge, Latest) and edge.source.message is Weights for edge in graph.edges):
        return "staleness: none, nothing is sampled by a policy that is being trained"
    if credits is None or queue is None or queue.window is None:
        return "staleness: not bounded by this graph"
    bound = staleness_bound(credits.initial, credits.per_version, queue.window)
    return (
        f"staleness: at most {bound} of max_staleness={queue.max_staleness} "
        f"(({credits.initial} credits + window {queue.window} - 2) // {credits.per_version} per version)"
    )


def mermaid(graph: Graph) -> str:
    """Return the graph as a Mermaid flowchart; queues are solid, registers and credits dotted."""
    lines = ["flowchart LR"]
    for name, stage in graph.nodes.items():
        config = stage.config
        count = f" x{config.replicas}" if config.replicas > 1 else ""
        lines.append(f'    {name}["{name}{count}"]')
    for edge in graph.edges:
        source, target = graph.node_of(edge.source), graph.node_of(edge.target)
        arrow = "-->" if isinstance(edge, Queue) else "-.->"
        lines.append(f'    {source} {arrow}|"{edge.source.message.__name__}: {bounds(edge)}"| {target}')
    return "\n".join(lines)


def bounds(edge: Edge) -> str:
    """Return what bounds an edge: its depth, order and staleness, or its credits."""
    if isinstance(edge, Queue):
        parts = [f"depth {edge.depth}"]
        if edge.window is not None:
            parts.append(f"in order, window {edge.window}")
        if edge.max_staleness is not None:
            parts.append(f"staleness <= {edge.max_staleness}")
        return ", ".join(parts)
    if isinstance(edge, Credits):
        return f"{edge.initial} credits, {edge.per_version} per version"
    return "newest wins" if isinstance(edge, Latest) else ""


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
