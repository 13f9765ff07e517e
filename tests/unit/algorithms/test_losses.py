"""Every policy loss and the value loss, values and gradients, against slow loops; and hand-made cases."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch

from flowrl.algorithms.base import LossBatch
from flowrl.algorithms.cispo import CISPO
from flowrl.algorithms.corrections import Correction, Kind, correction_weights, second_moment_limit
from flowrl.algorithms.dapo import DAPO
from flowrl.algorithms.dr_grpo import DrGRPO
from flowrl.algorithms.gmpo import GMPO
from flowrl.algorithms.grpo import GRPO
from flowrl.algorithms.gspo import GSPO
from flowrl.algorithms.opo import OPO
from flowrl.algorithms.policy import KL, PolicyGradient
from flowrl.algorithms.ppo import PPO
from flowrl.algorithms.reinforce_pp import ReinforcePP
from flowrl.algorithms.rloo import RLOO
from flowrl.algorithms.sapo import SAPO
from flowrl.algorithms.shaping import Shaping
from flowrl.algorithms.value import ValueLoss
from flowrl.errors import ConfigError
from tests.support import slow_algorithms as slow
from tests.unit.algorithms.cases import NAN, dirtied, gradient_of, loss_batch, mask_rows, rows_of, same

KINDS = get_args(Kind)
CLIPPED = [kind for kind in KINDS if not Correction(kind=kind).replaces_clip]
SEEDS = range(3)
# Each algorithm's defaults, stated a second time.
ALGORITHMS = [
    pytest.param(PPO(), slow.Policy(), id="ppo"),
    pytest.param(ReinforcePP(), slow.Policy(), id="reinforce++"),
    pytest.param(RLOO(), slow.Policy(), id="rloo"),
    pytest.param(GRPO(), slow.Policy(mean="sequence", kl_coef=0.04), id="grpo"),
    pytest.param(DrGRPO(constant_tokens=9), slow.Policy(mean="constant", constant=9), id="dr-grpo"),
    pytest.param(DAPO(), slow.Policy(high=0.28), id="dapo"),
    pytest.param(GSPO(), slow.Policy(low=3e-4, high=4e-4, ratio="sequence", mean="sequence"), id="gspo"),
    pytest.param(
        GSPO(clip_low=0.1, clip_high=0.1), slow.Policy(low=0.1, high=0.1, ratio="sequence", mean="sequence"), id="gspo2"
    ),
    pytest.param(CISPO(), slow.Policy(low=1.0, high=4.0, ratio="weight"), id="cispo"),
    pytest.param(
        CISPO(clip_low=0.2, clip_high=0.2, correction=Correction(kind="truncated")),
        slow.Policy(low=0.2, high=0.2, ratio="weight", correction="truncated"),
        id="cispo2",
    ),
    pytest.param(OPO(), slow.Policy(), id="opo"),
    pytest.param(SAPO(), slow.Policy(ratio="soft", mean="sequence"), id="sapo"),
    pytest.param(
        SAPO(tau_positive=2.0, tau_negative=4.0),
        slow.Policy(ratio="soft", mean="sequence", taus=(2.0, 4.0)),
        id="sapo2",
    ),
]


def columns_of(batch: LossBatch) -> slow.Columns:
    assert batch.entropy_BT is not None
    names = ("proximal", "behaviour", "advantages", "reference", "age")
    rows: dict[str, Any] = {name: rows_of(batch.columns[name]) for name in names}
    return slow.Columns(**rows, entropy=rows_of(batch.entropy_BT), masks=mask_rows(batch.mask_BT))


def assert_equals_slow(algorithm: PolicyGradient, policy: slow.Policy, batch: LossBatch) -> None:
    found = algorithm.loss(batch)
    logprobs, columns = rows_of(batch.logprobs_BT), columns_of(batch)
    total, count = slow.policy_loss(policy, logprobs, logprobs, columns)
    assert float(found.count) == count
    assert same(found.total / found.count, total / count)
    expected = slow.gradient(lambda moved: slow.policy_loss(policy, moved, logprobs, columns)[0] / count, logprobs)
    assert same(gradient_of(found.total / found.count, batch), expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("algorithm", "policy"), ALGORITHMS)
def test_policy_losses_and_gradients_equal_the_slow_ones(algorithm: PolicyGradient, policy: slow.Policy, seed: int):
    assert_equals_slow(algorithm, policy, loss_batch(seed))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", CLIPPED)
@pytest.mark.parametrize("ratio", ["token", "sequence", "weight"])
def test_every_correction_in_every_ratio_equals_the_slow_one(kind: Kind, ratio: str, seed: int):
    correction = Correction(kind=kind, cap=1.3, floor=0.8, max_drift=0.15)
    settings = {"clip_low": 0.3, "clip_high": 0.3, "correction": correction}
    mean = "sequence" if ratio == "sequence" else "token"
    algorithm = {"token": PPO, "sequence": GSPO, "weight": CISPO}[ratio](**settings)
    policy = slow.Policy(low=0.3, high=0.3, ratio=ratio, mean=mean, correction=kind, cap=1.3, floor=0.8, max_drift=0.15)
    assert_equals_slow(algorithm, policy, loss_batch(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_tokens_beyond_the_second_moment_are_left_out_as_the_paper_does_it(seed: int):
    batch = loss_batch(seed)
    kept = batch.mask_BT > 0
    drifts = (batch.logprobs_BT.detach() - batch.columns["behaviour"])[kept]
    worths = batch.columns["advantages"][kept]
    limit = slow.second_moment_limit(drifts.tolist(), worths.tolist(), 0.1)
    assert limit < float("inf")
    algorithm = PPO(correction=Correction(kind="second_moment", max_second_moment=0.1))
    assert algorithm.drift_limit(drifts, worths) == pytest.approx(limit, abs=1e-6)
    assert algorithm.needs_drift
    limited = batch._replace(columns={**batch.columns, "drift_limit": torch.full_like(batch.mask_BT, limit)})
    assert_equals_slow(algorithm, slow.Policy(correction="second_moment", limit=limit), limited)


def test_the_second_moment_limit_by_hand():
    ratios = torch.tensor([0.1, -0.2, 0.5, -9.0])  # the last moves back
    worths = torch.tensor([1.0, -1.0, 1.0, 1.0])
    assert second_moment_limit(ratios, worths, 0.2) == float("inf")
    assert second_moment_limit(ratios, worths, 0.09) == pytest.approx(0.2)
    assert second_moment_limit(ratios, worths, 0.001) == 0.0


@pytest.mark.parametrize("seed", SEEDS)
def test_tokens_beyond_the_divergence_are_left_out(seed: int):
    algorithm = PPO(correction=Correction(kind="divergence", max_divergence=0.02))
    policy = slow.Policy(correction="divergence", max_divergence=0.02)
    assert_equals_slow(algorithm, policy, loss_batch(seed))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("width", [0.4, 0.1])
def test_gmpo_equals_the_slow_one(width: float, seed: int):
    batch = loss_batch(seed)
    worths_B1 = batch.columns["advantages"][:, :1]  # a sample's, the same on each of its tokens
    batch = batch._replace(columns={**batch.columns, "advantages": worths_B1.expand_as(batch.mask_BT)})
    assert_equals_slow(GMPO(width=width), slow.Policy(ratio="geometric", mean="sequence", width=width), batch)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_weighted_kl_has_the_gradient_of_its_weight(seed: int):
    kl = KL(coef=0.3, placement="loss", estimator="k3", is_weighted=True)
    assert_equals_slow(PPO(kl=kl), slow.Policy(kl_coef=0.3, kl_is_weighted=True), loss_batch(seed))


def test_a_weighted_kl_by_hand():
    batch = one_token(lp=-1.0, proximal=-1.0, behaviour=-1.0 - LOG2, advantage=0.0)
    batch = batch._replace(columns={**batch.columns, "reference": torch.tensor([[-1.0 - LOG3]])})
    kl = KL(coef=1.0, placement="loss", estimator="k3", is_weighted=True)
    assert same(PPO(kl=kl).loss(batch).total, 2.0 * (1 / 3 - 1 + LOG3))


def test_soft_and_geometric_ratios_of_one_token_by_hand():
    twice = one_token(lp=-1.0, proximal=-1.0, behaviour=-1.0 - LOG2, advantage=1.0)
    assert same(SAPO().loss(twice).total, -4.0 / (1.0 + math.exp(-1.0)))
    assert same(GMPO().loss(twice).total, -math.exp(0.4))
    bad = one_token(lp=-1.0, proximal=-1.0, behaviour=-1.0 - LOG2, advantage=-1.0)
    assert same(GMPO().loss(bad).total, 2.0)  # learning brings it back: not clipped


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_terms_and_normalisations_equal_the_slow_ones(mean: Any, estimator: Any, seed: int):
    kl = KL(coef=0.3, placement="loss", estimator=estimator)
    algorithm = PPO(normalisation=mean, constant_tokens=5, kl=kl, entropy_coef=0.1, dual_clip=1.5)
    policy = slow.Policy(mean=mean, constant=5, kl_coef=0.3, estimator=estimator, entropy_coef=0.1, dual=1.5)
    assert_equals_slow(algorithm, policy, loss_batch(seed, drift=0.8))


def test_the_entropy_bonus_pushes_entropy_up():
    batch = loss_batch(0)
    assert batch.entropy_BT is not None
    batch = batch._replace(entropy_BT=batch.entropy_BT.requires_grad_())
    (found_BT,) = torch.autograd.grad(PPO(entropy_coef=0.5).loss(batch).total, [batch.entropy_BT])  # pyright: ignore
    assert torch.equal(found_BT, -0.5 * batch.mask_BT)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_the_value_loss_and_its_gradient_equal_the_slow_ones(clip: float, seed: int):
    batch = loss_batch(seed)
    values, old, returns = (
        rows_of(tensor) for tensor in (batch.logprobs_BT, batch.columns["values"], batch.columns["returns"])
    )
    masks = mask_rows(batch.mask_BT)
    found = ValueLoss(clip=clip).loss(batch)
    total, count = slow.value_loss(values, old, returns, masks, clip)
    assert float(found.count) == count
    assert same(found.total / found.count, total / count)
    expected = slow.gradient(lambda moved: slow.value_loss(moved, old, returns, masks, clip)[0] / count, values)
    assert same(gradient_of(found.total / found.count, batch), expected)


def test_garbage_under_the_mask_changes_neither_value_loss_nor_gradient():
    batch = loss_batch(0)
    dirty = LossBatch(
        logprobs_BT=dirtied(batch.logprobs_BT, batch.mask_BT, NAN).requires_grad_(),
        mask_BT=batch.mask_BT,
        columns={name: dirtied(column, batch.mask_BT, NAN) for name, column in batch.columns.items()},
    )
    loss, dirty_loss = ValueLoss().loss(batch), ValueLoss().loss(dirty)
    assert torch.equal(loss.total, dirty_loss.total)
    assert torch.equal(gradient_of(loss.total, batch), gradient_of(dirty_loss.total, dirty))
    assert all(torch.equal(loss.metrics[name][0], dirty_loss.metrics[name][0]) for name in loss.metrics)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_flows_through_a_correction(kind: Kind):
    log_ratio_BT = torch.tensor([[0.1, -0.1]], requires_grad=True)
    assert not correction_weights(Correction(kind=kind), log_ratio_BT, torch.ones(1, 2)).weights_BT.requires_grad


def one_token(*, lp: float, proximal: float, behaviour: float, advantage: float) -> LossBatch:
    columns = {"proximal": proximal, "behaviour": behaviour, "advantages": advantage, "age": 0.0, "drift_limit": 0.1}
    return LossBatch(
        logprobs_BT=torch.tensor([[lp]], requires_grad=True),
        mask_BT=torch.ones(1, 1),
        columns={name: torch.tensor([[value]]) for name, value in columns.items()},
    )


LOG2, LOG3 = 0.6931471805599453, 1.0986122886681098


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("behaviour", -1.2),  # ratio to behaviour 2 x 3, clipped to 1.2
        ("second_moment", 0.0),
        ("divergence", 0.0),
        ("decoupled", -3 * 1.2),
        ("interpolated", -1.2),  # one version old: as behaviour
        ("truncated", -2 * 1.2),
        ("clamped", -2 * 1.2),
        ("geometric", 0.0),
        ("icepop", 0.0),
        ("sequence", 0.0),
    ],
)
def test_corrections_of_one_stale_token_by_hand(kind: Kind, expected: float):
    batch = one_token(lp=-1.0, proximal=-1.0 - LOG2, behaviour=-1.0 - LOG2 - LOG3, advantage=1.0)
    loss = PPO(correction=Correction(kind=kind)).loss(batch)
    assert same(loss.total, expected)
    keeps = kind in ("behaviour", "decoupled", "interpolated")
    assert ("corrected_frac" in loss.metrics) != keeps
    assert keeps or float(loss.metrics["corrected_frac"][0]) == 1.0
    assert same(loss.metrics["is_weight"][0], 3.0)
    assert same(loss.metrics["is_weight_sq"][0], 9.0)
    assert same(loss.metrics["mismatch_kl"][0], 3.0 - 1.0 - LOG3)
    assert same(loss.metrics["approx_kl"][0], 2.0 - 1.0 - LOG2)


def test_an_interpolated_proximal_policy_of_a_token_two_versions_old_by_hand():
    batch = one_token(lp=-1.0, proximal=-9.0, behaviour=-1.0 - 2 * LOG2, advantage=1.0)
    batch.columns["age"][:] = 2.0
    loss = PPO(correction=Correction(kind="interpolated"), clip_high=3.0).loss(batch)
    assert same(loss.total, -4.0)  # half way: a weight of 2 and a ratio of 2
    assert same(gradient_of(loss.total, batch), [[-4.0]])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_zero_by_construction_is_not_told(kind: Kind):
    batch = loss_batch(0)
    once = {name: column for name, column in batch.columns.items() if name != "proximal"}
    batch = batch._replace(columns={**once, "drift_limit": torch.ones_like(batch.mask_BT)})
    correction = Correction(kind=kind)
    metrics = PPO(correction=correction).loss(batch).metrics
    assert "approx_kl" not in metrics
    assert ("clip_frac_high" in metrics) == (not correction.needs_proximal and not correction.replaces_clip)
    assert bool(PPO(correction=correction).idle_settings(1)) == ("clip_frac_high" not in metrics)
    assert bool(PPO(correction=correction).idle_settings(2)) == correction.replaces_clip


@pytest.mark.parametrize(("advantage", "low", "high"), [(1.0, 0.0, 1.0), (-1.0, 0.0, 0.0), (0.0, 0.0, 0.0)])
def test_clip_fractions_count_active_clips_only(advantage: float, low: float, high: float):
    metrics = PPO().loss(one_token(lp=-1.0, proximal=-2.0, behaviour=-2.0, advantage=advantage)).metrics
    assert (float(metrics["clip_frac_low"][0]), float(metrics["clip_frac_high"][0])) == (low, high)


def test_the_lower_clip_fraction_counts_falling_bad_tokens():
    metrics = PPO().loss(one_token(lp=-3.0, proximal=-2.0, behaviour=-2.0, advantage=-1.0)).metrics
    assert (float(metrics["clip_frac_low"][0]), float(metrics["clip_frac_high"][0])) == (1.0, 0.0)


def test_cispo_keeps_the_gradient_of_a_token_that_ppo_clips():
    batch = one_token(lp=-0.1, proximal=-3.0, behaviour=-3.0, advantage=1.0)
    assert float(gradient_of(PPO().loss(batch).total, batch)) == 0.0
    assert float(gradient_of(CISPO().loss(batch).total, batch)) == -5.0


def test_extreme_log_ratios_stay_finite():
    for advantage in (1.0, 0.0, -1.0):
        batch = one_token(lp=-0.1, proximal=-300.0, behaviour=-900.0, advantage=advantage)
        for kind in KINDS:
            loss = PPO(correction=Correction(kind=kind)).loss(batch)
            assert torch.isfinite(loss.total)
            assert all(torch.isfinite(total) for total, _ in loss.metrics.values())


def test_a_loss_that_lacks_what_it_needs_is_refused():
    batch = one_token(lp=-1.0, proximal=-1.0, behaviour=-1.0, advantage=1.0)
    with pytest.raises(ConfigError, match="add a reference node or set it to 0"):
        GRPO().loss(batch)
    with pytest.raises(ConfigError, match="needs entropies"):
        PPO(entropy_coef=0.1).loss(batch)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"shaping": Shaping(overlong_factor=2.0)},
            "shaping.overlong_factor: no effect while shaping.overlong",
        ),
        ({"shaping": Shaping(num_scores=8)}, "shaping.num_scores: no effect without shaping.running"),
        ({"kl": KL(coef=0.1, horizon=9)}, "kl.horizon: no effect while kl.target is 0"),
        ({"bootstrap_cut": True, "mask_cut": True}, "bootstrap_cut: no effect with mask_cut"),
    ],
)
def test_a_setting_without_effect_is_named(settings: dict[str, Any], said: str):
    (line,) = PPO(**settings).idle_settings(2)
    assert line.startswith(f"algorithm.{said}")
    assert PPO(shaping=Shaping(overlong_buffer=2, overlong_factor=2.0, running=True)).idle_settings(2) == []
