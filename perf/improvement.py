"""A run on several seeds: how long it takes and whether the held-out score rises beyond its interval.

    python -m perf.improvement [--graph graphs/group_async.py] [--config graphs/recipes/smollm2-grpo.yaml] [--seeds 0 1]

Runs `flowrl run graphs/ppo_async.py` (or another graph, or a recipe) once for each seed, one after the other, and
prints for each the wall time, the held-out score before and after, the paired change with its 95 % interval, and how
full the generators' decode slots were.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.telemetry.intervals import paired_interval
from flowrl.telemetry.metrics import read_evaluations
from perf.machine import machine

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]


def run_seed(seed: int, options: argparse.Namespace) -> tuple[float, Path]:
    """Run the graph once; returns its wall time in seconds and its directory."""
    name = f"improvement-{int(time.time())}-seed{seed}"
    command = [sys.executable, "-m", "flowrl.cli", "run", str(ROOT / options.graph), "--name", name,
               "--runs-dir", str(options.runs_dir), "--set", f"seed={seed}"]  # fmt: skip
    if options.config is not None:
        command += ["--config", str(ROOT / options.config)]
    for setting in options.settings:
        command += ["--set", setting]
    start_s = time.perf_counter()
    with (options.runs_dir / f"{name}.out").open("w") as out:
        subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=True)
    return time.perf_counter() - start_s, options.runs_dir / name


def held_out(run: Path) -> tuple[float, float, str]:
    """Return a run's first and last held-out mean, and the paired change with its interval over prompts as text."""
    scored = sorted(read_evaluations(run / "metrics.jsonl"), key=lambda evaluation: evaluation.version)
    first, last = scored[0].scores, scored[-1].scores
    before, after = (sum(map(sum, scores)) / sum(map(len, scores)) for scores in (first, last))
    change = paired_interval(first, last)
    return before, after, "" if change is None else f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", type=Path, default=Path("graphs/ppo_async.py"))
    parser.add_argument("--config", type=Path, help="settings, such as a recipe (default: the graph's own)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="PATH=VALUE")
    options = parser.parse_args(argv)
    options.runs_dir.mkdir(parents=True, exist_ok=True)
    print(machine())
    print("seed  minutes  before   after  change [95 % interval]    slots")
    for seed in options.seeds:
        seconds, directory = run_seed(seed, options)
        before, after, interval = held_out(directory)
        report = (directory / "report.txt").read_text().splitlines()
        slots = next((line.partition(": ")[2] for line in report if line.startswith("generator slot occupancy")), "")
        print(f"{seed:4d}  {seconds / 60:7.1f}  {before:6.3f}  {after:6.3f}  {interval:24s}  {slots}", flush=True)


if __name__ == "__main__":
    main()
