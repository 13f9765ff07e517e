"""What staleness costs and what a correction saves: learning curves of a tiny model at several bounds and seeds.

    python -m perf.staleness [--seeds 5] [--staleness 0 1 2 4 8] [--methods behaviour ...] [--schedule constant]

A method is a kind of correction, with GRPO, or an algorithm's path (flowrl.algorithms.sapo:SAPO). Runs the flow once
for each seed, bound and method (perf/staleness_task.py says what of it is real), prints
the final scores with their intervals over seeds and the change against synchronous training, paired by seed, and
writes `staleness.json` and `staleness.svg`. The score of a version is the mean reward of the groups it sampled, so it
is on-policy at every bound; the final one is the mean over the last tenth of the versions. Each run is kept in
`staleness_runs.jsonl` as it ends and not run again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import msgspec

from flowrl.runtime.local import LocalOptions, run_local
from flowrl.simulation.clock import run_virtual
from flowrl.telemetry.events import Step
from flowrl.telemetry.intervals import Interval, mean_interval
from perf.machine import machine
from perf.staleness_chart import chart
from perf.staleness_task import CountingReward, Setting, counting_graph, tiny_counter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flowrl.telemetry.events import Event

NO_MATTER = "-"  # the method of a synchronous run: every ratio is 1
METHODS = ["behaviour", "truncated", "divergence", "second_moment", "interpolated"]


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    setting: Setting
    scores: list[float]  # by policy version
    mean_staleness: float  # of learned groups, after the first steps that the bound still fills
    min_ess: float  # least effective sample size of any step
    mean_behaviour_kl: float  # nats a token, policy that sampled against policy at the start of the step
    seconds: float  # of processor time

    @property
    def final(self) -> float:
        """Return the mean score of the last tenth of the versions."""
        return fmean(self.scores[-max(1, len(self.scores) // 10) :])


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One bound and method over all seeds."""

    staleness: int
    method: str
    final: Interval
    change: Interval | None  # of the final score against the synchronous run of the same seed
    whole: Interval  # mean score of all versions: how soon it learns


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Yield the settings of all runs; synchronous ones once, for there is nothing to correct."""
    for seed in range(options.seeds):
        for staleness in options.staleness:
            for method in options.methods if staleness else ["behaviour"]:
                yield Setting(
                    seed=seed, staleness=staleness, method=method, steps=options.steps,
                    groups_per_step=options.groups, group_size=options.group_size, lr=options.lr,
                    minibatches=options.minibatches, entropy=options.entropy, schedule=options.schedule,
                )  # fmt: skip


def run_once(setting: Setting, directory: Path) -> Ran:
    """Run one flow to its end; a recovery would hide a defect and ends it."""
    events: list[Event] = []
    CountingReward.seen.clear()
    start_s = time.process_time()
    model = tiny_counter(directory / f"model-{setting.seed}", setting.seed)
    name = f"run-{setting.seed}-{setting.staleness}-{setting.method.rpartition(':')[2]}"
    told = LocalOptions(
        run_dir=directory / name, is_virtual=True, consume=events.extend, status_interval_s=1e6, max_restarts=0
    )
    run_virtual(run_local(counting_graph(setting, model), told))
    steps = [event for event in events if isinstance(event, Step)]
    settled = steps[min(setting.staleness, len(steps) - 1) :]
    return Ran(
        setting=setting,
        scores=[fmean(CountingReward.seen[version]) for version in sorted(CountingReward.seen)],
        mean_staleness=fmean(age for step in settled for age in step.staleness),
        min_ess=min(step.metrics.get("ess", 1.0) for step in steps),
        mean_behaviour_kl=fmean(step.metrics["behaviour_kl"] for step in steps),
        seconds=time.process_time() - start_s,
    )


def read_runs(path: Path) -> list[Ran]:
    """Return the runs that were done before, so that a comparison may be cut off and go on."""
    return msgspec.json.Decoder(Ran).decode_lines(path.read_bytes()) if path.exists() else []


def summary(runs: Sequence[Ran]) -> list[Row]:
    """Return a row for each bound and method."""
    synchronous = {ran.setting.seed: ran.final for ran in runs if ran.setting.staleness == 0}
    rows: list[Row] = []
    for staleness, method in dict.fromkeys((ran.setting.staleness, ran.setting.method) for ran in runs):
        mine = [r for r in runs if (r.setting.staleness, r.setting.method) == (staleness, method)]
        paired = [r.final - synchronous[r.setting.seed] for r in mine if r.setting.seed in synchronous]
        rows.append(
            Row(
                staleness=staleness,
                method=method if staleness else NO_MATTER,
                final=mean_interval([ran.final for ran in mine]),
                change=mean_interval(paired) if paired and staleness else None,
                whole=mean_interval([fmean(ran.scores) for ran in mine]),
            )
        )
    return sorted(rows, key=lambda row: (row.method, row.staleness))


def panels(runs: Sequence[Ran]) -> dict[str, dict[str, list[list[float]]]]:
    """Return the curves by method and bound; the synchronous ones are in every panel."""
    kinds = list(dict.fromkeys(ran.setting.method for ran in runs if ran.setting.staleness)) or [NO_MATTER]
    found: dict[str, dict[str, list[list[float]]]] = {}
    for kind in kinds:
        curves: dict[str, list[list[float]]] = {}
        for ran in sorted(runs, key=lambda ran: ran.setting.staleness):
            if ran.setting.staleness == 0 or ran.setting.method == kind:
                curves.setdefault(f"staleness {ran.setting.staleness}", []).append(ran.scores)
        found[kind] = curves
    return found


def shown(interval: Interval | None, form: str) -> str:
    """Return "mean [low, high]"."""
    if interval is None:
        return ""
    return f"{form} [{form}, {form}]".format(interval.mean, interval.low, interval.high)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print and write."""
    parser = argparse.ArgumentParser(
        prog="perf.staleness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--steps", type=int, default=300, help="policy versions (default: 300)")
    parser.add_argument("--groups", type=int, default=10, help="groups a step (default: 10)")
    parser.add_argument("--group-size", type=int, default=8, help="samples a group (default: 8)")
    parser.add_argument(
        "--lr", type=float, default=1e-3, help="(default: 1e-3, at which the synchronous run learns best)"
    )
    parser.add_argument("--minibatches", type=int, default=1)
    parser.add_argument("--entropy", type=float, default=0.01, help="weight of the entropy bonus (default: 0.01)")
    parser.add_argument(
        "--schedule", choices=["cosine", "linear", "constant"], default="constant", help="of lr (default: constant)"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(argv)
    print(machine())
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "staleness_runs.jsonl"
    done = {ran.setting: ran for ran in read_runs(kept)}
    runs: list[Ran] = []
    with tempfile.TemporaryDirectory(prefix="flowrl-staleness-") as directory:
        for setting in settings(options):
            if setting in done:
                runs.append(done[setting])
                continue
            runs.append(ran := run_once(setting, Path(directory)))
            with kept.open("ab") as file:
                file.write(msgspec.json.encode(ran) + b"\n")
            print(
                f"seed {setting.seed} staleness {setting.staleness} ({ran.mean_staleness:.2f} measured) "
                f"{setting.method}: final {ran.final:.3f}, least ESS {ran.min_ess:.2f}, {ran.seconds:.0f} s",
                flush=True,
            )
    rows = summary(runs)
    print(f"\nmean [95 % interval over {options.seeds} seeds]")
    print(f"{'staleness':>9s}  {'method':14s}  {'final score':24s}  {'against synchronous':26s}  all versions")
    for row in rows:
        print(
            f"{row.staleness:9d}  {row.method:14s}  {shown(row.final, '{:.3f}'):24s}  "
            f"{shown(row.change, '{:+.3f}'):26s}  {shown(row.whole, '{:.3f}')}"
        )
    found = {"machine": machine(), "runs": runs, "summary": rows}
    (options.out / "staleness.json").write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    title = f"Counting: score of each policy version, {options.seeds} seeds"
    drawn = chart(panels(runs), title=title, x_name="policy version", y_name="share of right digits")
    (options.out / "staleness.svg").write_text(drawn)
    print(f"written: {options.out / 'staleness.json'}, {options.out / 'staleness.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
