"""How far `flowrl simulate` is from runs that it has not seen.

    python -m perf.prediction [--set PATH=VALUE ...] --try "max_staleness=0" --try "groups_per_step=8" ...
    python -m perf.prediction --profile RUN --against RUN RUN ...

The first form runs the graph for real with the common settings, takes its profile, runs each `--try` for real as well
and holds it against what the profile predicts for that setting; the second does so for runs that exist. Compared are
learned samples per second and every node's shares between the first and the last step, as a run's report gives them;
a prediction is of a whole run of as many steps, so filling and draining the pipeline is in both.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.graph.program import load_program
from flowrl.runtime.simulate import simulate
from flowrl.telemetry.causes import Cause
from flowrl.telemetry.events import Event, Span, Status, Step
from flowrl.telemetry.profile import Profile, load_profile
from flowrl.telemetry.view import RunView, shares, words
from perf.machine import machine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[1]
CAUSES = {words(cause): cause for cause in Cause}


def run_for_real(options: argparse.Namespace, name: str, settings: list[str]) -> Path:
    """Run the graph and return its directory."""
    command = [sys.executable, "-m", "flowrl.cli", "run", str(options.graph), "--name", name, "--runs-dir",
               str(options.runs_dir)]  # fmt: skip
    for setting in settings:
        command += ["--set", setting]
    options.runs_dir.mkdir(parents=True, exist_ok=True)
    with (options.runs_dir / f"{name}.out").open("w") as out:
        subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=True)
    return options.runs_dir / name


def events_of(run_dir: Path) -> Iterator[Event]:
    """Return the spans, statuses and steps of a run in order of time, from its timeline and its metrics."""
    timeline = msgspec.json.decode((run_dir / "timeline.json").read_bytes())
    places = {r["tid"]: r["args"]["name"].split()[0] for r in timeline if r["name"] == "thread_name"}
    found: list[tuple[float, Event]] = []
    seconds: defaultdict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(Cause, 0.0))
    last_s: dict[str, float] = {}
    for record in timeline:
        at_s = record.get("ts", 0) / 1e6
        if record["ph"] == "X":
            args = dict(record["args"])
            replica = int(places[record["tid"]].rpartition(".")[2]) if record["tid"] in places else 0
            span = Span(node=record["cat"], replica=replica, name=record["name"], start_s=at_s,
                        end_s=at_s + record["dur"] / 1e6, groups=args.pop("groups", []), args=args)  # fmt: skip
            found.append((span.end_s, span))
        elif record["ph"] == "C" and record["name"].endswith(" %"):
            name = record["name"].removesuffix(" %")
            for cause, share in record["args"].items():
                seconds[name][CAUSES[cause]] += share / 100 * (at_s - last_s.get(name, at_s))
            last_s[name] = at_s
            node, _, replica = name.rpartition(".")
            status = Status(node=node, replica=int(replica), time_s=at_s, cause="", seconds=dict(seconds[name]), done=0)
            found.append((at_s, status))
    for line in (run_dir / "metrics.jsonl").read_bytes().splitlines():
        row: dict[str, Any] = msgspec.json.decode(line)
        if row["kind"] == "step":
            stale = [int(s) for s, count in row["staleness"].items() for _ in range(count)]
            found.append((row["time_s"], Step(version=row["version"], num_steps=row["num_steps"], time_s=row["time_s"],
                                              metrics=row["metrics"], staleness=stale)))  # fmt: skip
    yield from (event for _, event in sorted(found, key=lambda pair: pair[0]))


def hold_against(profile: Profile, run_dir: Path, options: argparse.Namespace, label: str) -> float:
    """Print a run beside its prediction and return the throughput's relative error."""
    view = RunView()
    view.fold(events_of(run_dir))
    program = load_program(options.graph, config=run_dir / "settings.yaml")
    began = time.perf_counter()
    predicted = simulate(program.graph, profile, steps=program.settings.steps, is_whole=True)
    cost_s = time.perf_counter() - began
    measured = view.steady_per_s("samples") or 0.0
    error = predicted.samples_per_s / measured - 1
    total = sum(view.staleness.values())
    mean = sum(stale * count for stale, count in view.staleness.items()) / total
    print(f"{label}: {measured:.2f} samples/s measured, {predicted.samples_per_s:.2f} predicted ({error:+.1%}); "
          f"staleness {mean:.2f}, {predicted.mean_staleness:.2f} predicted; simulated in {cost_s:.2f} s")  # fmt: skip
    worst = 0.0
    for node, guess in predicted.shares.items():
        real = shares(view.steady_seconds(node))
        pairs = [(cause, real.get(cause, 0.0), guess.get(cause, 0.0)) for cause in Cause]
        worst = max([worst, *(abs(r - g) for _, r, g in pairs)])
        shown = ", ".join(f"{words(c)} {r:.0%} ({g:.0%})" for c, r, g in pairs if max(r, g) > 0.02)
        print(f"    {node:<10} {shown}")
    print(f"    greatest difference of a share: {worst:.0%} of the time", flush=True)
    return error


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", type=Path, default=ROOT / "graphs/ppo_async.py")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="PATH=VALUE")
    parser.add_argument("--try", action="append", default=[], dest="tries", metavar='"PATH=VALUE ..."')
    parser.add_argument("--profile", type=Path, help="of a run that exists, instead of running one")
    parser.add_argument("--against", type=Path, nargs="*", default=[], metavar="RUN", help="runs that exist")
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs")
    options = parser.parse_args(argv)
    print(machine())
    stamp = int(time.time())
    first = options.profile or run_for_real(options, f"prediction-{stamp}-profile", options.settings)
    profile = load_profile(first)
    if not options.profile:
        hold_against(profile, first, options, "the profile's own run")
    errors = [hold_against(profile, run_dir, options, run_dir.name) for run_dir in options.against]
    for place, text in enumerate(options.tries):
        run_dir = run_for_real(options, f"prediction-{stamp}-{place}", [*options.settings, *text.split()])
        errors.append(hold_against(profile, run_dir, options, text))
    if errors:
        print(f"throughput of {len(errors)} settings not used for the profile: mean error "
              f"{sum(map(abs, errors)) / len(errors):.1%}, greatest {max(map(abs, errors)):.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
