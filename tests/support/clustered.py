"""`flowrl run` as a user starts it on a cluster of machines (cluster.py), and what can be seen of it from outside."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.command import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.cluster import Machine

FLEET = ROOT / "tests" / "support" / "fleet.py"
GROUP = ROOT / "graphs" / "group_async.py"


def command(*arguments: object) -> Sequence[str]:
    return [sys.executable, "-m", "flowrl.cli", *map(str, arguments)]


def told(settings: dict[str, object]) -> Sequence[str]:
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


def placed(said: str) -> list[str]:
    """Return what a run says of its processes' places, one line a machine: "learner.0, prompts.0 on 10.77.0.1"."""
    lines = [line for line in said.splitlines() if line.startswith("placement: ")]
    return lines[-1].removeprefix("placement: ").split("; ")


class Running:
    """A command that goes on on a machine, and what it has said so far."""

    def __init__(self, machine: Machine, log: Path, *arguments: object) -> None:
        self.log = log
        self.process = machine.start(command(*arguments), log=log, PYTHONUNBUFFERED="1")

    @property
    def text(self) -> str:
        return self.log.read_text()

    def until(self, *signs: str, within_s: float = 90.0) -> None:
        deadline_s = time.monotonic() + within_s
        while not all(sign in self.text for sign in signs):
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline_s, f"no {signs} in:\n{self.text}"
            time.sleep(0.05)

    def press_ctrl_c(self) -> None:
        """Interrupt the command itself, not the one that brought it onto the machine."""
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGINT)

    def ends(self, within_s: float = 60.0) -> int:
        return self.process.wait(within_s)


def steps_of(run_dir: Path) -> int:
    """Return how many steps a run has told of."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return max((json.loads(line).get("version", 0) for line in lines if line.endswith("}")), default=0)


def until_step(run: Running, run_dir: Path, step: int, within_s: float = 120.0) -> None:
    deadline_s = time.monotonic() + within_s
    while steps_of(run_dir) < step:
        assert run.process.poll() is None, run.text
        assert time.monotonic() < deadline_s, f"step {steps_of(run_dir)} of {step}:\n{run.text}"
        time.sleep(0.1)
