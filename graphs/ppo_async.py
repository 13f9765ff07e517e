"""Asynchronous PPO: generators, a reward function, a frozen reference, a critic and a learner, all at once.

    flowrl run graphs/ppo_async.py --set steps=40 --set learner.lr=1e-6 --set max_staleness=2

A prompt group is admitted against a credit; at `max_staleness` m there are (m + 1) * groups_per_step of them, so no
sample is ever more than m policy versions old when it is learned (0 is synchronous training).
"""

from typing import Annotated, Any

import msgspec

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
from flowrl.stages.reward import Reward, RewardModel, check_scorers, scorers_of
from flowrl.stages.texts import TextSource


class Settings(RunSettings):
    model: str = "SmolLM2-135M-Instruct"  # Hugging Face id or local directory
    critic_model: str = ""  # a reward model or base model to start the critic from; "": the policy's
    reference_model: str = ""  # "": the policy as it begins
    reward_models: list[str] = msgspec.field(default_factory=list)  # their scores are added up, and to the function's
    reward_weights: list[float] = msgspec.field(default_factory=list)  # one for each of them; []: reward_model.weight
    steps: Annotated[int, Meta(ge=1)] = 14  # policy versions to publish
    groups_per_step: Annotated[int, Meta(ge=1)] = 16  # prompt groups learned per policy version
    max_staleness: Annotated[int, Meta(ge=0)] = 1  # policy versions between sampling and learning
    algorithm: Select = Select(use="flowrl.algorithms.ppo:PPO")
    data: PromptData = PromptData()
    sampling: Sampling = Sampling()
    prompts: Prompts.Config = Prompts.Config()
    generator: Generator.Config = Generator.Config(cpus=1, group_size=8)
    reward: Reward.Config = Reward.Config()  # function="": none
    reward_model: RewardModel.Config = RewardModel.Config(share="learner")  # of every reward model
    reference: Reference.Config = Reference.Config(share="learner")
    critic: Critic.Config = Critic.Config(share="learner", lr=2e-5, minibatches=8)
    learner: Learner.Config = Learner.Config(cpus=1, lr=1e-5)
    evaluation: Evaluator.Config = Evaluator.Config()
    texts: TextSource.Config = TextSource.Config()  # a pre-training loss beside the policy's; per_step=0: none

    def __post_init__(self) -> None:
        check_scorers(self.reward.function, self.reward_models, self.reward_weights)


def build(s: Settings) -> Graph:
    in_flight = s.evaluation.in_flight
    credits = most_credits(s.max_staleness, s.groups_per_step, window=1)
    group = s.generator.group_size
    common: dict[str, Any] = dict(algorithm=s.algorithm, groups_per_step=s.groups_per_step, group_size=group,
                                  steps=s.steps, max_tokens=s.sampling.max_tokens)  # fmt: skip
    room = s.generator.max_model_len - s.sampling.max_tokens
    prompts = Prompts(s.prompts, model=s.model, data=s.data, group_size=group, seed=s.seed, room=room)
    generator = Generator(s.generator, model=s.model, sampling=s.sampling, heldout_sampling=s.sampling)
    scorers = scorers_of(
        s.reward, s.reward_model, s.reward_models, policy=s.model, data=s.data, weights=s.reward_weights
    )
    in_a_row = [generator.rollouts, *(scorer.scored for scorer in scorers.values())]
    reference = Reference(s.reference, model=s.reference_model or s.model, policy=s.model,
                          temperature=s.sampling.temperature)  # fmt: skip
    critic = Critic(s.critic, model=s.critic_model or s.model, policy=s.model, minibatches=s.learner.minibatches,
                    epochs=s.learner.epochs, **common)  # fmt: skip
    learner = Learner(s.learner, model=s.model, max_staleness=s.max_staleness, temperature=s.sampling.temperature,
                      is_cut=s.sampling.is_cut, has_critic=True, texts_per_step=s.texts.per_step,
                      text_coef=s.texts.coef, **common)  # fmt: skip
    evaluation = Evaluator(s.evaluation, model=s.model, data=s.data, seed=s.seed, reward=s.reward)
    nodes: dict[str, Any] = dict(
        prompts=prompts,
        generator=generator,
        **scorers,
        reference=reference,
        critic=critic,
        learner=learner,
        evaluation=evaluation,
    )
    edges: list[Any] = [
        Queue(prompts.prompts, generator.prompts, depth=16),
        *(Queue(given, scorer.rollouts, depth=64) for given, scorer in zip(in_a_row, scorers.values(), strict=False)),
        Queue(in_a_row[-1], reference.scored, depth=64),
        Queue(reference.referenced, critic.referenced, depth=credits, window=1),
        Queue(critic.samples, learner.samples, depth=credits, window=1, max_staleness=s.max_staleness),
        Latest(learner.weights, generator.weights),
        Credits(learner.released, prompts.credits, initial=credits, per_version=s.groups_per_step, versions=s.steps),
        Latest(learner.saves, critic.saves),
        Latest(learner.checkpoints, evaluation.checkpoints),
        Queue(evaluation.prompts, generator.heldout, depth=16),
        Queue(generator.heldout_rollouts, evaluation.rollouts, depth=in_flight, most=in_flight),
    ]
    if s.texts.per_step:
        nodes["texts"] = texts = TextSource(s.texts, model=s.model)
        edges += [Queue(learner.wanted, texts.wanted, depth=1), Queue(texts.texts, learner.texts, depth=1, most=1)]
    return Graph(nodes=nodes, edges=edges, until=learner)
