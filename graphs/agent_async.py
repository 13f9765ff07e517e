"""Asynchronous training on episodes: an agent plays an environment over several turns, and learns from whole episodes.

    flowrl run graphs/agent_async.py --set agent.environment=my_game:Game --set agent.max_turns=6

The group graph with an agent in place of generator and reward. `sampling.max_tokens` is what one turn may have; the
environment's tokens are read but not learned, and its reward for a turn lies on that turn's last token. The held-out
score is the environment's too.
"""

from typing import Annotated

from flowrl.config import Meta, Select
from flowrl.data.prompts import PromptData
from flowrl.engines.base import Sampling
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.graph.settings import RunSettings
from flowrl.graph.staleness import most_credits
from flowrl.stages.advantage import Advantage
from flowrl.stages.agent import Agent
from flowrl.stages.evaluator import Evaluator
from flowrl.stages.learner import Learner
from flowrl.stages.prompts import Prompts
from flowrl.stages.reference import Reference


class Settings(RunSettings):
    model: str = "SmolLM2-135M-Instruct"  # Hugging Face id or local directory
    steps: Annotated[int, Meta(ge=1)] = 20  # policy versions to publish
    groups_per_step: Annotated[int, Meta(ge=1)] = 16  # tasks learned per policy version
    max_staleness: Annotated[int, Meta(ge=0)] = 1  # policy versions between sampling and learning
    algorithm: Select = Select(use="flowrl.algorithms.grpo:GRPO")
    data: PromptData = PromptData()  # its rows are the tasks
    sampling: Sampling = Sampling()
    prompts: Prompts.Config = Prompts.Config()
    agent: Agent.Config = Agent.Config(cpus=1, group_size=8, max_turns=3, turn_prefix="The answer is")
    reference: Reference.Config = Reference.Config(share="learner")
    advantage: Advantage.Config = Advantage.Config()
    learner: Learner.Config = Learner.Config(cpus=1, lr=1e-5)
    evaluation: Evaluator.Config = Evaluator.Config(function="")


def build(s: Settings) -> Graph:
    in_flight = s.evaluation.in_flight
    credits = most_credits(s.max_staleness, s.groups_per_step, window=1)
    group = s.agent.group_size
    room = s.agent.max_model_len - s.sampling.max_tokens
    prompts = Prompts(s.prompts, model=s.model, data=s.data, group_size=group, seed=s.seed, room=room)
    agent = Agent(s.agent, model=s.model, sampling=s.sampling, heldout_sampling=s.sampling,
                  system_prompt=s.data.system_prompt, data=s.data)  # fmt: skip
    reference = Reference(s.reference, model=s.model, temperature=s.sampling.temperature)
    longest = s.agent.max_turns * s.sampling.max_tokens
    advantage = Advantage(s.advantage, algorithm=s.algorithm, group_size=group, groups_per_step=s.groups_per_step,
                          max_tokens=longest)  # fmt: skip
    learner = Learner(s.learner, model=s.model, algorithm=s.algorithm, steps=s.steps, groups_per_step=s.groups_per_step,
                      group_size=group, max_staleness=s.max_staleness, temperature=s.sampling.temperature,
                      is_cut=s.sampling.is_cut, has_critic=False, max_tokens=longest)  # fmt: skip
    evaluation = Evaluator(s.evaluation, model=s.model, data=s.data, seed=s.seed)
    return Graph(
        nodes=dict(
            prompts=prompts,
            agent=agent,
            reference=reference,
            advantage=advantage,
            learner=learner,
            evaluation=evaluation,
        ),
        edges=[
            Queue(prompts.prompts, agent.prompts, depth=16),
            Queue(agent.rollouts, reference.scored, depth=64),
            Queue(reference.referenced, advantage.referenced, depth=credits, window=1),
            Queue(advantage.samples, learner.samples, depth=credits, window=1, max_staleness=s.max_staleness),
            Latest(learner.weights, agent.weights),
            Credits(
                learner.released, prompts.credits, initial=credits, per_version=s.groups_per_step, versions=s.steps
            ),
            Latest(learner.saves, advantage.saves),
            Latest(learner.checkpoints, evaluation.checkpoints),
            Queue(evaluation.prompts, agent.heldout, depth=16),
            Queue(agent.heldout_rollouts, evaluation.rollouts, depth=in_flight, most=in_flight),
        ],
        until=learner,
    )
