"""Train again from what a run recorded, without generators, and hold the result against the run.

The graph is cut out of the run's own plan. It has the learner, the critic in front of it and what else feeds them
without being sampled, with a source of recorded groups in place of everything upstream.

Invariants:
- the repeated nodes get the same messages in the same order and the same settings as in the run. So where the numerics
  are deterministic (float32 on CPUs) losses and weights are bit-equal;
- a difference is then a fault of learner or machine, and equality says that whatever went wrong came with the data.

Called by `flowrl retrain`.

Tests: tests/contracts/test_retrain.py
"""

from __future__ import annotations

import contextlib
import time
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.engines.checkpoint import complete_checkpoints, damage, version_of
from flowrl.errors import ConfigError, DataError
from flowrl.graph.graph import RunSettings
from flowrl.graph.program import EdgePlan, GraphPlan, Program, graph_of
from flowrl.graph.stage import Specification, from_specification
from flowrl.messages import Buffer
from flowrl.runtime.launch import Say, check_program, drive
from flowrl.runtime.ledger import Cut
from flowrl.runtime.rundir import claim, create_run_dir, existing_run, read_plan, read_settings, write_plan
from flowrl.runtime.supervisor import Start
from flowrl.stages.critic import Critic
from flowrl.stages.learner import Learner
from flowrl.telemetry.metrics import read_steps
from flowrl.telemetry.records import read_digests, read_samples, step_files, step_path
from flowrl.telemetry.trackers import WandbConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from flowrl.graph.graph import Graph
    from flowrl.graph.stage import Stage

SOURCE, READER = "recorded", "weights_reader"  # the nodes that this adds


class RetrainRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for."""

    run: Path
    first: int = 0  # step to begin with
    last: int | None = None  # the step after the one to end with; None: all that were recorded
    name: str | None = None
    compares: bool = False  # whether to look for the first difference


def retrain(request: RetrainRequest, *, say: Say) -> int:
    """Train the recorded steps again; returns 1 where a difference was asked for and found, else 0.

    Raises:
        UserError: the run has no record of those steps, or is of a kind that cannot be repeated.
        RunError: the training failed.
    """
    run_dir = existing_run(request.run).resolve()
    plan = read_plan(run_dir)
    first, last = recorded_steps(run_dir, request)
    begin, checkpoint = starting_point(run_dir, first)
    if begin < first:
        say(f"no checkpoint of version {first} is left: beginning with step {begin}, from version {begin}")
    graph = retrained_graph(plan, run_dir, begin, last)
    program = Program(path=run_dir / "graph.json", settings=retrained_settings(run_dir), graph=graph)
    say(f"training again steps {begin} to {last - 1} of {run_dir}")
    check_program(program, say=say, address=None)
    name = request.name or f"{run_dir.name}-retrained-{time.strftime('%Y%m%d-%H%M%S')}"
    directory = create_run_dir(run_dir.parent / name).resolve()
    start = Start(cut=Cut(version=begin), checkpoint=checkpoint)
    with contextlib.closing(claim(directory, say)) as claimed:
        number = write_plan(directory, program)
        outcome = drive(
            program, directory, claimed=claimed, start_number=number, resume=start, address=None, again="", say=say
        )
    if not request.compares or outcome.was_stopped:
        return 0
    difference = first_difference(run_dir, directory, range(first, last))
    say(describe(difference, first, last))
    return 0 if difference is None else 1


def describe(difference: Difference | None, first: int, last: int) -> str:
    """Return the outcome of a comparison as a line."""
    if difference is None:
        return f"steps {first} to {last - 1}: samples, figures and every tensor of every version are equal, bit for bit"
    return f"first difference: step {difference.step}, {difference.what}: {difference.run} in the run, " + (
        f"{difference.again} this time"
    )


def recorded_steps(run_dir: Path, request: RetrainRequest) -> tuple[int, int]:
    """Return the first step to train and the one after the last.

    Raises:
        DataError: one of them was not recorded.
        ConfigError: there is none between.
    """
    directory = run_dir / "rollouts"
    recorded = step_files(directory)
    last = max(recorded, default=-1) + 1 if request.last is None else request.last
    wanted = range(request.first, last)
    if (missing := next((step for step in wanted if step not in recorded), None)) is not None:
        num_missing = wanted.stop - wanted.start - sum(step in wanted for step in recorded)
        what = f"has no record of step {missing} ({num_missing} of {wanted.stop - wanted.start} steps are missing)"
        raise DataError(str(directory), what, "choose among those there are; learner.save_rollouts=true records them")
    if not wanted:
        what = f"steps {request.first}:{last} are not recorded; {len(recorded)} are recorded"
        raise ConfigError("--steps", what, "give FIRST:END with FIRST below END")
    return request.first, last


def starting_point(run_dir: Path, first: int) -> tuple[int, Path | None]:
    """Return the newest version up to `first` to start from, and its checkpoint; version 0 needs none."""
    for checkpoint in reversed(complete_checkpoints(run_dir / "checkpoints")):
        if 0 < (version := version_of(checkpoint)) <= first and not damage(checkpoint):
            return version, checkpoint
    return 0, None


def retrained_settings(run_dir: Path) -> RunSettings:
    """Return the settings of the run that belong to no node, with nothing reported elsewhere and nothing restarted."""
    tree = read_settings(run_dir / "settings.yaml")
    own = {name: tree[name] for name in RunSettings.__struct_fields__ if name in tree}
    settings = msgspec.convert(own, RunSettings)
    off: Any = {"wandb": WandbConfig(), "tensorboard": False, "mlflow": "", "trackio": "", "prometheus_port": 0}
    return msgspec.structs.replace(settings, **off, max_restarts=0)


def retrained_graph(plan: GraphPlan, run_dir: Path, begin: int, last: int) -> Graph:
    """Return the part of a plan that trains, fed with the recorded steps from `begin` to `last`.

    Raises:
        ConfigError: the plan's last node does not learn from samples.
    """
    stages = {name: from_specification(spec, name) for name, spec in plan.nodes.items()}
    if not isinstance(stages[plan.until], Learner):
        what = f"{plan.until} learns from given examples, which are not recorded"
        raise ConfigError(str(run_dir), what, "run its graph again: with the same settings the order is the same")
    entry, trained = _trained(plan, stages)
    beside = _beside(plan, trained, entry)
    kept = {*trained, *beside}
    nodes = {name: _cut_off(plan.nodes[name], stages[name], kept, last) for name in kept}
    for name in kept:
        if isinstance(stages[name], Critic):  # it is told how the policy is trained
            nodes[name].arguments["policy"] = nodes[plan.until].arguments["config"]
    nodes[SOURCE] = Specification(
        stage="flowrl.stages.recorded:Recorded",
        arguments={"config": {}, "directory": str(run_dir / "rollouts"), "first": begin, "last": last},
    )
    nodes[READER] = Specification(stage="flowrl.stages.recorded:WeightsReader", arguments={"config": {}})
    edges = [_redirected(edge, kept, entry) for edge in plan.edges]
    graph = graph_of(GraphPlan(nodes=nodes, edges=[edge for edge in edges if edge is not None], until=plan.until))
    graph.check()
    return graph


def _trained(plan: GraphPlan, stages: dict[str, Stage]) -> tuple[str, list[str]]:
    """Return the port at which the recorded groups enter and the nodes from there to the learner, which it is last of.

    The critic takes what it made itself: it values, credits and trains on the groups again.
    """
    entry, nodes = f"{plan.until}.samples", [plan.until]
    feeding = next(edge.source for edge in plan.edges if edge.target == entry)
    node = feeding.partition(".")[0]
    if isinstance(stages[node], Critic):
        entry, nodes = f"{node}.referenced", [node, *nodes]
    return entry, nodes


def _beside(plan: GraphPlan, trained: list[str], entry: str) -> list[str]:
    """Return the sources that feed the trained nodes apart from the samples, texts of a pre-training loss for one."""
    queues = [edge for edge in plan.edges if edge.kind == "queue"]
    # A source that the trained nodes ask themselves (texts) is asked again.
    fed = {q.target.partition(".")[0] for q in queues if q.source.partition(".")[0] not in trained}
    found: list[str] = []
    for edge in queues:
        source, target = edge.source.partition(".")[0], edge.target.partition(".")[0]
        if target in trained and source not in trained and edge.target != entry:
            if source in fed:
                raise ConfigError(edge.source, "feeds the learner beside the samples and is not recorded")
            found.append(source)
    return found


def _cut_off(spec: Specification, stage: Stage, kept: set[str], last: int) -> Specification:
    """Return a node as it stands this time: same numbers, ending at `last`, on no device of a node left out."""
    arguments = {**spec.arguments}
    config: dict[str, Any] = {**arguments["config"]}
    if config.get("share") not in kept:
        config["share"] = ""
    if isinstance(stage, Learner | Critic):
        config["schedule"] = {**config["schedule"], "total_steps": stage.num_optimizer_steps}
        arguments["learning"] = {**arguments["learning"], "steps": last}
    if isinstance(stage, Learner):
        config |= {"save_every": 0, "evaluate_every": 0, "save_rollouts": True}
        config["transport"] = "shm"  # nobody fetches
    return Specification(stage=spec.stage, arguments={**arguments, "config": config})


def _redirected(edge: EdgePlan, kept: set[str], entry: str) -> EdgePlan | None:
    """Return an edge of the run as it is this time, or None where one of its ends is gone."""
    source, target = edge.source.partition(".")[0], edge.target.partition(".")[0]
    if edge.target == entry:
        return msgspec.structs.replace(edge, source=f"{SOURCE}.samples")
    if source in kept and target in kept:
        return edge
    if source in kept and edge.kind == "credits":
        bounds = {**edge.bounds, "is_endless": True}  # the source ends with the last recorded group
        return msgspec.structs.replace(edge, target=f"{SOURCE}.credits", bounds=bounds)
    if source in kept and edge.source.endswith(".weights"):
        return msgspec.structs.replace(edge, target=f"{READER}.weights")
    return None


class Difference(msgspec.Struct, frozen=True):
    """Where two runs part."""

    step: int
    what: str  # a sample's field, a figure or a tensor
    run: str
    again: str


def first_difference(run_dir: Path, again_dir: Path, steps: Iterable[int]) -> Difference | None:
    """Return where training again first differs from its run, or None where every step and version is equal."""
    figures = [read_steps(each / "metrics.jsonl") for each in (run_dir, again_dir)]
    digests = [read_digests(each) for each in (run_dir, again_dir)]
    for step in steps:
        pairs = zip_longest(*(read_samples(step_path(each / "rollouts", step)) for each in (run_dir, again_dir)))
        of_samples = (
            (f"group {ours.group_id} {what}", a, b) for ours, theirs in pairs for what, a, b in _fields(ours, theirs)
        )
        ours, theirs = (each.get(step + 1, {}) for each in figures)
        names = [name for name in ours if name in theirs and not name.endswith("_s")]  # times are never the same
        of_figures = ((name, ours[name], theirs[name]) for name in names)
        a, b = (each.get(step + 1, {}) for each in digests)
        of_tensors = ((f"tensor {name} of version {step + 1}", a.get(name), b.get(name)) for name in {**a, **b})
        for compared in (of_samples, of_figures, of_tensors):
            for what, was, is_now in compared:
                if was != is_now:
                    return Difference(step, what, str(was), str(is_now))
    return None


def _fields(run: Any, again: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield each number of two groups that is not of its own making, with its place."""
    for name in run.__struct_fields__:
        if name not in ("group_id", "generator"):  # which of two replicas sampled it is no matter
            yield from _leaves(name, getattr(run, name), getattr(again, name, None))


def _leaves(place: str, run: Any, again: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(run, Buffer) and isinstance(again, Buffer) and run != again:
        values = zip_longest(run.tolist(), again.tolist())
        yield from ((f"{place}[{token}]", *pair) for token, pair in enumerate(values))
    elif isinstance(run, list) and isinstance(again, list):
        lists = cast("list[Any]", run), cast("list[Any]", again)
        for index, pair in enumerate(zip_longest(*lists)):
            yield from _leaves(f"{place}[{index}]", *pair)
    else:
        yield place, run, again
