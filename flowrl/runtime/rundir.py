"""A run's directory: `runs/<name>/` with its settings, plan, metrics, timeline, rollouts, logs and checkpoints.

A new run never writes into a directory that holds another; a resumed one continues in its own, once every process of
the attempt before has ended. The driver alone holds `driver.lock`; every other process of the run holds a shared lock
on `lock`, so that whoever gets it alone has proof that they are dead. `lock` holds the number of the present attempt:
a process that cannot be proved dead, on a machine that is cut off, reads there that it must write no more.

Tests: tests/unit/runtime/test_rundir.py
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.config import parse_yaml, to_tree
from flowrl.errors import ConfigError, DataError, ResourceError, RunError, check_text
from flowrl.graph.program import GraphPlan, plan_of
from flowrl.telemetry.files import UNREADABLE, RecordFile, check_fence, fence, read_file, replace_file, seal, unseal

if TYPE_CHECKING:
    from collections.abc import Callable

    from flowrl.graph.program import Program

CLAIM_TIMEOUT_S = 60.0  # Ray needs some seconds to notice that a driver is gone
LOOKED_AT_S = 0.2  # more than `is_held` holds a lock for, to see whether somebody does
LOOK_S = 0.02  # between two looks whether a process is dead: no system call waits for it with a time limit
PRIVATE = 0o600
OURS = {"logs", "lock", "driver.lock"}  # what there is before the settings are written, and no run
LEAST_FREE_BYTES = 2 << 30  # a checkpoint of a small model with its optimizer state, twice


class RunStart(msgspec.Struct, frozen=True, kw_only=True):
    """One start of the command in a run's directory."""

    number: int  # from 0
    time_s: float
    graph: str  # the graph's file
    plan_digest: str  # of graph.json as it was written then
    settings: dict[str, Any]  # all of them, resolved
    data: dict[str, str] = {}  # node -> digest of the rows that it has read
    code: dict[str, str] = {}  # file -> digest of the graph and of what its settings name as file.py:name


def create_run_dir(directory: Path) -> Path:
    """Create a run's directory.

    Raises:
        ConfigError: it holds a run, or anything else.
        ResourceError: it cannot be written, or the disk is nearly full.
    """
    check_text(str(directory.resolve()), str(directory))
    if directory.exists() and {path.name for path in directory.iterdir()} - OURS:
        raise ConfigError(str(directory), "holds a run already", "choose another --name, or continue it with --resume")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise ResourceError(
            str(directory), f"cannot be written ({error.strerror})", "choose another --runs-dir"
        ) from error
    free = shutil.disk_usage(directory).free
    if free < LEAST_FREE_BYTES:
        what = f"{free / 2**30:.1f} GiB are free on its disk, {LEAST_FREE_BYTES / 2**30:.0f} GiB are needed"
        raise ResourceError(str(directory), what, "free some, or choose another --runs-dir")
    return directory


def write_plan(directory: Path, program: Program) -> int:
    """Write a start of the run, whole and on the disk, and return its number: settings, graph, digests of the data.

    `settings.yaml` and `graph.json` are of the newest start, `starts.jsonl` has a sealed line for every one, so that
    each group's bound is known and a change of the files shows. They may hold secrets: the owner alone reads them.

    Raises:
        ResourceError: the disk is full, or may not be written.
    """
    settings = to_tree(program.settings)
    plan = msgspec.json.format(msgspec.json.encode(plan_of(program.graph)))
    digests = {name: stage.data_digest for name, stage in program.graph.nodes.items() if stage.data_digest}
    number = len(read_starts(directory))
    start = RunStart(
        number=number,
        time_s=time.time(),
        graph=str(program.path),
        plan_digest=digest_of(plan),
        settings=settings,
        data=digests,
        code=code_of(program),
    )
    path = directory / "starts.jsonl"
    try:
        with contextlib.closing(RecordFile(path, mode=PRIVATE)) as file:
            file.append(seal(msgspec.json.encode(start)))
            file.sync()
            if file.is_waiting:
                raise OSError(errno.ENOSPC, file.trouble)
        replace_file(directory / "settings.yaml", as_yaml(program.settings).encode(), mode=PRIVATE)
        replace_file(directory / "graph.json", plan, mode=PRIVATE)
        (directory / "ending.json").unlink(missing_ok=True)  # of the start before
    except OSError as error:
        raise ResourceError(str(path), f"cannot be written ({error})", "make room, or mend its permissions") from error
    return number


