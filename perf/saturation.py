"""How busy the generators are where generation is the slowest stage.

    python -m perf.saturation [--steps 14] [--runs 3] [--max-staleness 1] [--set PATH=VALUE ...]

The graph without a critic, on its default model, with a generator that decodes two samples at a time, as one with
little memory for its cache: one core generates, the other scores and learns and waits for samples. A generator is busy
while it has at least one request running; the report measures it between the first and the last step.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from perf.machine import machine

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]


def run_once(options: argparse.Namespace, place: int) -> list[str]:
    """Run the graph once and return its report's lines."""
    name = f"saturation-{int(time.time())}-{place}"
    settings = {
        "steps": options.steps,
        "max_staleness": options.max_staleness,
        "generator.max_running": 2,
        "data.num_heldout": 4,
        "evaluation.samples": 1,
        **dict(setting.split("=", 1) for setting in options.settings),
    }
    command = [sys.executable, "-m", "flowrl.cli", "run", str(ROOT / "graphs/group_async.py"), "--name", name,
               "--runs-dir", str(options.runs_dir)]  # fmt: skip
    for path, value in settings.items():
        command += ["--set", f"{path}={value}"]
    with (options.runs_dir / f"{name}.out").open("w") as out:
        subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=True)
    return (options.runs_dir / name / "report.txt").read_text().splitlines()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--max-staleness", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="PATH=VALUE")
    options = parser.parse_args(argv)
    options.runs_dir.mkdir(parents=True, exist_ok=True)
    print(machine())
    shares: list[float] = []
    for place in range(options.runs):
        lines = run_once(options, place)
        busy = [line for line in lines if line.startswith("generator busy")]
        bottleneck = next((line for line in lines if line.startswith("bottleneck")), "")
        shares += [float(found) for line in busy for found in re.findall(r": ([\d.]+)%", line)]
        print(f"run {place}: {busy[0] if busy else 'no figure'}; {bottleneck}", flush=True)
    print(f"busy, median {statistics.median(shares):.1f} % ({min(shares):.1f} to {max(shares):.1f})")


if __name__ == "__main__":
    main()
