"""Rejection sampling, repeated: the best of n samples by reward is learned by SFT while the next ones are drawn.

    flowrl run graphs/rejection.py --set generator.group_size=16 --set select.min_reward=1.0

Groups without a sample good enough are filtered and others admitted in their place. Staleness is bounded as in
graphs/ppo_async.py: `max_staleness=0` samples, then learns, in turns.
"""

from flowrl.config import Select
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.stages.generator import Generator
from flowrl.stages.online import evaluated
from flowrl.stages.prompts import Prompts
from flowrl.stages.scorers import ScoredSettings, scorers
from flowrl.stages.selector import SelectionLearner, Selector


class Settings(ScoredSettings):
    objective: Select = Select(use="flowrl.algorithms.sft:SFT")
    generator: Generator.Config = Generator.Config(cpus=1, group_size=8)
    select: Selector.Config = Selector.Config(min_reward=1.0)


def build(s: Settings) -> Graph:
    sampler, learning = s.sampler(s.generator), s.learning(s.objective)
    prompts = Prompts(s.prompts, sampler)
    generator = Generator(s.generator, sampler)
    scoring = scorers(generator.rollouts, sampler, s)
    select = Selector(s.select, take="best")
    learner = SelectionLearner(s.learner, sampler, learning, num_samples=select.num_kept)
    evaluation = evaluated(s.evaluation, learner, generator, s.reward)
    row = dict(prompts=prompts, generator=generator, **scoring.nodes, select=select, learner=learner)
    return Graph(
        nodes={**row, **evaluation.nodes},
        edges=[
            Queue(prompts.prompts, generator.prompts),
            *scoring.edges,
            Queue(scoring.scored, select.scored),
            Queue(select.selected, learner.samples),
            Latest(learner.weights, generator.weights),
            Credits(learner.released, prompts.credits),
            *evaluation.edges,
        ],
        until=learner,
    )
