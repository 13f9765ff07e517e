"""Asynchronous training on episodes: an agent plays an environment over several turns, and learns from whole episodes.

    flowrl run graphs/agent_async.py --set agent.environment=my_game:Game --set agent.max_turns=6

The group graph with an agent in place of generator and reward. `sampling.max_tokens` is what one turn may have; the
environment's tokens are read but not learned, and its reward for a turn lies on that turn's last token. The held-out
score is the environment's too.
"""

from flowrl.config import Select
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.stages.advantage import Advantage
from flowrl.stages.agent import Agent
from flowrl.stages.evaluator import Evaluator
from flowrl.stages.learner import Learner
from flowrl.stages.online import OnlineSettings, evaluated
from flowrl.stages.prompts import Prompts
from flowrl.stages.reference import Reference


class Settings(OnlineSettings):  # the rows of its data are the tasks
    algorithm: Select = Select(use="flowrl.algorithms.grpo:GRPO")
    agent: Agent.Config = Agent.Config(cpus=1, group_size=8, max_turns=3, turn_prefix="The answer is")
    reference: Reference.Config = Reference.Config(share="learner")
    advantage: Advantage.Config = Advantage.Config()
    evaluation: Evaluator.Config = Evaluator.Config(function="")


def build(s: Settings) -> Graph:
    sampler, learning = s.sampler(s.agent), s.learning(s.algorithm)
    prompts = Prompts(s.prompts, sampler)
    agent = Agent(s.agent, sampler)
    reference = Reference(s.reference, sampler, learning=learning)
    advantage = Advantage(s.advantage, sampler, learning)
    learner = Learner(s.learner, sampler, learning)
    evaluation = evaluated(s.evaluation, learner, agent)
    row = dict(prompts=prompts, agent=agent, reference=reference, advantage=advantage, learner=learner)
    return Graph(
        nodes={**row, **evaluation.nodes},
        edges=[
            Queue(prompts.prompts, agent.prompts),
            Queue(agent.rollouts, reference.scored),
            Queue(reference.referenced, advantage.referenced),
            Queue(advantage.samples, learner.samples),
            Latest(learner.weights, agent.weights),
            Credits(learner.released, prompts.credits),
            *evaluation.edges,
        ],
        until=learner,
    )
