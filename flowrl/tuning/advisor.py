"""The advisor: what a run will be like, and which single change would make it quicker, before, during and after it.

Before (`forecast`) from the newest run beside it whose profile fits; during (`hint`) from what it has recorded so far;
after (`advice`) from its own profile.

Invariants:
- no gain below `WORTH_SAYING` is said, whenever;
- nothing is advised that `flowrl check` would refuse here, by the graph or for want of cores and GPUs;
- a replica that brings a core or a GPU is told apart from it;
- silence, or one line, rather than a guess.

The batch is never changed: it changes what is learned. Used by companion.py and runs/review.py.

Tests: tests/unit/tuning/test_advisor.py
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from flowrl.errors import FlowrlError
from flowrl.graph.edges import Credits
from flowrl.graph.program import GraphPlan, get_setting, graph_of, load_program, plan_of
from flowrl.runtime.placement import num_cores, num_gpus
from flowrl.runtime.rundir import read_plan, read_settings
from flowrl.simulation.costs import load_profile
from flowrl.simulation.prediction import bottleneck_line
from flowrl.simulation.profiler import Profiler, machine_name, places
from flowrl.simulation.run import simulate
from flowrl.simulation.stand_ins import lacking, optional_nodes
from flowrl.telemetry.events import Cause
from flowrl.telemetry.timeline import read_history, timelines
from flowrl.telemetry.view import RunView, format_duration, shares
from flowrl.tuning.knobs import graph_with, knobs_of
from flowrl.tuning.trials import TuneRequest, fits, reserved
from flowrl.tuning.tune import describe, tune

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from flowrl.graph.graph import Graph
    from flowrl.graph.program import Program
    from flowrl.graph.stage import Specification
    from flowrl.simulation.costs import Profile
    from flowrl.simulation.prediction import Prediction
    from flowrl.tuning.knobs import Knob, Option, Setting

WORTH_SAYING = 0.03  # a smaller gain is within what a simulation is off by
FORECAST_S = 1.0  # of real time for all that is said before a run
LOOKED_STEPS = 8  # simulated for each change; those that seem worth telling are then measured
MEASURED_STEPS = 24
PRECISION = 0.02  # 95 % half-width of the step time at which a measurement ends
MOST_TOLD = 2
TUNED = 80  # simulations of a tuning for a report
MOST_RUNS = 50  # newest ones that are looked at for a profile
MOST_SAMPLES = 4096  # forecast after the pipeline has filled, which takes about a quarter of a second
MOST_STEPS = 12
COSTLY = ("engine", "function")  # a node whose settings have one of these takes time
# Settings of a node on which its costs depend, beside those that the simulator knows how to take into account.
SAME = (
    "engine", "engine_options", "function", "dtype", "gpus", "tensor_parallel", "max_model_len", "lora", "freeze",
    "micro_batch_tokens", "gradient_checkpointing", "offload_optimizer", "offload_parameters",
)  # fmt: skip
DRAWN = ("model", "sampling")  # of what is sampled, the same
STALENESS = "max_staleness"
ORDINALS = ("second", "third", "fourth", "fifth", "sixth", "seventh")


# What any change is worth.


class Change(NamedTuple):
    """Something that could be changed in a run."""

    words: str  # "a second generator"
    setting: Setting
    graph: Graph  # with it
    is_replica: bool = False


def worth(now: Graph, changes: Iterable[Change], profile: Profile) -> list[str]:
    """Return what is worth saying of single changes, the best first, each with its gain and its price."""
    measured = _measured(now, profile)
    looks = sorted(
        ((_look(change.graph, profile), place, change) for place, change in enumerate(changes)),
        reverse=True,
        key=lambda look: look[:2],
    )
    least = (1 + WORTH_SAYING) * _look(now, profile)
    told: list[tuple[float, str]] = []
    for rate, _, change in looks[:MOST_TOLD]:
        if rate < least:
            continue
        then = _measured(change.graph, profile)
        gain = then.samples_per_s / measured.samples_per_s - 1
        if gain >= WORTH_SAYING:
            price = _price(now, change, profile, measured) + _staler(then, measured)
            options = " ".join(f"--set {path}={value}" for path, value in change.setting.items())
            told.append((gain, f"{change.words} is worth {gain:+.0%}{price} ({options})"))
    return [text for _, text in sorted(told, key=lambda pair: -pair[0])]


def _look(graph: Graph, profile: Profile) -> float:
    try:
        return simulate(graph, profile, steps=LOOKED_STEPS, detail="causes").samples_per_s
    except FlowrlError:
        return 0.0


def _measured(graph: Graph, profile: Profile, on: Graph | None = None) -> Prediction:
    return simulate(graph, profile, steps=MEASURED_STEPS, precision=PRECISION, detail="causes", on=on)


def _price(now: Graph, change: Change, profile: Profile, measured: Prediction) -> str:
    """Return `, for 1 core more (the core alone +9%, the replica alone +2%)`, or nothing where no more is reserved."""
    more = [
        (then - was, name)
        for was, then, name in zip(reserved(now), reserved(change.graph), ("core", "GPU"), strict=True)
        if then > was
    ]
    if not more:
        return ""
    words = " and ".join(f"{count:g} {name}" + ("s" if count > 1 else "") for count, name in more)
    if not change.is_replica:
        return f", for {words} more"
    device, replica = (
        _measured(graph, profile, on=on).samples_per_s / measured.samples_per_s - 1
        for graph, on in ((now, change.graph), (change.graph, now))
    )
    return f", for {words} more ({words} alone {device:+.0%}, the replica alone {replica:+.0%})"


def _staler(then: Prediction, now: Prediction) -> str:
    """Return `, at staleness 1.8 instead of 0.9`, or nothing where it stays about as it is."""
    told = f"{then.mean_staleness:.1f}", f"{now.mean_staleness:.1f}"
    return f", at staleness {told[0]} instead of {told[1]}" if told[0] != told[1] else ""


def single_changes(program: Program, profile: Profile) -> Iterator[Change]:
    """Yield the changes of one knob to a position beside the present one that would be accepted here."""
    now: Graph = program.graph

    def is_affordable(setting: Setting) -> bool:
        try:
            return fits(graph_with(program, setting), now, profile, gpus=num_gpus() if reserved(now)[1] else 0)
        except FlowrlError:
            return False

    for knob in knobs_of(program.settings, now, cores=profile.cores, is_affordable=is_affordable):
        for option in adjacent(knob):
            if is_affordable(option.changes):
                graph = graph_with(program, option.changes)
                yield Change(_in_words(knob, option), option.changes, graph, knob.name.endswith(".replicas"))


def adjacent(knob: Knob) -> list[Option]:
    """Return the positions next to the present one, every other where they have no order; none of the batch's."""
    if knob.is_batch:
        return []
    values = [next(iter(option.changes.values())) for option in knob.options]
    if not all(isinstance(value, int | float) for value in values):
        return knob.options[1:]
    now = float(values[0])
    below = max((float(value) for value in values if float(value) < now), default=now)
    above = min((float(value) for value in values if float(value) > now), default=now)
    return [option for option, value in zip(knob.options[1:], values[1:], strict=True) if value in (below, above)]


