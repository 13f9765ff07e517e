"""Reference: adds a frozen model's log-probs to what a policy sampled, or to the responses of given examples.

The model is the policy as it began, or a teacher.

Invariants:
- a message leaves with one log-prob for each token of each of its responses, the mismatched ones of examples included;
- or, where no loss uses them and it is not one of those whose KL is measured (`unused_every`), with none.

Held-out examples take the same path between ports of their own, where those are joined. Replicas compete for messages.

Tests: tests/contracts/test_synchronous.py
"""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec

from flowrl.config import Meta, widen
from flowrl.data.models import prepare_model
from flowrl.data.vocabulary import check_same_vocabulary
from flowrl.engines.base import Scoring, TokenGroup, TrainingConfig, TrainingEngine
from flowrl.graph.edges import Edge, Queue
from flowrl.graph.ports import In, Out
from flowrl.graph.simulated import Itself
from flowrl.graph.stage import Stage
from flowrl.messages import Buffer, Example, Referenced, Scored, extend
from flowrl.stages.sampler import Course, Learning, Sampler
from flowrl.stages.tokens import token_group
from flowrl.stages.training import check_engine_of, check_loading, opened

if TYPE_CHECKING:
    from flowrl.graph.ports import Source
    from flowrl.graph.simulated import Costs
    from flowrl.graph.stage import Context, Say


class Reference(Stage):
    """Scores sampled tokens with a frozen model."""

    class Config(Scoring):
        """Settings of the reference node."""

        # scored together when ready; above 1 the last bits depend on timing
        batch_groups: Annotated[int, Meta(ge=1)] = 1
        # where no loss uses its log-probs, as with algorithm.kl.coef=0, only one in so many groups is scored, for `kl`
        unused_every: Annotated[int, Meta(ge=1)] = 8

    scored: In[Scored]
    referenced: Out[Referenced]

    def __init__(self, config: Config, sampler: Sampler, *, model: str = "", learning: Learning | None = None) -> None:
        """Score for what is learned; `learning` None: whatever that is, every group is scored."""
        self.config: Reference.Config = config
        self.sampler = sampler
        self.learning = learning
        self.model = model or sampler.model  # "": the policy as it begins

    def check(self, say: Say) -> None:
        """Prepare the model, which must read the policy's tokens."""
        check_engine_of(self.config, "reference", self.model)
        directory = prepare_model(self.model, say=say)
        if self.model != self.sampler.model:
            check_same_vocabulary(
                prepare_model(self.sampler.model, say=say), directory, "reference_model", longest=self.sampler.longest
            )
        check_loading(directory, "reference_model", "policy", trust_remote_code=self.config.trust_remote_code)
        if (every := self._every) > 1:
            said = f"no loss uses the reference: one group in {every} is scored, for the metric kl"
            say(f"{said}; reference.unused_every=1 scores all, algorithm.kl.coef uses it")

    @functools.cached_property
    def _every(self) -> int:
        """Return of how many groups one is scored; in a simulation the settings say whether it is used."""
        if self.learning is None:
            return 1
        algorithm = self.learning.algorithm.load("algorithm")
        is_used = getattr(algorithm, "needs_reference", not getattr(algorithm, "is_blank", False))
        return 1 if is_used else self.config.unused_every

    def _settings(self) -> TrainingConfig:
        model, temperature = str(prepare_model(self.model)), self.sampler.sampling.temperature
        return widen(
            TrainingConfig, self.config, lora=self.config.lora, model=model, temperature=temperature, frozen=True
        )

    async def follow(self, context: Context) -> None:
        """Serve as a rank other than 0."""
        async with opened(context, self.config.engine, self._settings, steps=1) as engine:
            await context.compute(engine.follow)

    def simulated(self, costs: Costs) -> Itself:
        """Score with zeros."""
        config = msgspec.structs.replace(self.config, unused_every=self._every)
        arguments = {"config": costs.training(config), "sampler": costs.sampler(self.sampler), "model": ""}
        learning = None if self.learning is None else costs.learning(self.learning)
        return Itself({**arguments, "learning": learning})

    async def run(self, context: Context) -> None:
        """Score groups until the edge closes."""
        async with opened(context, self.config.engine, self._settings, steps=1) as engine:
            while True:
                groups = await self.scored.get_some(self.config.batch_groups)
                start_s = context.now()
                chosen = [group for group in groups if group.group_id % self._every == 0]
                rows_of: dict[int, list[Buffer]] = {}
                if chosen:
                    found = await context.compute(engine.score, [token_group(group) for group in chosen])
                    ids = [group.group_id for group in chosen]
                    rows_of = {
                        name: [Buffer.floats(row) for row in rows] for name, rows in zip(ids, found, strict=True)
                    }
                    context.span("reference", start_s, groups=ids)
                for group in groups:
                    await self.referenced.put(extend(Referenced, group, ref_logprobs=rows_of.get(group.group_id, [])))
                    context.done += 1


