"""A group that the algorithm does not keep is filtered: counted, its credit returned, its place skipped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from flowrl.config import Select
from flowrl.engines.base import Sampling
from flowrl.errors import LastingError
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Buffer, Referenced, Rollouts, extend
from flowrl.runtime.ledger import read_entries
from flowrl.simulation.fake import FakeTraining
from flowrl.simulation.stand_ins import stand_in_model
from flowrl.stages.advantage import Advantage
from flowrl.stages.generator import Generator
from flowrl.stages.learner import Learner
from flowrl.stages.prompts import Prompts
from flowrl.stages.sampler import Learning, Sampler
from tests.support.flows import NumberedPrompts, run

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.graph.stage import Context

STEPS, GROUPS = 3, 2
GREEDY = 0.25  # reward of the greedy response
DAPO = Select(use="flowrl.algorithms.dapo:DAPO")


class Rewarder(Stage):
    """Every other group has equal rewards, from which a group algorithm learns nothing."""

    class Config(StageConfig):
        pass

    rollouts: In[Rollouts]
    referenced: Out[Referenced]

    def __init__(self, config: Config) -> None:
        self.config = config

    async def run(self, context: Context) -> None:
        async for group in self.rollouts:
            rewards = [1.0, 1.0] if group.group_id % 2 else [1.0, 0.0]
            rewards += [GREEDY] * group.num_greedy
            zeros = [Buffer.floats([0.0] * len(sample.token_ids)) for sample in group.samples]
            await self.referenced.put(extend(Referenced, group, scores={"task": rewards}, ref_logprobs=zeros))


class Drifted(FakeTraining):
    """Its importance weights lie so far apart that the effective sample size is what it is told to be."""

    def __init__(self, *given: Any, ess: float, **more: Any) -> None:
        super().__init__(*given, **more)
        self._ess = ess

    def accumulate(self, groups: Any, objective: Select) -> dict[str, float]:
        return super().accumulate(groups, objective) | {"is_weight": 1.0, "is_weight_sq": 1.0 / self._ess}


class Forgets(Advantage):
    """Writes nothing into its part of a checkpoint, so that no run could go on from there."""

    def save(self, directory: Path, version: int) -> None:
        pass


def flow(algorithm: Select, *, greedy: bool = False, ess: float = 1.0, kind: type[Advantage] = Advantage) -> Graph:
    sampler = Sampler(model=stand_in_model(), sampling=Sampling(max_tokens=4), group_size=2, greedy=greedy)
    learning = Learning(algorithm=algorithm, steps=STEPS, groups_per_step=GROUPS, max_staleness=1)
    prompts = NumberedPrompts(Prompts.Config(), sampler)
    generator = Generator(Generator.Config(engine="flowrl.simulation.fake:FakeGeneration"), sampler)
    rewarder = Rewarder(Rewarder.Config())
    advantage = kind(Advantage.Config(), sampler, learning)
    config = Learner.Config(engine=f"{__name__}:Drifted", engine_options={"ess": ess}, save_rollouts=False)
    learner = Learner(config, sampler, learning)
    return Graph(
        nodes={"prompts": prompts, "generator": generator, "rewarder": rewarder, "advantage": advantage,
               "learner": learner},
        edges=[
            Queue(prompts.prompts, generator.prompts, depth=4),
            Queue(generator.rollouts, rewarder.rollouts, depth=4),
            Queue(rewarder.referenced, advantage.referenced),
            Queue(advantage.samples, learner.samples),
            Latest(learner.weights, generator.weights),
            Credits(learner.released, prompts.credits, is_endless=True),
        ],
        until=learner,
    )  # fmt: skip


def test_groups_without_contrast_are_filtered_and_never_learned(tmp_path: Path) -> None:
    totals = run(flow(DAPO), tmp_path).outcome.totals
    assert totals["learned"] == STEPS * GROUPS
    assert totals["filtered"] >= STEPS * GROUPS - 1  # one between each two that were learned
    learned = [entry.group for entry in read_entries(tmp_path / "ledger.jsonl") if entry.event == "learned"]
    assert all(group % 2 == 0 for group in learned)


def test_a_greedy_response_is_scored_as_a_baseline_and_not_learned(tmp_path: Path) -> None:
    remax = Select(use="flowrl.algorithms.remax:ReMax", options={"kl": {"coef": 0.0}})
    steps = run(flow(remax, greedy=True), tmp_path).steps
    assert len(steps) == STEPS
    for step in steps:
        assert step.metrics["samples"] == GROUPS * 2
        assert step.metrics["reward.mean"] == 0.75  # of [1, 0] and [1, 1]
        assert step.metrics["reward.greedy"] == GREEDY
        assert step.metrics["groups.mixed"] == 1.0
        assert step.metrics["groups.idle"] == 0.0


@pytest.mark.parametrize(("ess", "is_told"), [(0.2, True), (0.5, False)])
def test_a_small_effective_sample_size_is_warned_of(tmp_path: Path, ess: float, is_told: bool) -> None:
    ran = run(flow(DAPO, ess=ess), tmp_path)
    told = [notice.text for notice in ran.notices if "effective sample size" in notice.text]
    assert len(told) == STEPS * is_told
    assert all("effective sample size 0.20 in step" in text and "lower max_staleness or lr" in text for text in told)


def test_a_stage_that_saves_nothing_of_its_state_fails_at_the_checkpoint_and_not_at_the_resume(tmp_path: Path) -> None:
    with pytest.raises(LastingError, match=r"advantage\.0: Forgets\.save wrote nothing of version 3; write what"):
        run(flow(DAPO, kind=Forgets), tmp_path)
