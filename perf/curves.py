"""Learning curves of runs that were made before, in one picture and one table.

    python -m perf.curves PPO=runs/improvement-1 GRPO=runs/improvement-2 --out docs/learning_curves.svg

A curve is the mean reward of the samples that each step learned from; runs with one label are seeds of one curve, drawn
as their mean with a band from the least to the greatest. The table, in Markdown, gives each run's held-out score before
and after. Nothing is run.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.telemetry.metrics import read_steps
from perf.improvement import held_out
from perf.staleness_chart import chart

if TYPE_CHECKING:
    from collections.abc import Sequence


def rewards(run: Path) -> list[float]:
    """Return the mean reward of each step's samples, in the order of steps."""
    steps = read_steps(run / "metrics.jsonl")
    return [found for version in sorted(steps) if (found := steps[version].get("reward.mean")) is not None]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN")
    parser.add_argument("--out", type=Path, required=True, help="the SVG to write")
    parser.add_argument("--title", default="Mean reward of the samples learned in each step")
    options = parser.parse_args(argv)
    curves: dict[str, list[list[float]]] = {}
    print("| run | held-out before | after | change [95 % interval over prompts] |\n|---|---|---|---|")
    for label, _, directory in (run.partition("=") for run in options.runs):
        curves.setdefault(label, []).append(rewards(Path(directory)))
        before, after, interval = held_out(Path(directory))
        print(f"| {label} | {before:.3f} | {after:.3f} | {interval} |")
    highest = max(reward for seeds in curves.values() for seed in seeds for reward in seed)
    top = math.ceil(10 * highest) / 10
    options.out.write_text(chart({"": curves}, title=options.title, x_name="step", y_name="reward", top=top))


if __name__ == "__main__":
    main()
