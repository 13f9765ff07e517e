"""Iterative DPO: the best and the worst of n samples by reward are the pair that is learned while the next are drawn.

    flowrl run graphs/iterative_dpo.py --set objective.beta=0.05 --set generator.group_size=8
    flowrl run graphs/iterative_dpo.py --set objective=flowrl.algorithms.ipo:IPO

Groups whose rewards tie are filtered and others admitted in their place.
Staleness is bounded as in graphs/ppo_async.py: `max_staleness=0` samples, then learns, in turns.
"""

from flowrl.config import Select
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.stages.generator import Generator
from flowrl.stages.learner import Learner
from flowrl.stages.online import evaluated
from flowrl.stages.prompts import Prompts
from flowrl.stages.reference import Reference
from flowrl.stages.scorers import ScoredSettings, scorers
from flowrl.stages.selector import SelectionLearner, Selector


class Settings(ScoredSettings):
    reference_model: str = ""  # "": the policy as it begins
    objective: Select = Select(use="flowrl.algorithms.dpo:DPO")
    generator: Generator.Config = Generator.Config(cpus=1, group_size=8)
    select: Selector.Config = Selector.Config()
    reference: Reference.Config = Reference.Config(share="learner")
    learner: Learner.Config = Learner.Config(cpus=1, lr=1e-6)


def build(s: Settings) -> Graph:
    sampler, learning = s.sampler(s.generator), s.learning(s.objective)
    prompts = Prompts(s.prompts, sampler)
    generator = Generator(s.generator, sampler)
    scoring = scorers(generator.rollouts, sampler, s)
    select = Selector(s.select, take="pair")
    reference = Reference(s.reference, sampler, model=s.reference_model)
    learner = SelectionLearner(s.learner, sampler, learning, num_samples=select.num_kept)
    evaluation = evaluated(s.evaluation, learner, generator, s.reward)
    row = dict(prompts=prompts, generator=generator, **scoring.nodes, select=select, reference=reference)
    return Graph(
        nodes=dict(**row, learner=learner, **evaluation.nodes),
        edges=[
            Queue(prompts.prompts, generator.prompts),
            *scoring.edges,
            Queue(scoring.scored, select.scored),
            Queue(select.selected, reference.scored),
            Queue(reference.referenced, learner.samples),
            Latest(learner.weights, generator.weights),
            Credits(learner.released, prompts.credits),
            *evaluation.edges,
        ],
        until=learner,
    )
