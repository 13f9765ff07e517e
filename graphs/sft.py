"""Supervised fine-tuning on demonstrations; examples of several turns learn the assistant's tokens only.

    flowrl run graphs/sft.py --set data.source=demonstrations.jsonl --set learner.lr=1e-5 --set steps=200

An example is admitted against a credit; two steps of them are out at a time, so that reading hides behind training.
"""

from flowrl.graph.graph import Credits, Graph, Queue
from flowrl.stages.examples import Examples, HeldoutExamples
from flowrl.stages.offline import OfflineSettings as Settings
from flowrl.stages.offline_learner import OfflineLearner


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
