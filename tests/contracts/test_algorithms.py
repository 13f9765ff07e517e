"""What every online algorithm keeps: found by walking flowrl.algorithms, so a new file is tested by being there.

Finite; indifferent to padding, row order, micro-batch split and whatever stands under mask 0; a gradient of the right
sign; a count the engine can know before the forward; refusals that agree with what the algorithm says it needs.
"""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
import torch

import flowrl.algorithms
from flowrl.algorithms.base import AdvantageBatch, Algorithm, LossBatch
from flowrl.config import Select, to_tree
from flowrl.errors import ConfigError
from flowrl.messages import Buffer
from flowrl.stages.estimation import settled
from tests.contracts.test_objectives import found_objectives
from tests.support.shipped_algorithms import defined
from tests.unit.algorithms.cases import (
    advantage_batch,
    estimated_loss_batch,
    gradient_of,
    mapped_advantages,
    mapped_loss,
    rewarded,
    widened,
)
from tests.unit.engines.test_packing import random_groups
from tests.unit.engines.test_trainer import gradients, opened

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from flowrl.engines.base import TokenGroup
    from flowrl.engines.torch import TorchEngine


def found_algorithms() -> list[type[Algorithm]]:
    """Return every class in flowrl.algorithms that says what tokens are worth."""
    return [kind for kind in defined(Algorithm) if kind.advantages is not Algorithm.advantages]


ALGORITHMS = found_algorithms()
PARTS = {"advantages", "corrections", "functional", "return_scale", "shaping", "surrogate"}  # pure functions
every_algorithm = pytest.mark.parametrize("kind", ALGORITHMS, ids=lambda kind: kind.__name__)
every_seed = pytest.mark.parametrize("seed", range(3))
garbage = pytest.mark.parametrize("filler", [float("nan"), float("inf"), -float("inf"), 1e30])


def prepared(kind: type[Algorithm], seed: int) -> tuple[Algorithm, AdvantageBatch, LossBatch]:
    algorithm, group = made(kind), advantage_batch(seed)
    return algorithm, group, estimated_loss_batch(algorithm, group, algorithm.advantages(group), seed)


def made(kind: type[Algorithm]) -> Algorithm:
    """The algorithm with its defaults, and with the longest response that a graph fills in."""
    return settled(Select(use=f"{kind.__module__}:{kind.__name__}"), 8).load("algorithm")


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_walk_finds_the_algorithms():
    names = {kind.__name__ for kind in ALGORITHMS}
    assert {"PPO", "GRPO", "DrGRPO", "RLOO", "ReinforcePP", "ReinforcePPBaseline", "GSPO", "CISPO", "DAPO"} <= names
    assert "OnPolicyDistillation" in names
    assert "PolicyGradient" not in names


def test_every_file_is_an_algorithm_or_an_objective_that_is_found_or_a_part_of_them():
    files = {module.name for module in pkgutil.iter_modules(flowrl.algorithms.__path__)}
    found = {kind.__module__.rpartition(".")[2] for kind in (*ALGORITHMS, *found_objectives())}
    assert files - found == {"base", *PARTS, "pairs", "policy"}


@every_algorithm
def test_the_class_loads_by_its_path_and_its_settings_survive_the_wire(kind: type[Algorithm]):
    chosen = Select(use=f"{kind.__module__}:{kind.__name__}")
    loaded = chosen.load("algorithm")
    assert loaded == kind()
    assert msgspec.convert(to_tree(loaded), kind) == loaded


@every_algorithm
@every_seed
def test_credit_loss_gradient_and_metrics_are_finite(kind: type[Algorithm], seed: int):
    algorithm, group, batch = prepared(kind, seed)
    credited = algorithm.advantages(group)
    loss = algorithm.loss(batch)
    tensors = [credited.advantages_BT, loss.total, loss.count, gradient_of(loss.total, batch)]
    tensors += [part for pair in loss.metrics.values() for part in pair]
    tensors += [] if credited.returns_BT is None else [credited.returns_BT]
    assert all(torch.isfinite(tensor).all() for tensor in tensors)
    assert all(torch.isfinite(torch.tensor(list(credited.metrics.values()))))
    assert not any(tensor.requires_grad for pair in loss.metrics.values() for tensor in pair)


