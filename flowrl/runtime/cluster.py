"""Ray as a run uses it: started in a thread of its own, asked with deadlines, ended for certain.

Invariants:
- `ask` is the only way in which an actor is called and waited for, so no wait on Ray is without an end (held by
  tests/unit/runtime/test_asking.py);
- Ray never takes the driver's signals, and a signal that goes to every process of the run (a closed terminal, a batch
  system) ends none of Ray's;
- what Ray leaves of a driver that died (session directories) is swept by the next.

Why a thread: Ray installs a handler for SIGTERM when it starts in the main thread, and blocks that thread, deaf, for as
long as a cluster does not answer. Its processes die with the thread that started them, so that lives until `stop`. Its
native part puts a handler before Python's all the same, which ends the process 3 s after a SIGTERM: that is undone.

Whatever a Ray of ours starts, and what that starts, has `MARK` in its environment. `stop` ends when none of it lives,
and what outlives a driver that was killed (a stopped process hears of nothing) is killed by the next one.

Tests: tests/ray/test_faults_of_ray.py
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import Future
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec
import ray as _ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flowrl import scratch
from flowrl.errors import FlowrlError, ResourceError, RunError
from flowrl.runtime.devices import num_cores, visible_machine
from flowrl.runtime.nodes import NodeReport, RayNode, answer, node_of
from flowrl.runtime.placement import check_resources, module_path, places
from flowrl.scratch import MOST_SOCKET_BYTES, SOCKET_BYTES, socket_root
from flowrl.stops import STOPS

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from types import TracebackType

    from flowrl.graph.graph import Graph
    from flowrl.runtime.devices import Machine
    from flowrl.runtime.nodes import NodeQuestion

ray: Any = _ray  # its own types are partial

ANSWER_S = 20.0  # for Ray to say who we are
# For the head to say which nodes there are: fleet.HEAD_S without an answer must have passed, and the run have ended, in
# less than the minute after which what Ray connected first of this process ends it.
HEAD_ANSWER_S = 10.0
SURVEY_S = 60.0  # for a node to start a process and look around
START_S = 120.0  # for Ray to start here; some seconds are usual
REACH_S = 25.0  # for a cluster to answer
CONNECT_S = 5.0  # for something to listen at its address
LEAVE_S = 5.0  # for this process to leave a Ray that lives
STOP_S = 20.0  # for Ray to end by itself
HEAD_GONE_S = 3600  # fleet.HEAD_S comes before it
MOST_PORT = 65535
END_LOOK_S = 0.02  # between two looks whether what was killed is dead
END_LOOKS = 500  # one that writes to a slow disk takes its time to die
SLICES = 6  # of a time limit: a driver that was stopped has used up one of them when it goes on
SLOW = "timed out during startup"  # of a raylet that has not shown itself within half a minute, as Ray says it
MAX_SAID = 400  # characters of Ray's own words
MARK = "FLOWRL_DRIVER"
OURS = "flowrl"  # marks a session directory that a run of ours made
_LEFT = threading.Event()  # this process is connected still to a cluster whose head was gone


class Unanswered(RunError):
    """A call to an actor was not answered within `within_s`."""

    def __init__(self, where: str, what: str, *, within_s: float) -> None:
        super().__init__(where, what)
        self.within_s = within_s


async def ask(call: Any, *arguments: Any, where: str, within_s: float) -> Any:
    """Call an actor's method, or a task, and return its answer.

    Raises:
        Unanswered: there was none within `within_s` in which this process ran.
        RayError: the actor is dead, or the method raised.
    """
    return await answer_of(call.remote(*arguments), where=where, within_s=within_s)


async def answer_of(reference: Any, *, where: str, within_s: float) -> Any:
    """Return what Ray has promised; see `ask`."""
    answer = asyncio.ensure_future(_await(reference))
    try:
        for _ in range(SLICES):
            finished, _ = await asyncio.wait([answer], timeout=within_s / SLICES)
            if finished:
                return answer.result()
        raise Unanswered(where, f"not heard from for {within_s:.0f} s", within_s=within_s)
    finally:
        answer.cancel()


async def _await(reference: Any) -> Any:
    return await reference


async def in_thread(function: Callable[[], Any], *, where: str, within_s: float) -> Any:
    """Return what a call into Ray that blocks gives, made in a thread that nobody waits for at the end.

    Raises:
        Unanswered: it gave nothing within `within_s`.
    """
    given: Future[Any] = Future()

    def call() -> None:
        try:
            given.set_result(function())
        except BaseException as error:
            given.set_exception(error)

    threading.Thread(target=call, name="asks ray", daemon=True).start()
    try:
        async with asyncio.timeout(within_s):
            return await asyncio.shield(asyncio.wrap_future(given))
    except TimeoutError:
        raise Unanswered(where, f"not heard from for {within_s:.0f} s", within_s=within_s) from None


class Cluster:
    """A Ray of this machine alone, started here, or one that runs at `address`."""

    def __init__(
        self, graph: Graph | None, address: str | None, *, start_s: float = 0.0, machine: Machine | None = None
    ) -> None:
        """Start nothing yet; where Ray is started here, the graph is held against this machine.

        `machine` is what Ray is told of its GPUs, those that are visible by default.
        """
        self._graph = graph
        self._machine = machine
        self._address = address
        self._start_s = start_s or (START_S if address is None else REACH_S)
        self._thread: threading.Thread | None = None
        self._ready: Future[None] = Future()
        self._end = threading.Event()
        self._processes: dict[str, int] = {}  # of Ray itself, where it was started here
        self._session: Path | None = None
        self._stopped_s: dict[str, float] = {}  # since when one of them is stopped
        self.has_head = True  # it answered when it was asked last

    @property
    def is_local(self) -> bool:
        """Return whether Ray was started here."""
        return self._address is None

    def __enter__(self) -> Self:
        """Start, or connect; blocks.

        Raises:
            ResourceError: it does not start or answer, or the machine has too little of something.
        """
        self._begin()
        try:
            with _signals_kept():
                self._ready.result(self._start_s)
        except BaseException as error:
            self.stop()
            raise self._refusal(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it, or let go of it."""
        self.stop()

    async def start(self) -> None:
        """Start, or connect, while the loop goes on; see `__enter__`."""
        self._begin()
        try:
            with _signals_kept():
                async with asyncio.timeout(self._start_s):
                    await asyncio.wrap_future(self._ready)
        except Exception as error:
            await self.close()
            raise self._refusal(error) from error

    async def close(self) -> None:
        """End it, or let go of it, while the loop goes on; also where this is cancelled."""
        stopping = threading.Thread(target=self.stop, name="ray stops", daemon=True)
        stopping.start()
        try:
            while stopping.is_alive():  # noqa: ASYNC110  a thread tells nobody that it has ended
                await asyncio.sleep(0.05)
        finally:
            stopping.join()

    async def restart(self) -> None:
        """Start again after `trouble`.

        Raises:
            RunError: Ray cannot be started twice here; the run must be resumed.
        """
        await self.close()
        if self._thread is not None:
            raise RunError("ray", "did not end, so it cannot be started again in this process")
        await self.start()

    def trouble(self, patience_s: float) -> str:
        """Return what is wrong with a Ray that was started here: a process of it has died, or stands still too long."""
        for name, pid in self._processes.items():
            state = _state(pid)
            if not state:
                return f"Ray's {name} died"
            if state != "T":
                self._stopped_s.pop(name, None)
            elif time.monotonic() - self._stopped_s.setdefault(name, time.monotonic()) > patience_s:
                return f"Ray's {name} stands still for {patience_s:.0f} s"
        return ""

    async def nodes(self) -> list[RayNode]:
        """Return the nodes that Ray has or had.

        Raises:
            Unanswered: the head does not answer.
        """
        try:
            found = await in_thread(ray.nodes, where="ray", within_s=HEAD_ANSWER_S)
        except Exception:
            self.has_head = False
            raise
        self.has_head = True
        return [node_of(told) for told in found]

    async def home(self, nodes: Sequence[RayNode], address: str = "") -> RayNode:
        """Return the living node at an address, or else the driver's, or else the head.

        Raises:
            ResourceError: there is none at that address.
        """
        alive = [node for node in nodes if node.is_alive]
        if address:
            found = next((node for node in alive if node.address == address), None)
            if found is None:
                what = f"no node {address} is there, but {', '.join(node.address for node in alive)}"
                raise ResourceError("cluster.home", what, "name one of them")
            return found
        own = await in_thread(lambda: ray.get_runtime_context().get_node_id(), where="ray", within_s=ANSWER_S)
        return next((n for n in alive if n.id == own), None) or next((n for n in alive if n.is_head), alive[0])

    async def survey(self, nodes: Sequence[RayNode], question: NodeQuestion) -> dict[str, NodeReport]:
        """Return the answers of living nodes, by address.

        Raises:
            ResourceError: one cannot run our code, or does not answer.
        """
        body = msgspec.json.encode(question)
        found = await asyncio.gather(*(self.on(node, answer, (body,), within_s=SURVEY_S) for node in nodes))
        return {n.address: msgspec.json.decode(told, type=NodeReport) for n, told in zip(nodes, found, strict=True)}

    async def on(
        self, node: RayNode, function: Callable[..., bytes], arguments: tuple[Any, ...], *, within_s: float
    ) -> bytes:
        """Return what a function of ours gives on a node.

        Raises:
            ResourceError: the node cannot run our code, or does not answer.
        """
        where = f"node {node.address}"
        tied = NodeAffinitySchedulingStrategy(node.id, soft=False)
        variables = {"env_vars": {"PYTHONPATH": module_path()}}
        task: Any = ray.remote(num_cpus=0, max_retries=0, runtime_env=variables, scheduling_strategy=tied)(function)
        try:
            return await ask(task, *arguments, where=where, within_s=within_s)
        except Unanswered as error:
            raise ResourceError(
                where, error.what, "see that it can start a process, or leave it out with cluster.nodes"
            ) from error
        except RayError as error:
            last = str(error).strip().splitlines()[-1]
            raise ResourceError(where, f"cannot run flowrl ({last})", "install the same flowrl there") from error

    def _begin(self) -> None:
        if self._address is None:
            if self._graph is not None:
                check_resources(self._graph, self._machine)
            sweep()
        self._ready, self._end = Future(), threading.Event()
        self._thread = threading.Thread(target=self._live, args=(self._ready, self._end), name="ray", daemon=True)
        self._thread.start()

    def _live(self, ready: Future[None], end: threading.Event) -> None:
        """Start Ray, keep it until the end, stop it: the body of its thread."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # its processes are started with the mask of this thread
        try:
            with _marked() if self.is_local else contextlib.nullcontext():
                self._start()
            self._note_processes()
            ready.set_result(None)
        except BaseException as error:
            ready.set_exception(error)
        else:
            end.wait()
        if not self.is_local and not self.has_head:
            _LEFT.set()  # Ray's native part may end this process while it takes leave of a head that is gone
            return
        node = ray._private.worker._global_node
        if self.is_local and node is not None:  # Ray gives each of its processes a second, one after the other
            node.kill_all_processes = self._bury
        # They are killed only when this process has left them: its native part ends it when it loses them before.
        with contextlib.suppress(Exception):  # what is left of it is killed by `stop`
            ray.shutdown()

    def _start(self) -> None:
        """Start Ray, or connect; once more where a busy machine had it pass its own limit, which cannot be set."""
        try:
            _start_ray(self._address, num_gpus=self._num_gpus())
        except Exception as error:
            if not self.is_local or SLOW not in str(error):
                raise
            ray.shutdown()
            _end_marked(lambda driver: driver == driver_mark())
            _start_ray(self._address, num_gpus=self._num_gpus())

    def _num_gpus(self) -> int:
        """Return the GPUs that Ray is told of: all where a node has some, else none."""
        if self._graph is None or not any(place.gpus for place in places(self._graph)):
            return 0
        return len((self._machine or visible_machine()).gpus)

    def _note_processes(self) -> None:
        node = ray._private.worker._global_node
        if self._address is not None or node is None:
            return
        self._processes = {name: each[0].process.pid for name, each in node.all_processes.items() if each}
        self._session = Path(node.get_session_dir_path())
        (self._session / OURS).write_text(driver_mark())

    def _refusal(self, error: BaseException) -> BaseException:
        if isinstance(error, ResourceError):
            return error
        said = " ".join(str(error).split())
        if "AuthToken" in said or "AuthenticationError" in said:
            what = f"{self._address} refuses this machine's token, or wants one"
            remedy = "copy ~/.ray/auth_token from the cluster's head, or set RAY_AUTH_TOKEN, and RAY_AUTH_MODE=token"
            return ResourceError("ray", what, remedy)
        if isinstance(error, TimeoutError):
            what = f"{self._address or 'Ray'} does not answer within {self._start_s:.0f} s"
            return ResourceError("ray", what, "see that it runs and can be reached, and `flowrl doctor`")
        if isinstance(error, Exception) and not isinstance(error, FlowrlError):  # Ray raises also plain ones
            shown = said if len(said) <= MAX_SAID else f"{said[:MAX_SAID]} ..."
            return ResourceError("ray", f"cannot start or reach Ray ({shown})", "see `flowrl doctor`")
        return error

    def stop(self) -> None:
        """End it, or let go of it; blocks, at most about `STOP_S`."""
        thread = self._thread
        if thread is None:
            return
        if self.trouble(0.0):
            self._kill()  # leaving would wait for what is dead
        self._end.set()
        is_connecting = self._address is not None and not self._ready.done()
        thread.join(1.0 if is_connecting else LEAVE_S)
        self._kill()  # what it had only begun to start, or does not let this process go
        thread.join(0.0 if is_connecting else STOP_S)
        if self.is_local:
            _end_marked(lambda driver: driver == driver_mark())
            scratch.sweep()  # what they could not remove any more
        thread.join(1.0)
        if not thread.is_alive():
            self._thread = None
        if self._session is not None:
            shutil.rmtree(self._session, ignore_errors=True)
        self._processes, self._session, self._stopped_s = {}, None, {}

    def _bury(self, **_: Any) -> None:
        """Kill Ray's processes together and see that they are dead."""
        self._kill()
        for each in chain.from_iterable(ray._private.worker._global_node.all_processes.values()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.process.wait(1.0)

    def _kill(self) -> None:
        for pid in self._processes.values():
            if _state(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _signals_kept() -> Generator[None]:
    """Let signals be as they were before Ray started, the alarm by which it would end a process too."""
    is_main = threading.current_thread() is threading.main_thread()  # no other thread may set a handler
    has_alarm = any(signal.getitimer(signal.ITIMER_REAL))
    try:
        yield
    finally:
        for number in STOPS if is_main else ():
            signal.signal(number, signal.getsignal(number))
        if is_main and not has_alarm:
            signal.alarm(0)


def _start_ray(address: str | None, *, num_gpus: int) -> None:
    if address is None:
        _stay_on_loopback()
        _keep_token_private()
        # Nobody asks it which tasks there were, and at its end it would try to tell for five seconds.
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    else:
        _reach(address)
        with contextlib.suppress(OSError):  # no home, and so no token in it
            if "RAY_AUTH_TOKEN" in os.environ or _token().is_file():
                os.environ.setdefault("RAY_AUTH_MODE", "token")
        # Ray's native part ends a driver, without a word of ours, when its head has been silent for this long.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", f"{HEAD_GONE_S}")
        _knock(address)
    if _LEFT.is_set():
        ray.shutdown()
        _LEFT.clear()
    ray._private.worker.print_to_stdstream = _unheard  # what it tells of dead workers, the supervisor tells better
    logging.getLogger("ray").setLevel(logging.ERROR)  # before it starts; `logging_level` holds only from then on
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would let everything else on the machine go first
    local: dict[str, Any] = {
        "num_cpus": num_cores(),
        "num_gpus": num_gpus,
        "include_dashboard": False,
        "object_store_memory": 512 << 20,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": str(ray_root()),
    }
    ray.init(
        address=address or "local",
        log_to_driver=False,
        logging_level="ERROR",
        configure_logging=False,
        **({} if address else local),
    )


def _reach(address: str) -> None:
    """Insist that something listens at a cluster's address; "auto" leads to whatever runs on this machine.

    Raises:
        ResourceError: nothing does, or it is no address.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    if not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > MOST_PORT:
        raise ResourceError("--address", f"{address!r} is not an address", "give HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        what = f"nothing answers at {address} ({error})"
        raise ResourceError("ray", what, "see that the head runs (`ray status` there) and its port is open") from error


def _knock(address: str) -> None:
    """Ask a cluster's head who it is, which says why it does not let us in where connecting would only fail, later.

    Raises:
        AuthenticationError: it refuses our token.
    """
    if address in ("auto", "local") or "://" in address:
        return
    with _errors_unheard():
        ray._raylet.GcsClient(address=address)


@contextlib.contextmanager
def _errors_unheard() -> Generator[None]:
    """Let nothing reach standard error that Ray's native part writes there in this block."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        for descriptor in (kept, null):
            os.close(descriptor)


def ray_root() -> Path:
    """Return where a Ray that is started here keeps its sockets and logs: by itself, or since a path is too long."""
    root = Path(os.environ.get("RAY_TMPDIR") or socket_root())
    return (root if len(os.fsencode(root)) <= MOST_SOCKET_BYTES - SOCKET_BYTES else Path("/tmp")) / "ray"


def _keep_token_private() -> None:
    """Let nobody but its owner read the token that keeps others out of Ray; Ray itself leaves that to the umask.

    Where there is no home, or it may not be written, this run has a token of its own.
    """
    try:
        _write_token(_token())
    except OSError:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _token() -> Path:
    """Return where Ray's token is kept; its native part goes by the variable alone."""
    if not (home := os.environ.get("HOME")):
        raise FileNotFoundError(errno.ENOENT, "HOME is not set")
    return Path(home) / ".ray" / "auth_token"


def _write_token(token: Path) -> None:
    token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not token.exists():
        private = token.with_name(f".auth_token.{os.getpid()}")
        private.touch(mode=0o600)
        private.write_text(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # another run's has just been made
            os.link(private, token)  # whole, or not there
        private.unlink()
    with contextlib.suppress(PermissionError):  # somebody else keeps it for us
        token.chmod(0o600)


def _unheard(*said: Any, **more: Any) -> None:
    """Keep what Ray would print in the driver off the terminal."""


def _stay_on_loopback() -> None:
    """Let a Ray of this machine alone listen on the loopback interface only.

    `_node_ip_address` is not enough. Ray replaces a loopback address by the machine's own unless it takes the platform
    for one without clusters, which it decides by this variable when it is imported.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # for the processes that it starts
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False


@contextlib.contextmanager
def _marked() -> Generator[None]:
    """Let what is started in this block carry our mark; what the user starts beside it does not."""
    os.environ[MARK] = driver_mark()
    try:
        yield
    finally:
        del os.environ[MARK]


def driver_mark(pid: int | str = "self") -> str:
    """Return what tells a process of this machine from every other, a later one of the same number too; "": it is dead.

    The namespace is part of it: a container's processes are seen from outside by other numbers.
    """
    try:
        about = Path(f"/proc/{pid}/stat").read_text()
        number, (state, *rest) = about.split()[0], about.rpartition(") ")[2].split()
        return f"{os.readlink('/proc/self/ns/pid')} {number} {rest[18]}" if state not in "ZX" else ""
    except OSError:
        return ""


def _is_dead(driver: str) -> bool:
    """Return whether a driver that has marked a process is dead; one of another namespace is not ours to judge."""
    namespace, _, rest = driver.partition(" ")
    pid = rest.partition(" ")[0]
    return namespace == os.readlink("/proc/self/ns/pid") and pid.isdigit() and driver_mark(pid) != driver


def _end_marked(is_due: Callable[[str], bool]) -> None:
    """Kill every process of this user whose mark is due, and see that it is dead."""
    for _ in range(END_LOOKS):
        due = [pid for pid, driver in marked_processes() if is_due(driver)]
        if not due:
            return
        for pid in due:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        threading.Event().wait(END_LOOK_S)


def marked_processes() -> Generator[tuple[int, str]]:
    """Yield the living processes of this user that carry a mark, and the mark."""
    for each in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            if each.name.isdigit() and each.stat().st_uid == os.getuid() and _state(int(each.name)):
                for variable in (each / "environ").read_bytes().split(b"\0"):
                    name, _, value = variable.decode(errors="replace").partition("=")
                    if name == MARK:
                        yield int(each.name), value


def sweep(root: Path | None = None) -> None:
    """Kill the processes and remove the session directories of runs of ours whose driver is dead, and no others."""
    _end_marked(_is_dead)
    scratch.sweep()
    for mark in (root or ray_root()).glob(f"session_*/{OURS}"):
        with contextlib.suppress(OSError):  # somebody else sweeps too
            if mark.stat().st_uid == os.getuid() and _is_dead(mark.read_text()):
                shutil.rmtree(mark.parent, ignore_errors=True)


def _state(pid: int) -> str:
    """Return the letter of a process's state, "" where there is none or it is dead: R, S, T stopped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return ""
    return "" if state in "ZX" else state
