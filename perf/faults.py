"""What faults cost on real processes: signals to the Ray actors of a flow with fake engines, and to Ray itself.

    python -m perf.faults [--faults 50] [--seeds 0 1 2] [--heartbeat 10]
    python -m perf.faults --faults 30 --every 60 --seeds 0        a soak of half an hour

For each seed a flow of prompts, two generators, two scorers and a learner trains until so many faults have struck
replicas, the flow's host, the learner, and Ray's own raylet and control store, at random moments; then the judgement of
`flowrl verify` is printed. Per kind of fault: how many were injected and recovered, seconds from the fault to the next
learned step (p50, p95), and hangs: silences longer than twice what the run may take to notice. Then what all of them
together lost, learned twice or too late, and what was left behind: living processes, files in /tmp/ray and /dev/shm.
Of each process that lived for five minutes: resident memory and open files a minute after its start and at its end. See
perf/README.md for how to read it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from flowrl.runs.verify import judge
from flowrl.runtime.cluster import Cluster
from flowrl.runtime.ledger import read_entries
from flowrl.runtime.ray import run_ray
from flowrl.runtime.supervisor import Options
from flowrl.stages.learner import Learner
from flowrl.telemetry.events import Event, Recovery, Step
from perf.machine import machine
from tests.support.flows import FlowSettings, flow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.runs.verify import Verdict

UNLIMITED = 1_000_000
SETTINGS = FlowSettings(
    seed=0, steps=1_000_000, groups_per_step=4, window=1, max_staleness=2, generators=2, scorers=2, depth=8,
    token_s=0.005, sigma=0.5, update_s=0.02, score_s=0.02, train_s=0.02, filter_every=7, initial=12, save_every=5,
    is_finite=False,
)  # fmt: skip


LOOK_S = 10.0  # between two looks at what the processes hold
SETTLED_S = 60.0  # after its start a process holds what it will hold
LASTING_S = 300.0


@dataclass(frozen=True)
class Size:
    """What a process held at a moment."""

    time_s: float
    resident_mib: float
    num_files: int


@dataclass
class Story:
    """What happened in one run."""

    struck: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])  # kind, when
    learned_at: list[float] = field(default_factory=list[float])
    recoveries: list[Recovery] = field(default_factory=list[Recovery])
    has_stepped: asyncio.Event = field(default_factory=asyncio.Event)
    sizes: dict[tuple[str, int], list[Size]] = field(default_factory=lambda: defaultdict(list))  # by process

    def consume(self, events: list[Event]) -> None:
        """Take in the run's events."""
        for event in events:
            if isinstance(event, Step):
                self.learned_at.append(time.time())
                self.has_stepped.set()
            elif isinstance(event, Recovery):
                self.recoveries.append(event)

    async def next_step(self) -> None:
        """Wait until a further step has been learned."""
        self.has_stepped.clear()
        await self.has_stepped.wait()


