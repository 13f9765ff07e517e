"""What the loss of a node costs: `python -m perf.faults --nodes`, on machines made of namespaces (root only).

    python -m perf.faults --nodes [--only "link lost"] [--silence 240]

Four machines with a Ray of their own (tests/support/cluster.py) carry the flow of fakes in tests/support/fleet.py: the
driver and a generator on the first, the flow's host and the learner on the second, a generator on the third; the
last one joins in the end. In each row one thing befalls a machine, and Ray is started again where it has ended, as
whoever keeps a cluster would. A fault is recovered from once `SETTLED` further steps are learned, more than were under
way; `--silence` seconds without a step are a hang. Ray's settings are its own. Then `flowrl verify`'s judgement.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.runs.verify import judge
from flowrl.runtime.ledger import read_entries
from perf.machine import machine as this_machine
from tests.support.cluster import hindrance, machines
from tests.support.clustered import FLEET, Running, steps_of, told

if TYPE_CHECKING:
    import argparse
    import subprocess
    from collections.abc import Callable

    from tests.support.cluster import Machine

SETTLED = 4  # steps: what was under way when it struck makes three at most
LOOK_S = 0.1
MAX_STALENESS = 2  # of the flow


@dataclass
class Trial:
    """A run on three machines that is driven through faults of its nodes."""

    disk: Path
    head: Machine
    home: Machine  # of the flow's host and the learner
    other: Machine  # of a generator
    spare: Machine
    silence_s: float
    rays: dict[str, subprocess.Popen[str]] = field(default_factory=dict)  # by machine
    rows: list[str] = field(default_factory=list)
    num_hangs: int = 0

    @property
    def run_dir(self) -> Path:
        return self.disk / "run"

    def start(self) -> None:
        """Start Ray everywhere and the run on it."""
        self.head.start_ray(cpus=1)
        for machine in (self.home, self.other):
            self.join(machine)
        settings = told({"cluster.home": self.home.address, "generators": 2, "learner_cpus": 1})
        self.run = Running(self.head, self.disk / "log", "run", FLEET, "--address", self.head.ray, "--name", "run",
                           "--runs-dir", self.disk, *settings)  # fmt: skip
        self.steps(SETTLED)

    def join(self, machine: Machine, *, is_waited_for: bool = True) -> None:
        """Let a machine's Ray join the cluster, with room for the learner or a generator."""
        self.rays[machine.name] = machine.start_ray(self.head, is_waited_for=is_waited_for)

    def until_occupied(self, machine: Machine) -> None:
        """Wait until a replica is on a machine: else nothing of the run would be struck there."""
        deadline_s = time.monotonic() + self.silence_s
        while machine.is_on and not any("ReplicaActor" in line for line in machine.processes().values()):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"nothing of the run is on {machine.address}: {self.run.text[-2000:]}")
            self.keep_cluster()
            time.sleep(LOOK_S)

    def keep_cluster(self) -> None:
        """Start Ray again where it has ended, as whoever keeps a cluster's pods does."""
        for machine in (self.home, self.other):
            if machine.is_on and self.rays[machine.name].poll() is not None:
                self.join(machine, is_waited_for=False)

    def steps(self, count: int) -> float:
        """Wait until so many further steps are learned; returns the seconds, or raises TimeoutError."""
        began_s = heard_s = time.monotonic()
        seen, goal = steps_of(self.run_dir), steps_of(self.run_dir) + count
        while (now := steps_of(self.run_dir)) < goal:
            if now != seen:
                seen, heard_s = now, time.monotonic()
            if self.run.process.poll() is not None:
                raise TimeoutError(f"the run ended with {self.run.process.returncode}: {self.run.text[-2000:]}")
            if time.monotonic() - heard_s > self.silence_s:
                self.num_hangs += 1
                raise TimeoutError(f"silent for {self.silence_s:.0f} s: {self.run.text[-2000:]}")
            self.keep_cluster()
            time.sleep(LOOK_S)
        return time.monotonic() - began_s

    def strike(self, name: str, fault: Callable[[Trial], None]) -> None:
        """Let one fault happen; its row has the longest that the run stood still and the seconds to the next steps."""
        before = self.num_reissued()
        try:
            for machine in (self.home, self.other):
                self.until_occupied(machine)
            struck_s = time.monotonic()
            fault(self)
            self.steps(SETTLED)
            seconds, is_well = f"{time.monotonic() - struck_s:.1f}", "yes"
        except TimeoutError as error:
            print(f"{name}: {error}", flush=True)
            seconds, is_well = "-", "NO"
        self.rows.append(f"| {name} | {is_well} | {seconds} | {self.num_reissued() - before} |")
        print(self.rows[-1], flush=True)

    def num_reissued(self) -> int:
        """Return how many groups the run has said to be issued again."""
        said = [line.rpartition("issued again: ")[2].split(" ")[0] for line in self.run.text.splitlines()]
        return sum(int(word) for word in said if word.isdigit())


