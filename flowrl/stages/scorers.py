"""The row of nodes that score a policy's samples, as a graph's settings name them.

First the reward function, then each reward model, then the judges; every one adds a score of its own name, and what is
learned is their sum. Called by graph files.

Tests: tests/graphs/test_commands.py
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from flowrl.errors import ConfigError
from flowrl.graph.edges import Edge, Queue
from flowrl.stages.judge import Judge, ModelJudge
from flowrl.stages.reward import Reward, RewardModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.graph.ports import Out, Source
    from flowrl.graph.stage import Stage
    from flowrl.messages import Rollouts, Scored
    from flowrl.stages.sampler import Sampler


class Scorers(NamedTuple):
    """Nodes that score a policy's samples, in the order in which samples pass them, and where they leave the last."""

    nodes: dict[str, Stage]
    edges: list[Edge]
    scored: Out[Scored]


def scorers(
    rollouts: Source[Rollouts],
    sampler: Sampler,
    reward: Reward.Config,
    reward_model: RewardModel.Config | None = None,
    models: Sequence[str] = (),
    weights: Sequence[float] = (),
    *,
    judge: Judge.Config,
    model_judge: ModelJudge.Config,
) -> Scorers:
    """Return the nodes that score what leaves at `rollouts`: those that the settings name.

    A model without a weight of its own has `reward_model.weight`; a judge is named by its server's URL or its model.

    Raises:
        ConfigError: nothing scores, or weights are neither none nor one for each model.
    """
    if weights and len(weights) != len(models):
        raise ConfigError("reward_weights", f"has {len(weights)} for {len(models)} reward_models", "give one each")
    row: dict[str, Reward | RewardModel | Judge | ModelJudge] = {}
    if reward.function:
        row["reward"] = Reward(reward, sampler)
    common = reward_model or RewardModel.Config()
    for k, (name, weight) in enumerate(zip(models, weights or [common.weight] * len(models), strict=True)):
        row[f"reward_model_{k}"] = RewardModel(msgspec.structs.replace(common, weight=weight), sampler, model=name)
    if judge.server.url:
        row["judge"] = Judge(judge)
    if model_judge.model:
        row["model_judge"] = ModelJudge(model_judge)
    if not row:
        remedy = "give reward.function, reward_models, judge.server.url or model_judge.model"
        raise ConfigError("reward", "nothing scores the samples", remedy)
    in_a_row = list(row.values())
    edges: list[Edge] = [Queue(rollouts, in_a_row[0].rollouts)]
    edges += [Queue(before.scored, after.rollouts) for before, after in pairwise(in_a_row)]
    return Scorers({**row}, edges, in_a_row[-1].scored)
