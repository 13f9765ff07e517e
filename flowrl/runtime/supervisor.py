"""The supervisor: starts a run's replicas, sees who has ended, and recovers by the two ways of decision 0003.

A replica of a stateless stage that ends by accident is replaced: what it held is issued again, and the next incarnation
starts. A stateful one, or the flow's host, costs the attempt: everything is ended and started again from the newest
sound checkpoint.

Invariants:
- the supervisor alone decides, `Workers` carries out;
- a node is replaced at most `max_restarts` times without a learned step between, and not after an error that its code
  raised a second time;
- what the user has to mend (UserError) is never retried;
- every recovery is told, with node, replica and reason.

The local and the Ray runtime each have `Workers` of their own.

Tests: tests/unit/runtime/test_recovery.py
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn, Protocol

import msgspec

from flowrl.engines.checkpoint import newest_sound, read_cut, strays
from flowrl.errors import DataError, FlowrlError, LastingError, RewardError, RunError, StageError, StallError, UserError
from flowrl.graph.graph import ClusterConfig
from flowrl.messages import decode
from flowrl.runtime.flow import Released, node_name, replica_name
from flowrl.runtime.ledger import Cut, whole_lines
from flowrl.telemetry import clock
from flowrl.telemetry.events import Event, Notice, Recovery
from flowrl.telemetry.files import UNREADABLE
from flowrl.telemetry.records import quarantine

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from flowrl.graph.graph import Graph
    from flowrl.runtime.rundir import Claim


STOP_LOOK_S = 2.0  # between two looks, once a stop is asked for, whether what it waits for can come
REPORT_S = 0.5  # between a process's reports to the driver: its events, and the sign that it lives
ADDRESS = re.compile(r"\b0x[0-9a-f]+")  # of an object in memory: another in every process
REPORTS_PER_S = 250.0  # that the driver is to take in from all processes; where there are more, each reports less often


def report_interval_s(num_processes: int, heartbeat_timeout_s: float) -> float:
    """Return how far apart a process's reports are.

    100 processes report every half second, 1,000 every 4 s, and none less than four times within the heartbeat's limit.
    """
    return min(max(REPORT_S, num_processes / REPORTS_PER_S), heartbeat_timeout_s / 4)


class Death(StageError):
    """A replica's process ended, or fell silent, without a word; the next one may fare better."""


class HostLost(RunError):
    """The process that holds the flow is gone, or what carries every process."""


@dataclass(frozen=True)
class Start:
    """Where an attempt begins."""

    cut: Cut | None = None  # None: at the very beginning
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    totals: dict[str, int]  # the ledger's
    was_stopped: bool = False
    recoveries: Counter[str] = field(default_factory=Counter[str])  # by node: restarts; "rollback": of the whole graph


class Scaling:
    """How many replicas nodes are to have while the run goes on; asked for by `flowrl scale`."""

    def __init__(self) -> None:
        self.wanted: dict[str, int] = {}  # by node
        self.changed = asyncio.Event()

    def ask(self, node: str, count: int) -> None:
        """Ask for a number of replicas, at least one."""
        self.wanted[node] = max(1, count)
        self.changed.set()


@dataclass(kw_only=True)
class Options:
    """What a runtime is told of a run."""

    run_dir: Path | None = None
    consume: Callable[[list[Event]], None] = lambda events: None
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    scaling: Scaling = field(default_factory=Scaling)
    resume: Start | None = None  # None: a new run
    claim: Claim | None = None  # of the directory; None: the runtime takes it
    start_number: int = -1  # of this start of the command, for the ledger
    stall_timeout_s: float = 1800.0  # nothing moves for so long: who waits for what, and the end
    heartbeat_timeout_s: float = 60.0  # a replica not heard from for so long is taken for dead
    grace_s: float = 60.0  # for stages to end by themselves once the run is over
    placing: ClusterConfig = field(default_factory=ClusterConfig)  # on a cluster
    moved: dict[str, str] = field(default_factory=dict[str, str])  # files of user code -> where every node finds them
    max_restarts: int = 3  # of one node, or of the whole graph, without a learned step between
    now: Callable[[], float] = clock.now


