"""Tuning: simulate many settings of a graph and say which are worth having.

There is no single best: throughput is traded against staleness, so the result is a Pareto front. Its settings were
measured, the others only looked at (trials.py). First comes every knob alone, then all combinations of the greater
knobs, or as many as the budget allows, drawn evenly. Last comes whatever differs in one knob from the best so far. The
batch (groups in a step, samples in a group) is only turned alone and never recommended, because it changes what is
learned, not only how fast.

Invariants:
- nothing recommended would be refused or need more devices than there are;
- the recommended setting is the fastest, and of its equals the one on the fewest devices, with the fewest changes;
- what less staleness would cost is said beside it;
- the same request gives the same tuning.

Tests: tests/unit/tuning/test_tune.py
"""

from __future__ import annotations

import itertools
import math
import random
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.errors import ConfigError
from flowrl.tuning.knobs import BATCH
from flowrl.tuning.trials import Searcher, Trial, TrialPool, TuneRequest, trial_pool

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flowrl.tuning.knobs import Knob, Setting

__all__ = ["Trial", "TuneRequest", "Tuning", "describe", "pareto", "parse_budget", "tune"]

EQUAL = 0.01  # throughputs no further apart are as good as each other
LOOKED_CLOSER = 0.05  # below the best look at the same staleness, in throughput, that is still measured
MOST_MEASURED = 48  # settings besides those that differ from the present in one knob
DRAWN = 0.6  # of the budget for combinations; the rest is for what is near the best of them
ROUNDS = 4  # of looking near the best


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """What was found."""

    present: Trial
    front: list[Trial]  # at the present batch; from the least stale to the fastest
    recommended: Trial
    sensitivity: dict[str, dict[str, float]]  # knob -> position -> throughput against the present one
    looked: list[tuple[float, float]]  # samples/s and staleness of all that were simulated at the present batch
    num_trials: int  # settings searched; those that must run alike were simulated once

    @property
    def command(self) -> str:
        """Return the recommended setting as options of `flowrl run`."""
        return as_options(self.recommended.setting)


def as_options(setting: Setting) -> str:
    """Return a setting as options of `flowrl run`."""
    return " ".join(f"--set {path}={value}" for path, value in setting.items())


def parse_budget(budget: Sequence[str], **rest: Any) -> TuneRequest:
    """Return a request from `settings=1000`, `gpus=16`, `cpus=8`, or a plain number of settings.

    Raises:
        ConfigError: something else is given.
    """
    names = {"settings": "budget", "cpus": "cores", "gpus": "gpus"}  # words as in a node's settings
    found: dict[str, Any] = {}
    for part in [part.strip() for text in budget for part in text.split(",")]:
        name, _, number = part.rpartition("=")
        try:
            found[names[name or "settings"]] = int(number) if names[name or "settings"] == "budget" else float(number)
        except (KeyError, ValueError) as error:
            remedy = f"write cpus={number}" if name == "cores" else "write settings=1000, gpus=16 or cpus=8"
            raise ConfigError("--budget", f"{part!r} is not understood", remedy) from error
    return TuneRequest(**rest, **found)


def tune(request: TuneRequest) -> Tuning:
    """Search the settings of a graph.

    Raises:
        UserError: the graph or the profile cannot be used.
    """
    searcher = Searcher(request)
    present = searcher.measure({})  # what is wrong with the profile is said here, not by a worker
    knobs = searcher.knobs()
    with trial_pool(request, searcher) as trials:
        alone = _alone(knobs, trials, request.budget)
        search = _Search(knobs, trials, request.budget - 1 - sum(map(len, alone.values())))
        search.found = [present, *(trial for each in alone.values() for trial in each.values())]
        search.draw()
        for _ in range(ROUNDS):
            search.climb()
        measured = trials.measure([trial.setting for trial in closer(search.found)])
    known = {_key(trial.setting): trial for trial in search.found if trial.is_measured and not _changes_batch(trial)}
    known |= {_key(trial.setting): trial for trial in measured}
    front = [simplest(trial, list(known.values())) for trial in pareto(known.values())]
    return Tuning(
        present=present,
        front=front,
        recommended=front[-1],
        sensitivity={
            name: {label: trial.samples_per_s / present.samples_per_s for label, trial in each.items()}
            for name, each in alone.items()
        },
        looked=[(t.samples_per_s, t.mean_staleness) for t in search.found if not _changes_batch(t)],
        num_trials=len(search.found),
    )


