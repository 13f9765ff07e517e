"""What faults cost on real processes: signals to each of a run and of Ray, leaps of the clock, a directory taken away.

    python -m perf.faults [--rounds 1] [--seed 0] [--only learner] [--heartbeat 10] [--stall 60]
    python -m perf.faults --only scorer --every 60        a soak: a minute between two faults
    python -m perf.faults --nodes                         nodes of a cluster: perf/node_faults.py

A flow of prompts, two generators, two scorers and a learner of two ranks, all of them fakes in real processes on a
real Ray, is driven by a process of its own (tests/support/driven.py). In each round it meets every fault of `FAULTS`
once, in an order drawn from the seed; a driver that a fault ends is started again with `resume`. A fault is recovered
from when a further step has been learned, and whoever was killed, or stopped for good, has been replaced; a silence
longer than twice the stall timeout is a hang. Then `flowrl verify`'s judgement of the whole history, the processes that
outlived the run, and what it left in /tmp/ray and /dev/shm. Of each process that lived for five minutes: resident
memory and open files a minute after its start and at its end. See perf/README.md for how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.runs.verify import judge
from flowrl.runtime.ledger import read_entries
from flowrl.telemetry.report import read_ending
from perf.machine import machine
from tests.support.driven import Driven

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MARK = "FLOWRL_FAULTS"  # in the environment of every process that comes of a run of ours
FLOW = ("flow.generators=2", "flow.scorers=2", "flow.ranks=2", "cluster.proxies=2")
REPLICAS = ("prompts.0", "generator.0", "generator.1", "scorer.0", "scorer.1", "learner.0", "learner.0.rank1")
HUB = ("hub", "hub.proxy0", "hub.proxy1")
RAYS = ("raylet", "gcs_server")
OWNER = re.compile(r"[-_](\d+)(?:-[0-9a-f]{12})?$")  # the process's number in the name of what it left
LOOK_S = 0.2
SETTLED_S = 60.0  # after its start a process holds what it will hold
LASTING_S = 300.0
LEAPS = {"clock an hour on": 3600, "clock an hour back": -3600}  # seconds; the third step sets it right again
CLOCK = Path(__file__).with_name("leaping_clock.c")


@dataclass(frozen=True)
class Fault:
    """One thing that befalls a run; `victim` is a process, or says what else it is."""

    kind: str
    victim: str

    @property
    def row(self) -> str:
        """Return what the table calls it: without the number of a replica."""
        return f"{self.kind} {self.victim.partition('.')[0]}" + (
            " rank 1" if "rank1" in self.victim else "'s proxy" if "proxy" in self.victim else ""
        )


FAULTS = [
    *(Fault(kind, who) for kind in ("SIGKILL", "SIGSTOP", "SIGSTOP, woken", "SIGTERM", "SIGHUP")
      for who in (*REPLICAS, *HUB, *RAYS)),
    *(Fault(kind, who) for kind in ("SIGKILL", "SIGTERM", "SIGSTOP, woken") for who in ("driver", "all at once")),
    *(Fault(kind, "driver") for kind in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGSTOP, killed")),
    Fault("second run", "in the directory"), Fault("read-only", "directory"),
    *(Fault(kind, "of all") for kind in LEAPS),
]  # fmt: skip


@dataclass
class Size:
    """What a process held at a moment."""

    time_s: float
    resident_mib: float
    num_files: int


@dataclass
class Story:
    """What happened."""

    waits: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # row -> seconds to recovery
    failed: list[str] = field(default_factory=list[str])  # faults that were not recovered from, and why
    num_hangs: int = 0
    sizes: dict[tuple[str, int], list[Size]] = field(default_factory=lambda: defaultdict(list))  # by process


class Wrong(Exception):
    """A fault was not recovered from."""


class Trial:
    """A run that is driven through faults."""

    def __init__(self, run_dir: Path, options: argparse.Namespace) -> None:
        self.run_dir = run_dir
        self._options = options
        self._clock = run_dir.parent / "clock"
        self._told = (*FLOW, f"heartbeat_timeout_s={options.heartbeat}", f"stall_timeout_s={options.stall}")
        self._environment = {MARK: str(run_dir), **leaping_clock(self._clock)}
        self.pids: set[int] = set()  # that ever were part of it
        self.drivers: list[int] = []
        self.story = Story()
        self._told_bytes = self._learned = 0
        self._driven: Driven | None = None
        self.start()

    def start(self, *told: str) -> None:
        """Start the driver."""
        self._driven = Driven(self.run_dir, *self._told, *told, runtime="ray", environment=self._environment,
                              start_new_session=True)  # fmt: skip
        self.drivers.append(self.driver.pid)

    @property
    def driver(self) -> subprocess.Popen[Any]:
        assert self._driven is not None
        return self._driven.process

    def learned(self) -> int:
        """Return how many groups have been learned so far, those that a rollback took back counted as well."""
        path = self.run_dir / "ledger.jsonl"
        size = path.stat().st_size if path.exists() else 0
        self._told_bytes = min(self._told_bytes, size)
        if size > self._told_bytes:
            with path.open("rb") as file:
                file.seek(self._told_bytes)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._told_bytes += len(whole)
            self._learned += whole.count(b'"learned"')
        return self._learned

    def until(self, what: str, is_so: Callable[[], bool], *, may_end: bool = False) -> None:
        """Wait for something; longer than twice the stall timeout is a hang.

        Raises:
            Wrong: it hangs, or the driver has ended.
        """
        limit_s, began_s = 2 * self._options.stall, time.monotonic()
        while not is_so():
            if time.monotonic() - began_s > limit_s:
                self.story.num_hangs += 1
                raise Wrong(f"{what}: silent for {limit_s:.0f} s")
            if not may_end and (code := self.driver.poll()) is not None:
                raise Wrong(f"{what}: the driver ended with {code}: {read_ending(self.run_dir)}")
            time.sleep(LOOK_S)

    def steps(self, what: str) -> None:
        """Wait until a further step has been learned."""
        before = self.learned()
        self.until(what, lambda: self.learned() > before)

    def processes(self) -> dict[str, int]:
        """Return the living processes by name: a replica writes its log, Ray's have names of their own."""
        found = {"driver": self.driver.pid}
        for pid in family(self.run_dir):
            self.pids.add(pid)
            with contextlib.suppress(OSError):
                log = Path(os.readlink(f"/proc/{pid}/fd/1"))
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                if log.parent == self.run_dir / "logs":
                    found[log.stem] = pid
                elif name in RAYS:
                    found[name] = pid
        return found

    def strike(self, fault: Fault) -> None:
        """Let one fault happen and see the run recover from it."""
        before = self.processes()
        struck_s = time.monotonic()
        try:
            if fault.kind in LEAPS:
                self._leap(fault.kind)
            elif fault.victim == "in the directory":
                self._drive_twice()
            elif fault.victim == "directory":
                self._bar_directory()
            elif fault.victim in ("driver", "all at once"):
                self._end_driver(fault, before)
            else:
                self._signal(fault, before)
            self.steps(str(fault))
            self.story.waits[fault.row].append(time.monotonic() - struck_s)
        except Wrong as wrong:
            self.story.failed.append(f"{fault.row}: {wrong}")
            self.story.waits[fault.row] += []
            say(f"NOT RECOVERED {wrong}")
            self.clean()
            self.start("resume")
        for name, pid in self.processes().items():
            with contextlib.suppress(OSError):  # it died meanwhile
                self.story.sizes[name, pid].append(size_of(pid))

    def _signal(self, fault: Fault, before: dict[str, int]) -> None:
        if fault.victim not in before:
            raise Wrong(f"{fault}: there is no such process, only {sorted(before)}")
        pid, (number, is_woken) = before[fault.victim], signal_of(fault.kind)
        os.kill(pid, number)
        if is_woken:
            time.sleep(self._options.pause)
            with contextlib.suppress(ProcessLookupError):  # it was not waited for
                os.kill(pid, signal.SIGCONT)
        elif number in (signal.SIGKILL, signal.SIGSTOP):
            self.until(f"{fault}: a process in its place", lambda: self.processes().get(fault.victim, pid) != pid)

    def _end_driver(self, fault: Fault, before: dict[str, int]) -> None:
        number, is_woken = signal_of(fault.kind)
        stopped = [*family(self.run_dir)] if fault.victim == "all at once" else [before["driver"]]
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if number == signal.SIGSTOP:
            time.sleep(2 * self._options.heartbeat)
            for pid in stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT if is_woken else signal.SIGKILL)
            if is_woken:
                return
        self.until(f"{fault}: the driver's end", lambda: self.driver.poll() is not None, may_end=True)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            ending = read_ending(self.run_dir)
            if self.driver.returncode or ending is None or not ending.was_stopped:
                raise Wrong(f"{fault}: not stopped in order, exit code {self.driver.returncode}, {ending}")
        self.start("resume")
        self.until(f"{fault}: the end of what was", lambda: not set(before.values()) & {*family(self.run_dir)})

    def _drive_twice(self) -> None:
        for told in ((), ("resume",)):
            second = Driven(self.run_dir, *self._told, *told, runtime="ray", environment=self._environment)
            if second.ends() != 2:
                raise Wrong(f"a second run was not refused: {second.process.returncode}")

    def _bar_directory(self) -> None:
        """Let nothing be opened for writing in the run's directory for a while; only root can."""
        where = str(self.run_dir)
        subprocess.run(["mount", "--bind", where, where], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", where], check=True)
            time.sleep(2 * self._options.heartbeat)
        finally:
            subprocess.run(["umount", "--lazy", where], check=True)

    def _leap(self, kind: str) -> None:
        self._clock.write_text(f"{LEAPS[kind]}\n")
        self.steps(kind)
        time.sleep(self._options.heartbeat)  # whoever reckons with the clock has looked at it by then
        self.steps(kind)
        self._clock.write_text("0\n")

    def clean(self) -> int:
        """Kill whatever is left of the run; returns how many processes that were."""
        left = [*family(self.run_dir)]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.driver.wait(10.0)
        return len(left)

    def left_bytes(self) -> int:
        """Return the bytes that the run left where Ray and the weights' transport put theirs, by its processes' ids."""
        ids = self.pids.union(self.drivers)
        return sum(
            path.lstat().st_size
            for root in (Path("/tmp/ray"), Path("/dev/shm"))
            if root.exists()
            for each in root.iterdir()
            if (owner := OWNER.search(each.name)) and int(owner[1]) in ids
            for path in (each, *each.rglob("*"))
            if path.is_file() and not path.is_symlink()
        )


def signal_of(kind: str) -> tuple[signal.Signals, bool]:
    """Return the signal of a kind of fault, and whether the process is woken again."""
    return signal.Signals[kind.partition(",")[0]], kind.endswith("woken")


def family(run_dir: Path) -> Iterator[int]:
    """Yield the living processes that come of a run: each has its mark from the driver."""
    mark = f"{MARK}={run_dir}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            is_alive = entry.name.isdigit() and (entry / "stat").read_text().rpartition(") ")[2][:1] != "Z"
            if is_alive and mark in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)


