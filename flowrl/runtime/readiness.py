"""Whether the nodes of a cluster can carry a run, found out before it starts; brings user code to those that lack it.

What must be on every node: the run's directory (one that all see, which each proves), the same versions, what the
settings name by path. User code is either found on every node under its own path, unchanged, or copied to `code` in the
run's directory, from where all processes then load it (decision 0009). Called by launch, `check --address` and doctor.

What a run is placed on are the nodes whose GPUs are alike (`equal_machines`): ranks march together, and nobody says
which of the nodes a process gets.

Tests: tests/unit/runtime/test_nodes.py, tests/unit/tuning/test_plans_of_clusters.py
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.errors import ResourceError, number_of
from flowrl.graph.program import GraphPlan, plan_of
from flowrl.imports import home_of
from flowrl.runtime.cluster import Cluster
from flowrl.runtime.devices import SAME_SIZE, check_usable, unusable
from flowrl.runtime.fleet import usable
from flowrl.runtime.nodes import NodeQuestion, capacities, check_node, paths_in, report_on, user_files
from flowrl.runtime.placement import places

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from flowrl.graph.graph import Graph
    from flowrl.graph.program import Program
    from flowrl.runtime.devices import Machine
    from flowrl.runtime.nodes import NodeReport, RayNode

CODE = "code"  # in a run's directory


@dataclass(frozen=True)
class Survey:
    """What the nodes answered."""

    nodes: list[RayNode]
    reports: dict[str, NodeReport]  # by address
    here: NodeReport
    gaps_s: dict[str, float]  # how far each node's clock is ahead of this machine's, about
    token: str
    files: list[str]  # of user code


async def survey(cluster: Cluster, program: Program | None, run_dir: Path | None) -> Survey:
    """Ask every node that a run may use.

    Raises:
        ResourceError: there is none, one does not answer, or cannot run flowrl.
    """
    nodes = await cluster.nodes()
    if program is not None:
        config = program.settings.cluster
        unknown = set(config.nodes) - {node.address for node in nodes if node.is_alive}
        if unknown:
            what = f"no node {sorted(unknown)[0]} is there; the cluster has {capacities(nodes)}"
            raise ResourceError("cluster.nodes", what, "name nodes by the addresses that Ray knows")
        nodes = usable(nodes, config)
    nodes = [node for node in nodes if node.is_alive]
    question = NodeQuestion(folder=os.getcwd())
    if program is not None:
        plan = msgspec.to_builtins(plan_of(program.graph))
        question = msgspec.structs.replace(question, paths=paths_in(plan), files=user_files(plan))
    with _token(run_dir) as token:
        if run_dir is not None:
            question = msgspec.structs.replace(question, run_dir=str(run_dir), token=token)
        here = report_on(question)
        began_s = time.time()
        reports = await cluster.survey(nodes, question)
        middle_s = (began_s + time.time()) / 2
        if run_dir is not None:  # what a node wrote must have come here
            reports = {
                address: report if (run_dir / report.wrote).is_file() else msgspec.structs.replace(report, seen="")
                for address, report in reports.items()
            }
    gaps_s = {address: report.time_s - middle_s for address, report in reports.items()}
    return Survey(nodes, reports, here, gaps_s, here.seen, [*question.files])


def look_for_gpus(program: Program, address: str) -> Survey | None:
    """Return what the nodes that a run may use answer; None where Ray knows of no GPU there.

    Raises:
        ResourceError: the cluster does not answer; otherwise see `survey`.
    """

    async def look(cluster: Cluster) -> Survey | None:
        nodes = usable(await cluster.nodes(), program.settings.cluster)
        return await survey(cluster, program, None) if any(node.gpus >= 1 for node in nodes) else None

    with Cluster(None, address) as cluster:
        return asyncio.run(look(cluster))


def equal_machines(found: Survey) -> tuple[dict[str, Machine], dict[str, str]]:
    """Return by address the machines to place on, and why each other one with GPUs is none of them.

    They have as many GPUs each and these as much memory; of several such groups it is the one with the most memory. Of
    a node's GPUs those count that Ray gives out.
    """
    able: dict[str, Machine] = {}
    left_out: dict[str, str] = {}
    for node in [node for node in found.nodes if node.gpus >= 1]:
        seen = found.reports[node.address].machine
        machine = msgspec.structs.replace(seen, gpus=seen.gpus[: int(node.gpus)])
        if why := _why_unable(machine, int(node.gpus)):
            left_out[node.address] = why
        else:
            able[node.address] = machine
    groups: list[dict[str, Machine]] = [{}]
    groups += [{address: one for address, one in able.items() if _are_alike(one, each)} for each in able.values()]
    best = max(groups, key=lambda group: sum(sum(_sizes(each)) for each in group.values()))
    return best, left_out | {address: f"has {each}" for address, each in able.items() if address not in best}


def _why_unable(machine: Machine, num_gpus: int) -> str:
    """Return why a node's GPUs cannot be planned for, or ""."""
    if len(machine.gpus) < num_gpus:
        why = f" ({machine.why_none})" if machine.why_none else ""
        return f"Ray gives out {number_of(num_gpus, 'GPU')}, and the driver shows {len(machine.gpus)}{why}"
    try:
        check_usable(machine)
    except ResourceError as error:
        return error.what
    return unusable(machine).partition(": ")[0]