def _alone(knobs: Sequence[Knob], trials: TrialPool, budget: int) -> dict[str, dict[str, Trial]]:
    """Measure every knob's other positions with all else as it is: knob -> position -> trial."""
    options = [(knob.name, option) for knob in knobs for option in knob.options[1:]][: max(0, budget - 1)]
    found = {_key(t.setting): t for t in trials.measure([option.changes for _, option in options])}
    alone: dict[str, dict[str, Trial]] = {}
    for name, option in options:
        if (trial := found.get(_key(option.changes))) is not None:
            alone.setdefault(name, {})[option.label] = trial
    return alone


class _Search:
    """Looks at combinations until the budget is spent."""

    def __init__(self, knobs: Sequence[Knob], trials: TrialPool, budget: int) -> None:
        self.found: list[Trial] = []
        self._knobs = [knob for knob in knobs if not knob.is_batch]
        self._trials = trials
        self._left = budget
        self._tried: set[object] = set()

    def draw(self) -> None:
        """Look at the combinations of the greater knobs, all or evenly drawn ones."""
        self._tried |= {_key(trial.setting) for trial in self.found}
        major = [knob for knob in self._knobs if not knob.is_minor]
        size = math.prod(len(knob.options) for knob in major)
        if size <= DRAWN * self._left:
            places: Iterable[Sequence[int]] = itertools.product(*(range(len(knob.options)) for knob in major))
        else:
            places = evenly([len(knob.options) for knob in major], max(0, round(DRAWN * self._left)))
        self._look([_merged(major, place) for place in places])

    def climb(self) -> None:
        """Look at what differs in one knob from the best so far."""
        near: list[Setting] = []
        for trial in closer(self.found):
            for knob in self._knobs:
                paths = {path for option in knob.options for path in option.changes}
                rest = {path: value for path, value in trial.setting.items() if path not in paths}
                near += [rest, *({**rest, **option.changes} for option in knob.options[1:])]
        self._look(near)

    def _look(self, settings: Iterable[Setting]) -> None:
        fresh: dict[object, Setting] = {}
        for setting in settings:
            if len(fresh) == max(0, self._left):
                break
            if (key := _key(setting)) not in self._tried:
                fresh.setdefault(key, setting)
        self._tried |= fresh.keys()
        seen = self._trials.look(list(fresh.values()))
        self._left -= len(seen)
        self.found += seen


def evenly(sizes: Sequence[int], count: int) -> Iterable[Sequence[int]]:
    """Yield `count` combinations in which each position of each knob comes up about as often as any other."""
    draw = random.Random(0)
    columns: list[list[int]] = []
    for size in sizes:
        column = [place % size for place in range(count)]
        draw.shuffle(column)
        columns.append(column)
    return zip(*columns, strict=True)


def _merged(knobs: Sequence[Knob], places: Sequence[int]) -> Setting:
    merged: Setting = {}
    for knob, place in zip(knobs, places, strict=True):
        if place:
            merged |= knob.options[place].changes
    return merged


