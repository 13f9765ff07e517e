"""Runs the best settings of a tuning for real, for a few steps, and holds what was predicted against them.

Each is a run of its own process, with its own directory under `runs_dir`, so that whatever a run leaves in a process is
gone before the next. Compared are learned samples per second, staleness and every node's shares between the first and
the last step, as a run's report gives them; the prediction is of a whole run of as many steps.

Invariants:
- settings are run in the order of the tuning, one after the other, with nothing beside them;
- what a run learned is deleted when it has ended, since each would keep gigabytes that nobody asked for;
- what was measured decides, not what was predicted.

Used by `flowrl tune --verify` and perf/prediction.

Tests: tests/unit/tuning/test_verification.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from flowrl.errors import DataError, RunError
from flowrl.graph.program import load_program
from flowrl.simulation.costs import load_profile
from flowrl.simulation.run import simulate
from flowrl.telemetry.events import Cause
from flowrl.telemetry.timeline import read_history
from flowrl.telemetry.view import RunView, shares, words
from flowrl.tuning.knobs import Setting
from flowrl.tuning.tune import recommendation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from flowrl.graph.graph import Graph
    from flowrl.simulation.costs import Profile
    from flowrl.tuning.trials import Trial, TuneRequest
    from flowrl.tuning.tune import Tuning

SHOWN_LINES = 15  # of a failed run's output
CLOSE = 0.03  # measured rates no further apart are as good as each other
SHOWN = 0.02  # a share of the time below which it is not told
IDLE = (Cause.WAIT_INPUT, Cause.WAIT_ROOM)


class Pair(msgspec.Struct, frozen=True):
    """A figure as it was measured and as it was predicted."""

    measured: float
    predicted: float


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """What a run did and what was said of it."""

    samples_per_s: Pair
    staleness: Pair  # mean over learned groups
    shares: dict[str, dict[str, Pair]]  # node -> cause -> part of its replicas' time

    @property
    def error(self) -> float:
        """Return by what part of the measured throughput the predicted one is too high."""
        return self.samples_per_s.predicted / self.samples_per_s.measured - 1

    @property
    def idle(self) -> dict[str, Pair]:
        """Return the part of its time that each node waits for input or room; of nodes that only wait, nothing."""
        return {
            node: Pair(sum(pairs[cause].measured for cause in IDLE), sum(pairs[cause].predicted for cause in IDLE))
            for node, pairs in self.shares.items()
            if pairs[Cause.COMPUTE].measured > SHOWN or pairs[Cause.COMPUTE].predicted > SHOWN
        }

    @property
    def worst_share(self) -> float:
        """Return the greatest difference of any share, as a part of the time."""
        return max(abs(pair.predicted - pair.measured) for node in self.shares.values() for pair in node.values())


def accuracy(run_dir: Path, graph: Graph, profile: Profile) -> Accuracy:
    """Predict a run that has ended and hold it against what it did.

    Raises:
        DataError: the run learned fewer than two steps.
    """
    view = RunView()
    view.fold(happened.event for happened in read_history(run_dir))
    measured = view.steady_per_s("samples")
    if measured is None or view.first_step is None:
        raise DataError(str(run_dir), "learned fewer than two steps", "give it more")
    found = simulate(graph, profile, steps=view.num_steps_done, is_whole=True, detail="causes")
    learned = view.staleness - Counter(view.first_step.staleness)  # as samples are counted: after the first step
    mean = sum(stale * count for stale, count in learned.items()) / max(1, learned.total())
    return Accuracy(
        samples_per_s=Pair(measured, found.samples_per_s),
        staleness=Pair(mean, found.mean_staleness),
        shares={node: _pairs(shares(view.steady_seconds(node)), predicted) for node, predicted in found.shares.items()},
    )


def _pairs(measured: dict[str, float], predicted: dict[str, float]) -> dict[str, Pair]:
    return {cause.value: Pair(measured.get(cause, 0.0), predicted.get(cause, 0.0)) for cause in Cause}


def describe(found: Accuracy, label: str) -> str:
    """Return a comparison for people: measured first, predicted in brackets."""
    rate, stale = found.samples_per_s, found.staleness
    lines = [
        f"{label}: {rate.measured:.2f} samples/s measured, {rate.predicted:.2f} predicted ({found.error:+.1%}); "
        f"staleness {stale.measured:.2f}, {stale.predicted:.2f} predicted"
    ]
    for node, pairs in found.shares.items():
        told = [(cause, pair) for cause, pair in pairs.items() if max(pair.measured, pair.predicted) > SHOWN]
        told_words = ", ".join(f"{words(cause)} {p.measured:.0%} ({p.predicted:.0%})" for cause, p in told)
        lines.append(f"    {node:<10} {told_words}")
    lines.append(f"    greatest difference of a share: {found.worst_share:.0%} of the time")
    return "\n".join(lines)


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """A setting that was run."""

    setting: Setting
    run_dir: str
    found: Accuracy


def chosen(tuning: Tuning, num: int) -> list[Trial]:
    """Return the settings to run: the recommended one, the present one, then the front from the fastest down."""
    wanted = [tuning.recommended, tuning.present, *reversed(tuning.front)]
    return list({frozenset(trial.setting.items()): trial for trial in wanted}.values())[:num]


def settled(tuning: Tuning, verified: Sequence[Verified]) -> tuple[Tuning, list[str]]:
    """Return the tuning with what its runs say in place of its predictions, and lines about what that changes.

    Of the settings that were run the fastest is recommended, of equals the one that was tuned first. Where only the
    recommended one was run it has to be as fast as the present one is predicted to be.
    """
    rates = {frozenset(each.setting.items()): each.found.samples_per_s.measured for each in verified}
    trials = {frozenset(trial.setting.items()): trial for trial in [tuning.recommended, tuning.present, *tuning.front]}
    measured = {key: msgspec.structs.replace(trials[key], samples_per_s=rate) for key, rate in rates.items()}
    told = {key: measured.get(key, trial) for key, trial in trials.items()}
    candidates = [*measured.values()]
    if len(candidates) == 1:
        candidates.append(told[frozenset(tuning.present.setting.items())])
    fastest = max(trial.samples_per_s for trial in candidates)
    best = next(trial for trial in candidates if trial.samples_per_s >= (1 - CLOSE) * fastest)
    front = [told[frozenset(trial.setting.items())] for trial in tuning.front]
    new = msgspec.structs.replace(
        tuning,
        recommended=best,
        present=told[frozenset(tuning.present.setting.items())],
        front=[trial for trial in front if trial.samples_per_s < best.samples_per_s or trial is best],
    )
    lines = ["", "as measured:"]
    if best.setting != tuning.recommended.setting:
        was = told[frozenset(tuning.recommended.setting.items())].samples_per_s
        lines.append(
            f"  contradicted: {in_words(tuning.recommended.setting)} makes {was:.2f} samples/s, "
            f"{in_words(best.setting)} {best.samples_per_s:.2f}"
        )
    return new, [*lines, *(f"  {line}" for line in recommendation(new))]


def verify(
    request: TuneRequest, settings: Iterable[Setting], *, steps: int, runs_dir: Path, say: Callable[[str], None]
) -> Iterator[Verified]:
    """Run settings for so many steps each, one after the other, and yield how near each prediction came.

    Raises:
        RunError: a run failed; the end of its output is in the message.
    """
    profile = load_profile(request.profile)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for place, setting in enumerate(settings):
        label = in_words(setting)
        say(f"running {label} for {steps} steps")
        run_dir = runs_dir / f"tune-{stamp}-{place}"
        _run(request, setting, steps, run_dir)
        graph = load_program(request.graph, config=run_dir / "settings.yaml").graph
        found = accuracy(run_dir, graph, profile)
        say(describe(found, label))
        yield Verified(setting=setting, run_dir=str(run_dir), found=found)


def in_words(setting: Setting) -> str:
    """Return a setting as it would be given, without `--set`."""
    return " ".join(f"{path}={value}" for path, value in setting.items()) or "as it is"


def _run(request: TuneRequest, setting: Setting, steps: int, run_dir: Path) -> None:
    changes = [f"{path}={value}" for path, value in setting.items()]
    command = [sys.executable, "-m", "flowrl.cli", "run", str(request.graph), "--name", run_dir.name,
               "--runs-dir", str(run_dir.parent)]  # fmt: skip
    if request.config is not None:
        command += ["--config", str(request.config)]
    for override in [*request.overrides, *changes, f"steps={steps}", "hints=false"]:
        command += ["--set", override]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        said = "\n".join((ended.stdout + ended.stderr).splitlines()[-SHOWN_LINES:])
        raise RunError(str(run_dir), f"the run ended with {ended.returncode}", said)
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
