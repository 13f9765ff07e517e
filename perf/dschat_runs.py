"""flowrl's own systems in `flowrl bench dschat`: how each is set, and its steps as a run's timeline shows them.

Three systems run graphs/ppo_async.py with a reward model, and differ in staleness and placement alone:
`colocated` is synchronous with every core or GPU given to each role in its turn, `disaggregated` is synchronous with
the devices split between generation and the rest, `asynchronous` has that split and a staleness of 1. Called by
perf/dschat.py.

A stage's seconds in a step are those in which at least one of its replicas was at work between two updates of the
policy, a generator's pauses for new weights taken out. Seconds in which weights were on their way and no stage worked
are `sync`: what hides behind work costs nothing.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Literal

from flowrl.config import to_tree
from flowrl.telemetry.events import Event, Span, Step
from flowrl.telemetry.timeline import read_history
from perf.dschat_workload import StepTimes, Workload
from perf.runs import ROOT, run_graph

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

GRAPH = ROOT / "graphs/ppo_async.py"
System = Literal["colocated", "disaggregated", "asynchronous"]
SYSTEMS: tuple[System, ...] = ("colocated", "disaggregated", "asynchronous")
TRAINED = ("learner", "critic")
SCORING = ("reference", "reward_model")
MAX_STALENESS: dict[System, int] = {"colocated": 0, "disaggregated": 0, "asynchronous": 1}
ROOM = 8  # tokens that max_model_len leaves besides the longest prompt and response

Interval = tuple[float, float]
Tree = dict[str, Any]


def settings(work: Workload, system: System) -> Tree:
    """Return a run's settings as a tree: the workload's, DeepSpeed-Chat's constants, the system's placement."""
    staleness = MAX_STALENESS[system]
    room = work.data.max_prompt_tokens + work.max_tokens + ROOM
    tree: Tree = {
        "model": work.model,
        "reward": {"function": ""},
        "reward_models": [work.reward_model],
        "seed": work.seed,
        "data": to_tree(work.data),
        "steps": work.warmup + work.steps + staleness,  # the last ones have no generation beside them: not measured
        "groups_per_step": work.groups,
        "max_staleness": staleness,
        "sampling": {"max_tokens": work.max_tokens, "temperature": work.temperature,
                     "ignore_stop": work.mode == "fixed"},
        "algorithm": {"kl": {"coef": 0.1}, "shaping": {"clip": 5.0}, "whiten_advantages": False},
        "evaluation": {"samples": 1},
        "generator": {"group_size": work.group_size, "max_groups": work.groups * (1 + staleness),
                      "max_running": max(64, work.samples), "max_model_len": room, "dtype": work.dtype},
        "learner": {"lr": work.lr, "save_every": 0, "save_rollouts": False},
        "critic": {"lr": work.critic_lr},
    }  # fmt: skip
    for node in (*TRAINED, *SCORING):
        tree.setdefault(node, {})["dtype"] = work.dtype
    for node in TRAINED:
        tree[node]["schedule"] = {"kind": "constant"}
    place = _colocated if system == "colocated" else _split
    for node, placement in place(work).items():
        tree[node] |= placement
    return tree


def _colocated(work: Workload) -> dict[str, Tree]:
    """Return the placement that gives each role every device while it works."""
    threads = {"threads": work.cores}
    placement: dict[str, Tree] = {node: dict(threads) for node in (*TRAINED, *SCORING, "generator")}
    placement["generator"] |= {"share": "learner", "cpus": 0}
    placement["learner"] |= {"cpus": work.cores}
    if work.gpus:
        placement["learner"] |= {"ranks": work.gpus, "gpus": 1, "cpus": 1}
        placement["generator"] |= {"replicas": work.gpus, "layout": "processes", "gpu_memory_utilization": 0.4}
    return placement


def _split(work: Workload) -> dict[str, Tree]:
    """Return the placement that gives generation half of the devices."""
    half = max(1, work.cores // 2)
    rest = max(1, work.cores - half)
    placement: dict[str, Tree] = {node: {"threads": rest} for node in (*TRAINED, *SCORING)}
    placement["generator"] = {"threads": half, "cpus": half}
    placement["learner"]["cpus"] = rest
    if work.gpus:
        half = max(1, work.gpus // 2)
        placement["generator"] |= {"replicas": half, "gpus": 1, "cpus": 1, "layout": "processes"}
        placement["learner"] |= {"ranks": work.gpus - half, "gpus": 1, "cpus": 1}
    return placement


def run_system(work: Workload, system: System, overrides: Sequence[str], runs_dir: Path) -> Path:
    """Run one system to its end and return the run's directory."""
    tree = settings(work, system)
    return run_graph(GRAPH, tree, label=f"{work.mode}-{system}", overrides=overrides, runs_dir=runs_dir)


