"""What a user's stage puts into `Sample.columns` reaches the loss and the disk, and nothing else is told of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import pyarrow.parquet as pq
import pytest

from flowrl.config import Select
from flowrl.engines.base import Sampling
from flowrl.errors import RunError
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Buffer, Rollouts
from flowrl.simulation.fake import FakeTraining
from flowrl.simulation.stand_ins import stand_in_model
from flowrl.stages.generator import Generator
from flowrl.stages.learner import Learner
from flowrl.stages.prompts import Prompts
from flowrl.stages.sampler import Learning, Sampler
from flowrl.stages.tokens import group_batch, token_group
from tests.support.flows import NULL, NumberedPrompts, Scorer, run
from tests.support.one_stage import rollouts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.algorithms.base import LossBatch
    from flowrl.engines.base import TokenGroup
    from flowrl.graph.stage import Context


class Marked(Rollouts):
    """A message of the user's own."""

    marked_by: str


class Marker(Stage):
    """Gives each sample a number, and each of its tokens its place."""

    rollouts: In[Rollouts]
    marked: Out[Marked]

    async def run(self, context: Context) -> None:
        async for group in self.rollouts:
            samples = [
                msgspec.structs.replace(sample, columns={"rank": float(k), "place": places(len(sample.token_ids))})
                for k, sample in enumerate(group.samples)
            ]
            known = {name: getattr(group, name) for name in Rollouts.__struct_fields__}
            await self.marked.put(Marked(**{**known, "samples": samples}, marked_by=context.where))


def places(length: int) -> Buffer:
    return Buffer.floats([float(k) for k in range(length)])


class Noting(FakeTraining):
    """Makes the loss batch of every group that it is to learn."""

    seen: ClassVar[list[LossBatch]] = []

    def accumulate(self, groups: Sequence[TokenGroup], objective: Select) -> dict[str, float]:
        for group in groups:
            self.seen.append(group_batch(group, [row.numpy() for row in group.columns["behaviour"]]))
        return super().accumulate(groups, objective)


@pytest.mark.slow
def test_columns_and_a_users_fields_ride_from_a_stage_to_the_loss_and_the_disk(tmp_path: Path) -> None:
    sampler = Sampler(model=stand_in_model(), sampling=Sampling(max_tokens=4), group_size=2)
    learning = Learning(algorithm=Select(use=NULL), steps=1, groups_per_step=2, max_staleness=0)
    prompts = NumberedPrompts(Prompts.Config(), sampler)
    generator = Generator(Generator.Config(engine="flowrl.simulation.fake:FakeGeneration"), sampler)
    marker, scorer = Marker(StageConfig()), Scorer(Scorer.Config())
    learner = Learner(Learner.Config(engine=f"{__name__}:Noting"), sampler, learning)
    graph = Graph(
        nodes={"prompts": prompts, "generator": generator, "marker": marker, "scorer": scorer, "learner": learner},
        edges=[
            Queue(prompts.prompts, generator.prompts),
            Queue(generator.rollouts, marker.rollouts),
            Queue(marker.marked, scorer.rollouts),
            Queue(scorer.samples, learner.samples),
            Latest(learner.weights, generator.weights),
            Credits(learner.released, prompts.credits),
        ],
        until=learner,
    )
    Noting.seen.clear()
    run(graph, tmp_path)
    assert len(Noting.seen) == 2
    for batch in Noting.seen:
        mask_BT = batch.mask_BT > 0
        assert (batch.column("rank")[mask_BT] == mask_BT.nonzero()[:, 0]).all()
        assert (batch.column("place")[mask_BT] == mask_BT.nonzero()[:, 1]).all()
    rows = pq.read_table(tmp_path / "rollouts" / "step-000000.parquet").to_pylist()
    assert [row["column.rank"] for row in rows] == [0.0, 1.0, 0.0, 1.0]
    assert all(row["column.place"] == list(range(len(row["token_ids"]))) for row in rows)
    from flowrl.telemetry.records import read_samples

    learned: list[Any] = list(read_samples(tmp_path / "rollouts" / "step-000000.parquet"))
    assert {group.marked_by for group in learned} == {"marker.0"}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ([{"behaviour": 1.0}, {"behaviour": 1.0}], "'behaviour' of group 7: has the name of a column"),
        ([{"proximal": 1.0}, {"proximal": 1.0}], "has the name of a column"),
        ([{"mine": 1.0}, {}], "is not in sample 1; give it to every sample"),
        ([{"mine": Buffer.floats([1.0])}] * 2, "sample 0 has 1 float32 values for"),
        ([{"mine": Buffer.ints([1, 2, 3])}] * 2, "int32 values"),
    ],
)
def test_a_column_that_cannot_reach_the_loss_is_refused_in_words(columns: list[Any], said: str) -> None:
    group = rollouts("abc", "def")
    samples = [
        msgspec.structs.replace(sample, columns=each) for sample, each in zip(group.samples, columns, strict=True)
    ]
    with pytest.raises(RunError, match=said):
        token_group(msgspec.structs.replace(group, samples=samples))