def _in_words(knob: Knob, option: Option) -> str:
    """Return `a second generator`, `max_staleness 2 instead of 1`, or `critic: its own GPUs`."""
    node, _, name = knob.name.rpartition(".")
    if name == "share":
        return f"{node}: {option.label}"
    now, then = (next(iter(each.changes.values())) for each in (knob.options[0], option))
    if name == "replicas" and isinstance(now, int) and then == now + 1 <= len(ORDINALS) + 1:
        return f"a {ORDINALS[now - 1]} {node}{option.label.removeprefix(str(then))}"
    return f"{knob.name} {option.label} instead of {now}"


# Before a run.


def forecast(program: Program, runs_dir: Path) -> list[str]:
    """Return what to expect of a run as lines, from the runs in a directory; none where no profile there fits."""
    what = lacking(program.graph)
    if what:
        return [f"no prediction: the graph {what}"] if "do not say" in what else []
    until_s = time.monotonic() + FORECAST_S
    try:
        found = fitting_profile(program.graph, runs_dir)
        return [] if found is None else _lines(program, *found, until_s=until_s)
    except Exception as error:  # a prediction may fail as it likes and must never cost the run
        return [f"no prediction: {type(error).__name__}: {error}"]


def fitting_profile(graph: Graph, runs_dir: Path) -> tuple[Path, Profile] | None:
    """Return the newest run in a directory whose profile fits a graph, and the profile.

    It fits if it was measured on a machine of this name, from responses sampled alike. Every node that takes time had
    the same model, engine and precision, the same parts of it trained, the same kind of device.
    """
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


def _lines(program: Program, run_dir: Path, profile: Profile, *, until_s: float) -> list[str]:
    expected = _expected(program.graph, profile, until_s)
    steps, cores = get_setting(program.settings, "steps"), expected.devices.get("cores")
    whole = f"; {steps} steps in {format_duration(expected.time_s(steps))} after the start" if steps else ""
    lines = [
        f"predicted from {os.path.relpath(run_dir)}: {1 / expected.steps_per_s:.3g} s a step, "
        f"{expected.samples_per_s:.3g} samples/s{whole}",
        "  " + bottleneck_line(expected) + (f"; cores {cores:.0%} in use" if cores else ""),
    ]
    stale = get_setting(program.settings, STALENESS)
    with suppress(FlowrlError):  # there was no time for another
        if isinstance(stale, int):
            other = 0 if stale else 1
            rate = _expected(graph_with(program, {STALENESS: other}), profile, until_s).samples_per_s
            gain = expected.samples_per_s / rate - 1 if stale else rate / expected.samples_per_s - 1
            is_worth = abs(gain) >= WORTH_SAYING
            if stale:
                than = f"the synchronous run ({STALENESS}=0)"
                lines.append(f"  {gain:+.0%} over {than}" if is_worth else f"  no faster than {than}")
            else:
                worth_it = f"would be {gain:+.0%}" if is_worth else "would be no faster"
                lines.append(f"  synchronous: {STALENESS}=1 {worth_it}")
    return lines


