"""A graph file: a `Settings` class and a function `build(settings) -> Graph`, loaded by path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.config import resolve
from flowrl.errors import FlowrlError, GraphError
from flowrl.graph.graph import Graph
from flowrl.graph.plan import graph_of, plan_of
from flowrl.graph.settings import RunSettings

if TYPE_CHECKING:
    from collections.abc import Sequence


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """A graph file with its settings resolved and its graph built; nothing has started."""

    path: Path
    settings: Any  # the file's own Settings, a RunSettings
    graph: Any  # Graph


def load_program(path: Path, *, config: Path | None = None, overrides: Sequence[str] = ()) -> Program:
    """Load a graph file, resolve its settings, build its graph and check it.

    Raises:
        GraphError: the file is missing, has no Settings or build, or raises.
        ConfigError: a setting is wrong.
    """
    module = _load_module(path)
    for name in ("Settings", "build"):
        if not hasattr(module, name):
            raise GraphError(
                str(path), f"has no {name!r}", "a graph file defines Settings and build(settings) -> Graph"
            )
    kind: Any = module.Settings
    if not (isinstance(kind, type) and issubclass(kind, RunSettings)):
        raise GraphError(str(path), "its Settings does not extend RunSettings",
                         "write class Settings(RunSettings) from flowrl.graph.settings")  # fmt: skip
    settings = resolve(kind, config=config, overrides=overrides)
    graph = _guarded(path, "build", module.build, settings)
    if not isinstance(graph, Graph):
        raise GraphError(str(path), f"build returned {type(graph).__name__}, not a Graph", "return Graph(...)")
    graph.check()
    graph_of(plan_of(graph))  # every process will rebuild its stage from the plan
    return Program(path=path, settings=settings, graph=graph)


def _load_module(path: Path) -> Any:
    if not path.is_file():
        raise GraphError(str(path), "no such graph file", "name a file such as graphs/ppo_async.py")
    name = f"flowrl_graph_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise GraphError(str(path), "is not a Python file", "name a file such as graphs/ppo_async.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that the file's annotations can be resolved
    _guarded(path, "the file", spec.loader.exec_module, module)
    return module


def _guarded(path: Path, what: str, function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except FlowrlError:
        raise
    except Exception as error:
        line = _line_in(path, error)
        raise GraphError(f"{path}{line}", f"{what} raised {type(error).__name__}: {error}", "see --debug") from error


def _line_in(path: Path, error: Exception) -> str:
    """Return ":line" of the innermost frame of the traceback that is in the graph file."""
    trace, line = error.__traceback__, ""
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == path:
            line = f":{trace.tb_lineno}"
        trace = trace.tb_next
    return line