def leaping_clock(offset: Path) -> dict[str, str]:
    """Return the environment in which every process's clock is ahead by what `offset` holds; {} without a compiler."""
    offset.write_text("0\n")
    library = offset.with_suffix(".so")
    command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(CLOCK), "-ldl"]
    if subprocess.run(command, check=False).returncode:
        return {}
    return {"LD_PRELOAD": str(library), "LEAPING_CLOCK": str(offset)}


def size_of(pid: int) -> Size:
    """Return what a process holds now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    resident_mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return Size(time.time(), resident_mib, len(os.listdir(f"/proc/{pid}/fd")))


def growth(story: Story) -> list[str]:
    """Return a line for each process that lasted: what it held when settled and at the end."""
    lines: list[str] = []
    for (name, _), sizes in sorted(story.sizes.items()):
        lived_s = sizes[-1].time_s - sizes[0].time_s
        if lived_s >= LASTING_S:
            first = next(size for size in sizes if size.time_s >= sizes[0].time_s + SETTLED_S)
            last = sizes[-1]
            lines.append(
                f"{name:<14} lived {lived_s / 60:4.1f} min: resident {first.resident_mib:6.1f} -> "
                f"{last.resident_mib:6.1f} MiB, open files {first.num_files} -> {last.num_files}"
            )
    return lines


def table(story: Story) -> str:
    """Return the faults by kind, as the rows of a page."""
    lines = ["| kind | tried | recovered | to the next step, median s | worst s |", "|---|---|---|---|---|"]
    failed = [each.partition(": ")[0] for each in story.failed]
    for row in sorted(story.waits):
        waits = story.waits[row]
        figures = f"{statistics.median(waits):.1f} | {max(waits):.1f}" if waits else "- | -"
        lines.append(f"| {row} | {len(waits) + failed.count(row)} | {len(waits)} | {figures} |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(f"{time.strftime('%X')} {text}", file=sys.stderr, flush=True)


def meet(trial: Trial, faults: list[Fault], draw: random.Random, options: argparse.Namespace) -> None:
    """Let a run meet one fault after the other, and stop it."""
    for number, fault in enumerate(faults, start=1):
        with contextlib.suppress(Wrong):  # the run is being started again: the fault strikes it so
            trial.steps("before it")
        time.sleep(draw.uniform(0.0, 0.5) + options.every)
        say(f"{number}/{len(faults)} {fault.kind} {fault.victim}")
        trial.strike(fault)
    trial.driver.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        trial.driver.wait(2 * options.stall)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="how often each fault strikes")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--only", nargs="+", default=[""], help="faults whose row has one of these words")
    parser.add_argument("--faults", type=int, default=0, help="the first so many; 0: all")
    parser.add_argument("--every", type=float, default=0.0, help="seconds between two faults, about")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds that a stopped process stays so")
    parser.add_argument("--heartbeat", type=float, default=10.0, help="seconds of silence after which it is replaced")
    parser.add_argument("--stall", type=float, default=60.0, help="the run's stall_timeout_s; twice as long is a hang")
    parser.add_argument("--nodes", action="store_true", help="faults of a cluster's nodes, on machines of namespaces")
    parser.add_argument("--silence", type=float, default=240.0, help="with --nodes: seconds that are a hang")
    options = parser.parse_args(argv)
    if options.nodes:
        from perf.node_faults import main as on_nodes

        return on_nodes(options)
    draw = random.Random(options.seed)
    faults = [fault for fault in FAULTS if any(word in fault.row for word in options.only)] * options.rounds
    draw.shuffle(faults)
    faults = faults[: options.faults or None]
    print(f"{machine()}; {len(faults)} faults, seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        trial = Trial(Path(directory).resolve() / "run", options)
        story, began_s = trial.story, time.monotonic()
        try:
            meet(trial, faults, draw, options)
        finally:
            orphans = trial.clean()
        verdict = judge(read_entries(trial.run_dir / "ledger.jsonl"), max_staleness=2, is_finished=False)
        took_s = time.monotonic() - began_s
        print("\n".join(growth(story)))
        print(table(story))
        print(
            f"| **together: {len(faults)}** in {took_s:.0f} s, {verdict.steps} steps, {verdict.rollbacks} rollbacks | "
            f"not recovered {len(story.failed)} | lost {len(verdict.lost)}, duplicated {len(verdict.duplicated)}, "
            f"over-stale {len(verdict.over_stale)} | hangs {story.num_hangs}, orphans {orphans} | "
            f"bytes left {trial.left_bytes()} |"
        )
        print("\n".join(f"NOT RECOVERED {each}" for each in story.failed))
    return 0 if verdict.is_clean and not story.failed and not orphans else 1


if __name__ == "__main__":
    sys.exit(main())
