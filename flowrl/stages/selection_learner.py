"""Selection learner: an offline objective on what the policy has just sampled, its versions sent to the generators.

Rejection sampling is SFT on the best of n samples, iterative DPO is DPO on the best and the worst; both repeat with the
newest policy while the next samples are drawn. Everything else is the learner's: order, staleness, credits, versions,
checkpoints. As there, log-probs are those of the distribution that is sampled from (`temperature`). The tokens are the
sampled ones: a response that was cut is not given an end.

Tests: tests/unit/stages/test_selector.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowrl.data.examples import ExampleRow
from flowrl.graph.ports import In
from flowrl.graph.simulated import Itself
from flowrl.messages import Referenced, Scored
from flowrl.stages.examples import load_objective, try_rows, with_teacher
from flowrl.stages.learner import Learner
from flowrl.stages.sampler import Learning, Sampler

if TYPE_CHECKING:
    from flowrl.algorithms.base import Objective
    from flowrl.data.formats import Kind
    from flowrl.graph.simulated import Costs
    from flowrl.graph.stage import Context, Say


class SelectionLearner(Learner):
    """Trains the policy with an offline objective on selected samples."""

    samples: In[Scored]  # pyright: ignore[reportIncompatibleVariableOverride]  # takes every message the learner takes

    def __init__(self, config: Learner.Config, sampler: Sampler, learning: Learning, *, num_samples: int) -> None:
        super().__init__(config, sampler, learning)
        self.num_samples = num_samples  # of each group that are learned

    def check(self, say: Say) -> None:
        """Prepare the model and try the objective on a group as it will come."""
        super().check(say)
        with_teacher(self.algorithm, self.sampler.model, say=say)
        responses = [[2 + k] for k in range(self.num_samples)]
        has_reference = issubclass(self.samples.brings, Referenced)
        are_pairs = has_reference and self.num_samples == 2  # the best and the worst of a group
        kind: Kind | None = "preference" if are_pairs else None
        row = ExampleRow(prompt_ids=[1], responses=responses, kind=kind, index=0, place="select")
        try_rows(self.load_objective(), [row], has_reference=has_reference)

    def simulated(self, costs: Costs) -> Itself:
        """Train nothing."""
        shared = {"sampler": costs.sampler(self.sampler), "learning": costs.learning(self.learning, is_objective=True)}
        return Itself({"config": costs.training(self.config, "train"), **shared})

    async def run(self, context: Context) -> None:
        """Train until the last version is published, acknowledged and saved, or the user asks to stop."""
        self.algorithm = await context.compute(with_teacher, self.algorithm, self.sampler.model)
        await super().run(context)

    def load_objective(self) -> Objective:
        """Return what is minimised."""
        return load_objective(self.algorithm)
