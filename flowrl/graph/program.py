"""A graph file: a `Settings` class and a function `build(settings) -> Graph`, loaded by path.

Its graph as plain data (`plan_of`, `graph_of`) is shown, stored with a run and rebuilt in another process, without
pickle.

Tests: tests/unit/graph/test_graph.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.config import Config, given, resolve
from flowrl.errors import ConfigError, FlowrlError, GraphError, check_text
from flowrl.graph.edges import Credits, Latest, Queue
from flowrl.graph.graph import Graph, RunSettings, with_bounds
from flowrl.graph.stage import Specification, from_specification, specification
from flowrl.imports import add_places, load_afresh

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from flowrl.graph.edges import Edge

    # Says what devices imply for the settings of a graph: the graph, its nodes by where their settings stand, and what
    # is given -> defaults by address.
    Placing = Callable[[Graph, Mapping[str, str], Mapping[str, Any]], Mapping[str, Any]]


LOOKED_S = 0.5  # for what has no effect
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


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """A graph file with its settings resolved and its graph built; nothing has started."""

    path: Path
    settings: Any  # the file's own Settings, a RunSettings
    graph: Any  # Graph
    unread: Any = list  # () -> addresses of settings that were given and change nothing of the graph


def load_program(
    path: Path, *, config: Path | None = None, overrides: Sequence[str] = (), placing: Placing | None = None
) -> Program:
    """Load a graph file, resolve its settings, build its graph and check it.

    `placing` is asked, with the graph as it would be without devices, what these imply for its settings.

    Raises:
        GraphError: the file is missing, has no Settings or build, or raises.
        ConfigError: a setting is wrong.
    """
    check_text(str(path), str(path))
    places = [Path.cwd(), path.resolve().parent]  # where user code stands
    add_places(places)
    module = _load_module(path)
    for name in ("Settings", "build"):
        if not hasattr(module, name):
            raise GraphError(
                str(path), f"has no {name!r}", "a graph file defines Settings and build(settings) -> Graph"
            )
    kind: Any = module.Settings
    if not (isinstance(kind, type) and issubclass(kind, RunSettings)):
        raise GraphError(
            str(path),
            "its Settings does not extend RunSettings",
            "write class Settings(RunSettings) from flowrl.graph.graph",
        )
    read = partial(resolve, kind, config=config, overrides=overrides, places=places)
    asked = given(kind, config=config, overrides=overrides)
    settings = _guarded(path, "Settings", read)
    graph = _guarded(path, "build", build_graph, module, settings)
    graph.check()
    if placing is not None:
        found = placing(graph, node_paths(settings, graph), asked)
        settings = _guarded(path, "Settings", partial(read, implied=found))
        graph = _guarded(path, "build", build_graph, module, settings)
        graph.check()
    plan = plan_of(graph)
    graph_of(plan)  # every process will rebuild its stage from the plan
    plain = partial(resolve, kind, places=places)
    unread = partial(_unread, module, settings, plain, asked, plan)
    return Program(path=path, settings=settings, graph=graph, unread=unread)


def _unread(
    module: Any, settings: Any, plain: Callable[[], Any], asked: Mapping[str, Any], plan: GraphPlan
) -> list[str]:
    """Return what was given and makes no other graph than its default does: its node is not there, mostly.

    Each is tried, for half a second in all. What a graph cannot be built without is read.
    """
    own = {name: value for name, value in asked.items() if name not in RunSettings.__struct_fields__}
    found: list[str] = []
    until_s = time.monotonic() + LOOKED_S
    with contextlib.suppress(ConfigError):  # some have no default
        default = plain()
        for address in _leaves(own, settings):
            with contextlib.suppress(Exception):
                other = _as_it_comes(settings, default, address)
                if other != settings and plan_of(build_graph(module, other)) == plan:
                    found.append(".".join(address))
            if time.monotonic() > until_s:
                break
    return found


def _leaves(asked: Mapping[str, Any], settings: Any) -> Iterator[list[str]]:
    """Yield the addresses of what is given, down to what is no settings any more."""
    for name, value in asked.items():
        inner = getattr(settings, name)
        if isinstance(value, dict) and isinstance(inner, Config):
            yield from ([name, *rest] for rest in _leaves(cast("dict[str, Any]", value), inner))
        else:
            yield [name]


def _as_it_comes(settings: Any, plain: Any, address: Sequence[str]) -> Any:
    """Return settings with one of them as it is by default."""
    name, *rest = address
    default = getattr(plain, name)
    return msgspec.structs.replace(
        settings, **{name: _as_it_comes(getattr(settings, name), default, rest) if rest else default}
    )


def get_setting(settings: Any, path: str) -> Any:
    """Return the value at a path, or None where there is none."""
    for name in path.split("."):
        known = cast("dict[str, Any]", settings) if isinstance(settings, dict) else {}
        settings = known.get(name) if isinstance(settings, dict) else getattr(settings, name, None)
    return settings


def node_paths(settings: Any, graph: Graph) -> dict[str, str]:
    """Return path -> a node whose settings stand there: its name, or that of several with a number behind it.

    `reward_model` are the settings of `reward_model_0` and `reward_model_1`.
    """
    found: dict[str, str] = {}
    for node, stage in graph.nodes.items():
        for path in (node, node.rstrip("0123456789").removesuffix("_")):
            if type(get_setting(settings, path)) is type(stage.config):
                found.setdefault(path, node)
                break
    return found


def build_graph(module: Any, settings: Any) -> Graph:
    """Build a graph file's graph, with the depths of queues that the settings give.

    Raises:
        GraphError: `build` returned something else.
        ConfigError: a depth is given for what is not a queue.
    """
    graph = module.build(settings)
    if not isinstance(graph, Graph):
        what = f"build returned {type(graph).__name__}, not a Graph"
        raise GraphError(str(module.__file__), what, "return Graph(...)")
    if not settings.depths:
        return graph
    depths = {f"{node}.{port}": depth for node, ports in settings.depths.items() for port, depth in ports.items()}
    edges = [_with_depth(edge, depths.pop(graph.address(edge.target), None)) for edge in graph.edges]
    if depths:
        queues = [graph.address(edge.target) for edge in graph.edges if isinstance(edge, Queue)]
        raise ConfigError(
            f"depths.{next(iter(depths))}", "is not a port that a queue leads to", f"name one of {', '.join(queues)}"
        )
    return dataclasses.replace(graph, edges=edges)


def _with_depth(edge: Edge, depth: int | None) -> Edge:
    if depth is None or not isinstance(edge, Queue):
        return edge
    return with_bounds(edge, depth=depth)


def _load_module(path: Path) -> Any:
    if not path.is_file():
        raise GraphError(str(path), "no such graph file", "`flowrl init .` writes the shipped ones to graphs/")
    if path.suffix != ".py":
        raise GraphError(str(path), "is not a Python file", "name a file such as graphs/ppo_async.py")
    return _guarded(path, "the file", load_afresh, path)


def _guarded(path: Path, what: str, function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except FlowrlError:
        raise
    except (Exception, SystemExit) as error:
        line = _line_in(path, error)
        raise GraphError(f"{path}{line}", f"{what} raised {type(error).__name__}: {error}", "see --debug") from error


def _line_in(path: Path, error: BaseException) -> str:
    """Return ":line" of the innermost frame of the traceback that is in the graph file."""
    trace, line = error.__traceback__, ""
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == path.resolve():
            line = f":{trace.tb_lineno}"
        trace = trace.tb_next
    return line
