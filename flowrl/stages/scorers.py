"""The row of nodes that score a policy's samples, and the settings of online training that name them.

First the reward function, then each reward model, then the judges; every one adds a score of its own name, and what is
learned is their sum. Called by graph files.

Tests: tests/graphs/test_commands.py
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from flowrl.errors import ConfigError
from flowrl.graph.edges import Edge, Queue
from flowrl.stages.judge import Judge, ModelJudge
from flowrl.stages.online import OnlineSettings
from flowrl.stages.reward import Reward, RewardModel

if TYPE_CHECKING:
    from flowrl.graph.ports import Out, Source
    from flowrl.graph.stage import Stage
    from flowrl.messages import Rollouts, Scored
    from flowrl.stages.sampler import Sampler


class ScoredSettings(OnlineSettings):
    """Settings of a graph in which a policy learns from scores of its samples."""

    elsewhere = {
        **OnlineSettings.elsewhere,
        **dict.fromkeys(("reward.model", "reward_model", "reward_model.model"), "reward_models=[DIR]"),
        **dict.fromkeys(("reward", "reward_function"), "reward.function"),
        **dict.fromkeys(("generator.n", "num_generations"), "generator.group_size"),
        "max_new_tokens": "sampling.max_tokens",
        "beta": "algorithm.kl.coef",
    }
    reward_models: list[str] = msgspec.field(default_factory=list)  # their scores are added up, and to the function's
    reward_weights: list[float] = msgspec.field(default_factory=list)  # one for each of them; []: reward_model.weight
    reward: Reward.Config = Reward.Config()  # function="": none
    reward_model: RewardModel.Config = RewardModel.Config(share="learner")  # of every reward model
    judge: Judge.Config = Judge.Config()  # server.url="": none
    model_judge: ModelJudge.Config = ModelJudge.Config()  # model="": none


class NamesScorers(Protocol):
    """Settings that name scorers: `ScoredSettings`, or a graph's own with the same names."""

    @property
    def reward_models(self) -> list[str]: ...
    @property
    def reward_weights(self) -> list[float]: ...
    @property
    def reward(self) -> Reward.Config: ...
    @property
    def reward_model(self) -> RewardModel.Config: ...
    @property
    def judge(self) -> Judge.Config: ...
    @property
    def model_judge(self) -> ModelJudge.Config: ...


class Scorers(NamedTuple):
    """Nodes that score a policy's samples, in the order in which samples pass them, and where they leave the last."""

    nodes: dict[str, Stage]
    edges: list[Edge]
    scored: Out[Scored]


def scorers(rollouts: Source[Rollouts], sampler: Sampler, s: NamesScorers) -> Scorers:
    """Return the nodes that score what leaves at `rollouts`: those that the settings name.

    A model without a weight of its own has `reward_model.weight`; a judge is named by its server's URL or its model.

    Raises:
        ConfigError: nothing scores, or weights are neither none nor one for each model.
    """
    models, weights = s.reward_models, s.reward_weights
    if weights and len(weights) != len(models):
        raise ConfigError("reward_weights", f"has {len(weights)} for {len(models)} reward_models", "give one each")
    row: dict[str, Reward | RewardModel | Judge | ModelJudge] = {}
    if s.reward.function:
        row["reward"] = Reward(s.reward, sampler)
    for k, (name, weight) in enumerate(zip(models, weights or [s.reward_model.weight] * len(models), strict=True)):
        config = msgspec.structs.replace(s.reward_model, weight=weight)
        row[f"reward_model_{k}"] = RewardModel(config, sampler, model=name)
    if s.judge.server.url:
        row["judge"] = Judge(s.judge)
    if s.model_judge.model:
        row["model_judge"] = ModelJudge(s.model_judge)
    if not row:
        remedy = "give reward.function, reward_models, judge.server.url or model_judge.model"
        raise ConfigError("reward", "nothing scores the samples", remedy)
    in_a_row = list(row.values())
    edges: list[Edge] = [Queue(rollouts, in_a_row[0].rollouts)]
    edges += [Queue(before.scored, after.rollouts) for before, after in pairwise(in_a_row)]
    return Scorers({**row}, edges, in_a_row[-1].scored)