def processes(run_dir: Path) -> dict[str, int]:
    """Return the run's living processes by name: each writes its log."""
    found: dict[str, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                log = Path(os.readlink(entry / "fd" / "1"))
            except OSError:
                continue
            if log.parent == run_dir / "logs":
                found[log.stem] = int(entry.name)
    return found


FATAL = {"hub", "learner.0"}  # whoever loses the attempt is struck less often
# kind -> its share among the faults, the signal, and whether the process is woken again
KINDS: dict[str, tuple[float, signal.Signals, bool]] = {
    "SIGKILL": (6.0, signal.SIGKILL, False),
    "SIGSTOP, woken": (2.0, signal.SIGSTOP, True),
    "SIGSTOP": (2.0, signal.SIGSTOP, False),
    "SIGTERM": (1.0, signal.SIGTERM, False),
    "SIGHUP": (1.0, signal.SIGHUP, False),
}
RAYS = {"raylet": 0.3, "gcs_server": 0.3}  # Ray's own processes: chance beside a replica's 1


async def strike(story: Story, run_dir: Path, draw: random.Random, options: argparse.Namespace) -> None:
    """Strike somebody once a step has been learned since the last time, until enough have been struck."""
    while len(story.struck) < options.faults:
        await story.next_step()
        await asyncio.sleep(draw.uniform(0.0, 0.5) + options.every)
        alive = processes(run_dir) | rays()
        if not processes(run_dir):
            continue
        names = sorted(alive)
        weights = [RAYS.get(name, 0.3 if name in FATAL else 1.0) for name in names]
        name = draw.choices(names, weights)[0]
        kind = draw.choices(list(KINDS), [share for share, _, _ in KINDS.values()])[0]
        _, number, is_woken = KINDS[kind]
        if name in RAYS and number not in (signal.SIGKILL, signal.SIGSTOP):
            number, kind = signal.SIGKILL, "SIGKILL"
        story.struck.append((f"{kind} {name.partition('.')[0]}", time.time()))
        print(f"{time.strftime('%X')} {kind} {name}", file=sys.stderr, flush=True)
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(alive[name], number)
            if is_woken:
                await asyncio.sleep(options.pause)
                os.kill(alive[name], signal.SIGCONT)


def rays() -> dict[str, int]:
    """Return the processes of the Ray that this process has started."""
    found: dict[str, int] = {}
    for child in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for pid in child.read_text().split():
            with contextlib.suppress(OSError):
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                if name in RAYS:
                    found[name] = int(pid)
    return found


def left_bytes() -> int:
    """Return the bytes that lie where Ray and the weights' transport put theirs."""
    return sum(
        path.lstat().st_size for root in ("/tmp/ray", "/dev/shm") for path in Path(root).rglob("*") if path.is_file()
    )


async def watch(story: Story, run_dir: Path) -> None:
    """Note what the driver and every process of the run hold, again and again."""
    while True:
        for name, pid in {"driver": os.getpid(), **processes(run_dir)}.items():
            with contextlib.suppress(OSError):  # it died meanwhile
                story.sizes[name, pid].append(size_of(pid))
        await asyncio.sleep(LOOK_S)


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


async def run_seed(seed: int, run_dir: Path, options: argparse.Namespace, cluster: Cluster) -> tuple[Story, Verdict]:
    """Run one seed; returns its story and the verdict on its ledger."""
    story, stopping = Story(), asyncio.Event()
    draw = random.Random(seed)

    async def faults() -> None:
        await strike(story, run_dir, draw, options)
        await story.next_step()
        await story.next_step()
        stopping.set()

    striking, watching = asyncio.create_task(faults()), asyncio.create_task(watch(story, run_dir))
    told = Options(run_dir=run_dir, consume=story.consume, stopping=stopping, max_restarts=UNLIMITED,
                   heartbeat_timeout_s=options.heartbeat, grace_s=3.0)  # fmt: skip
    try:
        await run_ray(flow(SETTINGS, Learner), told, cluster)
    finally:
        striking.cancel()
        watching.cancel()
    return story, judge(read_entries(run_dir / "ledger.jsonl"), max_staleness=2, is_finished=False)


def silences(story: Story, limit_s: float) -> list[float]:
    """Return the times between two learned steps that are longer than the limit."""
    gaps = [after - before for before, after in itertools.pairwise(story.learned_at)]
    return [gap for gap in gaps if gap > limit_s]


def table(stories: list[Story]) -> str:
    """Return the faults by kind."""
    waits: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    for story in stories:
        for kind, when in story.struck:
            counts[kind] += 1
            after = [moment - when for moment in story.learned_at if moment > when]
            if after:
                waits[kind].append(after[0])
    lines = ["kind                     injected  recovered  to the next step, s: p50    p95"]
    for kind in sorted(counts):
        found = sorted(waits[kind])
        p95 = found[min(len(found) - 1, int(0.95 * len(found)))] if found else float("nan")
        p50 = statistics.median(found) if found else float("nan")
        lines.append(f"{kind:<23} {counts[kind]:9d} {len(found):10d} {p50:28.1f} {p95:6.1f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50, help="in each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--every", type=float, default=0.0, help="seconds between two faults, about")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds that a stopped process stays so")
    parser.add_argument("--heartbeat", type=float, default=10.0, help="seconds of silence after which it is replaced")
    options = parser.parse_args(argv)
    print(machine())
    stories: list[Story] = []
    verdicts: list[Verdict] = []
    hangs = orphans = 0
    before_bytes = left_bytes()
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as directory:
            with Cluster(flow(SETTINGS, Learner), None) as cluster:
                start_s = time.time()
                story, verdict = uvloop.run(run_seed(seed, Path(directory), options, cluster))
                took_s = time.time() - start_s
            orphans += len(processes(Path(directory)))
        stories.append(story)
        verdicts.append(verdict)
        hangs += len(silences(story, 2 * (options.heartbeat + 20.0)))
        again = sum(recovery.reissued for recovery in story.recoveries)
        print(
            f"seed {seed}: {len(story.struck)} faults in {took_s:.0f} s, {verdict.steps} steps, "
            f"issued again {again} groups, rollbacks {verdict.rollbacks}; lost {len(verdict.lost)}, "
            f"duplicated {len(verdict.duplicated)}, over-stale {len(verdict.over_stale)}",
            flush=True,
        )
        for line in growth(story):
            print(line, flush=True)
    print(table(stories))
    tried = sum(len(story.struck) for story in stories)
    print(
        f"faults tried {tried}, lost {sum(len(v.lost) for v in verdicts)}, duplicated "
        f"{sum(len(v.duplicated) for v in verdicts)}, over-stale {sum(len(v.over_stale) for v in verdicts)}, "
        f"hangs {hangs}, orphans {orphans}, bytes left {max(0, left_bytes() - before_bytes)}"
    )


if __name__ == "__main__":
    main()
