"""Online DPO from people: they compare two answers of the running policy, which learns the pair while it draws others.

    flowrl run graphs/humans_dpo.py --set humans.deadline_s=1800
    flowrl feedback runs/NAME      # the page: another process, which may come and go
    flowrl run graphs/humans_dpo.py --set offline.data.source=preferences.jsonl --set humans.asked=0.5

A group that nobody judges in time is filtered, as is a tie, and others are admitted in its place; with `offline.data` a
pair of these is learned in its place, and `humans.asked` is the weight of people's pairs in the mix. The reference is
the policy as it starts. Staleness is bounded as in graphs/ppo_async.py, people's time included.
"""

from flowrl.config import Select
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.stages.evaluator import Evaluator
from flowrl.stages.generator import Generator
from flowrl.stages.humans import Humans
from flowrl.stages.learner import Learner
from flowrl.stages.offline_pairs import OfflinePairs, filled, has_pairs
from flowrl.stages.online import OnlineSettings, evaluated
from flowrl.stages.prompts import Prompts
from flowrl.stages.reference import Reference
from flowrl.stages.reward import Reward
from flowrl.stages.selector import SelectionLearner, Selector


class Settings(OnlineSettings):
    groups_per_step: int = 8  # pairs that people must have decided before a version is learned
    objective: Select = Select(use="flowrl.algorithms.dpo:DPO")
    generator: Generator.Config = Generator.Config(cpus=1, group_size=2)
    humans: Humans.Config = Humans.Config()
    offline: OfflinePairs.Config = OfflinePairs.Config()  # data.source="": people's pairs alone
    select: Selector.Config = Selector.Config()
    reference: Reference.Config = Reference.Config(share="learner")
    learner: Learner.Config = Learner.Config(cpus=1, lr=1e-6)
    # Of held-out prompts, which people are not asked about; data without answers: data.num_heldout=0
    evaluation: Evaluator.Config = Evaluator.Config(function="flowrl.rewards.verify:reasoning_gym_score")


def build(s: Settings) -> Graph:
    sampler, learning = s.sampler(s.generator), s.learning(s.objective)
    prompts = Prompts(s.prompts, sampler)
    generator = Generator(s.generator, sampler)
    humans = Humans(s.humans, passes=has_pairs(s.offline))
    judged = filled(humans.scored, s.offline, sampler)
    select = Selector(s.select, take="pair")
    reference = Reference(s.reference, sampler)
    learner = SelectionLearner(s.learner, sampler, learning, num_samples=select.num_kept)
    evaluation = evaluated(s.evaluation, learner, generator, Reward.Config(function=""))
    row = dict(generator=generator, humans=humans, **judged.nodes, select=select, reference=reference)
    return Graph(
        nodes=dict(prompts=prompts, **row, learner=learner, **evaluation.nodes),
        edges=[
            Queue(prompts.prompts, generator.prompts),
            Queue(generator.rollouts, humans.rollouts),
            *judged.edges,
            Queue(judged.scored, select.scored),
            Queue(select.selected, reference.scored),
            Queue(reference.referenced, learner.samples),
            Latest(learner.weights, generator.weights),
            Credits(learner.released, prompts.credits),
            *evaluation.edges,
        ],
        until=learner,
    )
