"""Asynchronous group algorithms (GRPO, RLOO, REINFORCE++, ...): PPO's graph with `advantage` in place of a critic.

    flowrl run graphs/group_async.py --set algorithm=flowrl.algorithms.rloo:RLOO --set generator.group_size=8

Advantages come from the rewards of a prompt's own samples, so a group has two samples or more.
"""

from typing import Annotated

from flowrl.config import Meta, Select
from flowrl.data.prompts import PromptData
from flowrl.engines.base import Sampling
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.graph.settings import RunSettings
from flowrl.graph.staleness import most_credits
from flowrl.stages.advantage import Advantage
from flowrl.stages.evaluator import Evaluator
from flowrl.stages.generator import Generator
from flowrl.stages.learner import Learner
from flowrl.stages.prompts import Prompts
from flowrl.stages.reference import Reference
from flowrl.stages.reward import Reward


class Settings(RunSettings):
    model: str = "SmolLM2-135M-Instruct"  # Hugging Face id or local directory
    steps: Annotated[int, Meta(ge=1)] = 20  # policy versions to publish
    groups_per_step: Annotated[int, Meta(ge=1)] = 16  # prompt groups learned per policy version
    max_staleness: Annotated[int, Meta(ge=0)] = 1  # policy versions between sampling and learning
    algorithm: Select = Select(use="flowrl.algorithms.grpo:GRPO")
    data: PromptData = PromptData()
    sampling: Sampling = Sampling()
    prompts: Prompts.Config = Prompts.Config()
    generator: Generator.Config = Generator.Config(cpus=1, group_size=8)
    reward: Reward.Config = Reward.Config()
    reference: Reference.Config = Reference.Config(share="learner")
    advantage: Advantage.Config = Advantage.Config()
    learner: Learner.Config = Learner.Config(cpus=1, lr=1e-5)
    evaluation: Evaluator.Config = Evaluator.Config()


def build(s: Settings) -> Graph:
    in_flight = s.evaluation.in_flight
    credits = most_credits(s.max_staleness, s.groups_per_step, window=1)
    group = s.generator.group_size
    room = s.generator.max_model_len - s.sampling.max_tokens
    prompts = Prompts(s.prompts, model=s.model, data=s.data, group_size=group, seed=s.seed, room=room)
    generator = Generator(s.generator, model=s.model, sampling=s.sampling, heldout_sampling=s.sampling)
    reward = Reward(s.reward)
    reference = Reference(s.reference, model=s.model, temperature=s.sampling.temperature)
    advantage = Advantage(s.advantage, algorithm=s.algorithm, group_size=group)
    learner = Learner(s.learner, model=s.model, algorithm=s.algorithm, steps=s.steps, groups_per_step=s.groups_per_step,
                      group_size=group, max_staleness=s.max_staleness, temperature=s.sampling.temperature,
                      has_critic=False)  # fmt: skip
    evaluation = Evaluator(s.evaluation, model=s.model, data=s.data, seed=s.seed)
    return Graph(
        nodes=dict(
            prompts=prompts,
            generator=generator,
            reward=reward,
            reference=reference,
            advantage=advantage,
            learner=learner,
            evaluation=evaluation,
        ),
        edges=[
            Queue(prompts.prompts, generator.prompts, depth=16),
            Queue(generator.rollouts, reward.rollouts, depth=64),
            Queue(reward.scored, reference.scored, depth=64),
            Queue(reference.referenced, advantage.referenced, depth=64),
            Queue(advantage.samples, learner.samples, depth=credits, window=1, max_staleness=s.max_staleness),
            Latest(learner.weights, generator.weights),
            Credits(
                learner.released, prompts.credits, initial=credits, per_version=s.groups_per_step, versions=s.steps
            ),
            Latest(learner.checkpoints, evaluation.checkpoints),
            Queue(evaluation.prompts, generator.heldout, depth=16),
            Queue(generator.heldout_rollouts, evaluation.rollouts, depth=in_flight, most=in_flight),
        ],
        until=learner,
    )
