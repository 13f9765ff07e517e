"""Trials: settings of a graph, simulated, in this process or in one for each core.

A trial is first a look (a couple of steps, enough to tell the good from the bad). For the few that matter it is a
measurement, which goes on until the step time is known well enough.

Invariants:
- every setting passes the graph's own checks before it is simulated, and stays within the devices there are, or there
  is no trial of it;
- the same setting gives the same trial in whichever process.

Used by tune.py and advisor.py.

Tests: tests/unit/tuning/test_trials.py
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.engines.base import Serving
from flowrl.errors import FlowrlError
from flowrl.graph.edges import Credits
from flowrl.graph.program import load_program, plan_of
from flowrl.runtime.devices import num_cores
from flowrl.simulation.costs import load_profile
from flowrl.simulation.run import simulate
from flowrl.tuning.knobs import Knob, Setting, graph_with, knobs_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from flowrl.graph.graph import Graph
    from flowrl.graph.program import Program
    from flowrl.simulation.costs import Profile
    from flowrl.simulation.prediction import Prediction

LOOK_STEPS = 2  # after the first: throughput is settled by then, staleness is not
MEASURED_STEPS = 24  # at most
PRECISION = 0.02  # 95 % half-width of the step time at which a measurement ends
WORTH_PROCESSES = 64  # trials; fewer are done before the processes have started
_encoder = msgspec.json.Encoder()


@contextmanager
def _collected_after() -> Generator[None]:
    """Leave cyclic garbage until the block has ended: looking for it all along takes a third of a simulation."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One setting, simulated."""

    setting: Setting  # what differs from the settings as they are
    samples_per_s: float
    mean_staleness: float
    bottleneck: str  # "": only looked at
    max_staleness: int = 0  # of any learned group
    devices: float = 0.0  # GPUs that are reserved, and cores that are or that threads keep busy
    is_measured: bool = True  # not only looked at


class TuneRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be tuned; each worker process loads it for itself."""

    graph: Path
    profile: Path
    config: Path | None = None
    overrides: list[str] = []
    budget: int = 200  # settings searched at most; those that must run alike are simulated once
    cores: float = 0.0  # that may be reserved; 0: the profile's, or what the graph reserves already
    gpus: float = 0.0  # that may be reserved; 0: what the graph reserves already
    only: list[str] = []  # the ends of the names of knobs to turn, such as ".replicas"; []: all


def _trial(setting: Setting, graph: Graph, found: Prediction, *, is_measured: bool) -> Trial:
    return Trial(
        setting=setting,
        samples_per_s=found.samples_per_s,
        mean_staleness=found.mean_staleness,
        bottleneck=found.bottleneck,
        max_staleness=max(found.staleness),
        devices=occupied(graph),
        is_measured=is_measured,
    )


class Searcher:
    """A graph file and a profile, loaded once in each process."""

    def __init__(self, request: TuneRequest, profile: Profile | None = None) -> None:
        """Load; the profile that is given counts for the one that the request names."""
        self.profile: Profile = profile or load_profile(request.profile)
        self.program: Program = load_program(request.graph, config=request.config, overrides=request.overrides)
        self._at_once = msgspec.structs.replace(self.profile, message_s=0.0)
        self._looked: dict[bytes, Prediction] = {}
        cores, gpus = reserved(self.program.graph)
        self._cores = request.cores or max(self.profile.cores, cores)
        self._gpus = request.gpus or gpus
        self._only = tuple(request.only)

    def knobs(self) -> list[Knob]:
        """Return the knobs that the graph has."""
        settings, graph = self.program.settings, self.program.graph
        found = knobs_of(settings, graph, cores=self._cores, is_affordable=self.is_affordable)
        return [knob for knob in found if not self._only or knob.name.endswith(self._only)]

    def build(self, setting: Setting) -> Graph:
        """Return the checked graph of a setting.

        Raises:
            FlowrlError: the graph refuses it.
        """
        return graph_with(self.program, setting)

    def is_affordable(self, setting: Setting) -> bool:
        """Return whether the graph takes the setting and it stays within the devices there are."""
        try:
            return self._fits(self.build(setting))
        except FlowrlError:
            return False

    def measure(self, setting: Setting, *, steps: int = MEASURED_STEPS) -> Trial:
        """Simulate a setting until its throughput is known, or for so many steps."""
        graph = self.build(setting)
        with _collected_after():
            found = simulate(graph, self.profile, steps=steps, precision=PRECISION, detail="causes")
        return _trial(setting, graph, found, is_measured=True)

    def look(self, setting: Setting) -> Trial | None:
        """Simulate a setting for a moment, with messages that arrive at once; None where it is refused or too large.

        Of settings that differ in limits which no run of theirs can reach, one is simulated.
        """
        try:
            graph = self.build(setting)
            if not self._fits(graph):
                return None
            key = effective(graph)
            if (found := self._looked.get(key)) is None:
                with _collected_after():
                    found = simulate(graph, self._at_once, steps=LOOK_STEPS, warmup=1, detail="speed")
                self._looked[key] = found
        except FlowrlError:
            return None
        return _trial(setting, graph, found, is_measured=False)

    def try_measuring(self, setting: Setting) -> Trial | None:
        """Measure a setting; None where it is refused or needs too much."""
        try:
            return self.measure(setting) if self._fits(self.build(setting)) else None
        except FlowrlError:
            return None

    def _fits(self, graph: Graph) -> bool:
        cores, gpus = reserved(graph)
        return cores <= self._cores and gpus <= self._gpus


class TrialPool:
    """Does trials, on all cores where there are many."""

    def __init__(self, searcher: Searcher, pool: ProcessPoolExecutor | None) -> None:
        self._searcher = searcher
        self._pool = pool

    def look(self, settings: Sequence[Setting]) -> list[Trial]:
        """Look at settings; those that are refused are left out."""
        return self._all(self._searcher.look, _look, settings)

    def measure(self, settings: Sequence[Setting]) -> list[Trial]:
        """Measure settings; those that are refused are left out."""
        return self._all(self._searcher.try_measuring, _measure, settings)

    def _all(
        self,
        here: Callable[[Setting], Trial | None],
        there: Callable[[Setting], Trial | None],
        settings: Sequence[Setting],
    ) -> list[Trial]:
        if self._pool is None:
            found = [here(setting) for setting in settings]
        else:
            found = list(self._pool.map(there, settings, chunksize=max(1, min(16, len(settings) // 16))))
        return [trial for trial in found if trial is not None]


@contextmanager
def trial_pool(request: TuneRequest, searcher: Searcher) -> Generator[TrialPool]:
    """Open what does the trials: processes where the budget is worth starting them."""
    num = num_cores()
    if request.budget < WORTH_PROCESSES or num == 1:
        yield TrialPool(searcher, None)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num, mp_context=spawn, initializer=_open, initargs=(request,)) as pool:
        yield TrialPool(searcher, pool)


_searcher: Searcher | None = None  # of a worker process


def _open(request: TuneRequest) -> None:
    global _searcher
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _searcher = Searcher(request)
    gc.freeze()  # what is loaded stays; looking through it again and again costs a tenth of the time


def _end_with_parent() -> None:
    """Leave when the parent was killed: the pool's pipes stay open between its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _look(setting: Setting) -> Trial | None:
    assert _searcher is not None, "a worker opens first"
    return _searcher.look(setting)


