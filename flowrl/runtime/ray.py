"""The Ray runtime: the supervisor in the driver, everything else in actors, one machine or a cluster.

The driver runs the supervisor on a `RayCrew`: it starts the hub and the replicas (runtime/actors.py), carries events to
the sinks, hears of deaths from Ray and of silence from the hub. Invariant: every actor of an attempt is dead before the
next one starts and when `run_ray` returns, whatever ended it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import msgspec
import ray as _ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flowrl import errors
from flowrl.errors import FlowrlError, ResourceError, StageError, StallError
from flowrl.graph.plan import plan_of
from flowrl.runtime.actors import Failure, HubActor, ReplicaActor, ReplicaPlan, process_name
from flowrl.runtime.flow import Released, node_name
from flowrl.runtime.local import num_readers
from flowrl.runtime.placement import Place, check_resources, environment, num_cores, places
from flowrl.runtime.supervisor import Death, HostLost, Options, Outcome, Silence, Start, Supervisor, report_interval_s
from flowrl.runtime.wire import Address
from flowrl.telemetry.events import decode_events

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from flowrl.graph.graph import Graph

ray: Any = _ray  # its own types are partial
Handle = Any  # a Ray actor handle; Ray gives it no usable type


@contextlib.contextmanager
def running_ray(graph: Graph, address: str | None) -> Generator[None]:
    """Connect to a cluster, or start one on this machine with no dashboard, bound to the loopback interface.

    Raises:
        ResourceError: the cluster does not answer, or the machine has too little of something.
    """
    if address is None:
        check_resources(graph)
        _stay_on_loopback()
    logging.getLogger("ray").setLevel(logging.ERROR)  # before it starts; `logging_level` holds only from then on
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would let everything else on the machine go first
    local: dict[str, Any] = {
        "num_cpus": num_cores(),
        "include_dashboard": False,
        "object_store_memory": 512 << 20,
        "_node_ip_address": "127.0.0.1",
    }
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=False,
            **({} if address else local),
        )
    except (RayError, ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise ResourceError("ray", f"cannot start or reach Ray ({error})", "see `flowrl doctor`") from error
    try:
        yield
    finally:
        ray.shutdown()


def _stay_on_loopback() -> None:
    """Let a Ray of this machine alone listen on the loopback interface only.

    `_node_ip_address` is not enough: Ray replaces a loopback address by the machine's own unless it takes the platform
    for one without clusters, which it decides by this variable when it is imported.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # for the processes that it starts
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False


async def run_ray(graph: Graph, options: Options) -> Outcome:
    """Run a graph to its end on Ray, which must have been started.

    Raises:
        FlowrlError: the first failure that is not recovered from, or a StallError.
    """
    return await Supervisor(graph, RayCrew(graph, options), options).run()


@dataclass
class RankProcess:
    """A rank's actor and where it runs."""

    place: Place
    actor: Handle
    pid: int = 0
    address: str = ""


@dataclass
class Attempt:
    """What one attempt has started."""

    hub: Handle
    kinds: dict[str, str]
    group: PlacementGroup | None
    bundles: dict[tuple[str, int, int], int]
    wire: Address | None = None  # where the hub takes calls to the flow
    processes: dict[str, list[RankProcess]] = field(default_factory=dict[str, "list[RankProcess]"])  # by replica
    beside: list[asyncio.Task[None]] = field(default_factory=list["asyncio.Task[None]"])