@every_algorithm
@every_seed
@garbage
def test_what_stands_under_the_mask_changes_nothing_bit_for_bit(kind: type[Algorithm], seed: int, filler: float):
    algorithm, group, batch = prepared(kind, seed)

    def dirtied(tensor: Tensor, mask_filler: float) -> Tensor:
        if mask_filler == 0.0:  # the mask itself
            return tensor
        return torch.where(group.mask_BT > 0, tensor.detach(), torch.full_like(tensor, filler))

    before, after = algorithm.advantages(group), algorithm.advantages(mapped_advantages(group, dirtied))
    assert torch.equal(before.advantages_BT, after.advantages_BT)
    assert before.metrics == after.metrics
    dirty = mapped_loss(batch, dirtied)
    loss, dirty_loss = algorithm.loss(batch), algorithm.loss(dirty)
    assert torch.equal(loss.total, dirty_loss.total)
    assert torch.equal(gradient_of(loss.total, batch), gradient_of(dirty_loss.total, dirty))
    assert all(torch.equal(loss.metrics[name][0], dirty_loss.metrics[name][0]) for name in loss.metrics)


@every_algorithm
@every_seed
@pytest.mark.parametrize(("left", "right"), [(0, 3), (2, 0), (4, 5)])
def test_padding_changes_nothing(kind: type[Algorithm], seed: int, left: int, right: int):
    algorithm, group, batch = prepared(kind, seed)
    width = group.mask_BT.shape[1]

    def padded(tensor: Tensor, filler: float) -> Tensor:
        return widened(tensor, left=left, right=right, filler=filler)

    before, after = algorithm.advantages(group), algorithm.advantages(mapped_advantages(group, padded))
    assert close(after.advantages_BT[:, left : left + width], before.advantages_BT)
    wide = mapped_loss(batch, padded)
    loss, wide_loss = algorithm.loss(batch), algorithm.loss(wide)
    assert close(wide_loss.total, loss.total)
    assert float(wide_loss.count) == float(loss.count)
    assert close(gradient_of(wide_loss.total, wide)[:, left : left + width], gradient_of(loss.total, batch))


@every_algorithm
@every_seed
def test_a_sample_without_sampled_tokens_changes_nothing(kind: type[Algorithm], seed: int):
    algorithm, group, batch = prepared(kind, seed)

    def with_empty_row(tensor: Tensor, filler: float) -> Tensor:
        return torch.cat([tensor.detach(), torch.full_like(tensor[:1], filler)])

    grown = mapped_advantages(group, with_empty_row)._replace(
        rewards_B=torch.cat([group.rewards_B, torch.tensor([7.0])])
    )
    before, after = algorithm.advantages(group), algorithm.advantages(grown)
    assert close(after.advantages_BT[:-1], before.advantages_BT)
    assert not after.advantages_BT[-1].any()
    assert after.metrics == pytest.approx(before.metrics, abs=1e-6)
    loss, grown_loss = algorithm.loss(batch), algorithm.loss(mapped_loss(batch, with_empty_row))
    assert close(grown_loss.total, loss.total)
    assert float(grown_loss.count) == float(loss.count)


@every_algorithm
@every_seed
def test_the_order_of_samples_only_orders_the_results(kind: type[Algorithm], seed: int):
    algorithm, group, batch = prepared(kind, seed)
    order = torch.tensor([2, 0, 3, 1])

    def reordered(tensor: Tensor, _: float) -> Tensor:
        return tensor.detach()[order]

    shuffled = mapped_advantages(group, reordered)._replace(rewards_B=group.rewards_B[order])
    assert close(algorithm.advantages(shuffled).advantages_BT, algorithm.advantages(group).advantages_BT[order])
    assert close(algorithm.loss(mapped_loss(batch, reordered)).total, algorithm.loss(batch).total)


@every_algorithm
@every_seed
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_micro_batches_add_up_to_the_batch(kind: type[Algorithm], seed: int, cut: int):
    algorithm, _, batch = prepared(kind, seed)
    parts = [
        mapped_loss(batch, lambda tensor, _, rows=rows: tensor.detach()[rows])
        for rows in (slice(None, cut), slice(cut, None))
    ]
    whole, losses = algorithm.loss(batch), [algorithm.loss(part) for part in parts]
    assert close(sum(loss.total for loss in losses), whole.total)  # pyright: ignore[reportArgumentType]
    assert sum(float(loss.count) for loss in losses) == float(whole.count)
    for name, pair in whole.metrics.items():
        for index in (0, 1):
            assert close(sum(loss.metrics[name][index] for loss in losses), pair[index])  # pyright: ignore[reportArgumentType]
    gradients = [gradient_of(loss.total, part) for loss, part in zip(losses, parts, strict=True)]
    assert close(torch.cat(gradients), gradient_of(whole.total, batch))


@every_algorithm
@every_seed
def test_the_count_does_not_depend_on_what_the_model_says(kind: type[Algorithm], seed: int):
    algorithm, _, batch = prepared(kind, seed)
    zeros_BT = torch.zeros_like(batch.mask_BT)
    unseen = batch._replace(logprobs_BT=zeros_BT, entropy_BT=zeros_BT if algorithm.needs_entropy else None)
    assert float(algorithm.loss(unseen).count) == float(algorithm.loss(batch).count)


