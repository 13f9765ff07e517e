"""Masked arithmetic, whitening, KL estimators, and every worked number in a docstring."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil

import pytest
import torch

import flowrl.algorithms
from flowrl.algorithms.functional import (
    Estimator,
    kl_estimate,
    log_ratio,
    masked,
    sequence_mean,
    whiten,
)
from tests.support import slow_algorithms as slow
from tests.unit.algorithms.cases import NAN, mask_rows, ragged_mask, rows_of, same

MODULES = [f"flowrl.algorithms.{module.name}" for module in pkgutil.iter_modules(flowrl.algorithms.__path__)]
SEEDS = range(5)


def random_rows(seed: int, rows: int = 3, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 3.0 + torch.randn(rows, width, generator=generator), ragged_mask(rows, width, generator)


@pytest.mark.parametrize("name", MODULES)
def test_worked_numbers_in_docstrings_hold(name: str):
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


def test_masked_stops_nan_forwards_and_backwards():
    values = torch.tensor([2.0, -math.inf], requires_grad=True)
    total = masked(torch.exp(-masked(values, torch.tensor([1.0, 0.0]))), torch.tensor([1.0, 0.0])).sum()
    total.backward()
    assert float(total.detach()) == pytest.approx(math.exp(-2.0))
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([-math.exp(-2.0), 0.0])


def test_means_of_nothing_are_zero():
    nothing = torch.zeros(2, 3)
    assert sequence_mean(torch.full((2, 3), NAN), nothing).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seed", SEEDS)
def test_whitening_gives_mean_zero_and_variance_one(seed: int):
    values_BT, mask_BT = random_rows(seed)
    kept = whiten(values_BT, mask_BT)[mask_BT > 0].double()
    assert float(kept.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float((kept**2).mean()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_whitening_a_step_in_parts_equals_whitening_it_flat(seed: int):
    (first_BT, first_mask_BT), (second_BT, second_mask_BT) = random_rows(seed), random_rows(seed + 100, 2, 9)
    parts = whiten([first_BT, second_BT], [first_mask_BT, second_mask_BT])
    masks = mask_rows(first_mask_BT) + mask_rows(second_mask_BT)
    expected = slow.whiten(rows_of(first_BT) + rows_of(second_BT), masks)
    assert same(parts[0], expected[:3])
    assert same(parts[1], expected[3:])
    flat = torch.cat([first_BT[first_mask_BT > 0], second_BT[second_mask_BT > 0]])
    together = torch.cat([parts[0][first_mask_BT > 0], parts[1][second_mask_BT > 0]])
    assert torch.equal(whiten(flat, torch.ones_like(flat)), together)


def test_whitening_equal_values_gives_zeros():
    assert whiten(torch.full((4,), 0.3), torch.ones(4)).tolist() == [0.0] * 4


def test_log_ratios_are_held_where_their_squares_stay_finite():
    ratio = log_ratio(torch.tensor([0.0, -200.0]), torch.tensor([-200.0, 0.0]))
    assert ratio.tolist() == [20.0, -20.0]
    assert torch.isfinite(torch.exp(2 * ratio)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_estimators_agree_with_the_exact_kl_in_expectation(seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits, others = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    logprobs, reference = torch.log_softmax(logits, 0), torch.log_softmax(others, 0)
    exact = sum(math.exp(p) * (p - q) for p, q in zip(logprobs.tolist(), reference.tolist(), strict=True))
    for estimator in ("k1", "k3"):
        expectation = (logprobs.exp() * kl_estimate(logprobs, reference, estimator)).sum()
        assert float(expectation) == pytest.approx(exact, abs=1e-12)
    assert bool((kl_estimate(logprobs, reference, "k3") >= 0).all())


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gradient_of_k2_is_in_expectation_that_of_the_kl(seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
    reference = torch.log_softmax(torch.randn(5, dtype=torch.float64, generator=generator), 0)
    logprobs = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), [logits], retain_graph=True)
    estimate = (logprobs.exp().detach() * kl_estimate(logprobs, reference, "k2")).sum()
    assert torch.allclose(torch.autograd.grad(estimate, [logits])[0], exact, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates_equal_the_slow_ones(estimator: Estimator):
    generator = torch.Generator().manual_seed(0)
    logprobs, reference = torch.randn(2, 20, generator=generator)
    expected = [slow.kl(lp, ref, estimator) for lp, ref in zip(logprobs.tolist(), reference.tolist(), strict=True)]
    assert same(kl_estimate(logprobs, reference, estimator), expected)