def step_times(events: Iterable[Event], work: Workload) -> list[StepTimes]:
    """Return the measured steps of a run, from one update of the policy to the next."""
    at_s: dict[int, float] = {}
    figures: dict[int, dict[str, float]] = {}
    lengths: defaultdict[int, list[int]] = defaultdict(list)  # of the responses, by the step that learns them
    busy: defaultdict[str, list[Interval]] = defaultdict(list)
    for event in events:
        if isinstance(event, Step):
            at_s[event.version], figures[event.version] = event.time_s, event.metrics
        elif isinstance(event, Span) and (stage := _stage(event.name)):
            busy[stage].append((event.start_s, event.end_s))
            if "pause_s" in event.args:
                busy["pause"].append((event.end_s - float(event.args["pause_s"]), event.end_s))
            if stage == "generation" and event.groups:
                lengths[event.groups[0] // work.groups + 1] += event.args["lengths"]
    return [
        _step(busy, (at_s[version - 1], at_s[version]), figures[version], tuple(lengths[version]))
        for version in range(work.warmup + 1, work.warmup + work.steps + 1)
    ]


def _stage(name: str) -> str:
    """Return the stage of the paper's tables that a span belongs to; "" for none."""
    if name.startswith(("publish ", "weight update ")):
        return "sync"
    if name.startswith(("step ", "critic step ")):
        return "training"
    return {"generate": "generation", "score": "scoring", "reference": "scoring", "value": "scoring"}.get(name, "")


def _step(
    busy: dict[str, list[Interval]], window: Interval, metrics: dict[str, float], lengths: tuple[int, ...]
) -> StepTimes:
    within = {stage: joined(intervals, window) for stage, intervals in busy.items()}
    generation = without(within.get("generation", []), within.get("pause", []))
    scoring, training = within.get("scoring", []), within.get("training", [])
    working = joined([*generation, *scoring, *training], window)
    sync_s = total_s(without(within.get("sync", []), working))
    wall_s = window[1] - window[0]
    return StepTimes(
        wall_s=wall_s,
        generation_s=total_s(generation),
        sync_s=sync_s,
        scoring_s=total_s(scoring),
        training_s=total_s(training),
        other_s=wall_s - total_s(working) - sync_s,
        samples=int(metrics["samples"]),
        tokens=int(metrics["tokens"]),
        lengths=lengths,
    )


def joined(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """Return what intervals cover of a window, in order and apart; [(0, 2), (1, 5)] in (1, 4) is [(1, 4)]."""
    found: list[Interval] = []
    for start, end in sorted((max(start, window[0]), min(end, window[1])) for start, end in intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif end > start:
            found.append((start, end))
    return found


def without(intervals: Iterable[Interval], holes: Sequence[Interval]) -> list[Interval]:
    """Return what is left of intervals outside the holes, both in order and apart; [(0, 9)], [(2, 3)] is two."""
    left: list[Interval] = []
    for start, end in intervals:
        at = start
        for hole_start, hole_end in holes:
            if hole_end <= at or hole_start >= end:
                continue
            if hole_start > at:
                left.append((at, hole_start))
            at = max(at, hole_end)
        if at < end:
            left.append((at, end))
    return left


def total_s(intervals: Iterable[Interval]) -> float:
    """Return the seconds that intervals apart from each other cover."""
    return sum((end - start for start, end in intervals), 0.0)


def measured(run_dir: Path, work: Workload) -> list[StepTimes]:
    """Return the measured steps of a run that has ended."""
    return step_times((happened.event for happened in read_history(run_dir)), work)
