"""DPO, IPO, KTO and the pairwise reward model against slow loops and by hand."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch

from flowrl.algorithms.apo import APO
from flowrl.algorithms.base import LossBatch, Objective
from flowrl.algorithms.cpo import CPO
from flowrl.algorithms.dpo import DPO
from flowrl.algorithms.hinge import Hinge
from flowrl.algorithms.ipo import IPO
from flowrl.algorithms.kto import KTO
from flowrl.algorithms.orpo import ORPO
from flowrl.algorithms.pairwise import Pairwise
from flowrl.algorithms.robust_dpo import RobustDPO
from flowrl.algorithms.simpo import SimPO
from flowrl.errors import ConfigError
from tests.support import slow_preference as slow
from tests.support.pair_batches import pair_batch, rows_taken
from tests.support.slow_algorithms import gradient
from tests.unit.algorithms.cases import gradient_of, mask_rows, rows_of, same

SEEDS = range(3)
PAIRS = [(0, 1), (2, 3), (4, 5)]


def assert_equals_slow(objective: Objective, batch: LossBatch, slow_loss: Any) -> None:
    """Hold value, count and gradient against `slow_loss(rows) -> (total, count)`."""
    found = objective.loss(batch)
    logprobs = rows_of(batch.logprobs_BT)
    total, count = slow_loss(logprobs)
    assert float(found.count) == count
    assert same(found.total / found.count, total / count)
    expected = gradient(lambda moved: slow_loss(moved)[0] / count, logprobs)
    assert same(gradient_of(found.total / found.count, batch), expected)


def pair(lp: tuple[float, float], ref: tuple[float, float] = (-1.0, -1.0), label: float = 0.0) -> LossBatch:
    """One pair of one-token responses."""
    return LossBatch(
        logprobs_BT=torch.tensor([[lp[0]], [lp[1]]], requires_grad=True),
        mask_BT=torch.ones(2, 1),
        columns={"reference": torch.tensor([[ref[0]], [ref[1]]]), "label": torch.tensor([[label], [0.0]])},
        group_B=torch.tensor([0, 0]),
        sample_B=torch.tensor([0, 1]),
    )


def metrics_of(objective: Objective, batch: LossBatch) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in objective.loss(batch).metrics.items() if count}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("beta", "smoothing", "nll"), [(0.1, 0.0, 0.0), (0.5, 0.1, 0.0), (1.0, 0.3, 0.7)])
def test_dpo_and_its_gradient_equal_the_slow_ones(beta: float, smoothing: float, nll: float, seed: int):
    batch = pair_batch(seed)
    reference, masks = rows_of(batch.columns["reference"]), mask_rows(batch.mask_BT)
    assert_equals_slow(
        DPO(beta=beta, label_smoothing=smoothing, nll_coef=nll),
        batch,
        lambda lp: slow.dpo(lp, reference, masks, PAIRS, beta=beta, e=smoothing, nll=nll),
    )


KIN = [
    ("hinge", Hinge(beta=0.7), {"beta": 0.7}),
    ("robust", RobustDPO(beta=0.5, flipped=0.2), {"beta": 0.5, "e": 0.2}),
    ("simpo", SimPO(beta=2.0, gamma=0.4), {"beta": 2.0, "gamma": 0.4}),
    ("cpo", CPO(beta=0.3, nll_coef=0.6), {"beta": 0.3, "nll": 0.6}),
    ("orpo", ORPO(lam=0.4), {"lam": 0.4}),
    ("apo_zero", APO(beta=0.5), {"beta": 0.5}),
    ("apo_down", APO(beta=0.5, anchor="down"), {"beta": 0.5}),
    ("normalised", DPO(beta=2.0, reduction="mean"), {"beta": 2.0}),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("kind", "objective", "settings"), KIN, ids=[kind for kind, _, _ in KIN])
def test_the_losses_over_pairs_and_their_gradients_equal_the_slow_ones(
    kind: str, objective: Objective, settings: dict[str, float], seed: int
):
    batch = pair_batch(seed)
    reference, masks = rows_of(batch.columns["reference"]), mask_rows(batch.mask_BT)
    assert_equals_slow(objective, batch, lambda lp: slow.pairwise_kin(kind, lp, reference, masks, PAIRS, **settings))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [  # the chosen token went from e^-1 to e^-0.5, the rejected one from e^-1 to e^-2
        (Hinge(beta=0.1), 1.0 - 0.15),
        (Hinge(beta=1.0), 0.0),
        (RobustDPO(beta=1.0, flipped=0.0), math.log1p(math.exp(-1.5))),
        (SimPO(beta=1.0, gamma=1.5), math.log(2.0)),
        (CPO(beta=1.0, nll_coef=2.0), math.log1p(math.exp(-1.5)) + 1.0),
        (ORPO(lam=0.0), 0.5),
        (APO(beta=1.0), 1.0 - 1.0 / (1.0 + math.exp(-0.5)) + 1.0 / (1.0 + math.exp(1.0))),
        (APO(beta=1.0, anchor="down"), 1.0 / (1.0 + math.exp(-0.5)) + 1.0 - 1.0 / (1.0 + math.exp(-1.5))),
        (DPO(beta=1.0, reduction="mean"), math.log1p(math.exp(-1.5))),
    ],
)
def test_losses_of_one_pair_by_hand(objective: Objective, expected: float):
    assert same(objective.loss(pair((-0.5, -2.0))).total, expected)


def test_orpo_of_a_certain_answer_is_finite():
    batch = pair((0.0, -0.1))
    found = ORPO().loss(batch)
    assert torch.isfinite(found.total)
    assert torch.isfinite(gradient_of(found.total, batch)).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ipo_and_its_gradient_equal_the_slow_ones(reduction: Literal["mean", "sum"], seed: int):
    batch = pair_batch(seed)
    reference, masks = rows_of(batch.columns["reference"]), mask_rows(batch.mask_BT)
    assert_equals_slow(
        IPO(beta=0.4, reduction=reduction),
        batch,
        lambda lp: slow.ipo(lp, reference, masks, PAIRS, beta=0.4, reduction=reduction),
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("good", "bad"), [(1.0, 1.0), (1.3, 0.2)])
def test_kto_and_its_gradient_equal_the_slow_ones(good: float, bad: float, seed: int):
    batch = pair_batch(seed)
    reference, masks = rows_of(batch.columns["reference"]), mask_rows(batch.mask_BT)
    labels = batch.columns["label"][:, 0].tolist()
    assert set(labels) == {0.0, 1.0}
    assert_equals_slow(
        KTO(beta=0.3, desirable_weight=good, undesirable_weight=bad),
        batch,
        lambda lp: slow.kto(lp, reference, masks, labels, beta=0.3, z=0.3, good=good, bad=bad),
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("centre", [0.0, 0.2])
def test_the_reward_model_loss_and_its_gradient_equal_the_slow_ones(centre: float, seed: int):
    batch = pair_batch(seed)
    masks, margins = mask_rows(batch.mask_BT), batch.columns["label"][:, 0].tolist()
    assert_equals_slow(
        Pairwise(centre_coef=centre),
        batch,
        lambda values: slow.bradley_terry(values, masks, PAIRS, margins, centre=centre),
    )


def test_dpo_by_hand():
    batch = pair((-0.5, -2.0))  # beta times a margin of 0.5 - (-1.0)
    assert same(DPO(beta=2.0).loss(batch).total, math.log1p(math.exp(-3.0)))
    assert metrics_of(DPO(beta=2.0), batch) == pytest.approx(
        {"accuracy": 1.0, "margin": 3.0, "reward.chosen": 1.0, "reward.rejected": -2.0}
    )


def test_a_policy_that_is_the_reference_has_loss_log_2_and_is_at_chance():
    batch = pair((-1.0, -1.0))
    assert same(DPO().loss(batch).total, math.log(2.0))
    assert metrics_of(DPO(), batch)["accuracy"] == 0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_label_smoothing_mixes_dpo_with_dpo_on_swapped_pairs(seed: int):
    batch = pair_batch(seed)
    assert batch.sample_B is not None
    swapped = batch._replace(sample_B=1 - batch.sample_B)
    straight, turned = (DPO(label_smoothing=0.0).loss(each).total for each in (batch, swapped))
    assert torch.equal(straight, DPO().loss(batch).total)
    assert same(DPO(label_smoothing=0.2).loss(batch).total, float((0.8 * straight + 0.2 * turned).detach()))


@pytest.mark.parametrize("objective", [DPO(), IPO(beta=1.0), IPO(reduction="sum"), Pairwise(), DPO(nll_coef=0.1)])
def test_descent_raises_the_chosen_and_lowers_the_rejected(objective: Objective):
    batch = pair((-1.0, -1.0))
    gradient_BT = gradient_of(objective.loss(batch).total, batch)
    assert float(gradient_BT[0]) < 0 < float(gradient_BT[1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ipo_is_least_where_the_margin_is_1_over_2_beta(reduction: Literal["mean", "sum"]):
    at, below, beyond = (pair((-1.0 + margin, -1.0)) for margin in (2.0, 1.5, 2.5))
    objective = IPO(beta=0.25, reduction=reduction)
    assert float(objective.loss(at).total.detach()) == 0.0
    assert not gradient_of(objective.loss(at).total, at).any()
    assert float(gradient_of(objective.loss(below).total, below)[0]) < 0
    assert float(gradient_of(objective.loss(beyond).total, beyond)[0]) > 0


def labelled(lp: float, *, label: float, z: float) -> LossBatch:
    columns = {"reference": -1.0, "label": label, "reference_point": z}
    return LossBatch(
        torch.tensor([[lp]], requires_grad=True),
        torch.ones(1, 1),
        {name: torch.tensor([[value]]) for name, value in columns.items()},
    )


def test_kto_by_hand():
    good, bad = (labelled(0.0, label=label, z=0.5) for label in (1.0, -1.0))  # log ratio 1, z one half
    assert same(KTO(beta=1.0, desirable_weight=3.0).loss(good).total, 3.0 / (1.0 + math.exp(0.5)))
    assert same(KTO(beta=1.0).loss(bad).total, 1.0 / (1.0 + math.exp(-0.5)))
    assert float(gradient_of(KTO().loss(good).total, good)) < 0 < float(gradient_of(KTO().loss(bad).total, bad))
    assert metrics_of(KTO(beta=2.0), good) == {
        "desirable_frac": 1.0, "accuracy": 1.0, "reward.desirable": 2.0, "reference_point": 0.5,
    }  # fmt: skip
    assert metrics_of(KTO(beta=2.0), bad) == {
        "desirable_frac": 0.0, "accuracy": 0.0, "reward.undesirable": 2.0, "reference_point": 0.5,
    }  # fmt: skip


def test_the_reference_point_is_the_mean_log_ratio_but_never_below_0():
    assert KTO().reference_point([4.0, -1.0]) == 1.5
    assert KTO().reference_point([-4.0, 1.0]) == 0.0


def test_the_score_of_a_response_is_the_value_at_its_last_token_under_the_mask():
    mask_BT = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    values_BT = torch.tensor([[9.0, 2.0, 7.0], [9.0, 9.0, 1.0]], requires_grad=True)
    batch = LossBatch(values_BT, mask_BT, {}, None, torch.tensor([0, 0]), torch.tensor([0, 1]))
    loss = Pairwise().loss(batch)
    assert same(loss.total, math.log1p(math.exp(-1.0)))
    assert gradient_of(loss.total, batch).bool().tolist() == [[False, True, False], [False, False, True]]


def test_a_margin_asks_for_more_but_does_not_change_accuracy():
    batch = pair((2.0, 1.0), label=3.0)
    assert same(Pairwise().loss(batch).total, math.log1p(math.exp(2.0)))
    assert same(Pairwise(use_margin=False).loss(batch).total, math.log1p(math.exp(-1.0)))
    assert metrics_of(Pairwise(), batch)["accuracy"] == 1.0


@pytest.mark.parametrize("objective", [DPO(), IPO(), Pairwise()])
@pytest.mark.parametrize("rows", [[0], [0, 1, 2], [0, 2]])
def test_what_is_not_a_pair_is_refused(objective: Objective, rows: list[int]):
    with pytest.raises(ConfigError, match="a group has 1 responses"):
        objective.loss(rows_taken(pair_batch(0), torch.tensor(rows)))


@pytest.mark.parametrize("objective", [DPO(), IPO(), KTO()])
def test_a_missing_reference_is_refused(objective: Objective):
    batch = pair_batch(0)
    batch.columns.pop("reference")
    with pytest.raises(ConfigError, match=r"'reference'.*graphs/preference\.py"):
        objective.loss(batch)


@pytest.mark.parametrize("objective", [DPO(label_smoothing=0.1), IPO(), KTO(), Pairwise()])
def test_extreme_log_ratios_stay_finite(objective: Objective):
    for size in (1e3, -1e3):
        batch = pair((size, -size))
        batch.columns["reference_point"] = torch.zeros(2, 1)
        loss = objective.loss(batch)
        assert torch.isfinite(loss.total)
        assert torch.isfinite(gradient_of(loss.total, batch)).all()
