"""What a run will be like, said before it starts, where an earlier run beside it has left a profile that fits.

A profile fits if it was measured on a machine of this name, from responses sampled alike, and every node that takes
time had the same model, engine and precision, the same parts of it trained, the same kind of device. Of those that fit
the newest is taken, and named. Invariants: silence rather than a guess from another machine or model; whatever goes
wrong here costs the prediction, never the run; nothing is started or written. Called by launch.py.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.errors import FlowrlError
from flowrl.graph.edges import Credits
from flowrl.graph.plan import GraphPlan, plan_of
from flowrl.runtime.placement import num_cores
from flowrl.runtime.rundir import read_plan
from flowrl.simulation.costs import load_profile
from flowrl.simulation.prediction import bottleneck_line
from flowrl.simulation.profiler import machine_name
from flowrl.simulation.run import can_simulate, simulate
from flowrl.simulation.timed_graph import optional_nodes
from flowrl.telemetry.view import format_duration
from flowrl.tuning.knobs import get_setting, graph_with

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flowrl.graph.graph import Graph
    from flowrl.graph.program import Program
    from flowrl.graph.stage import Specification
    from flowrl.simulation.costs import Profile
    from flowrl.simulation.prediction import Prediction

MOST_RUNS = 50  # newest ones that are looked at
MOST_SAMPLES = 4096  # simulated after the pipeline has filled, which takes about a quarter of a second
MOST_STEPS = 12
COSTLY = ("engine", "function")  # a node whose settings have one of these takes time
# Settings of a node on which its costs depend, beside those that the simulator knows how to take into account.
SAME = (
    "engine", "engine_options", "function", "dtype", "threads", "gpus", "tensor_parallel", "max_model_len", "lora",
    "freeze", "micro_batch_tokens", "gradient_checkpointing", "offload_optimizer", "offload_parameters",
)  # fmt: skip
DRAWN = ("model", "sampling")  # of what is sampled, the same
STALENESS = "max_staleness"


def forecast(program: Program, runs_dir: Path) -> list[str]:
    """Return what to expect of a run as lines, from the runs in a directory; none where no profile there fits."""
    if not can_simulate(program.graph):
        return []
    try:
        found = fitting_profile(program.graph, runs_dir)
        return [] if found is None else _lines(program, *found)
    except Exception as error:  # a prediction may fail as it likes and must never cost the run
        return [f"no prediction: {type(error).__name__}: {error}"]


def fitting_profile(graph: Graph, runs_dir: Path) -> tuple[Path, Profile] | None:
    """Return the newest run in a directory whose profile fits a graph, and the profile."""
    optional = optional_nodes(graph)
    plan = msgspec.json.decode(msgspec.json.encode(plan_of(graph)), type=GraphPlan)  # as it reads back from a run
    wanted = {name: spec for name, spec in plan.nodes.items() if name not in optional and _is_costly(spec)}
    for run_dir in _newest(runs_dir):
        try:
            profile, measured = load_profile(run_dir), read_plan(run_dir)
        except FlowrlError:
            continue  # of another version, or cut short
        is_same = all(name in measured.nodes and _is_same(spec, measured.nodes[name]) for name, spec in wanted.items())
        if is_same and profile.machine == machine_name(num_cores()) and wanted.keys() <= profile.nodes.keys():
            return run_dir, profile
    return None


def _newest(runs_dir: Path) -> Iterator[Path]:
    found = [path.parent for path in runs_dir.glob("*/profile.json")]
    yield from sorted(found, key=lambda run_dir: os.path.getmtime(run_dir / "profile.json"), reverse=True)[:MOST_RUNS]


def _is_costly(spec: Specification) -> bool:
    return any(name in spec.arguments.get("config", {}) for name in COSTLY)


def _is_same(wanted: Specification, measured: Specification) -> bool:
    ours, theirs = wanted.arguments, measured.arguments
    config, other = ours["config"], theirs.get("config", {})
    return (
        wanted.stage == measured.stage
        and ours.get("model") == theirs.get("model")
        and all(ours.get("sampler", {}).get(name) == theirs.get("sampler", {}).get(name) for name in DRAWN)
        and all(config.get(name) == other.get(name) for name in SAME)
    )


def _lines(program: Program, run_dir: Path, profile: Profile) -> list[str]:
    settings: Any = program.settings
    expected = _simulated(program.graph, profile)
    steps, cores = get_setting(settings, "steps"), expected.devices.get("cores")
    whole = f"; {steps} steps in {format_duration(expected.time_s(steps))} after the start" if steps else ""
    lines = [
        f"predicted from {os.path.relpath(run_dir)}: {1 / expected.steps_per_s:.3g} s a step, "
        f"{expected.samples_per_s:.3g} samples/s{whole}",
        bottleneck_line(expected) + (f"; cores {cores:.0%} in use" if cores else ""),
    ]
    stale = get_setting(settings, STALENESS)
    if isinstance(stale, int):
        other = 0 if stale else 1
        rate = _simulated(graph_with(program, {STALENESS: other}), profile).samples_per_s
        if stale:
            lines.append(f"{expected.samples_per_s / rate - 1:+.0%} over the synchronous run ({STALENESS}=0)")
        else:
            lines.append(f"synchronous: {STALENESS}=1 would be {rate / expected.samples_per_s - 1:+.0%}")
    return [lines[0], *(f"  {line}" for line in lines[1:])]


def _simulated(graph: Graph, profile: Profile) -> Prediction:
    sizes = [getattr(stage.config, "group_size", 1) for stage in graph.nodes.values()]
    per_step = max(sizes) * max(edge.per_version for edge in graph.edges if isinstance(edge, Credits))
    steps = max(2, min(MOST_STEPS, MOST_SAMPLES // per_step))
    return simulate(graph, profile, steps=steps, detail="causes")