class MaybeReference(NamedTuple):
    """A reference with the edge to it, or none, and where the scored samples go on."""

    nodes: dict[str, Stage]
    edges: list[Edge]
    scored: Source[Scored]


def referenced(scored: Source[Scored], config: Reference.Config, sampler: Sampler, *, model: str) -> MaybeReference:
    """Put a reference behind what leaves at `scored`, where a model for it is named."""
    if not model:
        return MaybeReference({}, [], scored)
    reference = Reference(config, sampler, model=model)
    return MaybeReference({"reference": reference}, [Queue(scored, reference.scored)], reference.referenced)


class ExampleReference(Stage):
    """Scores given responses with a frozen model."""

    class Config(Scoring):
        """Settings of the reference node."""

        # scored together when ready; above 1 the last bits depend on timing
        batch_examples: Annotated[int, Meta(ge=1)] = 1

    optional = frozenset({"heldout", "heldout_referenced"})
    together = (optional,)
    examples: In[Example]
    referenced: Out[Example]
    heldout: In[Example]
    heldout_referenced: Out[Example]

    def __init__(self, config: Config, course: Course, *, model: str = "") -> None:
        self.config: ExampleReference.Config = config
        self.course = course
        self.model = model or course.model  # "": the policy as it begins

    def check(self, say: Say) -> None:
        """Prepare the model, which must read the policy's tokens."""
        check_engine_of(self.config, "reference", self.model)
        directory = prepare_model(self.model, say=say)
        if self.model != self.course.model:
            check_same_vocabulary(prepare_model(self.course.model, say=say), directory, "reference_model")
        check_loading(directory, "reference_model", "policy", trust_remote_code=self.config.trust_remote_code)

    def _settings(self) -> TrainingConfig:
        model = str(prepare_model(self.model))
        return widen(TrainingConfig, self.config, lora=self.config.lora, model=model, frozen=True)

    async def follow(self, context: Context) -> None:
        """Serve as a rank other than 0."""
        async with opened(context, self.config.engine, self._settings, steps=1) as engine:
            await context.compute(engine.follow)

    async def run(self, context: Context) -> None:
        """Score examples until the edges close."""
        async with (
            opened(context, self.config.engine, self._settings, steps=1) as engine,
            asyncio.TaskGroup() as lanes,
        ):
            lanes.create_task(self._lane(context, engine, self.examples, self.referenced))
            if self.heldout.is_connected:
                lanes.create_task(self._lane(context, engine, self.heldout, self.heldout_referenced))

    async def _lane(
        self, context: Context, engine: TrainingEngine, examples: In[Example], referenced: Out[Example]
    ) -> None:
        while True:
            batch = await examples.get_some(self.config.batch_examples)
            start_s = context.now()
            groups = [TokenGroup(prompt_ids=each.token_ids, responses=each.responses) for each in batch]
            rows = await context.compute(engine.score, groups)
            context.span("reference", start_s, groups=[each.group_id for each in batch])
            for each, logprobs in zip(batch, rows, strict=True):
                buffers = [Buffer.floats(row) for row in logprobs]
                await referenced.put(extend(Example, each, ref_logprobs=buffers))
                context.done += 1