def raylet(machine: Machine) -> int:
    """Return a machine's raylet."""
    return next(pid for pid, line in machine.processes().items() if "/raylet/raylet" in line.split(" ")[0])


def kill_raylet(machine: Callable[[Trial], Machine]) -> Callable[[Trial], None]:
    return lambda trial: os.kill(raylet(machine(trial)), signal.SIGKILL)


def stand_still(machine: Callable[[Trial], Machine], seconds: float) -> Callable[[Trial], None]:
    def fault(trial: Trial) -> None:
        machine(trial).signal(signal.SIGSTOP)
        time.sleep(seconds)
        machine(trial).signal(signal.SIGCONT)

    return fault


def cut(machine: Callable[[Trial], Machine], seconds: float) -> Callable[[Trial], None]:
    def fault(trial: Trial) -> None:
        machine(trial).cut()
        time.sleep(seconds)
        machine(trial).restore()

    return fault


def switch_off(machine: Callable[[Trial], Machine]) -> Callable[[Trial], None]:
    return lambda trial: machine(trial).stop()


def exchange(trial: Trial) -> None:
    """Switch the learner's machine off for good and let another join."""
    trial.home.stop()
    trial.home = trial.spare
    trial.join(trial.spare)


def of_generator(trial: Trial) -> Machine:
    return trial.other


def of_learner(trial: Trial) -> Machine:
    return trial.home


FAULTS: dict[str, Callable[[Trial], None]] = {
    f"{whose}'s node: {what}": kind(machine, *seconds)
    for whose, machine in (("generator", of_generator), ("learner", of_learner))
    for what, kind, seconds in (
        ("raylet killed, started again", kill_raylet, ()),
        ("stands still for 20 s", stand_still, (20.0,)),
        ("link lost for 8 s", cut, (8.0,)),
        ("link lost for 20 s", cut, (20.0,)),
        ("link lost for 75 s, Ray started again", cut, (75.0,)),
    )
} | {
    "learner's node: gone for good, another joins": exchange,
    "generator's node: gone for good": switch_off(of_generator),
}


def main(options: argparse.Namespace) -> int:
    """Run the faults that are asked for; returns 0 if each was recovered from and nothing was lost."""
    if reason := hindrance():
        print(f"perf.faults --nodes: {reason}")
        return 2
    disk = Path(tempfile.mkdtemp(prefix="flowrl-nodes-", dir="/var/tmp"))
    faults = {name: fault for name, fault in FAULTS.items() if any(word in name for word in options.only)}
    print(f"{this_machine()}; {len(faults)} faults of nodes", flush=True)
    try:
        with machines(4) as (head, home, other, spare):
            trial = Trial(disk, head, home, other, spare, silence_s=options.silence)
            trial.start()
            for name, fault in faults.items():
                trial.strike(name, fault)
            trial.run.press_ctrl_c()
            code = trial.run.ends(120.0)
            entries = read_entries(trial.run_dir / "ledger.jsonl")
            verdict = judge(entries, max_staleness=MAX_STALENESS, is_finished=False)
        print("| fault | recovered | s to the next steps | issued again |\n|---|---|---|---|")
        print("\n".join(trial.rows))
        print(
            f"| **together: {len(faults)}**, {verdict.steps} steps, {verdict.rollbacks} rollbacks, exit code {code} | "
            f"lost {len(verdict.lost)} | duplicated {len(verdict.duplicated)}, over-stale {len(verdict.over_stale)} | "
            f"hangs {trial.num_hangs} |"
        )
        return 0 if verdict.is_clean and not code and "| NO |" not in "".join(trial.rows) else 1
    finally:
        shutil.rmtree(disk, ignore_errors=True)
