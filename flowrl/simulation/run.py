"""Simulation: the same graph on the virtual clock, with engines that only take the time a profile says.

The stages, edges and credits are those of a real run, on the real channels; timed_graph.py exchanges what a graph holds
by import path, timed_run.py runs it, timed.py takes the time, prediction.py sees what comes of it. Invariant: the same
graph, profile and steps give the same prediction. `flowrl simulate` prints one; `flowrl tune` (tune.py)
searches with many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from flowrl.engines.base import Serving
from flowrl.errors import ConfigError
from flowrl.graph.edges import Credits
from flowrl.graph.plan import graph_of
from flowrl.graph.staleness import staleness_bound
from flowrl.simulation.clock import run_virtual
from flowrl.simulation.costs import CallCost, NodeProfile, Profile
from flowrl.simulation.prediction import Prediction, Watch
from flowrl.simulation.timed import CURRENT, SimulationState
from flowrl.simulation.timed_graph import optional_nodes, timed_plan
from flowrl.simulation.timed_run import DirectFlow, run_timed

if TYPE_CHECKING:
    from collections.abc import Callable

    from flowrl.graph.graph import Graph
    from flowrl.runtime.flow import Flow

Detail = Literal["speed", "causes", "queues"]

MEASURED_STEPS = 12  # enough that one slow group is a few percent of them
LOOKS_A_STEP = 8  # at every queue's fill


def simulate(
    graph: Graph,
    profile: Profile,
    *,
    steps: int = MEASURED_STEPS,
    warmup: int | None = None,
    precision: float = 0.0,
    is_whole: bool = False,
    detail: Detail = "queues",
    connect: Callable[[Flow, str, float], DirectFlow] = DirectFlow,
) -> Prediction:
    """Predict how a graph runs under a profile's costs.

    Of a run without end, `steps` steps are measured after `warmup`, by default until the pipeline has filled; fewer
    where `precision` is given and the half-width of the mean step time's 95 % interval is down to that part of it.
    With `is_whole` the run has `steps` steps in all and is measured between the first and the last, as a run's report
    does: then the start and the end, when nothing more is admitted, are in it. `detail` says what is looked at, and
    less of it is quicker: the "speed" and the staleness alone, the "causes" of each node's time with them, or the
    "queues" and their bytes besides. For the speed alone messages are not weighed, so no queue is full by its bytes.
    `connect` makes what stands between a replica and the flow.

    Raises:
        ConfigError: the profile lacks a node, or the graph has nothing to simulate.
        FlowrlError: as the run itself would raise it.
    """
    filling = _warmup(graph)
    before = 1 if is_whole else filling if warmup is None else warmup
    total = steps if is_whole else steps + before
    plan = timed_plan(graph, profile, steps=total, is_whole=is_whole)
    scene = SimulationState(profile, cores=max(profile.cores, _reserved(graph)))
    watch = Watch(before, total, scene, precision=precision)
    look_s = _look_s(graph, profile) if detail == "queues" else None
    token = CURRENT.set(scene)
    try:
        run_virtual(
            run_timed(graph_of(plan), plan, watch, message_s=profile.message_s, look_s=look_s, connect=connect,
                      is_bare=detail == "speed")
        )  # fmt: skip
    finally:
        CURRENT.reset(token)
    return watch.prediction(notes=_notes(graph, profile, scene))


def can_simulate(graph: Graph) -> bool:
    """Return whether prompts are admitted, something generates and something learns, which is what is simulated."""
    return not _lacking(graph)


def _lacking(graph: Graph) -> str:
    """Return what a graph has not that can be simulated; "" where it has all."""
    if not any(isinstance(edge, Credits) for edge in graph.edges):
        return "has no Credits edge"
    if not any(isinstance(stage.config, Serving) for stage in graph.nodes.values()):
        return "has no node that generates"
    return "" if hasattr(graph.nodes[graph.until_node].config, "engine") else "trains nothing"


def _warmup(graph: Graph) -> int:
    """Return the steps until the pipeline is full: as many as a sample may be old, and one.

    Raises:
        ConfigError: no prompts are admitted, or nothing generates, or nothing learns.
    """
    if lacking := _lacking(graph):
        remedy = "name a graph that admits prompts, generates and learns, such as graphs/ppo_async.py"
        raise ConfigError("graph", f"{lacking}, so there is nothing to simulate", remedy)
    credits = [edge for edge in graph.edges if isinstance(edge, Credits)]
    return 1 + max(staleness_bound(edge.initial, edge.per_version, 1) for edge in credits)


def _reserved(graph: Graph) -> float:
    """Return the cores that the graph's nodes reserve: on fewer it would not start."""
    configs = [stage.config for stage in graph.nodes.values() if not stage.config.share]
    return sum(config.cpus * config.replicas * config.ranks for config in configs)


def _look_s(graph: Graph, profile: Profile) -> float:
    """Return the time between two looks at the queues, from how long a step takes at least."""
    credits = next(edge for edge in graph.edges if isinstance(edge, Credits))
    response = sum(profile.response_tokens.quantiles) / len(profile.response_tokens.quantiles)
    longest_s = max(1e-3, 10 * profile.message_s)
    for name, stage in graph.nodes.items():
        costs = profile.nodes.get(name)
        if costs is None:
            continue
        config: Any = stage.config
        if costs.decode is not None and isinstance(config, Serving):
            samples = credits.per_version * getattr(config, "group_size", 1)
            speed = costs.decode.tokens_per_s(min(config.max_running, samples))
            longest_s = max(longest_s, samples * response / speed / config.replicas)
        longest_s = max(longest_s, costs.calls.get("train", CallCost()).call_s)
    return longest_s / LOOKS_A_STEP


def _notes(graph: Graph, profile: Profile, scene: SimulationState) -> list[str]:
    """Say where the prediction leaves what the profile has seen."""
    notes: list[str] = []
    if optional := optional_nodes(graph):
        notes.append(f"left out: {', '.join(optional)}")
    if scene.cores > profile.cores:
        notes.append(f"{scene.cores:g} cores are reserved, the profile's machine has {profile.cores:g}")
    for name, stage in graph.nodes.items():
        config: Any = stage.config
        costs = profile.nodes.get(name, NodeProfile())
        if costs.decode is not None and isinstance(config, Serving) and costs.decode.running[1] > 0:
            most = min(config.max_running, getattr(config, "max_groups", 1) * getattr(config, "group_size", 1))
            low, high = costs.decode.running
            if not 0.8 * low <= most <= 1.25 * high:
                notes.append(f"{name} may run {most} samples at once, the profile saw {low:g} to {high:g}")
        if stage.config.ranks > costs.ranks:
            notes.append(f"{name}: {stage.config.ranks} ranks are taken to be that much faster than {costs.ranks}")
    return notes
