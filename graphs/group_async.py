"""Asynchronous group algorithms (GRPO, RLOO, REINFORCE++, ...): PPO's graph with `advantage` in place of a critic.

    flowrl run graphs/group_async.py --set algorithm=flowrl.algorithms.rloo:RLOO --set generator.group_size=8

Advantages come from the rewards of a prompt's own samples, so a group has two samples or more. With a teacher as
`reference_model` and algorithm=flowrl.algorithms.on_policy_distillation:OnPolicyDistillation it distils instead.
"""

from typing import Annotated, Any

import msgspec

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
from flowrl.stages.replay_buffer import ReplayBuffer
from flowrl.stages.reward import Reward, RewardModel, check_scorers, scorers_of
from flowrl.stages.texts import TextSource


class Settings(RunSettings):
    model: str = "SmolLM2-135M-Instruct"  # Hugging Face id or local directory
    reference_model: str = ""  # "": the policy as it begins; with on-policy distillation the teacher
    reward_models: list[str] = msgspec.field(default_factory=list)  # their scores are added up, and to the function's
    reward_weights: list[float] = msgspec.field(default_factory=list)  # one for each of them; []: reward_model.weight
    steps: Annotated[int, Meta(ge=1)] = 20  # policy versions to publish
    groups_per_step: Annotated[int, Meta(ge=1)] = 16  # prompt groups learned per policy version
    max_staleness: Annotated[int, Meta(ge=0)] = 1  # policy versions between sampling and learning
    algorithm: Select = Select(use="flowrl.algorithms.grpo:GRPO")
    data: PromptData = PromptData()
    sampling: Sampling = Sampling()
    prompts: Prompts.Config = Prompts.Config()
    generator: Generator.Config = Generator.Config(cpus=1, group_size=8)
    reward: Reward.Config = Reward.Config()  # function="": none
    reward_model: RewardModel.Config = RewardModel.Config(share="learner")  # of every reward model
    reference: Reference.Config = Reference.Config(share="learner")
    advantage: Advantage.Config = Advantage.Config()
    replay: ReplayBuffer.Config = ReplayBuffer.Config()  # learned groups learned once more; ratio=0: none
    learner: Learner.Config = Learner.Config(cpus=1, lr=1e-5)
    evaluation: Evaluator.Config = Evaluator.Config()
    texts: TextSource.Config = TextSource.Config()  # a pre-training loss beside the policy's; per_step=0: none

    def __post_init__(self) -> None:
        check_scorers(self.reward.function, self.reward_models, self.reward_weights)


def build(s: Settings) -> Graph:
    in_flight = s.evaluation.in_flight
    credits = most_credits(s.max_staleness, s.groups_per_step, window=1)
    group = s.generator.group_size
    room = s.generator.max_model_len - s.sampling.max_tokens
    prompts = Prompts(s.prompts, model=s.model, data=s.data, group_size=group, seed=s.seed, room=room)
    generator = Generator(s.generator, model=s.model, sampling=s.sampling, heldout_sampling=s.sampling)
    scorers = scorers_of(
        s.reward, s.reward_model, s.reward_models, policy=s.model, data=s.data, weights=s.reward_weights
    )
    in_a_row = [generator.rollouts, *(scorer.scored for scorer in scorers.values())]
    reference = Reference(s.reference, model=s.reference_model or s.model, policy=s.model,
                          temperature=s.sampling.temperature)  # fmt: skip
    advantage = Advantage(s.advantage, algorithm=s.algorithm, group_size=group, groups_per_step=s.groups_per_step,
                          max_tokens=s.sampling.max_tokens)  # fmt: skip
    learner = Learner(s.learner, model=s.model, algorithm=s.algorithm, steps=s.steps, groups_per_step=s.groups_per_step,
                      group_size=group, max_staleness=s.max_staleness, temperature=s.sampling.temperature,
                      is_cut=s.sampling.is_cut, has_critic=False, texts_per_step=s.texts.per_step,
                      text_coef=s.texts.coef, max_tokens=s.sampling.max_tokens)  # fmt: skip
    evaluation = Evaluator(s.evaluation, model=s.model, data=s.data, seed=s.seed, reward=s.reward)
    nodes: dict[str, Any] = dict(
        prompts=prompts,
        generator=generator,
        **scorers,
        reference=reference,
        advantage=advantage,
        learner=learner,
        evaluation=evaluation,
    )
    edges: list[Any] = [
        Queue(prompts.prompts, generator.prompts, depth=16),
        *(Queue(given, scorer.rollouts, depth=64) for given, scorer in zip(in_a_row, scorers.values(), strict=False)),
        Queue(in_a_row[-1], reference.scored, depth=64),
        Queue(reference.referenced, advantage.referenced, depth=credits, window=1),
        Latest(learner.weights, generator.weights),
        Credits(learner.released, prompts.credits, initial=credits, per_version=s.groups_per_step, versions=s.steps),
        Latest(learner.saves, advantage.saves),
        Latest(learner.checkpoints, evaluation.checkpoints),
        Queue(evaluation.prompts, generator.heldout, depth=16),
        Queue(generator.heldout_rollouts, evaluation.rollouts, depth=in_flight, most=in_flight),
    ]
    credited = advantage.samples
    if s.replay.ratio:
        nodes["replay"] = replay = ReplayBuffer(
            s.replay, algorithm=s.algorithm, groups_per_step=s.groups_per_step, credits=credits, seed=s.seed
        )  # fmt: skip
        edges += [Queue(credited, replay.fresh, depth=credits, window=1), Latest(learner.saves, replay.saves)]
        credited = replay.samples
    edges.append(Queue(credited, learner.samples, depth=credits, window=1, max_staleness=s.max_staleness))
    if s.texts.per_step:
        nodes["texts"] = texts = TextSource(s.texts, model=s.model)
        edges += [Queue(learner.wanted, texts.wanted, depth=1), Queue(texts.texts, learner.texts, depth=1, most=1)]
    return Graph(nodes=nodes, edges=edges, until=learner)