class Workers(Protocol):
    """What a runtime does for the supervisor; one attempt at a time."""

    async def open(self, start: Start) -> None:
        """Bring up a fresh flow at the start's cut."""
        ...

    def run(self, replica: str, incarnation: int, start: Start) -> Coroutine[None, None, None]:
        """Start a replica and wait for its end.

        Raises:
            FlowrlError: it failed, or died.
        """
        ...

    def watch(self) -> Coroutine[None, None, None]:
        """Wait for ever.

        Raises:
            StallError: nothing has moved for too long.
            HostLost: the flow is gone.
        """
        ...

    @property
    def unplaced(self) -> set[str]:
        """Return the replicas that have no process: they wait for a place."""
        ...

    async def has_begun(self) -> bool:
        """Return whether anybody was given something to work on in this attempt.

        Raises:
            HostLost: the flow is gone.
        """
        ...

    async def release(self, replica: str, successor: int, *, blames: bool = True) -> Released:
        """Fence a replica off that is gone and give back what it held, which is blamed unless it was asked to go."""
        ...

    async def kill(self, replica: str) -> None:
        """Make sure that nothing of a replica runs any more."""
        ...

    async def totals(self) -> dict[str, int]:
        """Return the ledger's totals."""
        ...

    async def close_edges(self) -> None:
        """Close every edge, so that stages end by themselves."""
        ...

    async def close(self) -> None:
        """End whatever is left of the attempt."""
        ...


class _Stopped(Exception):
    """A stop was asked for that need not, or cannot, be waited for: nothing is under way, or it lacks a process."""


class _Rollback(Exception):
    """The attempt is lost."""

    def __init__(self, where: str, cause: FlowrlError) -> None:
        super().__init__(where)
        self.where = where
        self.cause = cause


