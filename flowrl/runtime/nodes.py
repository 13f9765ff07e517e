"""The nodes of a Ray cluster, as machines: what Ray knows of each, and what each proves before a run starts on it.

A node is asked by a task that is tied to it; its answer is bytes.

Invariants:
- nobody is believed to see the run's directory who has not read there what the driver wrote and written what the driver
  then found;
- what a run needs on every node (versions, files, the time of day) is held against the driver's before anything
  starts;
- the first node that lacks something is named.

Imports nothing heavy: a node's Python runs it. Called by launch and by doctor.

Tests: tests/unit/runtime/test_nodes.py
"""

from __future__ import annotations

import ast
import os
import platform
import shutil
import socket
import sys
import threading
import time
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.errors import FlowrlError, ResourceError
from flowrl.imports import home_of
from flowrl.runtime.devices import Machine, num_cores, visible_machine

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

SAME = ("flowrl-engine", "ray", "torch", "vllm", "deepspeed", "transformers", "msgspec")  # on every node
MAX_CLOCK_GAP_S = 60.0  # events of two nodes are told and drawn in one order
NAME_S = 3.0  # for a node to look its own name up


class RayNode(msgspec.Struct, frozen=True, kw_only=True):
    """What Ray knows of a node."""

    id: str
    address: str
    is_alive: bool
    cpus: float
    gpus: float
    is_head: bool = False


def node_of(told: Mapping[str, Any]) -> RayNode:
    """Return a node from Ray's own description of it."""
    resources: dict[str, float] = told.get("Resources") or {}
    return RayNode(
        id=told["NodeID"],
        address=told["NodeManagerAddress"],
        is_alive=told["Alive"],
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        is_head="node:__internal_head__" in resources,
    )


class NodeQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """What a node is asked."""

    run_dir: str = ""  # "": of none
    token: str = ""  # the name of a file in it
    paths: list[str] = []  # that must be there
    files: dict[str, str] = {}  # of user code, with their digests
    folder: str = ""  # the driver's working directory, from which relative paths count


class NodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a node answers."""

    host_name: str
    is_resolved: bool  # its own name, within `NAME_S`
    versions: dict[str, str]
    machine: Machine  # with the GPUs that Ray's own processes there may see
    shm_bytes: int  # free
    time_s: float
    seen: str  # what it read in the run's directory
    wrote: str  # the file that it wrote there
    missing: list[str]  # of the paths
    differing: list[str]  # files of user code that are not there, or not the same


def report_on(question: NodeQuestion) -> NodeReport:
    """Look at this machine."""
    folder = Path(question.folder)
    name = socket.gethostname()
    seen, wrote = _prove(question)
    return NodeReport(
        host_name=name,
        is_resolved=_resolves(name),
        versions=_versions(),
        machine=_machine(),
        shm_bytes=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        time_s=time.time(),
        seen=seen,
        wrote=wrote,
        missing=[path for path in question.paths if not (folder / path).exists()],
        differing=[path for path, digest in question.files.items() if digest_of_file(Path(path)) != digest],
    )


def answer(question: bytes) -> bytes:
    """Do `report_on` in a Ray task."""
    return msgspec.json.encode(report_on(msgspec.json.decode(question, type=NodeQuestion)))


def digest_of_file(path: Path) -> str:
    """Return the digest of a file, "" where there is none."""
    try:
        return blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return ""


def _prove(question: NodeQuestion) -> tuple[str, str]:
    """Read the run's token and write it back in a file of this node's own."""
    wrote = f"{question.token}.{socket.gethostname()}-{os.getpid()}"
    if not question.run_dir:
        return "", ""
    try:
        seen = (Path(question.run_dir) / question.token).read_text()
        (Path(question.run_dir) / wrote).write_text(seen)
    except OSError:
        return "", ""
    return seen, wrote


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in SAME:
        for distribution in (name, f"{name}-cpu"):
            try:
                found.setdefault(name, version(distribution).partition("+")[0])
            except PackageNotFoundError:
                continue
    return found


def _machine() -> Machine:
    """Return this machine by the environment that this process was started in: Ray hides GPUs from a task of none."""
    pairs = [os.fsdecode(each).partition("=") for each in Path("/proc/self/environ").read_bytes().split(b"\0")]
    try:
        return visible_machine(environ={name: value for name, _, value in pairs})
    except FlowrlError as error:
        return Machine(cores=num_cores(), why_none=str(error))


def _resolves(name: str) -> bool:
    """Return whether a host name leads to an address soon; a look-up that hangs is left to itself."""
    found: list[str] = []

    def look_up() -> None:
        try:
            found.append(socket.gethostbyname(name))
        except OSError:
            return

    looking = threading.Thread(target=look_up, daemon=True)
    looking.start()
    looking.join(NAME_S)
    return bool(found)


def user_files(plan: Any) -> dict[str, str]:
    """Return the files of the user's code, with their digests.

    They are those that this process has loaded, those that import paths in a plan (plain data) lead to, which may be
    loaded in other processes only. So is what stands beside these and is imported there.
    """
    own = str(Path(__file__).resolve().parents[1]) + os.sep
    others = tuple({sys.prefix, sys.base_prefix, sys.exec_prefix, own})
    found: set[Path] = set()
    for module in list(sys.modules.values()):
        named = getattr(module, "__file__", None) or ""
        if named.endswith(".py") and os.path.isabs(named) and module.__name__ != "__main__":
            found.add(Path(named))
    left = [Path(text.rpartition(":")[0]) for text in _strings(plan) if ".py:" in text and os.path.isabs(text)]
    while left:
        if (file := left.pop()) not in found and file.is_file():
            found.add(file)
            left += imported_beside(file)
    return {
        str(file): digest_of_file(file)
        for file in sorted({each.resolve() for each in found if not str(each).startswith(others)})
        if file.is_file() and "site-packages" not in file.parts and not str(file).startswith(others)
    }


def imported_beside(file: Path) -> list[Path]:
    """Return the files that a file of user code imports from where it stands."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []  # whoever loads it says so
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module or ''}.{alias.name}".lstrip(".") for alias in node.names)}
    home = home_of(file)
    places = [folder.joinpath(*name.split(".")) for folder in {home, file.parent} for name in names if name]
    parents = [folder for place in places for folder in place.parents if folder != home and home in folder.parents]
    candidates = [*(place.with_suffix(".py") for place in places), *(p / "__init__.py" for p in [*places, *parents])]
    return sorted({candidate for candidate in candidates if candidate.is_file()})


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        yield from _strings([*cast("dict[str, Any]", tree).values()])
    elif isinstance(tree, list | tuple):
        for each in cast("list[Any]", tree):
            yield from _strings(each)


