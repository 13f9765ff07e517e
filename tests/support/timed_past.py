"""The directory of a run that took place on the virtual clock: real stages and events, costs that a reader can add up.

Everything that flowrl reads a past run's costs from is there: graph.json, settings.yaml, timeline.json, metrics.jsonl
and profile.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.graph.graph import RunSettings
from flowrl.graph.program import graph_of, load_program
from flowrl.runtime.placement import num_cores
from flowrl.runtime.rundir import create_run_dir, write_plan
from flowrl.simulation.clock import run_virtual
from flowrl.simulation.costs import CallCost, DecodeCost, NodeProfile, Profile, Spread
from flowrl.simulation.fake import CURRENT, SimulationState
from flowrl.simulation.prediction import Watch
from flowrl.simulation.profiler import ProfileFile, machine_name
from flowrl.simulation.run import run_timed
from flowrl.simulation.stand_ins import timed_plan
from flowrl.telemetry.sinks import open_sinks
from tests.support.command import GRAPH

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.graph.graph import Graph
    from flowrl.graph.program import Program
    from flowrl.telemetry.events import Event

SMALL = ("groups_per_step=2", "generator.group_size=2", "steps=12")  # a run of the PPO graph that is quick to simulate


class Keeping(Watch):
    """A watch that keeps everything the replicas tell."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.events: list[Event] = []

    def record(self, event: Event) -> None:
        super().record(event)
        self.events.append(event)


def events_of(graph: Graph, truth: Profile, *, steps: int) -> Sequence[Event]:
    """Run a graph on the virtual clock at the costs of `truth` and return all that its replicas tell."""
    state = SimulationState(truth, cores=truth.cores)
    watch = Keeping(1, steps, state)
    plan = timed_plan(graph, truth, steps=steps, is_whole=True)
    token = CURRENT.set(state)
    try:
        run_virtual(run_timed(graph_of(plan), plan, watch, status_s=0.5))
    finally:
        CURRENT.reset(token)
    return watch.events


def ppo_costs(*, token_s: float = 0.05, train_s: float = 0.01) -> Profile:
    """Costs of the PPO graph: a generator takes `token_s` for a sample's token, the learner `train_s` for a step.

    A sample has 8 tokens; decoding more of them at a time makes it no quicker.
    """
    little = CallCost(call_s=0.01)
    nodes = {
        "generator": NodeProfile(decode=DecodeCost(sample_s=token_s)),
        "reward": NodeProfile(calls={"score": little}),
        "reference": NodeProfile(calls={"score": little}),
        "critic": NodeProfile(calls={"score": little, "train": little}),
        "learner": NodeProfile(calls={"train": CallCost(call_s=train_s)}),
    }
    return Profile(format=1, cores=num_cores(), response_tokens=Spread(quantiles=(8.0,)), nodes=nodes)


def ppo(*overrides: str) -> Program:
    """Return the PPO graph, small, with further settings."""
    return load_program(GRAPH, overrides=[*SMALL, *overrides])


def timed_past(directory: Path, truth: Profile, *overrides: str, is_fitted: bool = False) -> Path:
    """Write a run of the PPO graph that went at the costs of `truth`, and return its directory.

    Its profile is the truth, or what the profiler makes of the run.
    """
    create_run_dir(directory)
    program = ppo(*overrides)
    write_plan(directory, program)
    events = events_of(program.graph, truth, steps=program.settings.steps)
    with open_sinks(directory, RunSettings(), title=directory.name, nodes=list(program.graph.nodes)) as sinks:
        if is_fitted:
            sinks.add("profile", lambda: ProfileFile(directory))
        sinks.consume(list(events))
    if not is_fitted:
        known = msgspec.structs.replace(truth, machine=machine_name(num_cores()))
        (directory / "profile.json").write_bytes(msgspec.json.encode(known))
    return directory
