"""How full the generators' decode slots are where generation is the slowest stage, and how near its rate a run comes.

    python -m perf.saturation [--steps 14] [--runs 3] [--max-staleness 1] [--set PATH=VALUE ...]
    python -m perf.saturation --bound --graph graphs/rejection.py --set generator.max_running=4

By default the graph without a critic, on its default model, with a generator that decodes two samples at a time, as one
with little memory for its cache: one core generates, the other scores and learns and waits for samples. Slot occupancy
is the part of what it could decode together that it did decode, by time, between the first and the last step.

With `--bound` every run has a synchronous one before it, the same but for `max_staleness=0`. The seconds that nodes
work in one of its steps are the stage times: G of the generators, R of all others together. The bound is a step in
max(G, R), and generation's part is G / (G + R). Where cores are threads of one core, work beside generation slows it
down, which the bound knows nothing of.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flowrl.errors import DataError
from flowrl.telemetry.events import Cause
from flowrl.telemetry.timeline import read_history
from flowrl.telemetry.view import RunView
from perf.machine import machine
from perf.runs import ROOT, run_graph

if TYPE_CHECKING:
    from collections.abc import Sequence

GENERATOR = "generator"


class Steady(NamedTuple):
    """A run between its first and its last step."""

    step_s: float
    occupancy: float  # part of the generators' decode slots filled, by time
    generating_s: float  # of a step; G
    other_s: float  # of a step, of every other node's work; R

    @property
    def bound_s(self) -> float:
        """Return the least that a step with everything overlapped takes."""
        return max(self.generating_s, self.other_s)

    @property
    def generation(self) -> float:
        """Return generation's part of all work."""
        return self.generating_s / (self.generating_s + self.other_s)


def steady(run_dir: Path) -> Steady:
    """Return how a run that has ended went between its first and its last step."""
    view = RunView()
    view.fold(happened.event for happened in read_history(run_dir))
    if view.first_step is None or view.last_step is None or view.num_steps_done < 2:
        raise DataError(str(run_dir), "learned fewer than two steps", "give it more")
    num_steps = view.num_steps_done - 1
    spent = {node: view.steady_seconds(node) for node in view.nodes}
    num_generators = sum(replica.node == GENERATOR for replica in view.replicas)
    work_s = {node: seconds.get(Cause.COMPUTE, 0.0) / num_steps for node, seconds in spent.items()}
    return Steady(
        step_s=(view.last_step.time_s - view.first_step.time_s) / num_steps,
        occupancy=view.slot_occupancy(GENERATOR) or 0.0,
        generating_s=work_s.pop(GENERATOR) / num_generators,
        other_s=sum(work_s.values()),
    )


def run_once(options: argparse.Namespace, max_staleness: int) -> Steady:
    """Run the graph once."""
    tree = {
        "steps": options.steps,
        "max_staleness": max_staleness,
        "generator": {"max_running": 2},
        "data": {"num_heldout": 4},
        "evaluation": {"samples": 1},
        "hints": False,
    }
    label = f"saturation-staleness-{max_staleness}"
    return steady(run_graph(options.graph, tree, label=label, overrides=options.settings, runs_dir=options.runs_dir))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", type=Path, default=ROOT / "graphs/group_async.py")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--max-staleness", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--bound", action="store_true", help="run it synchronously too, for the stages' times")
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="PATH=VALUE")
    options = parser.parse_args(argv)
    print(machine())
    found: list[Steady] = []
    reached: list[float] = []
    for place in range(options.runs):
        alone = run_once(options, 0) if options.bound else None
        if alone is not None:
            print(
                f"run {place}, synchronous: {alone.step_s:.2f} s a step, generation {alone.generating_s:.2f} s "
                f"({alone.generation:.0%} of all work), the rest {alone.other_s:.2f} s: {alone.bound_s:.2f} s at least",
                flush=True,
            )
        found.append(run_once(options, options.max_staleness))
        said = f"run {place}: {found[-1].step_s:.2f} s a step, decode slots {found[-1].occupancy:.1%} filled"
        if alone is not None:
            reached.append(alone.bound_s / found[-1].step_s)
            said += f", {reached[-1]:.1%} of the bound's rate, {alone.step_s / found[-1].step_s:.2f} times synchronous"
        print(said, flush=True)
    print(f"slot occupancy, {_spread([each.occupancy for each in found])}")
    if reached:
        print(f"of the bound, {_spread(reached)}")


def _spread(parts: Sequence[float]) -> str:
    return f"median {statistics.median(parts):.1%} ({min(parts):.1%} to {max(parts):.1%})"


if __name__ == "__main__":
    main()
