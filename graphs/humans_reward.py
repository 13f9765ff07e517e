"""A reward model from people: they compare two answers of a model, and each pair is learned as it is decided.

    flowrl run graphs/humans_reward.py --set data.source=prompts.jsonl --set data.num_heldout=0
    flowrl feedback runs/NAME      # the page: another process, which may come and go

The model that answers stays as it is. A step's `accuracy` is the share of its pairs that the reward model ordered as
people did before it learned them. The checkpoint is a sequence classifier with one label, for `reward_models` or
`reward_base` of graphs/humans_ppo.py.
"""

from typing import Annotated

from flowrl.config import Meta, Select
from flowrl.data.examples import ExampleData
from flowrl.data.prompts import PromptData
from flowrl.graph.graph import Credits, Graph, Queue
from flowrl.stages.generator import Generator
from flowrl.stages.humans import Humans
from flowrl.stages.offline_learner import OfflineLearner
from flowrl.stages.online import SamplingSettings
from flowrl.stages.prompts import Prompts
from flowrl.stages.sampler import Course
from flowrl.stages.selector import PairExamples, Selector


class Settings(SamplingSettings):
    reward_base: str = ""  # a reward model to go on from; "": the body of the model that answers
    steps: Annotated[int, Meta(ge=1)] = 20  # optimizer steps
    examples_per_step: Annotated[int, Meta(ge=1)] = 16  # pairs that people must have decided before a step is learned
    objective: Select = Select(use="flowrl.algorithms.pairwise:Pairwise")
    data: PromptData = PromptData(num_heldout=0)
    generator: Generator.Config = Generator.Config(cpus=1, group_size=2)
    humans: Humans.Config = Humans.Config()
    pairs: Selector.Config = Selector.Config()
    learner: OfflineLearner.Config = OfflineLearner.Config(cpus=1, lr=9e-6)


def build(s: Settings) -> Graph:
    sampler = s.sampler(s.generator)
    course = Course(
        model=s.reward_base or s.model,
        data=ExampleData(),  # nothing is read: the examples are people's
        objective=s.objective,
        steps=s.steps,
        examples_per_step=s.examples_per_step,
    )
    prompts = Prompts(s.prompts, sampler)
    generator = Generator(s.generator, sampler)
    humans = Humans(s.humans)
    pairs = PairExamples(s.pairs)
    learner = OfflineLearner(s.learner, course)
    return Graph(
        nodes=dict(prompts=prompts, generator=generator, humans=humans, pairs=pairs, learner=learner),
        edges=[
            Queue(prompts.prompts, generator.prompts),
            Queue(generator.rollouts, humans.rollouts),
            Queue(humans.scored, pairs.scored),
            Queue(pairs.examples, learner.examples),
            Credits(learner.released, prompts.credits),
        ],
        until=learner,
    )