def closer(trials: Iterable[Trial]) -> list[Trial]:
    """Return those worth measuring: near the fastest among all that are no staler, the simplest first.

    Of the staleness, the greatest of any group is compared: a look is too short for the mean. Trials that change the
    batch are not among them.
    """
    same = [trial for trial in trials if not _changes_batch(trial)]
    near: list[Trial] = []
    best = 0.0
    for stale in sorted({trial.max_staleness for trial in same}):
        those = [trial for trial in same if trial.max_staleness == stale]
        best = max(best, *(trial.samples_per_s for trial in those))
        near += [trial for trial in those if trial.samples_per_s >= (1 - LOOKED_CLOSER) * best]
    groups: dict[int, list[Trial]] = {}
    for trial in sorted(near, key=lambda t: (round(math.log(t.samples_per_s) / EQUAL), -len(t.setting)), reverse=True):
        groups.setdefault(trial.max_staleness, []).append(trial)
    each = MOST_MEASURED // max(1, len(groups))
    return [trial for those in groups.values() for trial in those[:each]]


def pareto(trials: Iterable[Trial]) -> list[Trial]:
    """Return the trials that none beats in both throughput and staleness, from the least stale to the fastest."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t.mean_staleness, -t.samples_per_s)):
        if not front or trial.samples_per_s > front[-1].samples_per_s * (1 + EQUAL):
            front.append(trial)
    return front


def simplest(trial: Trial, others: Sequence[Trial]) -> Trial:
    """Return the trial that is as good as this one on the fewest devices, and with the fewest changes."""
    equals = [
        other
        for other in others
        if other.samples_per_s >= (1 - EQUAL) * trial.samples_per_s
        and other.mean_staleness <= trial.mean_staleness + EQUAL
    ]
    return min(equals, key=lambda t: (t.devices, len(t.setting), -t.samples_per_s))


def _changes_batch(trial: Trial) -> bool:
    return any(path.rpartition(".")[2] in BATCH for path in trial.setting)


def _key(setting: Setting) -> object:
    return frozenset(setting.items())


def describe(tuning: Tuning) -> str:
    """Return what was found, for people."""
    lines = [f"{tuning.num_trials:,} settings searched", "", "samples/s  staleness  bottleneck  changes"]
    marks = {id(tuning.recommended): "  <- recommended"}
    lines += [_line(trial) + marks.get(id(trial), "") for trial in tuning.front]
    lines += ["at present", _line(tuning.present), "", "what each knob alone is worth, against the present:"]
    for knob, worth in sorted(tuning.sensitivity.items(), key=lambda item: -max(item[1].values())):
        telling = {label: share for label, share in worth.items() if abs(share - 1) >= EQUAL / 2}
        if telling:
            lines.append(f"  {knob}: " + ", ".join(f"{label} {share - 1:+.0%}" for label, share in telling.items()))
    idle = [knob for knob, worth in tuning.sensitivity.items() if all(abs(w - 1) < EQUAL / 2 for w in worth.values())]
    if idle:
        lines.append(f"  nothing: {', '.join(idle)}")
    return "\n".join([*lines, "", *recommendation(tuning)])


def recommendation(tuning: Tuning) -> list[str]:
    """Return what is recommended, and what less staleness than that would cost."""
    best = tuning.recommended
    gain = best.samples_per_s / tuning.present.samples_per_s - 1
    lines = [f"{tuning.command} ({gain:+.0%})" if tuning.command else "nothing to change: no setting is better"]
    for trial in tuning.front:
        if trial.mean_staleness < best.mean_staleness - EQUAL:
            cost = trial.samples_per_s / best.samples_per_s - 1
            options = as_options(trial.setting) or "as it is"
            stale = f"{trial.mean_staleness:.2f} in place of {best.mean_staleness:.2f}"
            lines.append(f"  staleness {stale} costs {-cost:.0%}: {options}")
    return lines


def _line(trial: Trial) -> str:
    changes = " ".join(f"{path}={value}" for path, value in trial.setting.items()) or "none"
    return f"{trial.samples_per_s:9.2f}  {trial.mean_staleness:9.2f}  {trial.bottleneck:<10}  {changes}"
