"""A reward model from preference pairs, or a process reward model from steps with labels.

    flowrl run graphs/reward_model.py --set data.source=preferences.jsonl --set steps=200
    flowrl run graphs/reward_model.py --set objective=flowrl.algorithms.process:Process --set data.source=steps.jsonl

The checkpoint is a sequence classifier with one label; `RewardModel` nodes score with it. The held-out score is the
share of pairs (or steps) that the model judges as they are labelled.
"""

from flowrl.config import Select
from flowrl.data.examples import ExampleData
from flowrl.graph.graph import Credits, Graph, Queue
from flowrl.stages.examples import Examples, HeldoutExamples
from flowrl.stages.offline import OfflineSettings
from flowrl.stages.offline_learner import OfflineLearner


class Settings(OfflineSettings):  # it starts from a model's body, or from a reward model; an example is a pair
    objective: Select = Select(use="flowrl.algorithms.pairwise:Pairwise")
    data: ExampleData = ExampleData(source="reasoning-gym:preference")
    learner: OfflineLearner.Config = OfflineLearner.Config(cpus=1, lr=9e-6)


def build(s: Settings) -> Graph:
    course = s.course()
    examples = Examples(s.examples, course)
    heldout = HeldoutExamples(s.heldout, course)
    learner = OfflineLearner(s.learner, course)
    return Graph(
        nodes=dict(examples=examples, heldout=heldout, learner=learner),
        edges=[
            Queue(examples.examples, learner.examples),
            Queue(heldout.examples, learner.heldout),
            Credits(learner.released, examples.credits),
        ],
        until=learner,
    )
