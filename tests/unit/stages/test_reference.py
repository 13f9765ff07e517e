"""A reference that no loss uses is run for the metric only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from flowrl.config import Select
from flowrl.engines.base import Sampling
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.simulation.stand_ins import stand_in_model
from flowrl.stages.advantage import Advantage
from flowrl.stages.generator import Generator
from flowrl.stages.learner import Learner
from flowrl.stages.prompts import Prompts
from flowrl.stages.reference import Reference
from flowrl.stages.sampler import Learning, Sampler
from tests.support.flows import NumberedPrompts, run
from tests.unit.stages.test_selector import Judge

if TYPE_CHECKING:
    from pathlib import Path

FAKE = "flowrl.simulation.fake:FakeTraining"
GRPO = "flowrl.algorithms.grpo:GRPO"


@pytest.mark.parametrize(
    ("algorithm", "scored"),
    [
        (Select(use=GRPO, options={"kl": {"coef": 0.0}}), [0, 4]),
        (Select(use=GRPO, options={"kl": {"coef": 0.1}}), [*range(6)]),
        (Select(use="flowrl.algorithms.on_policy_distillation:OnPolicyDistillation"), [*range(6)]),
    ],
)
def test_a_reference_that_no_loss_uses_scores_a_sample_of_the_groups(tmp_path: Path, algorithm: Any, scored: list[int]):
    sampler = Sampler(model=stand_in_model(), sampling=Sampling(max_tokens=4), group_size=2)
    learning = Learning(algorithm=algorithm, steps=3, groups_per_step=2, max_staleness=0)
    prompts = NumberedPrompts(Prompts.Config(), sampler)
    generator = Generator(Generator.Config(engine="flowrl.simulation.fake:FakeGeneration"), sampler)
    judge = Judge(Judge.Config())
    reference = Reference(Reference.Config(engine=FAKE, unused_every=4), sampler, learning=learning)
    advantage = Advantage(Advantage.Config(), sampler, learning)
    learner = Learner(Learner.Config(engine=FAKE), sampler, learning)
    nodes: Any = {"prompts": prompts, "generator": generator, "judge": judge, "reference": reference}
    edges = [
        Queue(prompts.prompts, generator.prompts),
        Queue(generator.rollouts, judge.rollouts),
        Queue(judge.scored, reference.scored),
        Queue(reference.referenced, advantage.referenced),
        Queue(advantage.samples, learner.samples),
        Latest(learner.weights, generator.weights),
        Credits(learner.released, prompts.credits),
    ]
    ran = run(Graph(nodes={**nodes, "advantage": advantage, "learner": learner}, edges=edges, until=learner), tmp_path)
    assert sorted(group for span in ran.spans if span.name == "reference" for group in span.groups) == scored
    assert [step for step, figures in enumerate(ran.steps) if "kl" in figures.metrics] == sorted(
        {g // 2 for g in scored}
    )
