"""Tuning: simulate many settings of a graph and say which are worth having.

Every setting that is tried passes the graph's own checks first, so nothing recommended would be refused; what would
need more cores or GPUs than the budget is not tried. There is no single best: throughput is traded against staleness,
so the result is a Pareto front. The recommended setting is the least stale one within `GOOD_ENOUGH` of the fastest,
at the batch the user asked for, because the number of groups in a step changes what is learned, not only how fast.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.errors import FlowrlError
from flowrl.graph.edges import Queue
from flowrl.graph.program import load_program
from flowrl.runtime.simulate import simulate
from flowrl.telemetry.profile import load_profile

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flowrl.graph.graph import Graph
    from flowrl.graph.program import Program
    from flowrl.telemetry.profile import Profile

TUNED_STEPS = 4  # simulated for each setting, after the pipeline has filled
GOOD_ENOUGH = 0.05  # of the best throughput that less staleness may cost
KNOBS = {  # path -> the values to try, as factors of the present one or as they are
    "max_staleness": (0, 1, 2, 4),
    "groups_per_step": (0.5, 1.0, 2.0),
    "generator.replicas": (1, 2, 3, 4, 6, 8),
    "generator.max_groups": (0.25, 0.5, 1.0, 2.0, 4.0),
    "generator.max_running": (0.5, 1.0, 2.0),
}
BATCH = "groups_per_step"

Setting = dict[str, int]  # path -> value


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One setting, simulated."""

    setting: Setting
    samples_per_s: float
    mean_staleness: float
    bottleneck: str


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be tuned; each worker process loads it for itself."""

    graph: Path
    profile: Path
    config: Path | None = None
    overrides: list[str] = []
    budget: int = 200  # simulations at most
    cores: float = 0.0  # that may be reserved; 0: the profile's, or what the graph reserves already
    gpus: float = 0.0  # that may be reserved; 0: what the graph reserves already


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """What was found."""

    present: Trial
    front: list[Trial]  # at the present batch; from the least stale to the fastest
    recommended: Trial
    sensitivity: dict[str, dict[str, float]]  # knob -> value -> throughput against the present one
    num_trials: int

    @property
    def command(self) -> str:
        """Return the recommended setting as options of `flowrl run`."""
        changed = {k: v for k, v in self.recommended.setting.items() if self.present.setting[k] != v}
        return " ".join(f"--set {path}={value}" for path, value in changed.items())


def tune(request: Request) -> Tuning:
    """Search the settings of a graph.

    Raises:
        UserError: the graph or the profile cannot be used.
    """
    searcher = Searcher(request)
    known = searcher.knobs()
    present = {path: values[0] for path, values in known.items()}
    knobs = {
        path: [v for v in values if v == present[path] or searcher.is_affordable({**present, path: v})]
        for path, values in known.items()
    }
    one_by_one = [{**present, path: value} for path, values in knobs.items() for value in values[1:]]
    grid = [dict(zip(knobs, values, strict=True)) for values in itertools.product(*knobs.values())]
    rest = [setting for setting in grid if setting != present and setting not in one_by_one]
    wanted = [*one_by_one, *_thinned(rest, request.budget - 1 - len(one_by_one))]
    allowed = [present, *filter(searcher.is_affordable, wanted)]
    now = searcher.trial(present)  # what is wrong with the profile is said here, not by a worker
    trials = _run(request, allowed)
    found = [trial for trial in trials if trial is not None]
    same_batch = [trial for trial in found if trial.setting.get(BATCH) == present.get(BATCH)]
    front = pareto(same_batch)
    best = max(trial.samples_per_s for trial in front)
    sensitivity = {
        path: {
            str(trial.setting[path]): trial.samples_per_s / now.samples_per_s
            for trial in found
            if all(trial.setting[k] == v for k, v in present.items() if k != path) and trial.setting[path] != value
        }
        for path, value in present.items()
    }
    sensitivity["queue depths"] = searcher.depths(now)
    return Tuning(
        present=now,
        front=front,
        recommended=next(trial for trial in front if trial.samples_per_s >= (1 - GOOD_ENOUGH) * best),
        sensitivity=sensitivity,
        num_trials=len(found),
    )


def pareto(trials: Iterable[Trial]) -> list[Trial]:
    """Return the trials that none beats in both throughput and staleness, from the least stale to the fastest."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t.mean_staleness, -t.samples_per_s)):
        if not front or trial.samples_per_s > front[-1].samples_per_s * (1 + 1e-6):
            front.append(trial)
    return front