def _measure(setting: Setting) -> Trial | None:
    assert _searcher is not None, "a worker opens first"
    return _searcher.try_measuring(setting)


def effective(graph: Graph) -> bytes:
    """Return a graph as data, with each limit that is beyond what can be under way at once put down to that."""
    plan = plan_of(graph)
    num_groups = sum(edge.initial for edge in graph.edges if isinstance(edge, Credits))
    edges = [
        msgspec.structs.replace(edge, bounds={**edge.bounds, "depth": min(edge.bounds["depth"], num_groups)})
        if edge.kind == "queue"
        else edge
        for edge in plan.edges
    ]
    nodes = {name: spec.arguments for name, spec in plan.nodes.items()}
    for name, stage in graph.nodes.items():
        config: Any = stage.config
        if isinstance(stage.config, Serving) and hasattr(config, "max_groups"):
            most = min(config.max_groups, num_groups + 1)  # one place is taken while the next prompt is waited for
            limits = {"max_groups": most, "max_running": min(config.max_running, most * config.group_size)}
            nodes[name] = {**nodes[name], "config": {**nodes[name]["config"], **limits}}
    return _encoder.encode((nodes, edges))


def fits(graph: Graph, now: Graph, profile: Profile, *, gpus: float) -> bool:
    """Return whether a graph stays within the profile's cores and so many GPUs, or what the present one reserves."""
    cores, wanted = reserved(graph)
    has_cores, has_gpus = reserved(now)
    return cores <= max(profile.cores, has_cores) and wanted <= max(gpus, has_gpus)


def occupied(graph: Graph) -> float:
    """Return the GPUs that a graph's nodes reserve, and their cores; a thread that no core is reserved for counts."""
    total = reserved(graph)[1]
    for stage in graph.nodes.values():
        config: Any = stage.config
        if not config.share:
            threads = 0.0 if config.gpus or not config.cpus else float(getattr(config, "threads", 1))
            total += max(config.cpus, threads) * config.replicas * config.ranks
    return total


def reserved(graph: Graph) -> tuple[float, float]:
    """Return the cores and GPUs that a graph's nodes reserve."""
    own = [stage.config for stage in graph.nodes.values() if not stage.config.share]
    return (
        sum(config.cpus * config.replicas * config.ranks for config in own),
        sum(config.gpus * config.replicas * config.ranks for config in own),
    )
