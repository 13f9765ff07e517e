"""The figures of a policy's loss, each against a loop over tokens that says what it is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from flowrl.algorithms.cispo import CISPO
from flowrl.algorithms.corrections import Correction
from flowrl.algorithms.gspo import GSPO
from flowrl.algorithms.ppo import PPO
from tests.support.slow_algorithms import Row, Rows, sampled
from tests.unit.algorithms.cases import loss_batch, mask_rows, rows_of, same

if TYPE_CHECKING:
    from flowrl.algorithms.policy import PolicyGradient

CAPPED = Correction(kind="truncated", cap=1.2)


def by_token(name: str, *, lp: float, prox: float, old: float, ref: float, advantage: float, high: float) -> float:
    """The figure of one token; ratios are of its own."""
    weight, ratio = math.exp(prox - old), math.exp(lp - prox)
    return {
        "approx_kl": math.exp(lp - prox) - 1 - (lp - prox),
        "behaviour_kl": math.exp(prox - old) - 1 - (prox - old),
        "kl_ref": math.exp(ref - lp) - 1 - (ref - lp),
        "is_weight": weight,
        "is_weight_sq": weight**2,
        "corrected_frac": float(weight > CAPPED.cap),
        "clip_frac_low": float(ratio < 0.8 and advantage < 0),
        "clip_frac_high": float(ratio > 1 + high and advantage > 0),
    }[name]


NAMES = ("approx_kl", "behaviour_kl", "kl_ref", "is_weight", "is_weight_sq", "corrected_frac", "clip_frac_low",
         "clip_frac_high")  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_the_mean_over_sampled_tokens_of_what_it_says(name: str, seed: int) -> None:
    batch = loss_batch(seed)
    columns = {key: rows_of(batch.columns[key]) for key in ("proximal", "behaviour", "reference", "advantages")}
    lp = rows_of(batch.logprobs_BT)
    found = [
        by_token(name, lp=lp[i][t], prox=columns["proximal"][i][t], old=columns["behaviour"][i][t],
                 ref=columns["reference"][i][t], advantage=columns["advantages"][i][t], high=0.3)
        for i, mask in enumerate(mask_rows(batch.mask_BT))
        for t in sampled(mask)
    ]  # fmt: skip
    total, count = PPO(clip_high=0.3, correction=CAPPED).loss(batch).metrics[name]
    assert float(count) == len(found)
    assert same(total, sum(found))


def sequence_ratio(lp: Rows, anchor: Rows, masks: list[list[int]]) -> Row:
    means = [
        sum(lp[i][t] - anchor[i][t] for t in sampled(mask)) / max(1, len(sampled(mask))) for i, mask in enumerate(masks)
    ]
    return [math.exp(mean) for mean in means]


@pytest.mark.parametrize("seed", range(3))
def test_gspo_clips_whole_sequences_and_cispo_clips_whatever_a_token_is_worth(seed: int) -> None:
    batch = loss_batch(seed)
    masks = mask_rows(batch.mask_BT)
    lp, old, worth = rows_of(batch.logprobs_BT), batch.columns["behaviour"], rows_of(batch.columns["advantages"])
    anchor = rows_of(old)
    of_sequences = sequence_ratio(lp, anchor, masks)
    for kind, is_high in ((GSPO, lambda ratio, a: ratio > 1.1 and a > 0), (CISPO, lambda ratio, a: ratio > 1.1)):
        algorithm: PolicyGradient = kind(clip_low=0.1, clip_high=0.1)
        expected = sum(
            is_high(of_sequences[i] if kind is GSPO else math.exp(lp[i][t] - anchor[i][t]), worth[i][t])
            for i, mask in enumerate(masks)
            for t in sampled(mask)
        )
        assert float(algorithm.loss(batch).metrics["clip_frac_high"][0]) == expected


def test_the_loss_that_is_told_is_without_its_terms() -> None:
    batch = loss_batch(0)
    plain, whole = PPO().loss(batch), PPO(entropy_coef=0.5).loss(batch)
    assert torch.equal(whole.metrics["policy_loss"][0], plain.total.detach())
    entropy, _ = whole.metrics["entropy"]
    assert same(whole.total, float(plain.total.detach() - 0.5 * entropy))
