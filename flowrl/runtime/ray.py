"""The Ray runtime: the supervisor in the driver, everything else in actors, one machine or a cluster.

The driver runs the supervisor on `RayWorkers`: it starts the hub and the replicas (runtime/actors.py) and asks each of
them again and again what there is to tell; one that does not answer in time is lost.

Invariants:
- every process of an attempt is proved dead before the next one starts and when `run_ray` returns, whatever ended it;
- or, where it cannot be reached, kept from every file (runtime/rundir.py);
- no wait is without an end (runtime/cluster.py).

Tests: tests/ray/test_synchronous_runs.py
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import msgspec
import ray as _ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from flowrl import errors
from flowrl.errors import FlowrlError, ResourceError, StageError, StallError
from flowrl.graph.program import plan_of
from flowrl.runtime.actors import Failure, HubActor, ProxyActor, ReplicaActor, ReplicaPlan
from flowrl.runtime.cluster import Cluster, Unanswered, ask
from flowrl.runtime.fleet import Fleet, needs_of
from flowrl.runtime.flow import Released, node_name
from flowrl.runtime.lease import turn_of
from flowrl.runtime.local import num_readers
from flowrl.runtime.nodes import amounts
from flowrl.runtime.placement import Place, environment, module_path, places, places_of
from flowrl.runtime.proxy import num_proxies
from flowrl.runtime.readiness import moved
from flowrl.runtime.rundir import Claim, holders
from flowrl.runtime.supervisor import Death, HostLost, Options, Outcome, Start, Supervisor, report_interval_s
from flowrl.runtime.wire import Address
from flowrl.telemetry import clock
from flowrl.telemetry.events import Notice, decode_events

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.graph.graph import Graph

ray: Any = _ray  # its own types are partial
Handle = Any  # a Ray actor handle; Ray gives it no usable type

PLACE_TOLD_S = 30.0  # that a replica has no process yet, before it is said
FOR_EVER_S = 7 * 86400.0  # as long as a run may last
BORN_S = 300.0  # for a process to start, its environment included
BURY_LOOK_S = 0.1  # between two looks whether a process that was ended is gone
POLITE_LOOKS = 15  # while it may end by Ray's own means; then it is killed
BURY_LOOKS = 300  # it may be in the middle of a large write


async def run_ray(graph: Graph, options: Options, cluster: Cluster) -> Outcome:
    """Run a graph to its end on a Ray that has been started.

    Raises:
        FlowrlError: the first failure that is not recovered from, or a StallError.
    """
    assert options.run_dir is not None, "a run on Ray has a directory"
    claimed = options.claim or Claim(options.run_dir)
    try:
        return await Supervisor(graph, RayWorkers(graph, options, cluster, claimed), options).run()
    finally:
        if options.claim is None:
            claimed.close()


@dataclass
class Attempt:
    """What one attempt has started."""

    number: int
    fleet: Fleet
    hub: Handle = None
    kinds: dict[str, str] = field(default_factory=dict[str, str])
    proxies: dict[str, Handle] = field(default_factory=dict[str, Handle])  # of the hub, by name
    wires: list[Address] = field(default_factory=list[Address])  # where the hub, or each proxy, takes calls to the flow
    num_started: int = 0  # processes, each of which is given the next of the wires
    actors: dict[str, list[Handle]] = field(default_factory=dict[str, "list[Handle]"])  # by replica, in rank order
    waiting: set[str] = field(default_factory=set[str])  # of these, who has waited for a while and been told
    is_told: bool = False  # where everything is
    unborn: set[str] = field(default_factory=set[str])  # replicas that have no process yet
    passing_on: asyncio.Task[None] | None = None


class RayWorkers:
    """Replicas as actors."""

    def __init__(self, graph: Graph, options: Options, cluster: Cluster, claimed: Claim) -> None:
        assert options.run_dir is not None, "a run on Ray has a directory"
        self._graph = graph
        self._options = options
        self._cluster = cluster
        self._claim = claimed
        self._run_dir = options.run_dir
        self._plan = moved(plan_of(graph), options.moved)
        self._fleet = Fleet(graph, cluster, options.placing, self._tell)
        self._attempt: Attempt | None = None
        limit_s = options.heartbeat_timeout_s
        self._interval_s = report_interval_s(len(places(graph)), limit_s)  # between two questions to a process
        self._within_s = limit_s + self._interval_s

    @property
    def _now(self) -> Attempt:
        assert self._attempt is not None, "open comes first"
        return self._attempt

    async def open(self, start: Start) -> None:
        """Prove the processes of the last attempt dead, reserve devices and start the hub at the start's cut."""
        if trouble := self._cluster.trouble(self._options.heartbeat_timeout_s):
            self._tell("warning", "ray", f"{trouble}; Ray is started again")
            await self._cluster.restart()
        await self._bury()
        fleet = self._fleet
        now = self._attempt = Attempt(number=self._claim.begin_attempt(), fleet=fleet)
        try:
            await fleet.reserve()
        except Unanswered as error:
            raise ResourceError("ray", f"its head was {error.what}", "see that the cluster runs") from error
        cut = msgspec.json.encode(start.cut)
        start_number, epoch = self._options.start_number, msgspec.json.encode(clock.epoch())
        plan = msgspec.json.encode(self._plan)
        now.hub = self._start_host(HubActor, plan, str(self._run_dir), cut, now.number, start_number, epoch)
        addresses = [f"{node}.{port}" for node, stage in self._graph.nodes.items() for port in stage.ports]
        wire = Address(*await self._ask_hub("open", self._options.stall_timeout_s, within_s=BORN_S))
        now.wires = await self._start_proxies(wire) or [wire]
        now.kinds = await self._ask_hub("kinds", addresses)
        now.passing_on = asyncio.create_task(self._pass_on_stop())

    def _start_host(self, kind: type, *arguments: Any) -> Handle:
        """Start what the flow is reached by, on the home node."""
        variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": module_path()}
        host = ray.remote(num_cpus=0, runtime_env={"env_vars": variables})(kind)
        return host.options(**self._fleet.at_home()).remote(*arguments)

    async def _start_proxies(self, hub: Address) -> list[Address]:
        """Start the hub's proxies beside it; returns where they listen."""
        now = self._now
        for index in range(num_proxies(self._options.placing.proxies, len(places(self._graph)))):
            name = f"hub.proxy{index}"
            now.proxies[name] = self._start_host(ProxyActor, str(self._run_dir), name, now.number)
        if now.proxies:
            self._tell("info", "hub", f"is called through {len(now.proxies)} proxies (cluster.proxies)")
        found = [self._ask_host(name, each.open, *hub, within_s=BORN_S) for name, each in now.proxies.items()]
        return [Address(*each) for each in await asyncio.gather(*found)]

    async def _ask_proxies(self, wait_s: float) -> None:
        """Look whether every proxy is there, for as long as `wait_s`.

        Raises:
            HostLost: one is not.
        """
        asked = [self._ask_host(name, each.listen, wait_s) for name, each in self._now.proxies.items()]
        if not all(await asyncio.gather(*asked)):
            raise HostLost("flow", "its host is gone from its proxies")

    async def _ask_hub(self, method: str, *arguments: Any, within_s: float | None = None) -> Any:
        """Ask the flow's host.

        Raises:
            HostLost: it is dead, or does not answer.
            FlowrlError: its own reason why it cannot begin.
        """
        return await self._ask_host("hub", getattr(self._now.hub, method), *arguments, within_s=within_s)

    async def _ask_host(self, name: str, call: Any, *arguments: Any, within_s: float | None = None) -> Any:
        """Ask the hub or a proxy; errors as of `_ask_hub`."""
        said = "its host" if name == "hub" else f"its host's {name.rpartition('.')[2]}"
        try:
            return await ask(call, *arguments, where="flow", within_s=within_s or self._within_s)
        except Unanswered as error:
            raise HostLost("flow", f"{said} was {error.what}") from error
        except RayError as error:
            cause = error.__cause__
            if isinstance(cause, FlowrlError):
                raise cause from None
            raise HostLost("flow", f"{said} died", f"its log, with why, is {self._log(name)}") from error

    async def run(self, replica: str, incarnation: int, start: Start) -> None:
        """Start a replica's ranks and wait for their end; one that fails takes the others with it."""
        token = secrets.token_hex(16)
        ranks = places_of(self._graph, replica)
        await self._now.fleet.make_room(ranks)
        actors = [self._start(p, incarnation, start, token) for p in ranks]
        self._now.actors[replica] = actors
        try:
            met = await self._births(replica, ranks, actors)
            if self._options.stopping.is_set():
                await self._request_stop(actors)
            for actor in actors:
                await ask(actor.begin, *met[0], where=replica, within_s=self._within_s)
            async with asyncio.TaskGroup() as listening:
                for actor in actors:
                    listening.create_task(self._listen(replica, actor))
        except (RayError, FlowrlError, ExceptionGroup) as error:
            first = _first(error)
            if isinstance(first, Unanswered):
                raise Death(replica, first.what) from error
            raise (self._death(replica, first) if isinstance(first, RayError) else first) from error

    async def _births(self, replica: str, ranks: list[Place], actors: list[Handle]) -> list[tuple[str, int]]:
        """Wait until every rank has a process; returns where each is. Who waits for a place is told.

        Raises:
            ResourceError: there was no place in time, and the node has no other replica.
        """
        attempt, limit_s = self._now, self._options.placing.place_timeout_s
        attempt.unborn.add(replica)
        births = asyncio.gather(*(ask(a.rendezvous, where=replica, within_s=FOR_EVER_S) for a in actors))
        needs = needs_of(ranks[0])
        try:
            if needs and not (await asyncio.wait([births], timeout=PLACE_TOLD_S))[0]:
                attempt.waiting.add(replica)
                await attempt.fleet.tell_waiting(replica, needs)
            while not births.done():
                await asyncio.wait([births], timeout=limit_s)
                others = {name for name in attempt.actors if node_name(name) == node_name(replica)} - attempt.unborn
                if not births.done() and not others:
                    what = f"has had no place with {amounts(needs)} for {limit_s:.0f} s"
                    raise ResourceError(replica, what, "enlarge the cluster and resume the run")
            met = births.result()
        finally:
            births.cancel()
            await asyncio.gather(births, return_exceptions=True)
            attempt.unborn.discard(replica)
            attempt.waiting.discard(replica)
        attempt.fleet.born(replica, {address for address, _ in met})
        if not attempt.unborn and not attempt.is_told:
            attempt.is_told = True
            if text := attempt.fleet.where():
                self._tell("info", "placement", text)
        return met

    @property
    def unplaced(self) -> set[str]:
        """Return the replicas that have waited for a place for a while."""
        return set(self._now.waiting)

    async def _listen(self, replica: str, actor: Handle) -> None:
        """Take in what a rank has to tell until it ends.

        Raises:
            FlowrlError: it failed, and says why.
            Unanswered: it has not been heard from for too long.
        """
        ended: bytes | None = None
        while ended is None:
            batch, ended = await ask(actor.listen, self._interval_s, where=replica, within_s=self._within_s)
            if batch:
                self._options.consume(decode_events(batch))
        if ended:
            failure = msgspec.json.decode(ended, type=Failure)
            kind: type[FlowrlError] = getattr(errors, failure.kind)
            raise kind(failure.where, failure.what, failure.remedy or f"see {self._log(replica)}")

    def _start(self, place: Place, incarnation: int, start: Start, token: str) -> Handle:
        stage, attempt = self._graph.nodes[place.node], self._now
        attempt.num_started += 1
        plan = ReplicaPlan(
            place=place,
            incarnation=incarnation,
            stage=self._plan.nodes[place.node],
            world_size=stage.config.ranks,
            kinds={address: kind for address, kind in attempt.kinds.items() if node_name(address) == place.node},
            hub=attempt.wires[attempt.num_started % len(attempt.wires)],
            run_dir=str(self._run_dir),
            num_readers=num_readers(self._graph, place.node, self._options.scaling.wanted),
            attempt=attempt.number,
            token=token,
            resume_from=str(start.checkpoint) if start.checkpoint else None,
            folder=os.getcwd(),
            epoch=clock.epoch(),
            turn=turn_of(self._graph, place.node),
        )
        choice: dict[str, Any] = {
            "num_cpus": place.cpus,
            "max_concurrency": 64,
            "runtime_env": {"env_vars": environment(stage.config, devices=attempt.fleet.devices(place))},
            **attempt.fleet.choice(place),
        }
        actor_type: Any = ray.remote(ReplicaActor)
        return actor_type.options(**choice).remote(msgspec.json.encode(plan))

    def _death(self, replica: str, error: Exception) -> FlowrlError:
        if isinstance(error, OutOfMemoryError):
            remedy = "lower generator.kv_cache_bytes or micro_batch_tokens, or run fewer replicas"
            return Death(replica, "Ray ended its process because the machine's memory was full", remedy)
        if isinstance(error, RayActorError):
            return Death(replica, "its process died", f"its log, with why, is {self._log(replica)}")
        return StageError(replica, str(error).strip().splitlines()[-1], f"see {self._log(replica)}")

    def _log(self, replica: str) -> Path:
        return self._run_dir / "logs" / f"{replica}.log"

    async def watch(self) -> None:
        """Wait for a stall, or for the hub, or Ray itself, to be lost; give nodes of the graph the room there is."""
        is_other = True
        while True:
            for node, count in self._now.fleet.room().items() if is_other else ():
                if count != self._options.scaling.wanted.get(node, self._graph.nodes[node].config.replicas):
                    most = self._options.placing.most[node]
                    self._tell("info", node, f"the cluster has room for {count} of at most {most}")
                    self._options.scaling.ask(node, count)
            told, _ = await asyncio.gather(
                self._ask_hub("listen", self._interval_s), self._ask_proxies(self._interval_s)
            )
            batch, stall, lost = told
            self._options.consume(decode_events(batch))
            for replica in lost:
                self._tell(
                    "warning", replica, "kept devices that others wait for, and nothing got on there: it is ended"
                )
                await self.kill(replica)
            if stall:
                raise StallError("flow", stall, "see the run's timeline and logs")
            if trouble := self._cluster.trouble(self._options.heartbeat_timeout_s):
                raise HostLost("ray", trouble)
            is_other = await self._now.fleet.look()

    async def release(self, replica: str, successor: int, *, blames: bool = True) -> Released:
        """Fence a replica off that is gone and give back what it held."""
        await self._ask_proxies(0.0)  # where one is gone, its replicas are gone for no reason of their own
        reissued, poisonous = await self._ask_hub("release", replica, successor, blames)
        if not blames:
            self._now.fleet.left(replica)
        return Released(reissued, poisonous)

    async def kill(self, replica: str) -> None:
        """Kill every rank of a replica, stopped ones of this machine too."""
        for actor in self._now.actors.get(replica, []):
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor)
        marked = {
            f"{replica}.log",
            *(f"{replica}.rank{n}.log" for n in range(1, len(self._now.actors.get(replica, [])))),
        }
        for look in range(BURY_LOOKS):
            left = [pid for pid in holders(self._run_dir / "lock") if _log_of(pid) in marked]
            if not left:
                return
            for pid in left if look >= POLITE_LOOKS else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(BURY_LOOK_S)

    async def has_begun(self) -> bool:
        """Return whether anybody was given something to work on."""
        return await self._ask_hub("has_begun")

    async def totals(self) -> dict[str, int]:
        """Return the ledger's totals."""
        return await self._ask_hub("totals")

    async def close_edges(self) -> None:
        """Close every edge."""
        with contextlib.suppress(HostLost):
            await self._ask_hub("close")

    async def close(self) -> None:
        """Kill every process of the attempt, see that it is dead, and free its devices."""
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        if attempt.passing_on is not None:
            attempt.passing_on.cancel()
            await asyncio.gather(attempt.passing_on, return_exceptions=True)
        if not self._cluster.trouble(0.0) and await attempt.fleet.has_head():
            for actor in [
                *(actor for ranks in attempt.actors.values() for actor in ranks),
                *attempt.proxies.values(),
                attempt.hub,
            ]:
                with contextlib.suppress(RayError, ValueError):
                    ray.kill(actor)
            attempt.fleet.free()
        await self._bury()
        self._claim.begin_attempt()  # what could not be reached writes no more, before anybody looks where to go on

    async def _bury(self) -> None:
        """See that no process of the run but this one is left; those of this machine are killed.

        One that cannot be reached, on a machine that is cut off, is fenced off by the number of the next attempt.
        """
        for look in range(BURY_LOOKS):
            if self._claim.is_alone():
                return
            if look >= POLITE_LOOKS:
                self._claim.kill_processes()
            await asyncio.sleep(BURY_LOOK_S)
        text = "a process of the last attempt may still live; once the next attempt begins it can write no more"
        self._tell("warning", "ray", text)

    def _tell(self, level: str, where: str, text: str) -> None:
        self._options.consume([Notice(level=level, where=where, text=text, time_s=self._options.now())])

    async def _pass_on_stop(self) -> None:
        await self._options.stopping.wait()
        await self._request_stop([actor for ranks in self._now.actors.values() for actor in ranks])

    async def _request_stop(self, actors: list[Handle]) -> None:
        """Tell processes that the user asks for a controlled stop; the dead need not hear it."""
        calls = [ask(actor.request_stop, where="stop", within_s=self._within_s) for actor in actors]
        await asyncio.gather(*calls, return_exceptions=True)


def _log_of(pid: int) -> str:
    """Return the name of the log that a process of the run writes, which is its own name."""
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/fd/1"))
    except OSError:
        return ""


def _first(error: Exception) -> Exception:
    """Return the first exception of a group, at any depth."""
    return (
        _first(cast("ExceptionGroup[Exception]", error).exceptions[0]) if isinstance(error, ExceptionGroup) else error
    )
