"""Texts: the source of a pre-training loss beside the policy's (ptx): a step's texts, whenever the learner asks.

Invariant: text k of step v is the row at position v * per_step + k of the data set's order. So the place in the data
follows from the learner's version.

A resumed run goes on with the texts that the stopped one would have taken. A source that died and was restarted answers
the same requests. A graph with `texts.per_step=0` has no such node.

Tests: tests/unit/stages/test_texts.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from flowrl.config import Meta
from flowrl.data.examples import ExampleData, ExampleSet, load_examples
from flowrl.data.models import prepare_model
from flowrl.data.prompts import load_tokenizer
from flowrl.errors import ConfigError
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import FIRST_TEXTS, Texts
from flowrl.stages.examples import check_rows, example_of, try_rows
from flowrl.telemetry.events import Cause

if TYPE_CHECKING:
    from flowrl.graph.stage import Context, Say


class TextSource(Stage):
    """Answers requests for texts."""

    class Config(StageConfig):
        """Settings of the texts node."""

        per_step: Annotated[int, Meta(ge=0)] = 0  # texts learned beside each step's samples; 0: none, and no node
        coef: Annotated[float, Meta(gt=0)] = 0.05  # of their mean negative log-likelihood
        # Plain text (column text), conversations or demonstrations, of which the responses are learned.
        data: ExampleData = ExampleData(num_heldout=0)

    is_single = True
    wanted: In[Texts]
    texts: Out[Texts]

    def __init__(self, config: Config, *, model: str) -> None:
        self.config: TextSource.Config = config
        self.model = model

    def check(self, say: Say) -> None:
        """Load the tokenizer and the texts.

        Raises:
            ConfigError: some are to be held out, but nothing evaluates on them.
        """
        from flowrl.algorithms.pretraining import Pretraining

        if self.config.data.num_heldout:
            what = f"{self.config.data.num_heldout} texts would be held out, and nothing evaluates on them"
            raise ConfigError("texts.data.num_heldout", what, "set it to 0")
        directory = prepare_model(self.model, say=say)
        rows = self.load()
        self.data_digest = rows.digest
        check_rows(directory, rows.train)
        try_rows(Pretraining(), rows.train, has_reference=False)

    def load(self) -> ExampleSet:
        """Return the texts."""
        return load_examples(self.config.data, load_tokenizer(prepare_model(self.model)))

    async def run(self, context: Context) -> None:
        """Answer until the edge closes."""
        with context.clock.charge(Cause.START):
            rows = await context.compute(self.load)
        async for request in self.wanted:
            first = (request.group_id - FIRST_TEXTS) * self.config.per_step
            examples = [
                example_of(rows.row_at(place), place, None) for place in range(first, first + self.config.per_step)
            ]
            await self.texts.put(Texts(group_id=request.group_id, examples=examples))
            context.done += 1
