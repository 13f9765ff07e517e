"""Supervised fine-tuning on demonstrations; examples of several turns learn the assistant's tokens only.

    flowrl run graphs/sft.py --set data.source=demonstrations.jsonl --set learner.lr=1e-5 --set steps=200

An example is admitted against a credit; two steps of them are out at a time, so that reading hides behind training.
"""

from typing import Annotated

from flowrl.config import Meta, Select
from flowrl.data.examples import ExampleData
from flowrl.graph.graph import Credits, Graph, Queue
from flowrl.graph.settings import RunSettings
from flowrl.stages.examples import Examples, HeldoutExamples
from flowrl.stages.offline_learner import OfflineLearner


class Settings(RunSettings):
    model: str = "SmolLM2-135M-Instruct"  # Hugging Face id or local directory
    steps: Annotated[int, Meta(ge=1)] = 100  # optimizer steps
    examples_per_step: Annotated[int, Meta(ge=1)] = 16
    objective: Select = Select(use="flowrl.algorithms.sft:SFT")
    data: ExampleData = ExampleData()
    examples: Examples.Config = Examples.Config()
    heldout: HeldoutExamples.Config = HeldoutExamples.Config()
    learner: OfflineLearner.Config = OfflineLearner.Config(cpus=1, lr=1e-5)


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
