"""A reward model from preference pairs, or a process reward model from steps with labels.

    flowrl run graphs/reward_model.py --set data.source=preferences.jsonl --set steps=200
    flowrl run graphs/reward_model.py --set objective=flowrl.algorithms.process:Process --set data.source=steps.jsonl

The checkpoint is a sequence classifier with one label; `RewardModel` nodes score with it. The held-out score is the
share of pairs (or steps) that the model judges as they are labelled.
"""

from typing import Annotated

from flowrl.config import Meta, Select
from flowrl.data.examples import ExampleData
from flowrl.graph.graph import Credits, Graph, Queue
from flowrl.graph.settings import RunSettings
from flowrl.stages.examples import Examples, HeldoutExamples
from flowrl.stages.offline_learner import OfflineLearner


class Settings(RunSettings):
    model: str = "SmolLM2-135M-Instruct"  # the body to start from, or a reward model; Hugging Face id or directory
    steps: Annotated[int, Meta(ge=1)] = 100  # optimizer steps
    examples_per_step: Annotated[int, Meta(ge=1)] = 16  # pairs
    objective: Select = Select(use="flowrl.algorithms.pairwise:Pairwise")
    data: ExampleData = ExampleData(source="reasoning-gym:preference")
    examples: Examples.Config = Examples.Config()
    heldout: HeldoutExamples.Config = HeldoutExamples.Config()
    learner: OfflineLearner.Config = OfflineLearner.Config(cpus=1, lr=9e-6)


def build(s: Settings) -> Graph:
    credits = 2 * s.examples_per_step
    examples = Examples(s.examples, model=s.model, data=s.data, objective=s.objective, has_reference=False)
    heldout = HeldoutExamples(s.heldout, model=s.model, data=s.data, objective=s.objective)
    learner = OfflineLearner(s.learner, model=s.model, objective=s.objective, steps=s.steps,
                             examples_per_step=s.examples_per_step, num_heldout=s.data.num_heldout,
                             chat_template=s.data.chat_template)  # fmt: skip
    return Graph(
        nodes=dict(examples=examples, heldout=heldout, learner=learner),
        edges=[
            Queue(examples.examples, learner.examples, depth=credits, window=1),
            Queue(heldout.examples, learner.heldout, depth=16),
            Credits(
                learner.released, examples.credits, initial=credits, per_version=s.examples_per_step, versions=s.steps
            ),
        ],
        until=learner,
    )
