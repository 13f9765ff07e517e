"""Prompts: admits prompt groups, one against each credit, in the order of their group ids.

Invariants:
- group k of a run is the row at position k of the data set's order, whatever happened before: each credit says which k
  it is for;
- ends when the edges close, or after `epochs` passes over the data, which it tells where an edge carries that;
- admits nothing more once the user asks to stop.

Tests: tests/unit/stages/test_writer.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowrl.data.models import check_reach, inspect_model, prepare_model
from flowrl.data.prompts import PromptSet, load_prompts, load_tokenizer
from flowrl.errors import DataError
from flowrl.graph.ports import In, Out
from flowrl.graph.simulated import Admits
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Buffer, Credit, End, Prompt
from flowrl.stages.sampler import Sampler
from flowrl.telemetry.events import Cause

if TYPE_CHECKING:
    from flowrl.graph.simulated import Costs
    from flowrl.graph.stage import Context, Say


class Prompts(Stage):
    """Source of training prompts."""

    class Config(StageConfig):
        """Settings of the prompts node."""

    is_single = True
    optional = frozenset({"ended"})
    credits: In[Credit]
    prompts: Out[Prompt]
    ended: Out[End]

    def __init__(self, config: Config, sampler: Sampler, *, epochs: int = 0) -> None:
        self.config: Prompts.Config = config
        self.sampler = sampler
        self.epochs = epochs  # passes over the data; 0: without end

    def check(self, say: Say) -> None:
        """Load the model's tokenizer and the data set; its longest prompt must fit the generators."""
        directory = prepare_model(self.sampler.model, say=say)
        rows = self.load()
        self.data_digest = rows.digest
        for line in rows.told():
            say(line)
        card = inspect_model(directory)
        for row in (*rows.train, *rows.heldout):
            check_reach(card, row.place, row.token_ids, len(row.token_ids))
        longest = max([*rows.train, *rows.heldout], key=lambda row: len(row.token_ids))
        if len(longest.token_ids) > self.sampler.room:
            most, limit = self.sampler.sampling.max_tokens, self.sampler.max_model_len
            what = (
                f"{longest.place} has {len(longest.token_ids)} tokens, which with sampling.max_tokens={most} "
                f"are more than generator.max_model_len={limit}"
            )
            remedy = "lower sampling.max_tokens, raise it, or lower data.max_prompt_tokens with data.on_bad=skip"
            raise DataError("data", what, remedy)

    def load(self) -> PromptSet:
        """Return the data set; group k is its row at position k."""
        return load_prompts(self.sampler.data, load_tokenizer(prepare_model(self.sampler.model)))

    def simulated(self, costs: Costs) -> Admits:
        """Admit groups of zeros."""
        return Admits(self.sampler.group_size)

    async def run(self, context: Context) -> None:
        """Admit groups until the edges close."""
        with context.clock.charge(Cause.START):
            rows = await context.compute(self.load)
        num_groups = self.epochs * len(rows.train) if self.epochs else None
        while True:
            (group_id,) = (await self.credits.get()).groups
            if context.stopping.is_set():
                return
            if num_groups is not None and group_id >= num_groups:  # ids are given out in order: all others are admitted
                await self.ended.put(End(version=num_groups))
                return
            row = rows.row_at(group_id)
            prompt = Prompt(
                group_id=group_id,
                token_ids=Buffer.ints(row.token_ids),
                columns=row.columns,
                begun=row.begun,
                num_samples=self.sampler.group_size,
                seed=(self.sampler.seed * 1_000_003 + group_id)
                * 4096
                % (1 << 62),  # apart by more than any group's size
            )
            await self.prompts.put(prompt)
            context.done += 1