def paths_in(tree: Any) -> list[str]:
    """Return the strings of plain data that are paths of this machine: models, data sets, adapters."""
    return sorted(
        {
            text
            for text in _strings(tree)
            if os.sep in text and "\n" not in text and len(text) < 4096 and Path(text).expanduser().exists()
        }
    )


def check_node(address: str, found: NodeReport, here: NodeReport, *, gap_s: float, token: str) -> None:
    """Hold what a node has against what this machine has; `gap_s` is how far its clock is off.

    Raises:
        ResourceError: the first thing that it lacks.
    """
    where = f"node {address}"
    for name, wanted in here.versions.items():
        has = found.versions.get(name, "")
        if name == "python":
            has, wanted = ".".join(has.split(".")[:2]), ".".join(wanted.split(".")[:2])
        if has != wanted:
            what = f"has {name} {has or 'not installed'}, this machine has {wanted}"
            raise ResourceError(where, what, "install the same on both, or leave the node out with cluster.nodes")
    if abs(gap_s) > MAX_CLOCK_GAP_S:
        what = f"its clock is {abs(gap_s):.0f} s {'ahead of' if gap_s > 0 else 'behind'} this machine's"
        raise ResourceError(where, what, "let both follow a time server (chrony, ntpd)")
    if found.missing:
        what = f"has no {found.missing[0]}" + (f" and {len(found.missing) - 1} more" if found.missing[1:] else "")
        raise ResourceError(where, what, "put it on a disk that every node sees, or copy it to the same path there")
    if found.seen != token:
        what = "does not see the run's directory: what it wrote there would be lost to the run"
        raise ResourceError(
            where, what, "give a --runs-dir on a disk that every node sees, or leave the node out with cluster.nodes"
        )


def fit(
    wanted: Sequence[tuple[str, Mapping[str, float]]], nodes: Iterable[RayNode]
) -> tuple[dict[str, str], list[str]]:
    """Return on which node each of `wanted` (who, and what it takes) has room, largest first, and who has none.

    Two nodes of one CPU have room for [("learner.0", {"CPU": 1}), ("generator.0", {"CPU": 1})], not for {"CPU": 2}.
    """
    free = [(node.address, {"CPU": node.cpus, "GPU": node.gpus}) for node in nodes if node.is_alive]
    found: dict[str, str] = {}
    left: list[str] = []
    for who, needs in sorted(wanted, key=lambda each: (-each[1].get("GPU", 0.0), -each[1].get("CPU", 0.0))):
        room = next((each for each in free if all(each[1].get(k, 0.0) >= v - 1e-9 for k, v in needs.items())), None)
        if room is None:
            left.append(f"{who} ({amounts(needs)})")
            continue
        found[who] = room[0]
        for name, amount in needs.items():
            room[1][name] -= amount
    return found, left


def lacking(wanted: Sequence[tuple[str, Mapping[str, float]]], nodes: Iterable[RayNode]) -> list[str]:
    """Return who of `wanted` has no room on any node, with what it takes; see `fit`."""
    return fit(wanted, nodes)[1]


def amounts(needs: Mapping[str, float]) -> str:
    """Return resources in words; {"CPU": 1.0, "GPU": 2.0} is "1 CPU, 2 GPU"."""
    return ", ".join(f"{amount:g} {name}" for name, amount in needs.items()) or "nothing"


def capacities(nodes: Iterable[RayNode]) -> str:
    """Return what each living node has, in words."""
    alive = sorted((node for node in nodes if node.is_alive), key=lambda each: each.address)
    has = [{"CPU": node.cpus, **({"GPU": node.gpus} if node.gpus else {})} for node in alive]
    return "; ".join(f"{node.address} {amounts(each)}" for node, each in zip(alive, has, strict=True)) or "no node"
