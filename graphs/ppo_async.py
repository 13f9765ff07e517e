"""Asynchronous PPO: generators, a reward function, a frozen reference, a critic and a learner, all at once.

    flowrl run graphs/ppo_async.py --set steps=40 --set learner.lr=1e-6 --set max_staleness=2

A prompt group is admitted against a credit; at `max_staleness` m there are (m + 1) * groups_per_step of them, so no
sample is ever more than m policy versions old when it is learned (0 is synchronous training).
"""

from typing import Annotated, Any

from flowrl.config import Meta, Select
from flowrl.data.prompts import PromptData
from flowrl.engines.base import Sampling
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.graph.settings import RunSettings
from flowrl.graph.staleness import most_credits
from flowrl.stages.critic import Critic
from flowrl.stages.evaluator import Evaluator
from flowrl.stages.generator import Generator
from flowrl.stages.learner import Learner
from flowrl.stages.prompts import Prompts
from flowrl.stages.reference import Reference
from flowrl.stages.reward import Reward


class Settings(RunSettings):
    model: str = "SmolLM2-135M-Instruct"  # Hugging Face id or local directory
    critic_model: str = ""  # a reward model or base model to start the critic from; "": the policy's
    steps: Annotated[int, Meta(ge=1)] = 14  # policy versions to publish
    groups_per_step: Annotated[int, Meta(ge=1)] = 16  # prompt groups learned per policy version
    max_staleness: Annotated[int, Meta(ge=0)] = 1  # policy versions between sampling and learning
    algorithm: Select = Select(use="flowrl.algorithms.ppo:PPO")
    data: PromptData = PromptData()
    sampling: Sampling = Sampling()
    prompts: Prompts.Config = Prompts.Config()
    generator: Generator.Config = Generator.Config(cpus=1, group_size=8)
    reward: Reward.Config = Reward.Config()
    reference: Reference.Config = Reference.Config(share="learner")
    critic: Critic.Config = Critic.Config(share="learner", lr=2e-5)
    learner: Learner.Config = Learner.Config(cpus=1, lr=1e-5)
    evaluation: Evaluator.Config = Evaluator.Config()


def build(s: Settings) -> Graph:
    in_flight = s.evaluation.in_flight
    credits = most_credits(s.max_staleness, s.groups_per_step, window=1)
    group = s.generator.group_size
    common: dict[str, Any] = dict(algorithm=s.algorithm, groups_per_step=s.groups_per_step, group_size=group,
                                  steps=s.steps)  # fmt: skip
    room = s.generator.max_model_len - s.sampling.max_tokens
    prompts = Prompts(s.prompts, model=s.model, data=s.data, group_size=group, seed=s.seed, room=room)
    generator = Generator(s.generator, model=s.model, sampling=s.sampling, heldout_sampling=s.sampling)
    reward = Reward(s.reward)
    reference = Reference(s.reference, model=s.model, temperature=s.sampling.temperature)
    critic = Critic(s.critic, model=s.critic_model or s.model, **common)
    learner = Learner(s.learner, model=s.model, max_staleness=s.max_staleness, temperature=s.sampling.temperature,
                      has_critic=True, **common)  # fmt: skip
    evaluation = Evaluator(s.evaluation, model=s.model, data=s.data, seed=s.seed)
    return Graph(
        nodes=dict(
            prompts=prompts,
            generator=generator,
            reward=reward,
            reference=reference,
            critic=critic,
            learner=learner,
            evaluation=evaluation,
        ),
        edges=[
            Queue(prompts.prompts, generator.prompts, depth=16),
            Queue(generator.rollouts, reward.rollouts, depth=64),
            Queue(reward.scored, reference.scored, depth=64),
            Queue(reference.referenced, critic.referenced, depth=credits, window=1),
            Queue(critic.samples, learner.samples, depth=credits, window=1, max_staleness=s.max_staleness),
            Latest(learner.weights, generator.weights),
            Credits(
                learner.released, prompts.credits, initial=credits, per_version=s.groups_per_step, versions=s.steps
            ),
            Latest(learner.saves, critic.saves),
            Latest(learner.checkpoints, evaluation.checkpoints),
            Queue(evaluation.prompts, generator.heldout, depth=16),
            Queue(generator.heldout_rollouts, evaluation.rollouts, depth=in_flight, most=in_flight),
        ],
        until=learner,
    )
