"""Offline pairs: in the place of a group that nobody judged, a pair of a preference data set is learned.

So training goes on with what there is: the pace is people's as long as they keep up, and else that of their deadline.

Invariants:
- a place in the run's order has one pair, people's or a given one, so credits, order and bound are those of the graph
  without it;
- the given pair of place k is the row at position k of the data's order, whatever happened before.

No version sampled a given pair: no token of it has one, and its place is as old as the answers that it stands for. The
metric `judged` of a step is the share of its pairs that people decided.

Tests: tests/unit/stages/test_offline_pairs.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from flowrl.data.examples import ExampleData, ExampleRow, ExampleSet, load_examples
from flowrl.data.models import prepare_model
from flowrl.data.prompts import load_tokenizer
from flowrl.errors import ConfigError, DataError
from flowrl.graph.edges import Edge, Queue
from flowrl.graph.ports import In, Out
from flowrl.graph.simulated import PassesOn
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Buffer, Sample, Scored, VersionSpan
from flowrl.stages.examples import check_rows
from flowrl.stages.humans import JUDGED
from flowrl.stages.sampler import Sampler
from flowrl.telemetry.events import Cause

if TYPE_CHECKING:
    from flowrl.graph.simulated import Costs
    from flowrl.graph.stage import Context, Say


Decode = Callable[[list[int]], Any]


class OfflinePairs(Stage):
    """Puts given pairs in the place of groups that nobody judged."""

    class Config(StageConfig):
        """Settings of the offline node; a graph has none where there are no data."""

        # Preferences; strings are put under the chat template as those of the run's own prompts are.
        data: ExampleData = ExampleData(source="", num_heldout=0, strings_as_chat=True)

    judged: In[Scored]
    scored: Out[Scored]

    def __init__(self, config: Config, sampler: Sampler) -> None:
        self.config: OfflinePairs.Config = config
        self.sampler = sampler

    def check(self, say: Say) -> None:
        """Load the pairs, which the model must be able to read.

        Raises:
            ConfigError: some are to be held out, but nothing evaluates on them.
            DataError: the data are no preferences.
        """
        if count := self.config.data.num_heldout:
            what = f"{count} pairs would be held out, and nothing evaluates on them"
            raise ConfigError("offline.data.num_heldout", what, "set it to 0")
        rows = self.load()
        self.data_digest = rows.digest
        for row in rows.train:
            if len(row.responses) != 2:
                what = f"is {row.kind} data: it has no two answers of which one is better"
                raise DataError(row.place, what, "give preferences: prompt, chosen and rejected")
        check_rows(prepare_model(self.sampler.model, say=say), rows.train)
        say(f"offline: {len(rows.train)} pairs, learned in the place of groups that people do not judge")

    def load(self) -> ExampleSet:
        """Return the pairs."""
        return load_examples(self.config.data, load_tokenizer(prepare_model(self.sampler.model)))

    def _open(self) -> tuple[ExampleSet, Decode]:
        """Return the pairs, and what makes text of tokens."""
        return self.load(), load_tokenizer(prepare_model(self.sampler.model)).decode

    def simulated(self, costs: Costs) -> PassesOn:
        """Take no time."""
        return PassesOn()

    async def run(self, context: Context) -> None:
        """Pass groups on until the edge closes."""
        with context.clock.charge(Cause.START):
            rows, decode = await context.compute(self._open)
        async for group in self.judged:
            if not group.metrics.get(JUDGED):
                group = given(group, rows.row_at(group.group_id), decode=decode)
            await self.scored.put(group)
            context.done += 1


def given(group: Scored, row: ExampleRow, *, decode: Decode) -> Scored:
    """Return a pair in a group's place, the chosen answer first, under the group's scores' names."""
    samples = [
        Sample(
            token_ids=Buffer.ints(response),
            logprobs=Buffer.floats([0.0] * len(response)),
            versions=[VersionSpan(group.oldest_version, 0, 0)],
            finish="stop",
            text=decode(response),
            mask=None if row.masks is None else Buffer.floats(row.masks[place]),
        )
        for place, response in enumerate(row.responses)
    ]
    return msgspec.structs.replace(
        group,
        token_ids=Buffer.ints(row.prompt_ids),
        columns={"prompt": decode(row.prompt_ids)},
        num_samples=2,
        samples=samples,
        generator="",
        scores={name: [1.0, 0.0] for name in group.scores},
    )


class Filled(NamedTuple):
    """A node of offline pairs with its edge, or none, and where groups go on."""

    nodes: dict[str, Stage]
    edges: list[Edge]
    scored: Out[Scored]


def filled(judged: Out[Scored], config: OfflinePairs.Config, sampler: Sampler) -> Filled:
    """Put offline pairs behind people's, where there are any."""
    if not has_pairs(config):
        return Filled({}, [], judged)
    offline = OfflinePairs(config, sampler)
    return Filled({"offline": offline}, [Queue(judged, offline.judged)], offline.scored)


def has_pairs(config: OfflinePairs.Config) -> bool:
    """Return whether a graph has offline pairs."""
    return bool(config.data.source or config.data.mix)
