"""On-policy distillation: a student learns a teacher's distribution on its own samples while the next ones are drawn.

    flowrl run graphs/distill_online.py --set objective.teacher=DIR --set objective.direction=reverse

The teacher sits in the learner; rewards are only shown. Staleness is bounded as in graphs/ppo_async.py. On given
responses: `flowrl run graphs/sft.py --set objective=flowrl.algorithms.full_distillation:FullDistillation`.
"""

from flowrl.config import Select
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.stages.generator import Generator
from flowrl.stages.online import OnlineSettings, evaluated
from flowrl.stages.prompts import Prompts
from flowrl.stages.reward import Reward
from flowrl.stages.selector import SelectionLearner

ON_ITS_SAMPLES = {"direction": "reverse", "mix": 1.0}


class Settings(OnlineSettings):
    objective: Select = Select(use="flowrl.algorithms.full_distillation:FullDistillation", options=ON_ITS_SAMPLES)
    generator: Generator.Config = Generator.Config(cpus=1, group_size=1)
    reward: Reward.Config = Reward.Config()


def build(s: Settings) -> Graph:
    sampler, learning = s.sampler(s.generator), s.learning(s.objective)
    prompts = Prompts(s.prompts, sampler)
    generator = Generator(s.generator, sampler)
    reward = Reward(s.reward, sampler)
    learner = SelectionLearner(s.learner, sampler, learning, num_samples=sampler.group_size)
    evaluation = evaluated(s.evaluation, learner, generator, s.reward)
    return Graph(
        nodes=dict(prompts=prompts, generator=generator, reward=reward, learner=learner, **evaluation.nodes),
        edges=[
            Queue(prompts.prompts, generator.prompts),
            Queue(generator.rollouts, reward.rollouts),
            Queue(reward.scored, learner.samples),
            Latest(learner.weights, generator.weights),
            Credits(learner.released, prompts.credits),
            *evaluation.edges,
        ],
        until=learner,
    )
