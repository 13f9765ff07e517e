"""Asynchronous PPO: generators, a reward function, a frozen reference, a critic and a learner, all at once.

    flowrl run graphs/ppo_async.py --set steps=40 --set learner.lr=1e-6 --set max_staleness=2

A prompt group is admitted against a credit; at `max_staleness` m there are (m + 1) * groups_per_step of them, so no
sample is ever more than m policy versions old when it is learned (0 is synchronous training).
"""

from collections.abc import Mapping
from typing import Annotated

from flowrl.config import Meta, Select
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.stages.critic import Critic
from flowrl.stages.generator import Generator
from flowrl.stages.learner import Learner
from flowrl.stages.online import evaluated, texts_for
from flowrl.stages.prompts import Prompts
from flowrl.stages.reference import Reference
from flowrl.stages.scorers import ScoredSettings, scorers
from flowrl.stages.texts import TextSource

MINIBATCHES = 8  # of the critic, which learns too little in one optimizer step a version


class Settings(ScoredSettings):
    critic_model: str = ""  # a reward model or base model to start the critic from; "": the policy's
    reference_model: str = ""  # "": the policy as it begins
    steps: Annotated[int, Meta(ge=1)] = 14
    algorithm: Select = Select(use="flowrl.algorithms.ppo:PPO")
    generator: Generator.Config = Generator.Config(cpus=1, group_size=8)
    reference: Reference.Config = Reference.Config(share="learner")
    critic: Critic.Config = Critic.Config(share="learner", lr=2e-5, minibatches=MINIBATCHES)
    texts: TextSource.Config = TextSource.Config()  # a pre-training loss beside the policy's; per_step=0: none

    def implied(self, given: Mapping[str, object]) -> Mapping[str, object]:
        """Return the most minibatches of the critic, up to MINIBATCHES, that divide a step's groups."""
        groups = given.get("groups_per_step")
        if not isinstance(groups, int):
            return {}
        return {"critic.minibatches": next(n for n in range(MINIBATCHES, 0, -1) if groups % n == 0)}


def build(s: Settings) -> Graph:
    sampler, learning = s.sampler(s.generator), s.learning(s.algorithm)
    prompts = Prompts(s.prompts, sampler)
    generator = Generator(s.generator, sampler)
    scoring = scorers(generator.rollouts, sampler, s)
    reference = Reference(s.reference, sampler, model=s.reference_model, learning=learning)
    critic = Critic(s.critic, sampler, learning, s.learner, model=s.critic_model)
    learner = Learner(s.learner, sampler, learning, beside=s.texts)
    texts, evaluation = texts_for(learner), evaluated(s.evaluation, learner, generator, s.reward)
    row = dict(**scoring.nodes, reference=reference, critic=critic, learner=learner)
    return Graph(
        nodes=dict(prompts=prompts, generator=generator, **row, **texts.nodes, **evaluation.nodes),
        edges=[
            Queue(prompts.prompts, generator.prompts),
            *scoring.edges,
            Queue(scoring.scored, reference.scored),
            Queue(reference.referenced, critic.referenced),
            Queue(critic.samples, learner.samples),
            Latest(learner.weights, generator.weights),
            Credits(learner.released, prompts.credits),
            *texts.edges,
            *evaluation.edges,
        ],
        until=learner,
    )