def code_of(program: Program) -> dict[str, str]:
    """Return the files of a program's own code, each with its digest: the graph, and what its settings name."""
    named = re.findall(rb'"([^"]+\.py):[^"]+"', msgspec.json.encode(to_tree(program.settings)))
    files = sorted({Path(program.path), *(Path(each.decode()) for each in named)})
    return {str(file): digest_of(file.read_bytes()) for file in files if file.is_file()}


def read_starts(directory: Path) -> list[RunStart]:
    """Return the starts of a run, oldest first; a last line that was cut short by a kill is no start.

    Raises:
        DataError: a line is damaged.
    """
    path = directory / "starts.jsonl"
    lines = (read_file(path) or b"").splitlines(keepends=True)
    found: list[RunStart] = []
    for number, line in enumerate(lines, start=1):
        if line == b"\n" or (number == len(lines) and not line.endswith(b"\n")):
            continue
        try:
            found.append(msgspec.json.decode(unseal(line), type=RunStart))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}", f"is damaged ({error})", "restore the file") from error
    return found


def recorded_settings(directory: Path) -> Path:
    """Return the file of the settings that a run goes on with, held against the record of its starts.

    Raises:
        ConfigError: there is no run, or the file is empty or was changed.
    """
    path = existing_run(directory) / "settings.yaml"
    starts = read_starts(directory)
    tree = read_settings(path)
    if not starts or tree == starts[-1].settings:
        return path
    if len(starts) > 1 and tree == starts[-2].settings:  # killed between the line and the file
        replace_file(path, yaml_of(starts[-1].settings).encode(), mode=PRIVATE)
        return path
    changed = next((name for name in starts[-1].settings if tree.get(name) != starts[-1].settings[name]), "a setting")
    what = f"{changed} is not what the run was started with: the file was changed"
    raise ConfigError(str(path), what, "restore it, and give changes with --set or --config")


def read_settings(path: Path) -> dict[str, Any]:
    """Return recorded settings as plain data.

    Raises:
        UserError: the file cannot be read, or does not hold settings.
    """
    tree = parse_yaml(read_file(path) or b"", str(path))
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(str(path), "holds no settings", "restore the file, or begin again in another directory")
    return cast("dict[str, Any]", tree)


def as_yaml(settings: Any) -> str:
    """Return resolved settings as a file that `--config` takes."""
    return yaml_of(to_tree(settings))


def yaml_of(tree: dict[str, Any]) -> str:
    """Return settings that are plain data as a file that `--config` takes."""
    import yaml

    return yaml.safe_dump(tree, sort_keys=False)


def digest_of(body: bytes) -> str:
    """Return the blake3 digest of a file's bytes."""
    from blake3 import blake3

    return blake3(body).hexdigest()


def read_plan(run_dir: Path) -> GraphPlan:
    """Return the plan of a run's graph.

    Raises:
        DataError: it cannot be read.
    """
    path = run_dir / "graph.json"
    try:
        return msgspec.json.decode(read_file(path) or b"", type=GraphPlan)
    except UNREADABLE as error:
        raise DataError(str(path), f"cannot be read ({error})", "name the directory of a run") from error


def existing_run(directory: Path) -> Path:
    """Return the directory of a run.

    Raises:
        ConfigError: there is none.
    """
    if not (directory / "settings.yaml").is_file():
        raise ConfigError(str(directory), "holds no run", "name a directory under runs/")
    check_text(str(directory.resolve()), str(directory))
    return directory


