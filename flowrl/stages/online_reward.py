"""Online reward model: scores every group, and learns what people said of it as they say it.

In the row behind the humans stage, in the learner's order.

Invariants:
- the model goes from version to version with each `groups_per_step` groups, the learner's steps where nothing behind it
  filters;
- a group of step v is scored by version v, which has learned no judgment of that step, and its metrics say which
  version it was;
- a group that nobody judged is scored like every other and teaches nothing, so that nothing waits for people here;
- running ahead of the learner, it adds its state to a checkpoint of version v at its first step boundary c >= v;
- after a resume version c scores the steps up to c, and learns none of them again.

What people said is no part of the reward. It is how the reward model is measured, on judgments that it has not learned
yet, and what it then learns. Its `agreement` is the share of pairs that it orders as people do, a tie half.

Tests: tests/unit/stages/test_online_reward.py
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import msgspec

from flowrl.config import ImportPath, Meta, Select, widen
from flowrl.data.models import prepare_model
from flowrl.data.vocabulary import check_same_vocabulary
from flowrl.engines.base import TokenGroup, Training, TrainingConfig, TrainingEngine
from flowrl.engines.checkpoint import checkpoint_version
from flowrl.errors import ConfigError, RewardError
from flowrl.graph.ports import In, Out
from flowrl.graph.simulated import Itself
from flowrl.graph.stage import Stage
from flowrl.messages import Scored, narrowed
from flowrl.stages.examples import load_objective
from flowrl.stages.humans import JUDGED
from flowrl.stages.offline_learner import VALUES_CARD
from flowrl.stages.sampler import Learning, Sampler
from flowrl.stages.step import mean_metrics
from flowrl.stages.tokens import token_group
from flowrl.stages.training import (
    check_training,
    load_state,
    opened,
    save_state,
)

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.graph.simulated import Costs
    from flowrl.graph.stage import Context, Say


class OnlineRewardModel(Stage):
    """Scores with a reward model that is trained on judgments as they come."""

    class Config(Training):
        """Settings of the reward-model node."""

        lr: float = 9e-6  # OpenRLHF paper, section 3.3
        engine: ImportPath = "flowrl.engines.deepspeed:DeepSpeedEngine"
        objective: Select = Select(use="flowrl.algorithms.pairwise:Pairwise")
        epochs: Annotated[int, Meta(ge=1)] = 1  # optimizer steps over the judgments of a step
        weight: float = 1.0  # the score is multiplied by it
        clip: Annotated[float, Meta(gt=0)] = 10.0  # scores beyond +- clip are clipped (OpenRLHF paper, section 3.3)
        name: str = ""  # of the score; "" takes the node's name
        save_model: bool = True  # with each checkpoint, for `flowrl export --node`, `reward_models` or a later run's

    ordered = frozenset({"judged"})
    is_stateful = True
    judged: In[Scored]  # in the learner's order
    scored: Out[Scored]

    def __init__(self, config: Config, sampler: Sampler, learning: Learning, *, model: str = "") -> None:
        self.config: OnlineRewardModel.Config = config
        self.sampler = sampler
        self.learning = learning
        self.model = model or sampler.model  # "": it begins as the policy's body, with scores of 0

    def check(self, say: Say) -> None:
        """Prepare the model, which must read the policy's tokens, and load the objective, which must give scores."""
        objective = load_objective(self.config.objective)
        if not objective.gives_score or objective.learns_from != "pairs":
            what = f"{self.config.objective.use} makes no reward model of pairs"
            raise ConfigError("reward_model.objective", what, "take flowrl.algorithms.pairwise:Pairwise")
        steps, saves = self.num_optimizer_steps, self.config.save_model
        directory = check_training(
            self.config, self.model, "reward_model", num_steps=steps, say=say, head=objective.head, saves=saves
        )
        if self.model != self.sampler.model:
            policy = prepare_model(self.sampler.model, say=say)
            check_same_vocabulary(policy, directory, "reward_model", longest=self.sampler.longest)

    def _settings(self) -> TrainingConfig:
        head = load_objective(self.config.objective).head
        return widen(TrainingConfig, self.config, model=str(prepare_model(self.model)), head=head)

    @property
    def num_optimizer_steps(self) -> int:
        """Return how many optimizer steps the whole run takes at most, the length of its schedule."""
        return self.learning.steps * self.config.epochs

    def simulated(self, costs: Costs) -> Itself:
        """Score with zeros and train nothing."""
        shared = {"sampler": costs.sampler(self.sampler), "learning": costs.learning(self.learning)}
        config = msgspec.structs.replace(costs.training(self.config), save_model=False)
        return Itself({"config": config, "model": "", **shared})

    async def follow(self, context: Context) -> None:
        """Serve as a rank other than 0."""
        async with opened(context, self.config.engine, self._settings, self.num_optimizer_steps) as engine:
            await context.compute(engine.follow)

    async def run(self, context: Context) -> None:
        """Score and learn until the edge closes."""
        async with opened(context, self.config.engine, self._settings, self.num_optimizer_steps) as engine:
            version = trained = 0
            if context.resume_from is not None:
                trained = await context.compute(load_state, engine, context.resume_from / context.node)
                version = checkpoint_version(context.resume_from)

            def save(directory: Path, version: int) -> None:
                save_state(engine, directory, context.version)
                if self.config.save_model:
                    card = VALUES_CARD.format(name=context.node, version=version)
                    engine.save_model(directory / "model", card=card)

            self._save = save
            context.version = version
            await self._score(context, engine, trained)

    def save(self, directory: Path, version: int) -> None:
        """Write the engine's state as it is."""
        self._save(directory, version)

    async def _score(self, context: Context, engine: TrainingEngine, trained: int) -> None:
        """Score until the edge closes; learn at the end of each step after the first `trained`."""
        name, num_groups = self.config.name or context.node, 0
        pairs, figures = list[TokenGroup](), dict[str, float]()
        async for group in self.judged:
            start_s = context.now()
            rows = await context.compute(engine.score, [token_group(group)])
            scores = [float(row[-1]) for row in rows[0]]
            if not all(map(math.isfinite, scores)):
                what = f"the model scored the samples of group {group.group_id} {scores}"
                raise RewardError(context.where, what, "lower reward_model.lr")
            told = {**group.metrics, **figures, f"{name}.version": float(max(context.version, trained))}
            if group.metrics.get(JUDGED) and (order := pair_of(group)):
                pairs.append(token_group(narrowed(group, order)))
                told[f"{name}.agreement"] = agreement(*(scores[place] for place in order))
            clipped = [self.config.weight * max(-self.config.clip, min(self.config.clip, each)) for each in scores]
            await self.scored.put(msgspec.structs.replace(group, scores={name: clipped}, metrics=told))
            context.done += 1
            context.span("score", start_s, groups=[group.group_id])
            num_groups += 1
            if num_groups % self.learning.groups_per_step == 0:
                async with context.stepping():
                    if context.version >= trained:
                        found = await self._learn(context, engine, pairs)
                        figures = {f"{name}.{key}": value for key, value in found.items()}
                pairs = []

    async def _learn(self, context: Context, engine: TrainingEngine, pairs: list[TokenGroup]) -> dict[str, float]:
        """Learn a step's judgments, where there are any, and return the figures."""
        start_s, updates = context.now(), list[dict[str, float]]()
        for _ in range(self.config.epochs if pairs else 0):
            metrics = await context.compute(engine.accumulate, pairs, self.config.objective)
            updates.append(metrics | await context.compute(engine.apply))
        if pairs:
            context.span(f"reward model step {context.version + 1}", start_s, args={"pairs": len(pairs)})
        return {"pairs": float(len(pairs)), **mean_metrics(updates)}


def pair_of(group: Scored) -> list[int]:
    """Return the places of the best and the worst sample by what people said; none where that is a tie.

    Worths [0.25, 1.0, 0.5] give [1, 0].
    """
    worth = group.rewards
    best, worst = max(range(len(worth)), key=worth.__getitem__), min(range(len(worth)), key=worth.__getitem__)
    return [best, worst] if worth[best] > worth[worst] else []


def agreement(better: float, worse: float) -> float:
    """Return 1 where the model scores the better answer higher, 0.5 where it scores both alike."""
    return (better > worse) + 0.5 * (better == worse)
