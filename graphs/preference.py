"""Preference optimisation against a frozen reference: DPO, or IPO, KTO and distillation by `objective`.

    flowrl run graphs/preference.py --set data.source=preferences.jsonl --set objective.beta=0.05
    flowrl run graphs/preference.py --set objective=flowrl.algorithms.kto:KTO --set data.source=labelled.jsonl
    flowrl run graphs/preference.py --set objective=flowrl.algorithms.distillation:Distillation \
        --set reference_model=TEACHER --set data.source=of_the_teacher.jsonl

The reference scores the next examples while the learner trains on the last ones; `reference.replicas` adds more of it.
"""

from typing import Annotated

from flowrl.config import Meta, Select
from flowrl.data.examples import ExampleData
from flowrl.graph.graph import Credits, Graph, Queue
from flowrl.graph.settings import RunSettings
from flowrl.stages.example_reference import ExampleReference
from flowrl.stages.examples import Examples, HeldoutExamples
from flowrl.stages.offline_learner import OfflineLearner


class Settings(RunSettings):
    model: str = "SmolLM2-135M-Instruct"  # Hugging Face id or local directory
    reference_model: str = ""  # the frozen reference, or the teacher; "": the policy as it starts
    steps: Annotated[int, Meta(ge=1)] = 100  # optimizer steps
    examples_per_step: Annotated[int, Meta(ge=1)] = 16  # pairs, or labelled responses
    objective: Select = Select(use="flowrl.algorithms.dpo:DPO")
    data: ExampleData = ExampleData(source="reasoning-gym:preference")
    examples: Examples.Config = Examples.Config()
    heldout: HeldoutExamples.Config = HeldoutExamples.Config()
    reference: ExampleReference.Config = ExampleReference.Config(share="learner")
    learner: OfflineLearner.Config = OfflineLearner.Config(cpus=1, lr=1e-6)


def build(s: Settings) -> Graph:
    credits = 2 * s.examples_per_step
    examples = Examples(s.examples, model=s.model, data=s.data, objective=s.objective, has_reference=True)
    heldout = HeldoutExamples(s.heldout, model=s.model, data=s.data, objective=s.objective)
    reference = ExampleReference(s.reference, model=s.reference_model or s.model, policy=s.model)
    learner = OfflineLearner(s.learner, model=s.model, objective=s.objective, steps=s.steps,
                             examples_per_step=s.examples_per_step, num_heldout=s.data.num_heldout,
                             chat_template=s.data.chat_template)  # fmt: skip
    return Graph(
        nodes=dict(examples=examples, heldout=heldout, reference=reference, learner=learner),
        edges=[
            Queue(examples.examples, reference.examples, depth=16),
            Queue(reference.referenced, learner.examples, depth=credits, window=1),
            Queue(heldout.examples, reference.heldout, depth=16),
            Queue(reference.heldout_referenced, learner.heldout, depth=16),
            Credits(
                learner.released, examples.credits, initial=credits, per_version=s.examples_per_step, versions=s.steps
            ),
        ],
        until=learner,
    )