def _expected(graph: Graph, profile: Profile, until_s: float) -> Prediction:
    sizes = [getattr(stage.config, "group_size", 1) for stage in graph.nodes.values()]
    per_step = max(sizes) * max(edge.per_version for edge in graph.edges if isinstance(edge, Credits))
    steps = max(2, min(MOST_STEPS, MOST_SAMPLES // per_step))
    left_s = max(0.0, until_s - time.monotonic())
    return simulate(graph, profile, steps=steps, detail="causes", within_s=left_s)


# While it goes on.


def hint(run_dir: Path, graph_file: Path, settings: Path) -> str:
    """Return what would help a run that is going on, the best first: `learner starved 38%: a second generator ...`.

    Raises:
        FlowrlError: the graph file does not fit the settings, or the costs are not known yet.
    """
    program = load_program(graph_file, config=settings)
    plan = plan_of(program.graph)
    profiler, view = Profiler(), RunView()
    newest = len(timelines(run_dir)) - 1  # earlier starts of the run may have had other settings
    for happened in read_history(run_dir):
        if happened.start == newest:
            profiler.consume([happened.event])
            view.fold([happened.event])
    profile = profiler.profile(places(msgspec.to_builtins(plan)))
    simulate(program.graph, profile, steps=1, detail="speed")  # says what the profile lacks
    told = worth(program.graph, single_changes(program, profile), profile)
    none = f"no single setting is worth {WORTH_SAYING:.0%} more"
    return f"{_holding_up(view, plan.until)}: {'; '.join(told) or none}"


def _holding_up(view: RunView, until: str) -> str:
    """Say what holds the run up, by its own measurements: the last node's waiting, or that it is never idle.

    `learner starved 38%, generator's decode slots 54% filled`.
    """
    part = shares(view.steady_seconds(until))
    starved, updating = part.get(Cause.WAIT_INPUT, 0.0), part.get(Cause.UPDATE, 0.0)
    if max(starved, updating) < WORTH_SAYING:
        return f"{until} busy {part.get(Cause.COMPUTE, 0.0):.0%}"
    if starved < updating:
        return f"{until} in weight updates {updating:.0%}"
    occupied = {node: view.slot_occupancy(node) for node in sorted(view.generator_nodes)}
    told = [f", {node}'s decode slots {part:.0%} filled" for node, part in occupied.items() if part is not None]
    return f"{until} starved {starved:.0%}" + "".join(told)


# After it.


def advice(run_dir: Path, plan: GraphPlan, graph_file: Path | None) -> list[str]:
    """Return advice as lines; none where the run has left no profile.

    One more replica of a node needs nothing but the run's directory; what only the graph file can change is searched.

    Raises:
        UserError: `graph_file` cannot be used with the run's settings.
    """
    if not (run_dir / "profile.json").is_file():
        return []
    if graph_file is not None:
        settings = run_dir / "settings.yaml"
        request = TuneRequest(graph=graph_file, profile=run_dir, config=settings, budget=TUNED)
        return describe(tune(request)).splitlines()
    try:
        graph, profile = graph_of(plan), load_profile(run_dir)
        rate = simulate(graph, profile, steps=LOOKED_STEPS, detail="causes").samples_per_s
        told = worth(graph, _one_more_each(plan, graph, profile, most=_most(run_dir)), profile)
    except FlowrlError as error:
        return [f"no advice: {error}"]
    none = "one more replica is worth nothing, of any node; --graph FILE has staleness, threads and more searched"
    return [f"simulated from this run's profile: {rate:,.3g} samples/s as it is", *(told or [none])]


def _most(run_dir: Path) -> dict[str, int]:
    """Return how many replicas a run's settings allow at most, by node."""
    settings = run_dir / "settings.yaml"
    cluster: dict[str, Any] = read_settings(settings).get("cluster", {}) if settings.is_file() else {}
    return cluster.get("most", {})


def _one_more_each(plan: GraphPlan, now: Graph, profile: Profile, *, most: Mapping[str, int]) -> Iterator[Change]:
    """Yield one more replica of each node whose state, graph and settings allow it, on the machine of the profile."""
    optional = optional_nodes(now)
    for node, old in plan.nodes.items():
        config = old.arguments.get("config", {})
        if "replicas" not in config or node in optional or now.nodes[node].is_stateful:
            continue
        count: int = config["replicas"] + 1
        if count > most.get(node, count):
            continue
        new = msgspec.structs.replace(old, arguments={**old.arguments, "config": {**config, "replicas": count}})
        with suppress(FlowrlError):
            graph = graph_of(msgspec.structs.replace(plan, nodes={**plan.nodes, node: new}))
            graph.check()
            if fits(graph, now, profile, gpus=num_gpus() if reserved(now)[1] else 0):
                ordinals = dict(enumerate(ORDINALS, start=2))
                words = f"a {ordinals.get(count, 'further')} {node}"
                yield Change(words, {f"{node}.replicas": count}, graph, is_replica=True)