class Supervisor:
    """One run of a graph on the workers of one runtime."""

    def __init__(self, graph: Graph, workers: Workers, options: Options) -> None:
        self._graph = graph
        self._workers = workers
        self._options = options
        self._incarnations: Counter[str] = Counter()
        self._spent: Counter[str] = Counter()  # recoveries by node since its last learned step
        self._learned_at: dict[str, int] = {}  # groups learned when a node was last recovered
        self._said: dict[str, str] = {}  # by the error that it was recovered from
        self._recoveries: Counter[str] = Counter()
        self._attempts = 0

    async def run(self) -> Outcome:
        """Run the graph to its end.

        Raises:
            FlowrlError: what ended it; the remedy says how to go on.
        """
        start = self._options.resume or Start()
        while True:
            try:
                if self._options.stopping.is_set() and not self._attempts:
                    return Outcome(_totals(start.cut or Cut()), was_stopped=True)  # nothing is under way yet
                self._attempts += 1
                await self._open(start)
                totals = await self._attempt(start)
                return Outcome(totals, self._options.stopping.is_set(), self._recoveries)
            except _Stopped:
                lost = None
            except _Rollback as rollback:
                lost = rollback
            except HostLost as error:
                lost = _Rollback("flow", error)
            finally:
                await self._workers.close()
            if lost is None or self._options.stopping.is_set():
                if lost is not None:
                    self._tell("warning", lost.where, f"{lost.cause}; a stop is asked for, so nothing starts again")
                newest = newest_start(self._options.run_dir, self._tell) if self._options.run_dir else start
                return Outcome(_totals(newest.cut or Cut()), was_stopped=True, recoveries=self._recoveries)
            start = self._go_back(lost)  # only now: what is not dead yet might make a further checkpoint

    async def _open(self, start: Start) -> None:
        """Bring the flow up, unless the user asks to stop meanwhile: for devices that may never be free."""
        opening = asyncio.ensure_future(self._workers.open(start))
        stopping = asyncio.ensure_future(self._options.stopping.wait())
        try:
            await asyncio.wait([opening, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                raise _Stopped
            opening.result()
        finally:
            for each in (opening, stopping):
                each.cancel()
            await asyncio.gather(opening, stopping, return_exceptions=True)

    async def _heed_stop(self) -> None:
        """End the attempt where a stop could only wait: nothing is under way, or a node has not one process."""
        if not self._options.stopping.is_set():
            return
        try:
            if not await self._workers.has_begun():
                self._tell("info", "run", "nothing is under way yet, so the run stops at once")
                raise _Stopped
        except HostLost as lost:
            raise _Rollback("flow", lost) from lost
        unplaced = self._workers.unplaced
        for node in self._graph.nodes:
            replicas = [replica_name(node, index) for index in range(self._size(node))]
            if unplaced.issuperset(replicas):
                text = "has no process, so what is under way cannot be finished: the run stops here, and goes on from "
                self._tell("warning", node, f"{text}its newest checkpoint")
                raise _Stopped

    async def _attempt(self, start: Start) -> dict[str, int]:
        running: dict[asyncio.Future[None], str] = {}
        for node, stage in self._graph.nodes.items():
            for index in range(self._size(node), stage.config.replicas):  # let go before a rollback: not waited for
                name = replica_name(node, index)
                await self._workers.release(name, self._incarnations[name], blames=False)
            for index in range(self._size(node)):
                self._start(replica_name(node, index), running, start)
        watching = asyncio.ensure_future(self._workers.watch())
        stopping = asyncio.ensure_future(self._options.stopping.wait())
        scaling = asyncio.ensure_future(self._options.scaling.changed.wait())
        until = self._graph.until_node
        try:
            while any(node_name(name) == until for name in running.values()):
                limit_s = STOP_LOOK_S if self._options.stopping.is_set() else None
                waited = [*running, watching, scaling, *([] if limit_s else [stopping])]
                await asyncio.wait(waited, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
                await self._heed_stop()
                if scaling.done():
                    self._options.scaling.changed.clear()
                    scaling = asyncio.ensure_future(self._options.scaling.changed.wait())
                    await self._scale(running, start)
                if watching.done():
                    self._heed(watching, running)
                for ended in [future for future in running if future.done()]:
                    await self._take(running.pop(ended), ended, running, start)
            return await self._wind_down(running)
        finally:
            for future in [*running, watching, stopping, scaling]:
                future.cancel()
            await asyncio.gather(*running, watching, return_exceptions=True)

    def _size(self, node: str) -> int:
        return self._options.scaling.wanted.get(node, self._graph.nodes[node].config.replicas)

    def _start(self, name: str, running: dict[asyncio.Future[None], str], start: Start) -> None:
        running[asyncio.ensure_future(self._workers.run(name, self._incarnations[name], start))] = name

    async def _scale(self, running: dict[asyncio.Future[None], str], start: Start) -> None:
        """Start the replicas that are asked for and let those go that are too many, the last ones first."""
        for node in self._options.scaling.wanted:
            names = [replica_name(node, index) for index in range(self._size(node))]
            for name in [name for name in names if name not in running.values()]:
                self._tell("info", name, "joins")
                self._start(name, running, start)
            for future, name in [*running.items()]:
                if node_name(name) == node and name not in names and not future.done():
                    del running[future]
                    await self._let_go(name, future)

    async def _let_go(self, name: str, future: asyncio.Future[None]) -> None:
        """End a replica; what it held is issued again, and is not to blame."""
        try:
            await self._workers.kill(name)
            future.cancel()
            await asyncio.gather(future, return_exceptions=True)
            self._incarnations[name] += 1
            released = await self._workers.release(name, self._incarnations[name], blames=False)
        except HostLost as lost:
            raise _Rollback("flow", lost) from lost
        again = f"; issued again: {len(released.reissued)} groups" if released.reissued else ""
        self._tell("info", name, f"has left{again}")

    async def _wind_down(self, running: dict[asyncio.Future[None], str]) -> dict[str, int]:
        """Close the edges and let the rest end; what fails now does not matter to what was learned."""
        await self._workers.close_edges()
        if running:
            await asyncio.wait(running, timeout=self._options.grace_s)
        for future, name in running.items():
            if future.done() and not future.cancelled() and (error := future.exception()) is not None:
                self._tell("warning", name, f"failed after the run had ended: {error}")
        return await self._workers.totals()

    def _heed(self, watching: asyncio.Future[None], running: dict[asyncio.Future[None], str]) -> NoReturn:
        """End the attempt for what the watch has seen."""
        error = watching.exception()
        failures = [f.exception() for f in running if f.done() and not f.cancelled()]
        first = next((failure for failure in failures if failure is not None), None)
        if isinstance(error, StallError) and first is not None:
            raise first  # a stage's own failure says more than the stall
        if isinstance(error, HostLost):
            raise _Rollback("flow", error)
        raise error if error is not None else RunError("flow", "the watch over the run ended")

    async def _take(
        self, name: str, ended: asyncio.Future[None], running: dict[asyncio.Future[None], str], start: Start
    ) -> None:
        """Recover from one replica's end, where it was not as it should be."""
        error = None if ended.cancelled() else ended.exception()
        if error is None:
            return
        if not isinstance(error, FlowrlError) or isinstance(error, UserError | StallError | LastingError):
            raise error
        if self._graph.nodes[node_name(name)].is_stateful:
            raise _Rollback(name, error)
        try:
            await self._workers.kill(name)
            self._charge(node_name(name), (await self._workers.totals())["learned"], error)
            successor = self._incarnations[name] + 1
            released = await self._workers.release(name, successor)
        except HostLost as lost:
            raise _Rollback("flow", lost) from lost
        self._incarnations[name] = successor
        self._report(name, error, released)
        self._start(name, running, start)

    def _charge(self, node: str, learned: int, error: FlowrlError) -> None:
        """Count a recovery against the node's budget, which is whole again once more groups are learned.

        Raises:
            FlowrlError: it is spent, or the code raised what it raised before; the error is of `error`'s own class.
        """
        if self._learned_at.get(node) != learned:
            self._spent[node] = 0
            self._said.pop(node, None)
        text = ADDRESS.sub("0x", str(error))
        said, self._said[node] = self._said.get(node), text
        is_own = isinstance(error, StageError | RewardError) and not isinstance(error, Death)
        if said == text and is_own:
            raise type(error)(
                error.where, f"{error.what} (and the same again after a restart)", error.remedy
            ) from error
        self._learned_at[node] = learned
        self._spent[node] += 1
        self._recoveries[node] += 1
        if self._spent[node] > self._options.max_restarts:
            what = f"{error.what} (and {self._options.max_restarts} times before, with nothing learned between)"
            raise type(error)(error.where, what, error.remedy) from error

    def _go_back(self, lost: _Rollback) -> Start:
        """Return where the next attempt starts.

        Raises:
            FlowrlError: the attempt's own error, where the budget is spent.
        """
        run_dir = self._options.run_dir
        start = newest_start(run_dir, self._tell) if run_dir is not None else Start(cut=Cut())
        learned = start.cut.learned if start.cut else 0
        self._charge("rollback", learned, lost.cause)
        version = start.cut.version if start.cut else 0
        text = f"{lost.cause}; everything starts again from " + (
            f"the checkpoint of version {version}" if start.checkpoint else "the beginning: there is no checkpoint yet"
        )
        self._tell("warning", lost.where, text)
        self._recover(lost.where, "rollback", 0)
        for node in self._graph.nodes:
            for index in range(self._size(node)):
                self._incarnations[replica_name(node, index)] += 1
        return start

    def _report(self, name: str, error: FlowrlError, released: Released) -> None:
        again = f"; issued again: {len(released.reissued)} groups" if released.reissued else ""
        self._tell("warning", name, f"{error.what}; restarted as incarnation {self._incarnations[name]}{again}")
        self._recover(name, "restart", len(released.reissued))
        for key, body in released.poisonous:
            kept = "nowhere: the run has no directory"
            if self._options.run_dir is not None:
                kept = f"in {quarantine(self._options.run_dir, key, decode(body), where=name, error=error)}"
            self._tell("error", name, f"group {key} killed its stage again and again; its input is {kept}")

    def _recover(self, where: str, kind: str, reissued: int) -> None:
        event = Recovery(where=where, kind=kind, reissued=reissued, time_s=self._options.now())
        self._options.consume([event])

    def _tell(self, level: str, where: str, text: str) -> None:
        self._options.consume([Notice(level=level, where=where, text=text, time_s=self._options.now())])


def newest_start(run_dir: Path, tell: Callable[[str, str, str], None]) -> Start:
    """Return the newest sound checkpoint of a run as a start, or its beginning where it has made none.

    Damaged checkpoints are named and passed over; files that belong to nobody are named and left alone.

    Raises:
        DataError: there are checkpoints and none is sound, or the ledger does not reach as far as the checkpoint.
    """
    directory = run_dir / "checkpoints"
    checkpoint, passed_over = newest_sound(directory)
    for wrong in passed_over:
        tell("warning", "checkpoints", f"{wrong}; passed over")
    if checkpoint is None and passed_over:
        what = f"none of {len(passed_over)} checkpoints is whole: {passed_over[0]}"
        raise DataError(str(directory), what, "restore one, or begin again with --from-start")
    if checkpoint is None:
        return Start(cut=Cut())
    for stray in strays(checkpoint):
        tell("warning", "checkpoints", f"{checkpoint.name}/{stray} belongs to no checkpoint; left alone")
    try:
        cut = msgspec.json.decode(read_cut(checkpoint), type=Cut)
    except UNREADABLE as error:
        raise DataError(str(checkpoint / "cut.json"), f"is not a cut ({error})", "resume with --from-start") from error
    whole_lines(run_dir / "ledger.jsonl", cut)
    return Start(cut=cut, checkpoint=checkpoint)


def _totals(cut: Cut) -> dict[str, int]:
    ended = {"learned": cut.learned, "filtered": cut.filtered, "failed": cut.failed}
    return {"admitted": sum(ended.values()), **ended, "unfinished": 0}
