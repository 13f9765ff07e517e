"""Drive a small flow on fake engines as `flowrl run` drives a graph: `python -m tests.support.driven RUN_DIR RUNTIME`.

Settings of RunSettings may follow as NAME=VALUE, `flow.NAME=VALUE` is one of the flow's, `resume` goes on from the
newest checkpoint. `Driven` is such a run in a process of its own, `Terminal` one in a terminal.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psutil

from flowrl.config import resolve
from flowrl.errors import FlowrlError, hold_output, let_go_of_output, say
from flowrl.graph.graph import RunSettings
from flowrl.graph.program import Program
from flowrl.runtime.launch import drive
from flowrl.runtime.rundir import claim, write_plan
from flowrl.runtime.supervisor import newest_start
from flowrl.stages.learner import Learner
from flowrl.stops import STOPS
from tests.support.command import ROOT
from tests.support.flows import ENDLESS, FlowSettings, flow

if TYPE_CHECKING:
    from collections.abc import Sequence


PATIENCE_S = 300.0  # only a test that fails waits so long
LOOK_S = 0.1


def heed_signals() -> None:
    """Let no signal be ignored because it was where the tests were started: a background shell, nohup."""
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)


class Driven:
    """A run in a process of its own, behind the words of `under`, or another `command` that drives one.

    `more` goes to `subprocess.Popen`.
    """

    def __init__(
        self, run_dir: Path, *told: str, stdout: int | None = None, runtime: str = "local", command: Sequence[str] = (),
        environment: dict[str, str] | None = None, under: Sequence[str] = (), **more: Any,
    ) -> None:  # fmt: skip
        self.run_dir = run_dir
        if not command:
            run_dir.mkdir(exist_ok=True)
            command = [*under, sys.executable, "-m", "tests.support.driven", str(run_dir), runtime, *told]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(environment or {})}
        with contextlib.nullcontext(stdout) if stdout is not None else (run_dir / "out").open("ab") as out:
            self.process = subprocess.Popen(
                command,
                **{"stdout": out, "stderr": subprocess.DEVNULL, "preexec_fn": heed_signals, "cwd": ROOT} | more,
                env=env,
            )

    def until(self, sign: str, name: str = "metrics.jsonl", *, patience_s: float = PATIENCE_S) -> None:
        """Wait until a file of the run holds a sign."""
        deadline_s = time.monotonic() + patience_s
        path = self.run_dir / name
        while not (path.exists() and sign in path.read_text(errors="replace")):
            assert time.monotonic() < deadline_s, f"no {sign!r} in {name}"
            assert self.process.poll() is None, f"it ended with {self.process.returncode} before {sign!r}"
            time.sleep(0.02)

    def ends(self) -> int:
        """Wait for its end; returns its exit code."""
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()


class Terminal(Driven):
    """A run in a terminal of its own."""

    def __init__(self, run_dir: Path, *told: str, runtime: str = "ray", **more: Any) -> None:
        self.text = ""
        self.is_hung_up = False
        self._seen: set[str] = set()  # the numbers of all processes that it was seen to have
        self._master, slave = pty.openpty()
        super().__init__(
            run_dir, *told, runtime=runtime, environment={"TERM": "dumb"}, stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True, preexec_fn=lambda: (heed_signals(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)), **more,
        )  # fmt: skip
        os.close(slave)
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while not self.is_hung_up:  # a read that waits would keep the terminal open
                if select.select([self._master], [], [], LOOK_S)[0]:
                    self.text += os.read(self._master, 65536).decode(errors="replace")

    def until(self, sign: str, name: str = "metrics.jsonl", *, patience_s: float = PATIENCE_S) -> None:
        """Wait until the terminal shows a sign, or a file of the run holds it."""
        deadline_s = time.monotonic() + patience_s
        path = self.run_dir / name
        while sign not in self.text and not (path.exists() and sign in path.read_text(errors="replace")):
            assert time.monotonic() < deadline_s, self.text
            assert self.process.poll() is None, self.text
            self.look()
            time.sleep(0.02)

    def look(self) -> None:
        """Take down which processes it has."""
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(self.process.pid).children(recursive=True)
            self._seen |= {str(self.process.pid), *(str(each.pid) for each in started)}

    def left_behind(self) -> list[str]:
        """Return what its processes have put where others put theirs too: Ray's sessions, weights, sockets.

        A name ends with the number of a process; what is not of this run's is another test's.
        """
        found = [path for each in ("tmp/ray/*", "dev/shm/*", "tmp/flowrl-*") for path in Path("/").glob(each)]
        owners = {path: re.search(r"[-_](\d+)(?:-[0-9a-f]{12})?$", path.name) for path in found}
        return [str(path) for path, pid in owners.items() if pid and pid[1] in self._seen]

    def type(self, text: str) -> None:
        """Give it to whoever reads from it."""
        os.write(self._master, text.encode())

    def press_ctrl_c(self) -> None:
        """Interrupt every process in it."""
        self.type("\x03")

    def hang_up(self) -> None:
        """Close the terminal: every process in it gets SIGHUP."""
        self.is_hung_up = True
        self._reading.join()
        os.close(self._master)


def main(directory: str, runtime: str, *told: str) -> int:
    hold_output()
    run_dir = Path(directory)
    given = [each for each in told if each != "resume" and not each.startswith("flow.")]
    of_flow = dict(each.removeprefix("flow.").split("=") for each in told if each.startswith("flow."))
    settings = resolve(RunSettings, overrides=[f"runtime={runtime}", "hints=false", *given])
    flow_settings = msgspec.convert({**msgspec.to_builtins(ENDLESS), **of_flow}, FlowSettings, strict=False)
    program = Program(path=Path(__file__), settings=settings, graph=flow(flow_settings, Learner))
    try:
        with contextlib.closing(claim(run_dir, say)) as claimed:
            resume = newest_start(run_dir, lambda *said: say(" ".join(said))) if "resume" in told else None
            drive(program, run_dir, claimed=claimed, start_number=write_plan(run_dir, program), resume=resume,
                  address=None, again="", say=say)  # fmt: skip
    except FlowrlError as error:
        say(f"driven: {error}", aside=True)
        return error.exit_code
    except KeyboardInterrupt:
        say("driven: aborted", aside=True)
        return 130
    finally:
        let_go_of_output()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