class Claim:
    """A run's directory, as the one process that drives the run holds it: until `close`, or its end."""

    def __init__(self, directory: Path) -> None:
        """Take the directory.

        Raises:
            ConfigError: another process drives the run.
        """
        self._directory = directory
        self._driver = _open(directory / "driver.lock")
        if not _wait_until(lambda: _is_free(self._driver, keep=True), LOOKED_AT_S):
            pid = os.pread(self._driver, 20, 0).decode(errors="replace").strip()
            os.close(self._driver)
            what = f"is driven by another flowrl already (process {pid or 'unknown'})"
            raise ConfigError(str(directory), what, "choose another --name, or stop that run first")
        os.ftruncate(self._driver, 0)
        os.pwrite(self._driver, f"{os.getpid()}\n".encode(), 0)
        self._processes = _open(directory / "lock")

    def is_alone(self) -> bool:
        """Return whether every other process of the run is dead, on this machine and on any that sees the directory."""
        return _is_free(self._processes, keep=False)

    def wait_alone(self, timeout_s: float) -> bool:
        """Wait until every other process of the run is dead; blocks. Returns whether it came so far."""
        return _wait_until(self.is_alone, timeout_s)

    def begin_attempt(self) -> int:
        """Begin an attempt and return its number: from now on processes of an older one write no more."""
        attempt = 1 + _attempt_in(self._processes)
        os.pwrite(self._processes, b"%-19d\n" % attempt, 0)
        os.fsync(self._processes)
        return attempt

    def kill_processes(self) -> list[int]:
        """Kill whatever process of the run is left on this machine, a stopped one too; returns their ids."""
        found = holders(self._directory / "lock")
        for pid in found:
            with contextlib.suppress(OSError):  # it ended by itself
                os.kill(pid, signal.SIGKILL)
        return found

    def close(self) -> None:
        """Let the directory go."""
        os.close(self._driver)
        os.close(self._processes)


def _attempt_in(lock: int) -> int:
    body = os.pread(lock, 20, 0).strip()
    if body and not body.isdigit():
        raise DataError(os.readlink(f"/proc/self/fd/{lock}"), "holds no number of an attempt", "empty it")
    return int(body or b"0")


def holders(lock: Path) -> list[int]:
    """Return the other processes of this machine that hold a lock, as far as we may see; not who has it open only."""
    found: list[int] = []
    about = lock.stat()

    def is_held_by(pid: int, descriptor: str) -> bool:
        with contextlib.suppress(OSError):  # closed meanwhile
            seen = os.stat(f"/proc/{pid}/fd/{descriptor}")
            if (seen.st_dev, seen.st_ino) == (about.st_dev, about.st_ino):
                return "\nlock:" in Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text()
        return False

    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):  # it has ended, or is not ours
            if pid != os.getpid() and any(is_held_by(pid, each) for each in os.listdir(f"/proc/{pid}/fd")):
                found.append(pid)
    return found


def hold(directory: Path, attempt: int) -> None:
    """Show, as long as this process lives, that the run has a process; it writes as long as its attempt goes on.

    Raises:
        RunError: another attempt has begun, or this machine sees another directory under that path.
    """
    lock = _open(directory / "lock")
    fcntl.flock(lock, fcntl.LOCK_SH)
    fence(directory / "lock", attempt)
    check_fence()
    if (present := _attempt_in(lock)) < attempt:
        what = f"is not the run's on this machine: attempt {present} stands there, not {attempt}"
        raise RunError(str(directory), what, "give a --runs-dir on a disk that every node sees")


def claim(directory: Path, say: Callable[[str], None], *, timeout_s: float = CLAIM_TIMEOUT_S) -> Claim:
    """Hold a run's directory as its driver, once no other process of the run is left.

    They end by themselves when their driver is dead; those of this machine that do not (a stopped one) are killed.

    Raises:
        ConfigError: another process drives it, or one is still there after `timeout_s`.
    """
    found = Claim(directory)
    if not found.is_alone():
        say(f"waiting for the processes of an earlier attempt to end, at most {timeout_s:.0f} s")
        if not found.wait_alone(timeout_s / 2):
            found.kill_processes()
        if not found.wait_alone(timeout_s / 2):
            pids = ", ".join(map(str, holders(directory / "lock"))) or "on another machine"
            found.close()
            what = f"still has processes of an earlier attempt after {timeout_s:.0f} s ({pids})"
            raise ConfigError(str(directory), what, "kill what is left of it")
    return found


def is_held(directory: Path) -> bool:
    """Return whether a process of the run lives on any machine that sees its directory."""
    for name in ("lock", "driver.lock"):
        try:
            lock = os.open(directory / name, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # never driven, or by somebody whose files we may not open
            continue
        try:
            if not _is_free(lock, keep=False):
                return True
        finally:
            os.close(lock)
    return False


def _wait_until(is_so: Callable[[], bool], timeout_s: float) -> bool:
    """Look again and again, at most so long; returns whether it came so far."""
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() >= deadline_s:
            return False
        threading.Event().wait(LOOK_S)
    return True


def _is_free(lock: int, *, keep: bool) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if not keep:
        fcntl.flock(lock, fcntl.LOCK_UN)
    return True


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE)  # who may open it might hold it, too