@every_algorithm
def test_descent_raises_good_tokens_and_lowers_bad_ones(kind: type[Algorithm]):
    algorithm = made(kind)
    logprobs_BT = torch.full((2, 3), -1.0, requires_grad=True)
    fresh = {name: torch.full((2, 3), -1.0) for name in ("behaviour", "proximal", "reference")}
    advantages_BT = torch.tensor([[1.0] * 3, [-1.0] * 3])
    batch = LossBatch(logprobs_BT, torch.ones(2, 3), {**fresh, "advantages": advantages_BT}, torch.ones(2, 3))
    gradient_BT = gradient_of(algorithm.loss(batch).total, batch)
    assert bool((gradient_BT[0] < 0).all())
    assert bool((gradient_BT[1] > 0).all())


@every_algorithm
def test_the_sample_that_reward_and_reference_prefer_is_worth_more(kind: type[Algorithm]):
    flat_BT = torch.full((2, 3), -1.0)
    reference_BT = flat_BT + torch.tensor([[0.5], [-0.5]])
    group = rewarded(1.0, 0.0, greedy=0.5)._replace(
        mask_BT=torch.ones(2, 3), behaviour_BT=flat_BT, reference_BT=reference_BT, values_BT=torch.zeros(2, 3)
    )
    advantages_BT = made(kind).advantages(group).advantages_BT
    assert bool((advantages_BT[0] > advantages_BT[1]).all())


@every_algorithm
def test_needs_are_stated_exactly(kind: type[Algorithm]):
    algorithm, group = made(kind), advantage_batch(0)
    alone = advantage_batch(0, rows=1)
    without_values, without_greedy = group._replace(values_BT=None), group._replace(greedy=None)
    for is_needed, lacking in (
        (algorithm.needs_group, alone),
        (algorithm.needs_critic, without_values),
        (algorithm.needs_greedy, without_greedy),
    ):
        if is_needed:
            with pytest.raises(ConfigError):
                algorithm.advantages(lacking)
        else:
            assert torch.isfinite(algorithm.advantages(lacking).advantages_BT).all()
    _, _, batch = prepared(kind, 0)
    if not algorithm.needs_entropy:
        assert torch.isfinite(algorithm.loss(batch._replace(entropy_BT=None)).total)


@pytest.fixture(scope="module")
def engine(tiny: Path) -> TorchEngine:
    """Return an engine that learns nothing: a step of learning rate 0 only clears its gradients."""
    return opened(tiny, lr=0.0)


@pytest.fixture(scope="module")
def sampled_groups(engine: TorchEngine) -> list[TokenGroup]:
    """Return groups with every column, drawn by policies near the engine's; some tokens are an environment's."""
    rng = np.random.default_rng(3)
    groups = random_groups(seed=52, count=5)

    def near(rows: list[np.ndarray]) -> list[Buffer]:
        return [Buffer.floats((row + 0.2 * rng.normal(size=len(row))).astype(np.float32)) for row in rows]

    found: list[TokenGroup] = []
    for group, rows in zip(groups, engine.score(groups), strict=True):
        columns = {name: near(rows) for name in ("behaviour", "proximal", "reference")}
        masks = [Buffer.floats((np.arange(len(row)) % 4 != 2).astype(np.float32)) for row in rows]
        found.append(msgspec.structs.replace(group, columns={**group.columns, **columns, "mask": masks}))
    return found


@every_algorithm
def test_neither_packing_nor_order_nor_micro_batches_change_loss_figures_and_gradient(
    kind: type[Algorithm], engine: TorchEngine, tiny: Path, sampled_groups: list[TokenGroup],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    choice = settled(Select(use=f"{kind.__module__}:{kind.__name__}"), 8)

    def learned(groups: list[TokenGroup]) -> tuple[dict[str, float], dict[str, Tensor]]:
        figures = engine.accumulate(groups, choice)
        found = gradients(engine)
        engine.apply()
        return figures, found

    figures, whole = learned(sampled_groups)
    assert any(gradient.abs().max() > 1e-3 for gradient in whole.values())
    others = [learned(sampled_groups[::-1])]
    monkeypatch.setattr(engine, "_layout", lambda longest: "padded")
    others.append(learned(sampled_groups))
    monkeypatch.undo()
    monkeypatch.setattr(engine._learning, "num_tokens", 30)
    others.append(learned(sampled_groups))
    for found, cut in others:
        assert found == pytest.approx(figures, rel=1e-5, abs=1e-6)
        for name, gradient in whole.items():
            torch.testing.assert_close(cut[name], gradient, atol=2e-6, rtol=1e-4)