class Searcher:
    """A graph file and a profile, loaded once in each process."""

    def __init__(self, request: Request) -> None:
        self._profile: Profile = load_profile(request.profile)
        self._program: Program = load_program(request.graph, config=request.config, overrides=request.overrides)
        self._build = sys.modules[type(self._program.settings).__module__].build
        cores, gpus = _reserved(self._program.graph)
        self._cores = request.cores or max(self._profile.cores, cores)
        self._gpus = request.gpus or gpus

    def knobs(self) -> dict[str, list[int]]:
        """Return the values to try for each knob that the graph has, the present one first."""
        found: dict[str, list[int]] = {}
        for path, candidates in KNOBS.items():
            known = _get(self._program.settings, path)
            if isinstance(known, int):
                values = {c if isinstance(c, int) else max(1, round(c * known)) for c in candidates} - {known}
                found[path] = [known, *sorted(values)]
        return found

    def build(self, setting: Setting) -> Graph:
        """Return the checked graph of a setting.

        Raises:
            FlowrlError: the graph refuses it.
        """
        settings = self._program.settings
        for path, value in setting.items():
            settings = _set(settings, path, value)
        graph: Graph = self._build(settings)
        graph.check()
        return graph

    def is_affordable(self, setting: Setting) -> bool:
        """Return whether the graph takes the setting and it stays within the budget of devices."""
        try:
            cores, gpus = _reserved(self.build(setting))
        except FlowrlError:
            return False
        return cores <= self._cores and gpus <= self._gpus

    def trial(self, setting: Setting) -> Trial:
        """Simulate a setting."""
        return self._simulated(self.build(setting), setting)

    def depths(self, present: Trial) -> dict[str, float]:
        """Return what halving and doubling the depth of every queue without order does to the throughput."""
        found: dict[str, float] = {}
        for factor in (0.5, 2.0):
            graph = self.build(present.setting)
            for edge in graph.edges:
                if isinstance(edge, Queue) and edge.window is None and edge.most is None:
                    object.__setattr__(edge, "depth", max(1, round(factor * edge.depth)))
            trial = self._simulated(graph, present.setting)
            found[f"x {factor:g}"] = trial.samples_per_s / present.samples_per_s
        return found

    def _simulated(self, graph: Graph, setting: Setting) -> Trial:
        found = simulate(graph, self._profile, steps=TUNED_STEPS, has_queues=False)
        return Trial(setting=setting, samples_per_s=found.samples_per_s, mean_staleness=found.mean_staleness,
                     bottleneck=found.bottleneck)  # fmt: skip


_searcher: Searcher | None = None  # of a worker process


def _open(request: Request) -> None:
    global _searcher
    _searcher = Searcher(request)


def _try(setting: Setting) -> Trial | None:
    assert _searcher is not None, "a worker opens first"
    try:
        return _searcher.trial(setting)
    except FlowrlError:
        return None


def _run(request: Request, settings: Sequence[Setting]) -> list[Trial | None]:
    """Simulate settings on all cores."""
    num = min(len(os.sched_getaffinity(0)), len(settings))
    with ProcessPoolExecutor(
        num, mp_context=multiprocessing.get_context("spawn"), initializer=_open, initargs=(request,)
    ) as pool:
        return list(pool.map(_try, settings, chunksize=max(1, min(16, len(settings) // (4 * num)))))


def _thinned(settings: list[Setting], most: int) -> list[Setting]:
    """Return at most so many of the settings, evenly spread."""
    if len(settings) <= most:
        return settings
    return [settings[place * len(settings) // most] for place in range(max(0, most))]


def _reserved(graph: Graph) -> tuple[float, float]:
    """Return the cores and GPUs that a graph's nodes reserve."""
    own = [stage.config for stage in graph.nodes.values() if not stage.config.share]
    return (
        sum(config.cpus * config.replicas * config.ranks for config in own),
        sum(config.gpus * config.replicas * config.ranks for config in own),
    )


def _get(settings: Any, path: str) -> Any:
    for name in path.split("."):
        settings = getattr(settings, name, None)
    return settings


def _set(settings: Any, path: str, value: int) -> Any:
    first, _, rest = path.partition(".")
    inner = _set(getattr(settings, first), rest, value) if rest else value
    return msgspec.structs.replace(settings, **{first: inner})


def describe(tuning: Tuning) -> str:
    """Return what was found, for people."""
    lines = [f"{tuning.num_trials} settings simulated", "", "samples/s  staleness  bottleneck  settings"]
    paths = list(tuning.present.setting)
    marks = {id(tuning.recommended): "  <- recommended"}
    lines += [_line(trial, paths) + marks.get(id(trial), "") for trial in tuning.front]
    lines += ["at present", _line(tuning.present, paths), "", "what each knob alone is worth, against the present:"]
    for knob, worth in tuning.sensitivity.items():
        if worth:
            lines.append(f"  {knob}: " + ", ".join(f"{value} {share - 1:+.0%}" for value, share in worth.items()))
    gain = tuning.recommended.samples_per_s / tuning.present.samples_per_s - 1
    lines += ["", f"{tuning.command} ({gain:+.0%})" if tuning.command else "nothing to change: no setting is better"]
    return "\n".join(lines)


def _line(trial: Trial, paths: Sequence[str]) -> str:
    settings = " ".join(f"{path}={trial.setting[path]}" for path in paths)
    return f"{trial.samples_per_s:9.2f}  {trial.mean_staleness:9.2f}  {trial.bottleneck:<10}  {settings}"
