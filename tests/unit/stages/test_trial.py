"""What a user's algorithm or objective gets wrong is found before a run; every shipped one passes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from flowrl.algorithms.base import Algorithm, Loss, LossBatch, Objective
from flowrl.algorithms.grpo import GRPO
from flowrl.algorithms.sft import SFT
from flowrl.algorithms.value import ValueLoss
from flowrl.config import Select
from flowrl.errors import ConfigError, DataError
from flowrl.stages.estimation import settled
from flowrl.stages.examples import try_rows
from flowrl.stages.trial import try_algorithm, try_objective
from tests.support.offline import example_row
from tests.support.shipped_algorithms import defined

if TYPE_CHECKING:
    from collections.abc import Callable


class OfAnotherColumn(GRPO):
    def advantages(self, batch: Any) -> Any:
        raise KeyError("difficulty")


class OnePerAnswer(GRPO):
    def advantages(self, batch: Any) -> Any:
        found = super().advantages(batch)
        return found._replace(advantages_BT=found.advantages_BT[:, 0])


class DividesByNothing(GRPO):
    def advantages(self, batch: Any) -> Any:
        found = super().advantages(batch)
        return found._replace(advantages_BT=found.advantages_BT / 0)


class OfAnotherShape(GRPO):
    def loss(self, batch: LossBatch) -> Loss:
        return super().loss(batch._replace(mask_BT=batch.mask_BT[:, :2]))


class Detached(GRPO):
    def loss(self, batch: LossBatch) -> Loss:
        return super().loss(batch._replace(logprobs_BT=batch.logprobs_BT.detach()))


class Mean(GRPO):
    """As most people write a loss first."""

    def loss(self, batch: LossBatch) -> Loss:
        found = super().loss(batch)
        return replace(found, total=found.total / found.count, count=torch.ones(()))


class CountsWhatIsLikely(GRPO):
    def loss(self, batch: LossBatch) -> Loss:
        return replace(super().loss(batch), count=(batch.logprobs_BT < -0.5).sum())


class ComparesRows(GRPO):
    def loss(self, batch: LossBatch) -> Loss:
        found = super().loss(batch)
        return replace(found, total=found.total + (batch.logprobs_BT - batch.logprobs_BT.mean()).square().sum())


class Overflows(GRPO):
    def loss(self, batch: LossBatch) -> Loss:
        found = super().loss(batch)
        return replace(found, total=found.total + torch.exp(100 - batch.logprobs_BT).sum())


class PlainFigures(GRPO):
    def loss(self, batch: LossBatch) -> Loss:
        found: Any = super().loss(batch)
        return replace(found, metrics={"half": (0.5, 1.0)})


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (OfAnotherColumn, "fails on a made-up group of 4 answers (KeyError: 'difficulty')"),
        (OnePerAnswer, "gives advantages of shape (4,), not (4, 3); return"),
        (DividesByNothing, "gives advantages that are not finite for a made-up"),
        (OfAnotherShape, "fails on 8 answers (RuntimeError: "),
        (Detached, "has a loss without a gradient; compute it from batch.logprobs_BT"),
        (Mean, "has a `total` of "),
        (CountsWhatIsLikely, "counts 14 in 8 answers, and 0 with log-probs of zero; let `count`"),
        (ComparesRows, "has a `total` of "),
        (Overflows, "has a loss of inf on 8 answers"),
        (PlainFigures, "fails on 8 answers (AttributeError: "),
    ],
)
def test_an_algorithm_that_would_fail_in_a_run_or_learn_something_else_is_refused(kind: type[GRPO], said: str):
    use = f"{__name__}:{kind.__name__}"
    with pytest.raises(ConfigError) as refused:
        try_algorithm(kind(), use, 4, has_turns=False)
    assert str(refused.value).startswith(f"algorithm: {use}: {said}")


class OfAStagesColumn(GRPO):
    def loss(self, batch: LossBatch) -> Loss:
        return replace(super().loss(batch), total=batch.columns["difficulty"].sum())


class OfAColumnAskedFor(GRPO):
    def loss(self, batch: LossBatch) -> Loss:
        return replace(super().loss(batch), total=batch.column("difficulty").sum())


@pytest.mark.parametrize("kind", [OfAStagesColumn, OfAColumnAskedFor])
def test_a_column_that_a_users_stage_may_give_is_left_to_the_run(kind: type[GRPO]):
    try_algorithm(kind(), kind.__name__, 4, has_turns=False)


@pytest.mark.parametrize("has_turns", [False, True])
@pytest.mark.parametrize("size", [2, 5])
def test_every_shipped_algorithm_takes_a_made_up_group(size: int, has_turns: bool):
    for kind in defined(Algorithm):
        if kind.advantages is not Algorithm.advantages:
            choice = settled(Select(use=f"{kind.__module__}:{kind.__qualname__}"), 3)
            try_algorithm(choice.load("algorithm"), kind.__name__, size, has_turns=has_turns)


def test_the_critics_objective_takes_groups_of_any_size():
    for size in (1, 4):
        try_objective(ValueLoss(), "critic.objective", size)


class MeanNll(Objective):
    """Demonstrations, with the mean over a micro-batch."""

    def loss(self, batch: LossBatch) -> Loss:
        nll = -(batch.logprobs_BT * batch.mask_BT).sum() / batch.mask_BT.sum()
        return Loss(nll, torch.ones(()), {})


class Fails(SFT):
    def loss(self, batch: LossBatch) -> Loss:
        raise ValueError(f"{batch.logprobs_BT.shape[0]} rows")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            MeanNll,
            "rows:1: MeanNll has a `total` of 1 for 2 answers, and of 2 for the same apart",
        ),
        (Fails, "rows:1: Fails fails on 2 answers (ValueError: 2 rows); mend it"),
    ],
)
def test_an_objective_is_tried_on_two_rows_of_each_kind(make: Callable[[], Objective], said: str):
    rows = [example_row([1], [[2, 3, 4]], []), example_row([1], [[2, 3, 4, 5]], []), example_row([1], [[2]], [])]
    with pytest.raises(DataError) as refused:
        try_rows(make(), rows, has_reference=False)
    assert said in str(refused.value)