class RayCrew:
    """Replicas as actors."""

    def __init__(self, graph: Graph, options: Options) -> None:
        assert options.run_dir is not None, "a run on Ray has a directory"
        self._graph = graph
        self._options = options
        self._run_dir = options.run_dir
        self._plan = plan_of(graph)
        self._attempt: Attempt | None = None

    @property
    def _now(self) -> Attempt:
        assert self._attempt is not None, "open comes first"
        return self._attempt

    async def open(self, start: Start) -> None:
        """Reserve devices and start the hub at the start's cut."""
        own = [p for p in places(self._graph) if p.host == p.node and (p.cpus or p.gpus)]
        group: PlacementGroup | None = None
        if own:
            group = placement_group([_bundle(p, self._graph) for p in own], strategy="PACK")
            await cast("Any", group).ready()
        hub_type = ray.remote(num_cpus=0, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})(HubActor)
        hub = hub_type.remote(msgspec.json.encode(self._plan), str(self._run_dir), msgspec.json.encode(start.cut))
        addresses = [f"{node}.{port}" for node, stage in self._graph.nodes.items() for port in stage.ports]
        bundles = {(p.node, p.replica, p.rank): index for index, p in enumerate(own)}
        self._attempt = Attempt(hub=hub, kinds={}, group=group, bundles=bundles)
        self._now.kinds = await hub.kinds.remote(addresses)
        self._now.wire = Address(*await hub.listen.remote())
        self._now.beside = [asyncio.create_task(self._carry_events()), asyncio.create_task(self._pass_on_stop())]

    async def run(self, replica: str, incarnation: int, start: Start) -> None:
        """Start a replica's ranks and wait for their end; one that fails takes the others with it."""
        ranks = [
            RankProcess(p, self._start(p, incarnation, start)) for p in places(self._graph) if _belongs(p, replica)
        ]
        self._now.processes[replica] = ranks
        if self._options.stopping.is_set():
            for process in ranks:
                process.actor.request_stop.remote()
        master = ("", 0)
        try:
            for process in ranks:
                process.address, port, process.pid = await process.actor.rendezvous.remote()
                if process.place.rank == 0:
                    master = process.address, port
        except RayError as error:
            raise self._death(replica, error) from error
        answers = {asyncio.ensure_future(_await(p.actor.run.remote(*master))): p for p in ranks}
        try:
            while answers:
                finished, _ = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
                for answer in finished:
                    self._check(answers.pop(answer), answer)
        finally:
            for answer in answers:
                answer.cancel()
            for process in ranks:
                with contextlib.suppress(RayError):
                    await self._now.hub.forget.remote(process_name(process.place))

    def _start(self, place: Place, incarnation: int, start: Start) -> Handle:
        stage, attempt = self._graph.nodes[place.node], self._now
        assert attempt.wire is not None, "open waits for it"
        plan = ReplicaPlan(
            place=place,
            incarnation=incarnation,
            stage=self._plan.nodes[place.node],
            world_size=stage.config.ranks,
            kinds={address: kind for address, kind in attempt.kinds.items() if node_name(address) == place.node},
            hub=attempt.wire,
            run_dir=str(self._run_dir),
            num_readers=num_readers(self._graph, place.node),
            report_interval_s=report_interval_s(len(places(self._graph)), self._options.heartbeat_timeout_s),
            resume_from=str(start.checkpoint) if start.checkpoint else None,
        )
        choice: dict[str, Any] = {
            "num_cpus": place.cpus,
            "num_gpus": place.gpus,
            "max_concurrency": 64,
            "runtime_env": {"env_vars": environment(stage.config, on_gpu=place.gpus > 0)},
        }
        bundle = attempt.bundles.get((place.node, place.replica, place.rank))
        if bundle is None:
            bundle = attempt.bundles.get((place.host, place.replica, place.rank))
        if attempt.group is not None and bundle is not None:
            choice["scheduling_strategy"] = PlacementGroupSchedulingStrategy(attempt.group, bundle)
        actor_type: Any = ray.remote(ReplicaActor)
        return actor_type.options(**choice).remote(msgspec.json.encode(plan), attempt.hub)

    def _check(self, process: RankProcess, ended: asyncio.Future[Any]) -> None:
        replica = f"{process.place.node}.{process.place.replica}"
        try:
            answer = ended.result()
        except RayError as error:
            process.pid = 0  # somebody else may get the number now
            raise self._death(replica, error) from error
        if answer:
            failure = msgspec.json.decode(answer, type=Failure)
            kind: type[FlowrlError] = getattr(errors, failure.kind)
            raise kind(failure.where, failure.what, failure.remedy or f"see {self._log(replica)}")

    def _death(self, replica: str, error: RayError) -> StageError:
        if isinstance(error, OutOfMemoryError):
            remedy = "lower generator.kv_cache_bytes or micro_batch_tokens, or run fewer replicas"
            return Death(replica, "Ray ended its process because the machine's memory was full", remedy)
        if isinstance(error, RayActorError):
            return Death(replica, "its process died", f"its last words are in {self._log(replica)}")
        return StageError(replica, str(error).strip().splitlines()[-1], f"see {self._log(replica)}")

    def _log(self, replica: str) -> Path:
        return self._run_dir / "logs" / f"{replica}.log"

    async def watch(self) -> None:
        """Wait for a stall, for silence, or for the hub to be lost."""
        hub, options = self._now.hub, self._options
        stalling = asyncio.ensure_future(_await(hub.watch.remote(options.stall_timeout_s)))
        silent = asyncio.ensure_future(_await(hub.silent.remote(options.heartbeat_timeout_s)))
        pinging = asyncio.ensure_future(self._ping())
        try:
            await asyncio.wait([stalling, silent, pinging], return_when=asyncio.FIRST_COMPLETED)
            if pinging.done():
                pinging.result()
            if silent.done():
                process = silent.result()
                replica = process.rpartition(".rank")[0] if ".rank" in process else process
                raise Silence(replica, f"not heard from for {options.heartbeat_timeout_s:.0f} s")
            raise StallError("flow", stalling.result(), "see the run's timeline and logs")
        except RayError as error:
            raise HostLost("flow", "its host died", f"its last words are in {self._log('hub')}") from error
        finally:
            for waiting in (stalling, silent, pinging):
                waiting.cancel()
            await asyncio.gather(stalling, silent, pinging, return_exceptions=True)

    async def _ping(self) -> None:
        timeout_s = self._options.heartbeat_timeout_s
        while True:
            await asyncio.sleep(timeout_s / 4)
            try:
                async with asyncio.timeout(timeout_s):
                    await self._now.hub.ping.remote()
            except TimeoutError as error:
                raise HostLost("flow", f"its host was not heard from for {timeout_s:.0f} s") from error

    async def release(self, replica: str, successor: int) -> Released:
        """Fence a dead replica off and give back what it held."""
        try:
            reissued, poisonous = await self._now.hub.release.remote(replica, successor)
        except RayError as error:
            raise HostLost("flow", "its host died") from error
        return Released(reissued, poisonous)

    async def kill(self, replica: str) -> None:
        """Kill every rank of a replica, stopped ones of this machine too."""
        for process in self._now.processes.get(replica, []):
            await _kill(process)

    async def totals(self) -> dict[str, int]:
        """Return the ledger's totals."""
        try:
            return await self._now.hub.totals.remote()
        except RayError as error:
            raise HostLost("flow", "its host died") from error

    async def close_edges(self) -> None:
        """Close every edge."""
        with contextlib.suppress(RayError):
            await self._now.hub.close.remote()

    async def close(self) -> None:
        """Kill every actor of the attempt and free its devices."""
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        for task in attempt.beside:
            task.cancel()
        await asyncio.gather(*attempt.beside, return_exceptions=True)
        with contextlib.suppress(RayError, TimeoutError):
            async with asyncio.timeout(5.0):
                self._options.consume(decode_events(await attempt.hub.drain.remote()))
        for process in [process for ranks in attempt.processes.values() for process in ranks]:
            await _kill(process)
        with contextlib.suppress(RayError):
            ray.kill(attempt.hub)
        if attempt.group is not None:
            with contextlib.suppress(RayError):
                remove_placement_group(attempt.group)

    async def _carry_events(self) -> None:
        with contextlib.suppress(RayError):  # the watch tells when the hub is gone
            while True:
                self._options.consume(decode_events(await self._now.hub.events.remote()))

    async def _pass_on_stop(self) -> None:
        await self._options.stopping.wait()
        for process in [process for ranks in self._now.processes.values() for process in ranks]:
            process.actor.request_stop.remote()


async def _kill(process: RankProcess) -> None:
    if process.pid and process.address == ray.util.get_node_ip_address():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)  # one that was stopped must wake up to be killed
    with contextlib.suppress(RayError):
        ray.kill(process.actor)


def _belongs(place: Place, replica: str) -> bool:
    return f"{place.node}.{place.replica}" == replica


async def _await(reference: Any) -> Any:
    return await reference


def _bundle(place: Place, graph: Graph) -> dict[str, float]:
    """Return the resources of a host's bundle: its own and its sharers' part of the GPUs."""
    gpus = graph.nodes[place.node].config.gpus
    return {name: amount for name, amount in (("CPU", place.cpus), ("GPU", gpus)) if amount}
