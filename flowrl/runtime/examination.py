"""A cluster looked at before a run: the bodies of `flowrl doctor --address` and `flowrl check --address`.

Of each node: what it has, whether it sees the directory that runs are kept in, how fast bytes come from it and whether
its ports can be reached. Nothing is left running, and nothing is written but a token that goes again.

Tests: tests/cluster/test_two_machines.py
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import msgspec

from flowrl.errors import ResourceError
from flowrl.runtime.cluster import Cluster, Unanswered
from flowrl.runtime.fleet import name_of, needs_of
from flowrl.runtime.nodes import amounts, capacities, check_node, fit
from flowrl.runtime.placement import places
from flowrl.runtime.readiness import check_survey, survey

if TYPE_CHECKING:
    from collections.abc import Callable

    from flowrl.graph.program import Program
    from flowrl.runtime.nodes import RayNode

    Say = Callable[[str], None]
    Level = Literal["ok", "note", "FIX"]
    Tell = Callable[[Level, str, str, str], None]

SENT_BYTES = 32 << 20
REACH_S = 10.0


def examine(address: str, runs_dir: Path, say: Tell) -> None:
    """Say of each node of a cluster what it has: level (ok, note, FIX), name, text, remedy.

    Raises:
        ResourceError: the cluster does not answer, or a node cannot run flowrl.
    """
    present = next(folder for folder in (runs_dir.resolve(), *runs_dir.resolve().parents) if folder.exists())
    with Cluster(None, address) as cluster:
        asyncio.run(_examine(cluster, present, say))


async def _examine(cluster: Cluster, present: Path, say: Tell) -> None:
    with TemporaryDirectory(prefix=".flowrl-doctor-", dir=present) as directory:
        found = await survey(cluster, None, Path(directory))
    for node in found.nodes:
        report, name = found.reports[node.address], f"node {node.address}"
        has = amounts({"CPU": node.cpus, **({"GPU": node.gpus} if node.gpus else {})})
        names = ", ".join(gpu.name for gpu in report.machine.gpus)
        versions = ", ".join(f"{each} {number}" for each, number in report.versions.items())
        say("ok", name, f"{report.host_name}: {has} for Ray; {names or 'no GPU'}; {versions}", "")
        try:
            check_node(node.address, report, found.here, gap_s=found.gaps_s[node.address], token=found.token)
            say("ok", name, f"sees {present}, clock {found.gaps_s[node.address]:+.0f} s", "")
        except ResourceError as error:
            say("FIX", name, error.what, error.remedy)
        if not report.is_resolved:
            remedy = "flowrl goes by addresses; add it to /etc/hosts for other programs"
            say("note", name, f"its own name {report.host_name} cannot be looked up", remedy)
        say(*(await _reached(cluster, node)))


async def _reached(cluster: Cluster, node: RayNode) -> tuple[Level, str, str, str]:
    """Send bytes both ways between this machine and a node; says how fast, or what cannot be reached."""
    name, secret = f"node {node.address}", secrets.token_bytes(16)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((node.address, 9))  # no packet is sent: the address of this machine on the way there
        own = probe.getsockname()[0]
    with socket.create_server((own, 0)) as listening:
        listening.settimeout(3 * REACH_S)
        taking = asyncio.get_running_loop().run_in_executor(None, _take, listening, node.address, secret)
        try:
            await cluster.on(node, send, (own, listening.getsockname()[1], node.address, secret), within_s=3 * REACH_S)
            speed = await taking
        except (ResourceError, Unanswered, OSError) as error:
            what = " ".join(str(error).split())
            return "FIX", name, f"cannot be reached both ways ({what})", "open the ports between the nodes"
    return "ok", name, f"{speed / 1e6:,.0f} MB/s from it, ports are open both ways", ""


def send(own: str, port: int, address: str, secret: bytes) -> bytes:
    """Listen on the node and send from there; runs on it."""
    with socket.create_server((address, 0)) as listening, socket.create_connection((own, port), REACH_S) as calling:
        calling.sendall(secret + listening.getsockname()[1].to_bytes(2, "little"))
        listening.settimeout(REACH_S)
        sending, _ = listening.accept()
        with sending:
            sending.sendall(bytes(SENT_BYTES))
    return b""


def _take(listening: socket.socket, address: str, secret: bytes) -> float:
    """Hear from the node at which port it listens, and take its bytes; returns bytes a second."""
    calling, _ = listening.accept()
    with calling:
        calling.settimeout(REACH_S)
        said = calling.recv(len(secret) + 2, socket.MSG_WAITALL)
        if not hmac.compare_digest(said[:-2], secret):
            raise ConnectionError("somebody else called")
        with socket.create_connection((address, int.from_bytes(said[-2:], "little")), REACH_S) as taking:
            began_s, left = time.monotonic(), SENT_BYTES
            while left and (piece := taking.recv(min(left, 1 << 20))):
                left -= len(piece)
    return (SENT_BYTES - left) / max(time.monotonic() - began_s, 1e-6)


def check_cluster(program: Program, address: str, say: Say) -> None:
    """Hold a graph against a cluster and say what would start where; starts nothing that stays.

    Raises:
        ResourceError: a node lacks something, or there is no room.
    """
    with Cluster(program.graph, address) as cluster:
        for line in asyncio.run(_plan(cluster, program, say)):
            say(line)


async def _plan(cluster: Cluster, program: Program, say: Say) -> list[str]:
    found = await survey(cluster, program, None)
    check_survey(found, program.graph, say)
    config = program.settings.cluster
    home = await cluster.home(found.nodes, config.home)
    all_places = places(program.graph)
    own = [place for place in all_places if place.host == place.node and (place.cpus or place.gpus)]
    first = [p for p in own if p.node == program.graph.until_node and p.replica == p.rank == 0]  # it is to be at home
    at_home, _ = fit([(name_of(place), needs_of(place)) for place in first], [home])
    for needs in [needs_of(place) for place in first if name_of(place) in at_home]:
        left_over = {"cpus": home.cpus - needs.get("CPU", 0.0), "gpus": home.gpus - needs.get("GPU", 0.0)}
        home = msgspec.structs.replace(home, **left_over)
    nodes = [home, *(node for node in found.nodes if node.id != home.id)]
    fitting, left = fit([(name_of(p), needs_of(p)) for p in own if name_of(p) not in at_home], nodes)
    fitting |= at_home
    if left:
        what = f"no room for {', '.join(left)}; the nodes have {capacities(found.nodes)}"
        raise ResourceError("placement", what, "lower replicas, ranks, cpus or gpus, or enlarge the cluster")
    by_node: dict[str, list[str]] = {home.address: ["the flow"]}
    for place in all_places:
        host = f"{place.host}.{place.replica}" + (f" rank {place.rank}" if place.rank else "")
        by_node.setdefault(fitting.get(host, home.address), []).append(name_of(place))
    return [f"node {address}: {', '.join(names)}" for address, names in by_node.items()]
