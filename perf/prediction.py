"""How far `flowrl simulate` is from runs that it has not seen.

    python -m perf.prediction [--set PATH=VALUE ...] [--try "max_staleness=0" --try "generator.replicas=2" ...]
    python -m perf.prediction --profile RUN --against RUN RUN ...

The first form runs the graph for real with the common settings, takes its profile, runs each `--try` for real as well
(by default `TRIES`, settings of depth, staleness and replicas) and holds it against what the profile predicts for that
setting; the profile is renewed before every `--renew` of them, since a machine that others share is not equally fast
for an hour. The second does so for runs that exist. The comparison is that of flowrl/tuning/verification.py: learned
samples per second and every node's shares between the first and the last step, of a whole run of as many steps. The
table ends with the medians of the relative error of throughput and of the difference of idle shares (the part of its
time in which a node waits for input or for room), over the settings and over their nodes.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.errors import FlowrlError
from flowrl.graph.program import load_program
from flowrl.simulation.costs import load_profile
from flowrl.tuning.trials import TuneRequest
from flowrl.tuning.verification import Accuracy, accuracy, describe, verify
from perf.machine import machine
from perf.runs import ROOT, run_graph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.tuning.knobs import Setting

PROFILED_STEPS = 20  # enough of every kind of call for its cost to be known
TRIED_STEPS = 12
RENEW = 4
TRIES = (
    "max_staleness=0",
    "max_staleness=2",
    "max_staleness=4",
    "generator.max_groups=2",
    "generator.max_groups=2 max_staleness=0",
    "depths.generator.prompts=1 depths.reward.rollouts=1 depths.reference.scored=1",
    "generator.replicas=2 generator.cpus=0.5",  # the same cores for both
    "generator.replicas=2 generator.cpus=0.5 max_staleness=0",
    "reward.replicas=2 max_staleness=2",
    "reference.replicas=2",
)


def setting_of(text: str) -> Setting:
    """Return `max_staleness=0 learner.lr=1e-6` as paths with their values."""
    pairs = [part.partition("=") for part in text.split()]
    return {path: value for path, _, value in pairs}


def table(found: Sequence[tuple[str, Accuracy]]) -> str:
    """Return one row for each setting, and the medians over them."""
    width = max(len(label) for label, _ in found)
    lines = [f"{'setting':<{width}}  measured  predicted   error  staleness  (said)  idle off by: median  greatest"]
    for label, each in found:
        rate, stale, off = each.samples_per_s, each.staleness, idle_errors(each)
        lines.append(
            f"{label:<{width}}  {rate.measured:8.2f}  {rate.predicted:9.2f}  {each.error:+6.1%}  "
            f"{stale.measured:9.2f}  {stale.predicted:6.2f}  {statistics.median(off):19.1%}  {max(off):8.1%}"
        )
    errors = [abs(each.error) for _, each in found]
    idle = [off for _, each in found for off in idle_errors(each)]
    lines.append(
        f"{len(found)} settings not used for the profile: throughput off by {statistics.median(errors):.1%} in the "
        f"median, {max(errors):.1%} at most; idle shares of {len(idle)} nodes by {100 * statistics.median(idle):.1f} "
        f"points, {100 * max(idle):.1f} at most"
    )
    return "\n".join(lines)


def idle_errors(found: Accuracy) -> list[float]:
    """Return by how much each node's idle share was missed, as a part of the time."""
    return [abs(pair.predicted - pair.measured) for pair in found.idle.values()]


def against(runs: Sequence[Path], options: argparse.Namespace, profile_run: Path) -> list[tuple[str, Accuracy]]:
    """Hold runs that exist against what a profile predicts for their settings."""
    profile = load_profile(profile_run)
    found: list[tuple[str, Accuracy]] = []
    for run_dir in runs:
        graph = load_program(options.graph, config=run_dir / "settings.yaml").graph
        found.append((run_dir.name, accuracy(run_dir, graph, profile)))
        print(describe(found[-1][1], run_dir.name), flush=True)
    return found


def profiled(options: argparse.Namespace) -> Path:
    """Run the graph with the common settings, say how its own profile fits it, and return its directory."""
    run_dir = run_graph(
        options.graph, {}, label="prediction-profile", runs_dir=options.runs_dir,
        overrides=[*options.settings, f"steps={options.profile_steps}", "hints=false"],
    )  # fmt: skip
    _say("a profile's own run, which it was fitted to and which counts for nothing below")
    against([run_dir], options, run_dir)
    return run_dir


def tried(options: argparse.Namespace) -> tuple[list[tuple[str, Accuracy]], int]:
    """Run settings for real; returns what was found, and how many of the runs failed."""
    found: list[tuple[str, Accuracy]] = []
    num_failed, profile_run = 0, options.profile
    for place, text in enumerate(options.tries):
        if options.profile is None and place % options.renew == 0:
            profile_run = profiled(options)
        request = TuneRequest(graph=options.graph, profile=profile_run, overrides=options.settings)
        try:
            (one,) = verify(request, [setting_of(text)], steps=options.steps, runs_dir=options.runs_dir, say=_say)
        except FlowrlError as error:  # hours of other runs are worth more than this one
            num_failed += 1
            _say(f"{text}: {error}")
        else:
            found.append((text, one.found))
    return found, num_failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", type=Path, default=ROOT / "graphs/ppo_async.py")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="PATH=VALUE")
    parser.add_argument("--try", action="append", default=[], dest="tries", metavar='"PATH=VALUE ..."')
    parser.add_argument("--steps", type=int, default=TRIED_STEPS, help=f"of each try (default: {TRIED_STEPS})")
    parser.add_argument("--profile-steps", type=int, default=PROFILED_STEPS, help="of the run that is profiled")
    parser.add_argument("--profile", type=Path, metavar="RUN", help="a run that exists, instead of running one")
    parser.add_argument("--renew", type=int, default=RENEW, help=f"tries that a profile is for (default: {RENEW})")
    parser.add_argument("--against", type=Path, nargs="*", default=[], metavar="RUN", help="runs that exist")
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs")
    options = parser.parse_args(argv)
    if not options.tries and not options.against:
        options.tries = list(TRIES)
    if options.against and not options.profile:
        parser.error("--against needs the --profile that predicts its runs")
    if options.renew < 1:
        parser.error(f"--renew {options.renew}: a profile is for one try at least")
    print(machine(), flush=True)
    found = against(options.against, options, options.profile) if options.against else []
    more, num_failed = tried(options)
    if found + more:
        print("\n" + table(found + more))
    return 1 if num_failed else 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
