"""PPO against a reward model that learns what people say of the policy's answers while the policy learns.

    flowrl run graphs/humans_ppo.py --set humans.deadline_s=60 --set humans.asked=0.5
    flowrl feedback runs/NAME      # the page: another process, which may come and go

People compare the two answers of a group. Training waits for them `humans.deadline_s` at most: what nobody judged is
scored like the rest and teaches the reward model nothing. The score of a step-v group is the reward model's of version
v; `reward_model.agreement` says how often it orders answers as people do, before it learns that they did.
"""

from typing import Annotated

from flowrl.config import Meta, Select
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.stages.critic import Critic
from flowrl.stages.evaluator import Evaluator
from flowrl.stages.generator import Generator
from flowrl.stages.humans import Humans
from flowrl.stages.learner import Learner
from flowrl.stages.online import OnlineSettings, evaluated
from flowrl.stages.online_reward import OnlineRewardModel
from flowrl.stages.prompts import Prompts
from flowrl.stages.reference import Reference
from flowrl.stages.reward import Reward


class Settings(OnlineSettings):
    reward_base: str = ""  # a reward model to go on from, such as graphs/humans_reward.py trains; "": the policy's body
    critic_model: str = ""  # a reward model or base model to start the critic from; "": the policy's
    steps: Annotated[int, Meta(ge=1)] = 40
    algorithm: Select = Select(use="flowrl.algorithms.ppo:PPO")
    generator: Generator.Config = Generator.Config(cpus=1, group_size=2)
    humans: Humans.Config = Humans.Config(deadline_s=60.0)
    reward_model: OnlineRewardModel.Config = OnlineRewardModel.Config(share="learner")
    reference: Reference.Config = Reference.Config(share="learner")
    critic: Critic.Config = Critic.Config(share="learner", lr=2e-5)
    # Of held-out prompts, which people are not asked about; data without answers: data.num_heldout=0
    evaluation: Evaluator.Config = Evaluator.Config(function="flowrl.rewards.verify:reasoning_gym_score")


def build(s: Settings) -> Graph:
    sampler, learning = s.sampler(s.generator), s.learning(s.algorithm)
    prompts = Prompts(s.prompts, sampler)
    generator = Generator(s.generator, sampler)
    humans = Humans(s.humans, passes=True)
    reward_model = OnlineRewardModel(s.reward_model, sampler, learning, model=s.reward_base)
    reference = Reference(s.reference, sampler, learning=learning)
    critic = Critic(s.critic, sampler, learning, s.learner, model=s.critic_model)
    learner = Learner(s.learner, sampler, learning)
    evaluation = evaluated(s.evaluation, learner, generator, Reward.Config(function=""))
    row = dict(humans=humans, reward_model=reward_model, reference=reference, critic=critic, learner=learner)
    return Graph(
        nodes=dict(prompts=prompts, generator=generator, **row, **evaluation.nodes),
        edges=[
            Queue(prompts.prompts, generator.prompts),
            Queue(generator.rollouts, humans.rollouts),
            Queue(humans.scored, reward_model.judged),
            Queue(reward_model.scored, reference.scored),
            Queue(reference.referenced, critic.referenced),
            Queue(critic.samples, learner.samples),
            Latest(learner.weights, generator.weights),
            Credits(learner.released, prompts.credits),
            *evaluation.edges,
        ],
        until=learner,
    )
