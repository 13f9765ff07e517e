"""What befalls Ray itself and the terminal of a run on it: a controlled stop or a recovery, and nothing left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import psutil
import pytest

from flowrl.runtime.rundir import holders
from tests.contracts.test_stops import check_stopped
from tests.support.command import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.ray]

PATIENCE_S = 300.0  # only a test that fails waits so long


class Terminal:
    """A run of tests/support/driven.py on Ray, in a terminal of its own."""

    def __init__(self, run_dir: Path, *told: str) -> None:
        run_dir.mkdir(exist_ok=True)
        self.run_dir = run_dir
        self.text = ""
        self._seen: set[str] = set()  # the numbers of all processes that it has started
        self._master, slave = pty.openpty()
        command = [sys.executable, "-m", "tests.support.driven", str(run_dir), "ray", *told]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=ROOT, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
        )  # fmt: skip
        os.close(slave)
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while piece := os.read(self._master, 65536):
                self.text += piece.decode(errors="replace")

    def until(self, sign: str) -> None:
        """Wait until the terminal shows a sign, or metrics.jsonl holds it."""
        deadline_s = time.monotonic() + PATIENCE_S
        metrics = self.run_dir / "metrics.jsonl"
        while sign not in self.text and not (metrics.exists() and sign in metrics.read_text(errors="replace")):
            assert time.monotonic() < deadline_s, self.text
            assert self.process.poll() is None, self.text
            self.look()
            time.sleep(0.05)

    def look(self) -> None:
        """Take down which processes it has."""
        started = psutil.Process(self.process.pid).children(recursive=True)
        self._seen |= {str(self.process.pid), *(str(each.pid) for each in started)}

    def left_behind(self) -> list[str]:
        """Return what its processes have put where others put theirs too: Ray's sessions, the weights' transport.

        A name ends with the number of a process; what is not of this run's is another test's.
        """
        found = [path for root in ("/tmp/ray", "/dev/shm") for path in Path(root).glob("*")]
        owners = {path: re.search(r"[-_](\d+)(?:-[0-9a-f]{12})?$", path.name) for path in found}
        return [str(path) for path, pid in owners.items() if pid and pid[1] in self._seen]

    def press_ctrl_c(self) -> None:
        os.write(self._master, b"\x03")

    def hang_up(self) -> None:
        """Close the terminal: every process in it gets SIGHUP."""
        os.close(self._master)

    def ends(self) -> int:
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()


def ray_processes(pid: int) -> dict[str, int]:
    """Return the processes of the Ray that a driver has started, by name."""
    found: dict[str, int] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found[Path(f"/proc/{child}/comm").read_text().strip()] = int(child)
    return found


def test_ctrl_c_during_set_up_stops_at_once(tmp_path: Path) -> None:
    run = Terminal(tmp_path / "run")
    run.until("run directory")
    while not ray_processes(run.process.pid):
        time.sleep(0.02)
    run.look()
    run.press_ctrl_c()
    assert run.ends() == 0, run.text
    check_stopped(tmp_path / "run", with_checkpoint=False)
    assert holders(tmp_path / "run" / "lock") == []
    assert run.left_behind() == []


def test_a_killed_raylet_is_recovered_from_and_a_closed_terminal_stops_in_order(tmp_path: Path) -> None:
    run = Terminal(tmp_path / "run", "heartbeat_timeout_s=15")
    run.until('"version":6,')
    old = holders(run.run_dir / "lock")
    assert len(old) >= 5, "hub, prompts, generator, scorer, learner, and the driver"
    os.kill(ray_processes(run.process.pid)["raylet"], signal.SIGKILL)
    run.until("Ray is started again")
    run.until('"version":11,')
    processes = set(holders(run.run_dir / "lock")) - {run.process.pid}
    assert not processes & set(old), "a process of the attempt before lives on"
    run.hang_up()
    assert run.ends() == 0
    check_stopped(tmp_path / "run")
    assert holders(tmp_path / "run" / "lock") == []
    assert run.left_behind() == []
