"""A graph file for clusters: the flow of flows.py on fake engines, whose generators and learner reserve cores.

flowrl run tests/support/fleet.py --address HEAD:6379 --set generators=2 --set generator_cpus=0.5
"""

from __future__ import annotations

import dataclasses
import tempfile
from typing import TYPE_CHECKING

import msgspec

from flowrl.graph.graph import RunSettings
from flowrl.graph.program import graph_of, plan_of
from flowrl.stages.learner import Learner
from tests.support.flows import ENDLESS, flow

if TYPE_CHECKING:
    from flowrl.graph.graph import Graph


tempfile.tempdir = "/var/tmp"  # which every machine sees, unlike /tmp: for the stand-in of a model


class Settings(RunSettings):
    steps: int = 1_000_000
    generators: int = 1
    generator_cpus: float = 1.0
    learner_cpus: float = 0.5


def build(s: Settings) -> Graph:
    plan = plan_of(flow(dataclasses.replace(ENDLESS, steps=s.steps, generators=s.generators), Learner))
    for node, cpus in {"generator": s.generator_cpus, "learner": s.learner_cpus}.items():
        plan.nodes[node].arguments["config"]["cpus"] = cpus
    return graph_of(msgspec.convert(msgspec.to_builtins(plan), type(plan)))
