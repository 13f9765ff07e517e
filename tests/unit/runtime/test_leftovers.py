"""What a driver that was killed has left behind is ended by the next one, and nothing else is."""

from __future__ import annotations

import fcntl
import subprocess
from typing import TYPE_CHECKING

import pytest

from flowrl.runtime.cluster import MARK, OURS, driver_mark, marked_processes, sweep
from flowrl.runtime.rundir import Claim, holders

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def mark(*, is_alive: bool = True, is_here: bool = True) -> str:
    """Return the mark of this process, or of another one: dead, or in a container."""
    namespace, pid, started = driver_mark().split()
    return f"{namespace if is_here else 'pid:[1]'} {pid} {started if is_alive else int(started) - 1}"


@pytest.fixture
def sleeper() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes to be killed at the end."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for each in started:
        each.kill()
        each.wait()


def test_processes_of_a_dead_driver_are_swept_and_no_others(sleeper: list[subprocess.Popen[bytes]], tmp_path: Path):
    marks = [mark(is_alive=False), mark(), mark(is_alive=False, is_here=False)]
    sleeper += [subprocess.Popen(["sleep", "600"], env={MARK: each}) for each in marks]
    while not {each.pid for each in sleeper} <= {pid for pid, _ in marked_processes()}:
        pass  # between its fork and its exec a process has our environment
    session = tmp_path / "session_1"
    session.mkdir()
    (session / OURS).write_text(marks[0])
    sweep(tmp_path)
    dead, ours, elsewhere = sleeper
    assert dead.poll() == -9
    assert ours.poll() is None
    assert elsewhere.poll() is None
    assert not session.exists()


def test_only_who_holds_a_lock_is_of_the_run(sleeper: list[subprocess.Popen[bytes]], tmp_path: Path):
    """Whoever only looks at a run, as `flowrl watch` does, has the file open, too."""
    claim = Claim(tmp_path)
    lock = tmp_path / "lock"
    with lock.open("r+b") as file:
        sleeper.append(subprocess.Popen(["sleep", "600"], stdin=file))
    with lock.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        sleeper.append(subprocess.Popen(["sleep", "600"], stdin=file))
    looks, holds = sleeper
    assert holders(lock) == [holds.pid]
    assert claim.kill_processes() == [holds.pid]
    assert holds.wait() == -9
    assert looks.poll() is None
    claim.close()
