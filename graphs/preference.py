"""Preference optimisation against a frozen reference: DPO, or IPO, KTO and distillation by `objective`.

    flowrl run graphs/preference.py --set data.source=preferences.jsonl --set objective.beta=0.05
    flowrl run graphs/preference.py --set objective=flowrl.algorithms.kto:KTO --set data.source=labelled.jsonl
    flowrl run graphs/preference.py --set objective=flowrl.algorithms.distillation:Distillation \
        --set reference_model=TEACHER --set data.source=of_the_teacher.jsonl

The reference scores the next examples while the learner trains on the last ones; `reference.replicas` adds more of it.
"""

from flowrl.config import Select
from flowrl.data.examples import ExampleData
from flowrl.graph.graph import Credits, Graph, Queue
from flowrl.stages.examples import Examples, HeldoutExamples
from flowrl.stages.offline import OfflineSettings
from flowrl.stages.offline_learner import OfflineLearner
from flowrl.stages.reference import ExampleReference


class Settings(OfflineSettings):  # an example is a pair, or a labelled response
    reference_model: str = ""  # the frozen reference, or the teacher; "": the policy as it starts
    objective: Select = Select(use="flowrl.algorithms.dpo:DPO")
    data: ExampleData = ExampleData(source="reasoning-gym:preference")
    reference: ExampleReference.Config = ExampleReference.Config(share="learner")
    learner: OfflineLearner.Config = OfflineLearner.Config(cpus=1, lr=1e-6)


def build(s: Settings) -> Graph:
    course = s.course()
    examples = Examples(s.examples, course)
    heldout = HeldoutExamples(s.heldout, course)
    reference = ExampleReference(s.reference, course, model=s.reference_model)
    learner = OfflineLearner(s.learner, course)
    return Graph(
        nodes=dict(examples=examples, heldout=heldout, reference=reference, learner=learner),
        edges=[
            Queue(examples.examples, reference.examples),
            Queue(reference.referenced, learner.examples),
            Queue(heldout.examples, reference.heldout),
            Queue(reference.heldout_referenced, learner.heldout),
            Credits(learner.released, examples.credits),
        ],
        until=learner,
    )