def _are_alike(one: Machine, other: Machine) -> bool:
    sizes = _sizes(one) + _sizes(other)
    return len(one.gpus) == len(other.gpus) and min(sizes) >= SAME_SIZE * max(sizes)


def _sizes(machine: Machine) -> list[int]:
    return [gpu.total_bytes for gpu in machine.gpus]


@contextlib.contextmanager
def _token(run_dir: Path | None) -> Generator[str]:
    """Write a token into a run's directory; it goes with all that was written back."""
    token = f".seen-{secrets.token_hex(8)}"
    if run_dir is not None:
        (run_dir / token).write_text(secrets.token_hex(8))
    try:
        yield token
    finally:
        if run_dir is not None:
            for file in run_dir.glob(f"{token}*"):
                file.unlink(missing_ok=True)


def check_survey(found: Survey, graph: Graph, say: Callable[[str], None]) -> None:
    """Hold what the nodes answered against this machine, and their GPUs against what a graph reserves.

    Raises:
        ResourceError: the first that lacks something.
    """
    for address, report in found.reports.items():
        check_node(address, report, found.here, gap_s=found.gaps_s[address], token=found.token)
        if not report.is_resolved:
            say(f"node {address}: its own name {report.host_name} cannot be looked up; its processes go by {address}")
    num_gpus = sum(node.gpus for node in found.nodes)
    if num_gpus and not any(place.gpus for place in places(graph)):
        machines, left_out = equal_machines(found)
        unable = "" if machines else f" ({'; '.join(f'{address}: {why}' for address, why in left_out.items())})"
        say(
            f"warning: the cluster has {number_of(num_gpus, 'GPU')} and the graph reserves none{unable}: set gpus, "
            "ranks and replicas (flowrl plan --on says which)"
        )


def bring_code(found: Survey, run_dir: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Copy user code into the run's directory where a node lacks some of it; returns each file's place there."""
    lacking = {address: report.differing for address, report in found.reports.items() if report.differing}
    if not lacking:
        return {}
    homes: dict[Path, Path] = {}
    places: dict[str, str] = {}
    for file in map(Path, found.files):
        home = home_of(file)
        target = homes.setdefault(home, run_dir / CODE / str(len(homes))) / file.relative_to(home)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        places[str(file)] = str(target)
    address, files = next(iter(lacking.items()))
    say(
        f"user code: node {address} has no {Path(files[0]).name} as it is here; "
        f"every process loads it from {run_dir / CODE}"
    )
    return places


def moved(plan: GraphPlan, places: dict[str, str]) -> GraphPlan:
    """Return a plan whose import paths lead to the places of user code."""
    if not places:
        return plan

    def follow(tree: Any) -> Any:
        if isinstance(tree, str):
            file, colon, name = tree.rpartition(":")
            return f"{places[file]}:{name}" if colon and file in places else tree
        if isinstance(tree, dict):
            return {key: follow(value) for key, value in cast("dict[str, Any]", tree).items()}
        return [follow(each) for each in cast("list[Any]", tree)] if isinstance(tree, list | tuple) else tree

    return msgspec.convert(follow(msgspec.to_builtins(plan)), GraphPlan)
