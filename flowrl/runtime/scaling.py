"""`flowrl scale RUN NODE=N`: more or fewer replicas of a node while its run goes on.

The command writes what it asks for into the run's directory, and the driver, wherever it is, takes it up. A replica
that joins starts from the newest weights, as one that was restarted does; one that leaves hands back what it holds,
which is issued again. So the staleness bound, the credits and the ledger stay what they are. `cluster.most` asks
likewise, as nodes join and go (runtime/fleet.py). Called by the command line and by launch.

Tests: tests/unit/runtime/test_scaling.py
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.errors import ConfigError, DataError
from flowrl.graph.program import graph_of, node_paths
from flowrl.imports import suggest
from flowrl.runtime.rundir import existing_run, is_held, read_plan
from flowrl.telemetry.files import UNREADABLE, read_file, replace_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from flowrl.graph.graph import Graph
    from flowrl.graph.program import Program
    from flowrl.runtime.supervisor import Scaling

FILE = "scale.json"
MOST_REPLICAS = 64  # that `auto` asks for on a cluster
LOOK_S = 1.0  # between two looks at it: a shared disk tells nobody what is written on another machine


def scale(run_dir: Path, asked: Sequence[str]) -> str:
    """Ask a run for numbers of replicas, each as "generator=6"; returns what was asked in words.

    Raises:
        ConfigError: the run does not go on, or a node cannot have that many.
    """
    graph = graph_of(read_plan(existing_run(run_dir)))
    wanted: dict[str, int] = {}
    for each in asked:
        node, _, number = each.partition("=")
        if not re.fullmatch("[1-9][0-9]{0,4}", number):
            raise ConfigError("scale", f"{each!r} is not NODE=N with N of 1 to 99999", "write generator=4")
        check_scales(graph, node, "scale")
        wanted[node] = int(number)
    if not is_held(run_dir):
        raise ConfigError(str(run_dir), "is not running: no process drives it", "resume it with --set NODE.replicas=N")
    replace_file(run_dir / FILE, msgspec.json.encode(_read(run_dir) | wanted))
    return ", ".join(f"{node} {count}" for node, count in wanted.items())


def check_scales(graph: Graph, node: str, where: str) -> None:
    """Insist that a node may have other numbers of replicas while its run goes on.

    Raises:
        ConfigError: there is no such node, or it may not.
    """
    if node not in graph.nodes:
        raise ConfigError(where, f"the run has no node {node!r}{suggest(node, graph.nodes)}", "name one of its nodes")
    stage = graph.nodes[node]
    if stage.is_stateful or stage.is_single or stage.config.share:
        why = "sits on the devices of another node" if stage.config.share else "can have one replica only"
        raise ConfigError(f"{where} {node}", why, "scale generators and scorers")


def check_most(graph: Graph, most: dict[str, int]) -> None:
    """Insist that nodes may have as many replicas as `cluster.most` says.

    Raises:
        ConfigError: one may not, or begins with more.
    """
    for node, count in most.items():
        check_scales(graph, node, "cluster.most")
        if (least := graph.nodes[node].config.replicas) > count:
            what = f"is {count}, but {node}.replicas={least} are started"
            raise ConfigError(f"cluster.most.{node}", what, "raise it, or lower the replicas")


def most_of_auto(program: Program, given: Mapping[str, Any]) -> dict[str, int]:
    """Return as `cluster.most` what `NODE.replicas=auto` means there, for nodes of which there may be several."""
    found: dict[str, int] = {}
    for path, node in node_paths(program.settings, program.graph).items():
        part = given.get(path)
        is_auto = isinstance(part, dict) and cast("dict[str, Any]", part).get("replicas") == "auto"
        if is_auto and node not in program.settings.cluster.most:
            with contextlib.suppress(ConfigError):  # one that has state, or shares devices, stays alone
                check_scales(program.graph, node, path)
                found[node] = max(MOST_REPLICAS, program.graph.nodes[node].config.replicas)
    return found


def _read(run_dir: Path) -> dict[str, int]:
    try:
        return msgspec.json.decode(read_file(run_dir / FILE) or b"{}", type=dict[str, int])
    except (DataError, *UNREADABLE):
        return {}


async def follow_scale(run_dir: Path, scaling: Scaling) -> None:
    """Take up what is asked for from now on, until cancelled."""
    (run_dir / FILE).unlink(missing_ok=True)  # of the start before
    seen: dict[str, int] = {}
    while True:
        await asyncio.sleep(LOOK_S)
        wanted = _read(run_dir)
        for node, count in wanted.items():
            if seen.get(node) != count:
                scaling.ask(node, count)
        seen = wanted
