"""The planner: where each process of a graph computes and how it saves memory, found before anything starts.

It is asked while a graph file is loaded (`load_program(..., placing=Planner(...))`) and answers with defaults. What the
user sets is kept, whatever it costs. search.py finds a placement, placed.py says what then lies where, reasons.py why
it is this one.

Invariants:
- no model is loaded, fetched or started; a run may ask the hub for a config;
- the same request gives the same plan;
- where nothing fits, the plan of what comes nearest is given all the same, with the changes that would each make it
  fit.

Called by `flowrl plan`, `run` and `check`.

Tests: tests/unit/tuning/test_planner.py
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.engines.base import Computing, Serving, Training
from flowrl.runtime.placement import place
from flowrl.stages.critic import Critic
from flowrl.stages.examples import load_objective
from flowrl.stages.reward import RewardModel
from flowrl.stages.sampler import Course, Sampler
from flowrl.tuning.machines import Site
from flowrl.tuning.memory import Work
from flowrl.tuning.placed import Models, Placed, table
from flowrl.tuning.reasons import assumed, reasons, remedies
from flowrl.tuning.search import Search, argument_of
from flowrl.tuning.shapes import find_shape

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from flowrl.algorithms.base import Objective
    from flowrl.graph.graph import Graph
    from flowrl.graph.stage import Stage
    from flowrl.tuning.memory import Head
    from flowrl.tuning.shapes import Shape


NONE = "nothing that was tried alone; take a smaller model, shorter sequences (data, sampling) or larger devices"
RUN_WAITS_S = 10.0  # for what would fit, where nothing does


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What was found."""

    site: Site
    values: dict[str, Any]  # address -> value, what the planner gives
    placed: Placed
    reasons: list[str]  # at most three lines
    remedies: list[str]  # where it does not fit: changes each of which would
    assumed: list[str]
    samples_per_s: float = 0.0  # simulated; 0: it was not

    @property
    def fits(self) -> bool:
        """Return whether every process has room."""
        return not self.placed.lacks

    def lines(self, *, whole: bool = True) -> list[str]:
        """Return the plan in words: all of it, or the three lines that a run begins with."""
        found = [f"placement: {reason}" if place == 0 else f"  {reason}" for place, reason in enumerate(self.reasons)]
        if not self.fits:
            found += [f"does not fit: {lack}" for lack in self.placed.lacks]
            found += [f"  would fit: {remedy}" for remedy in self.remedies or [NONE]]
        if not whole:
            return found
        values = " ".join(f"--set {path}={_plain(value)}" for path, value in self.values.items())
        told = [f"  as settings: {values}"] if values else []
        told += [f"assumed: {each}" for each in self.assumed]
        return [f"on {self.site}", "", *table(self.placed, self.site), "", *found, *told]


def _plain(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value) or '""'


class Planner:
    """Plans one graph while it is loaded; `plan` is what was found."""

    def __init__(self, site: Site, configs: Mapping[str, Path], *, is_for_run: bool = False) -> None:
        """`configs` name the configs of models that are not here.

        A run is not held up for a plan: where none can be made the rules have to do (`why_none` says why), and without
        GPUs nothing is simulated.
        """
        self._site = site
        self._given_configs = configs
        self._is_for_run = is_for_run
        self.plan: Plan | None = None
        self.why_none = ""

    def __call__(self, graph: Graph, paths: Mapping[str, str], given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return defaults for a graph's settings by address; see `load_program`."""
        by_rule = partial(place, graph, paths, given, machine=self._site.whole)
        if given.get("placement") == "given" or (self._is_for_run and given.get("runtime") == "local"):
            self.why_none = "the settings say where everything is"
            return by_rule()
        try:
            return self._planned(graph, paths, given)
        except Exception as error:  # a plan must never cost a run
            if not self._is_for_run:
                raise
            self.why_none = str(error)
            return by_rule()

    def _planned(self, graph: Graph, paths: Mapping[str, str], given: Mapping[str, Any]) -> Mapping[str, Any]:
        models = models_of(graph, self._given_configs, is_for_run=self._is_for_run)
        simulates = bool(self._site.machine.gpus) or not self._is_for_run
        search = Search(graph, paths, given, models, self._site, simulates=simulates)
        best, prediction, others = search.best()
        within_s = RUN_WAITS_S if self._is_for_run else math.inf
        self.plan = Plan(
            site=self._site,
            values=best.values,
            placed=best.placed,
            reasons=reasons(search, best, prediction, others),
            remedies=[*remedies(search, within_s=within_s)] if best.placed.lacks else [],
            assumed=assumed(search, best),
            samples_per_s=prediction.samples_per_s if prediction else 0.0,
        )
        return best.values

    def lines(self, *, whole: bool) -> list[str]:
        """Return the plan in words, or why there is none."""
        machine = self._site.machine
        lost = [f"warning: no GPU is used: {machine.why_none}; see flowrl doctor"] if machine.has_lost else []
        if self.plan is None:
            return lost + ([f"no plan of memory: {self.why_none}"] if whole or machine.gpus else [])
        return lost + self.plan.lines(whole=whole)


def models_of(graph: Graph, configs: Mapping[str, Path], *, is_for_run: bool = False) -> Models:
    """Return the models of a graph's nodes and the sequences that they see.

    Raises:
        ModelError: nothing is known of a model.
    """
    sampler, course = argument_of(graph, Sampler), argument_of(graph, Course)
    shapes: dict[str, Shape] = {}
    heads: dict[str, Head] = {}
    teachers: dict[str, Shape] = {}
    known: dict[str, Shape] = {}

    def shape(name: str) -> Shape:
        if name not in known:
            known[name] = find_shape(name, configs, is_for_run=is_for_run)
        return known[name]

    for name, stage in graph.nodes.items():
        if not isinstance(stage.config, Serving | Computing):
            continue
        own = getattr(stage, "model", "") or getattr(stage.config, "model", "") or (sampler or course).model
        shapes[name], heads[name] = shape(own), _head(stage)
        objective = _objective(stage)
        if objective is not None and objective.teacher_model:
            teachers[name] = shape(objective.teacher_model)
    if sampler is not None:
        response = min(sampler.max_response, sampler.longest)
        work = Work(prompt=max(1, sampler.longest - response), response=response, samples=sampler.group_size)
    else:
        tokens = course.data.max_tokens if course else 512
        work = Work(prompt=tokens // 4, response=tokens - tokens // 4, samples=1)
    return Models(shapes=shapes, heads=heads, teachers=teachers, work=work)


def _head(stage: Stage) -> Head:
    if isinstance(stage, Critic):
        return "value"
    if isinstance(stage, RewardModel):
        return "reward"
    objective = _objective(stage)
    return "policy" if objective is None else objective.head


def _objective(stage: Stage) -> Objective | None:
    """Return what a node learns from given examples, where it does."""
    course = stage.arguments.get("course")
    if not isinstance(course, Course) or not isinstance(stage.config, Training):
        return None
    return load_objective(course.objective)
