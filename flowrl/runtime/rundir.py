"""A run's directory: `runs/<name>/` with its settings, plan, metrics, timeline, rollouts, logs and checkpoints.

A new run never writes into a directory that holds another; a resumed one continues in its own, once every process of
the attempt before has ended: each holds a shared lock on `lock`, and whoever drives a run must have had it alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.config import to_tree
from flowrl.errors import ConfigError, DataError, ResourceError
from flowrl.graph.plan import GraphPlan, plan_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flowrl.graph.program import Program

CLAIM_TIMEOUT_S = 60.0  # Ray needs some seconds to notice that a driver is gone
LEAST_FREE_BYTES = 2 << 30  # a checkpoint of a small model with its optimizer state, twice


def create_run_dir(directory: Path) -> Path:
    """Create a run's directory.

    Raises:
        ConfigError: it exists and is not empty.
        ResourceError: it cannot be written, or the disk is nearly full.
    """
    if directory.exists() and any(directory.iterdir()):
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


def write_plan(directory: Path, program: Program) -> None:
    """Write the resolved settings, the graph as plain data, and the digests of the data that its check has read."""
    digests = {name: stage.data_digest for name, stage in program.graph.nodes.items() if stage.data_digest}
    write_atomically(directory / "data.json", msgspec.json.format(msgspec.json.encode(digests)))
    write_atomically(directory / "graph.json", msgspec.json.format(msgspec.json.encode(plan_of(program.graph))))
    write_atomically(directory / "settings.yaml", as_yaml(program.settings).encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is there whole, on the disk, or as it was."""
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def as_yaml(settings: Any) -> str:
    """Return resolved settings as a file that `--config` takes."""
    import yaml

    return yaml.safe_dump(to_tree(settings), sort_keys=False)


def read_plan(run_dir: Path) -> GraphPlan:
    """Return the plan of a run's graph.

    Raises:
        DataError: it cannot be read.
    """
    path = run_dir / "graph.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=GraphPlan)
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(str(path), f"cannot be read ({error})", "name the directory of a run") from error


def existing_run(directory: Path) -> Path:
    """Return the directory of a run.

    Raises:
        ConfigError: there is none.
    """
    if not (directory / "settings.yaml").is_file():
        raise ConfigError(str(directory), "holds no run", "name a directory under runs/")
    return directory


def hold(directory: Path) -> None:
    """Show, as long as this process lives, that the run has a process."""
    fcntl.flock(_open_lock(directory), fcntl.LOCK_SH)


def claim(directory: Path, say: Callable[[str], None], *, timeout_s: float = CLAIM_TIMEOUT_S) -> None:
    """Wait until no other process of the run is left, then hold it as its driver.

    Raises:
        ConfigError: one is still there after `timeout_s`.
    """
    lock = _open_lock(directory)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        say(f"waiting for the processes of an earlier attempt to end, at most {timeout_s:.0f} s")
        waiting = threading.Thread(target=fcntl.flock, args=(lock, fcntl.LOCK_EX), daemon=True)
        waiting.start()
        waiting.join(timeout_s)
        if waiting.is_alive():
            what = f"still has processes of an earlier attempt after {timeout_s:.0f} s"
            raise ConfigError(str(directory), what, "stop that run first, or kill what is left of it") from error
    fcntl.flock(lock, fcntl.LOCK_SH)


def is_held(directory: Path) -> bool:
    """Return whether a process of the run lives on any machine that sees its directory."""
    try:
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # never driven, or by somebody whose files we may not open
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _open_lock(directory: Path) -> int:
    return os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
