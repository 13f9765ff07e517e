"""What every offline objective keeps: found by walking flowrl.algorithms, so a new file is tested by being there.

Finite; indifferent to padding, row order, the split into micro-batches of whole groups, groups without tokens and
whatever stands under mask 0; a count the engine can know before the forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
import torch

from flowrl.algorithms.base import Algorithm, Objective
from flowrl.config import Select, to_tree
from tests.support.pair_batches import changed, pair_batch, rows_taken
from tests.support.shipped_algorithms import defined
from tests.unit.algorithms.cases import gradient_of, widened

if TYPE_CHECKING:
    from torch import Tensor


def found_objectives() -> list[type[Objective]]:
    """Return every class in flowrl.algorithms that has a loss and is no online algorithm."""
    kinds = defined(Objective)
    return [kind for kind in kinds if not issubclass(kind, Algorithm) and kind.loss is not Objective.loss]


OBJECTIVES = found_objectives()
every_objective = pytest.mark.parametrize("kind", OBJECTIVES, ids=lambda kind: kind.__name__)
every_seed = pytest.mark.parametrize("seed", range(3))


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_walk_finds_the_objectives():
    names = {kind.__name__ for kind in OBJECTIVES}
    assert {"SFT", "DPO", "IPO", "KTO", "Pairwise", "Process", "Distillation", "FullDistillation", "ValueLoss"} <= names
    assert not {"PairObjective", "PPO"} & names


@every_objective
def test_the_class_loads_by_its_path_and_its_settings_survive_the_wire(kind: type[Objective]):
    loaded = Select(use=f"{kind.__module__}:{kind.__name__}").load("objective")
    assert loaded == kind()
    assert msgspec.convert(to_tree(loaded), kind) == loaded


@every_objective
@every_seed
def test_loss_gradient_and_metrics_are_finite(kind: type[Objective], seed: int):
    batch = pair_batch(seed)
    loss = kind().loss(batch)
    gradient_BT = gradient_of(loss.total, batch)
    tensors = [loss.total, loss.count, gradient_BT]
    tensors += [part for pair in loss.metrics.values() for part in pair]
    assert all(torch.isfinite(tensor).all() for tensor in tensors)
    assert bool(gradient_BT.any())
    assert not any(tensor.requires_grad for pair in loss.metrics.values() for tensor in pair)


@every_objective
@every_seed
@pytest.mark.parametrize("filler", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_stands_under_the_mask_changes_nothing_bit_for_bit(kind: type[Objective], seed: int, filler: float):
    batch = pair_batch(seed)

    def dirtied(tensor: Tensor, mask_filler: float) -> Tensor:
        is_mask = mask_filler == 0.0
        return tensor if is_mask else torch.where(batch.mask_BT > 0, tensor, torch.full_like(tensor, filler))

    dirty = changed(batch, dirtied)
    loss, dirty_loss = kind().loss(batch), kind().loss(dirty)
    assert torch.equal(loss.total, dirty_loss.total)
    assert torch.equal(loss.count, dirty_loss.count)
    assert torch.equal(gradient_of(loss.total, batch), gradient_of(dirty_loss.total, dirty))
    assert all(torch.equal(loss.metrics[name][0], dirty_loss.metrics[name][0]) for name in loss.metrics)


@every_objective
@every_seed
@pytest.mark.parametrize(("left", "right"), [(0, 3), (2, 0), (4, 5)])
def test_padding_changes_nothing(kind: type[Objective], seed: int, left: int, right: int):
    batch = pair_batch(seed)
    width = batch.mask_BT.shape[1]
    wide = changed(batch, lambda tensor, filler: widened(tensor, left=left, right=right, filler=filler))
    loss, wide_loss = kind().loss(batch), kind().loss(wide)
    assert close(wide_loss.total, loss.total)
    assert float(wide_loss.count) == float(loss.count)
    assert close(gradient_of(wide_loss.total, wide)[:, left : left + width], gradient_of(loss.total, batch))


@every_objective
@every_seed
@pytest.mark.parametrize("empty", [(True, True), (True, False), (False, True)])
def test_a_group_without_tokens_to_learn_adds_nothing(kind: type[Objective], seed: int, empty: tuple[bool, bool]):
    batch = pair_batch(seed)
    assert batch.group_B is not None
    assert batch.sample_B is not None
    grown = changed(batch, lambda tensor, _: torch.cat([tensor, tensor[:2]]))
    grown = grown._replace(
        mask_BT=torch.cat([batch.mask_BT, batch.mask_BT[:2] * ~torch.tensor(empty)[:, None]]),
        group_B=torch.cat([batch.group_B, torch.tensor([9, 9])]),
        sample_B=torch.cat([batch.sample_B, torch.tensor([0, 1])]),
    )
    loss, grown_loss = kind().loss(batch), kind().loss(grown)
    if kind().needs_whole_groups or all(empty):
        assert close(grown_loss.total, loss.total)
        assert float(grown_loss.count) == float(loss.count)
    assert not gradient_of(grown_loss.total, grown)[-2:][torch.tensor(empty)].any()


@every_objective
@every_seed
def test_the_order_of_rows_only_orders_the_results(kind: type[Objective], seed: int):
    batch = pair_batch(seed)
    order = torch.tensor([5, 2, 0, 4, 3, 1])
    shuffled = rows_taken(batch, order)
    loss, shuffled_loss = kind().loss(batch), kind().loss(shuffled)
    assert close(shuffled_loss.total, loss.total)
    assert close(gradient_of(shuffled_loss.total, shuffled), gradient_of(loss.total, batch)[order])


@every_objective
@every_seed
@pytest.mark.parametrize("cut", [2, 4])
def test_micro_batches_of_whole_groups_add_up_to_the_batch(kind: type[Objective], seed: int, cut: int):
    batch = pair_batch(seed)
    parts = [rows_taken(batch, rows) for rows in torch.arange(6).split([cut, 6 - cut])]
    whole, losses = kind().loss(batch), [kind().loss(part) for part in parts]
    assert close(torch.stack([loss.total for loss in losses]).sum(), whole.total)
    assert sum(float(loss.count) for loss in losses) == float(whole.count)
    for name, pair in whole.metrics.items():
        for index in (0, 1):
            assert close(torch.stack([loss.metrics[name][index] for loss in losses]).sum(), pair[index])
    gradients = [gradient_of(loss.total, part) for loss, part in zip(losses, parts, strict=True)]
    assert close(torch.cat(gradients), gradient_of(whole.total, batch))


@every_objective
@every_seed
def test_one_response_alone_is_enough_unless_groups_must_be_whole(kind: type[Objective], seed: int):
    if kind().needs_whole_groups:
        return
    batch = pair_batch(seed)
    parts = [rows_taken(batch, torch.tensor([row])) for row in range(6)]
    assert close(torch.stack([kind().loss(part).total for part in parts]).sum(), kind().loss(batch).total)


@every_objective
@every_seed
def test_the_count_does_not_depend_on_what_the_model_says(kind: type[Objective], seed: int):
    batch = pair_batch(seed)
    unseen = batch._replace(logprobs_BT=torch.zeros_like(batch.mask_BT))
    assert float(kind().loss(unseen).count) == float(kind().loss(batch).count)


@every_objective
def test_the_held_out_score_is_one_of_the_metrics(kind: type[Objective]):
    objective = kind()
    assert not objective.score_metric or objective.score_metric in objective.loss(pair_batch(0)).metrics
