"""A small flow on fake engines whose processes write down which GPUs they see."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from flowrl.graph.program import graph_of, plan_of
from flowrl.stages.generator import Generator
from flowrl.stages.learner import Learner
from tests.support.flows import FlowSettings, Scorer, flow

if TYPE_CHECKING:
    from typing import Any

    from flowrl.graph.graph import Graph
    from flowrl.graph.stage import Context

SETTINGS = FlowSettings(
    seed=0, steps=2, groups_per_step=2, window=1, max_staleness=1, generators=1, scorers=3, depth=8, token_s=0.0,
    sigma=0.0, update_s=0.0, score_s=0.0, train_s=0.0, filter_every=0, initial=4,
)  # fmt: skip


def _write(context: Context) -> None:
    seen = context.run_dir / "seen"
    seen.mkdir(exist_ok=True)
    (seen / context.where).write_text(os.environ["CUDA_VISIBLE_DEVICES"])


class SeatedGenerator(Generator):
    async def run(self, context: Context) -> None:
        _write(context)
        await super().run(context)


class SeatedScorer(Scorer):
    async def run(self, context: Context) -> None:
        _write(context)
        await super().run(context)


class SeatedLearner(Learner):
    async def run(self, context: Context) -> None:
        _write(context)
        await super().run(context)


def seated(**configs: dict[str, Any]) -> Graph:
    """Return the flow with these fields of its nodes' configs, by node."""
    plan = plan_of(flow(SETTINGS, SeatedLearner))
    for node, kind in (("generator", SeatedGenerator), ("scorer", SeatedScorer)):
        plan.nodes[node] = msgspec.structs.replace(plan.nodes[node], stage=f"{__name__}:{kind.__name__}")
    for node, fields in configs.items():
        plan.nodes[node].arguments["config"] |= fields
    return graph_of(plan)
