"""Selector and its learner: the best of a group's samples, or the best and the worst as a pair, and what learns them.

Best of n is what rejection sampling learns from (RAFT, 2304.06767; Llama 2, 2307.09288, section 3.2.3), the pair what
iterative DPO does.

Invariant: a group leaves with the samples to learn from, the best one first, or is rejected as filtered with the
reason.

The reason is that the best is not good enough, or the two do not differ. Its credit then returns and its place is
skipped. What the policy's rewards are without the selection stands in the group's metrics; what is left of the group is
told as a span, from which a profile knows the tokens of the nodes behind. Replicas compete for groups. `choose` is also
how the writer of graphs/generate.py selects, and `PairExamples`, which gives the pair to an offline learner.

`SelectionLearner` trains with an offline objective on what the policy has just sampled (SFT on the best, DPO on the
pair). It sends its versions to the generators, which draw the next samples meanwhile. Everything else is the learner's:
order, staleness, credits, versions, checkpoints. As there, log-probs are those of the distribution that is sampled from
(`temperature`). The tokens are the sampled ones: a response that was cut is not given an end.

Tests: tests/unit/stages/test_selector.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from flowrl import messages
from flowrl.config import Meta
from flowrl.data.examples import ExampleRow
from flowrl.graph.ports import In, Out
from flowrl.graph.simulated import Itself, PassesOn
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Example, Referenced, Scored
from flowrl.stages.examples import load_objective, try_rows, with_teacher
from flowrl.stages.learner import Learner
from flowrl.stages.sampler import Learning, Sampler
from flowrl.stages.tokens import mask_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.algorithms.base import Objective
    from flowrl.data.formats import Kind
    from flowrl.graph.simulated import Costs
    from flowrl.graph.stage import Context, Say


Take = Literal["best", "pair"]


class Selection(StageConfig):
    """Settings of a node that selects among a group's samples by their rewards."""

    min_reward: float | None = None  # groups whose best sample has less are filtered
    min_gap: Annotated[float, Meta(ge=0)] = 0.0  # pairs whose rewards differ by no more than this are filtered


class Selector(Stage):
    """Keeps the best sample of a group, or the best and the worst."""

    class Config(Selection):
        """Settings of the select node."""

    scored: In[Scored]
    selected: Out[Scored]

    def __init__(self, config: Config, *, take: Take) -> None:
        self.config: Selector.Config = config
        self.take: Take = take

    @property
    def num_kept(self) -> int:
        """Return how many samples a group keeps."""
        return {"best": 1, "pair": 2}[self.take]

    def simulated(self, costs: Costs) -> PassesOn:
        """Take a group's first samples."""
        return PassesOn(num_samples=self.num_kept, filters=True)

    async def run(self, context: Context) -> None:
        """Select until the edge closes."""
        async for group in self.scored:
            places, reason = choose(group, self.take, self.config, range(len(group.samples)))
            if reason:
                await self.scored.reject(group, kind="filtered", reason=reason)
                continue
            narrow = chosen_samples(group, places)
            now_s = context.now()
            num_tokens = sum(len(sample.token_ids) for sample in narrow.samples)
            left = {"prompt_tokens": len(narrow.token_ids), "samples": len(places), "tokens": num_tokens}
            context.span("select", now_s, groups=[group.group_id], args=left)
            await self.selected.put(narrow)
            context.done += 1


class PairExamples(Stage):
    """Makes of a group an example: the best sample, chosen, and the worst, rejected."""

    scored: In[Scored]
    examples: Out[Example]

    def __init__(self, config: Selector.Config) -> None:
        self.config: Selector.Config = config

    async def run(self, context: Context) -> None:
        """Make examples until the edge closes."""
        async for group in self.scored:
            places, reason = choose(group, "pair", self.config, range(len(group.samples)))
            if reason:
                await self.scored.reject(group, kind="filtered", reason=reason)
                continue
            responses = [group.samples[place].token_ids for place in places]
            masks = [mask_of(group.samples[place]) for place in places]
            example = Example(group_id=group.group_id, token_ids=group.token_ids, responses=responses, masks=masks)
            await self.examples.put(example)
            context.done += 1


def choose(group: Scored, take: Take, rules: Selection, candidates: Sequence[int]) -> tuple[list[int], str]:
    """Return the places of the samples to take, the best first, or why there is nothing to take.

    Of equal rewards the first counts. Rewards [0.2, 1.0, 0.5] give [1] with take=best and [1, 0] with take=pair.
    """
    if not candidates:
        return [], f"none of {len(group.samples)} samples can be taken"
    rewards = group.rewards
    best = max(candidates, key=lambda place: rewards[place])
    worst = min(candidates, key=lambda place: rewards[place])
    if rules.min_reward is not None and rewards[best] < rules.min_reward:
        return [], f"the best of {len(candidates)} rewards is {rewards[best]:g}, below min_reward={rules.min_reward:g}"
    if take == "best":
        return [best], ""
    gap = rewards[best] - rewards[worst]
    if gap <= rules.min_gap:
        return [], f"rewards from {rewards[worst]:g} to {rewards[best]:g} differ by no more than {rules.min_gap:g}"
    if group.samples[best].token_ids == group.samples[worst].token_ids:
        return [], f"the best and the worst are the same tokens, rewarded {rewards[best]:g} and {rewards[worst]:g}"
    return [best, worst], ""


def chosen_samples(group: Scored, places: Sequence[int]) -> Scored:
    """Return the group with the samples at these places only, and the figures of all of them as metrics."""
    rewards = group.rewards
    metrics = {"reward.sampled": sum(rewards) / len(rewards), "reward.best": max(rewards)}
    return messages.narrowed(group, places, metrics={**group.metrics, **metrics})


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
        return Itself({"config": costs.training(self.config, "train"), **shared}, without=("results",))

    async def run(self, context: Context) -> None:
        """Train until the last version is published, acknowledged and saved, or the user asks to stop."""
        self.algorithm = await context.compute(with_teacher, self.algorithm, self.sampler.model)
        await super().run(context)

    def load_objective(self) -> Objective:
        """Return what is minimised."""
        return load_objective(self.algorithm)
