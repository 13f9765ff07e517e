"""Distillation over the whole vocabulary: what the loss makes of the KL that an engine forms; refusals."""

from __future__ import annotations

import pytest
import torch

from flowrl.algorithms.base import LossBatch
from flowrl.algorithms.full_distillation import FullDistillation
from flowrl.errors import ConfigError
from tests.support import slow_preference as slow
from tests.support.pair_batches import pair_batch
from tests.support.slow_algorithms import sampled
from tests.unit.algorithms.cases import gradient_of, mask_rows, rows_of, same


def test_the_loss_by_hand_is_a_mean_over_tokens_of_the_mixed_kl_and_likelihood() -> None:
    logprobs_BT = torch.tensor([[-1.0, -2.0, -9.0]], requires_grad=True)
    mask_BT = torch.tensor([[1.0, 1.0, 0.0]])
    batch = LossBatch(logprobs_BT, mask_BT, {}, divergence_BT=torch.tensor([[0.5, 1.5, 7.0]]))
    loss = FullDistillation(teacher="any", mix=0.25).loss(batch)
    assert float(loss.total.detach() / loss.count) == 0.25 * 1.0 + 0.75 * 1.5
    assert {name: float(total / count) for name, (total, count) in loss.metrics.items()} == {"nll": 1.5, "kl": 1.0}
    assert gradient_of(loss.total / loss.count, batch).tolist() == [[-0.375, -0.375, 0.0]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mix", [0.3, 1.0])
def test_the_loss_equals_the_slow_one_and_the_kl_gets_its_gradient(mix: float, seed: int) -> None:
    batch = pair_batch(seed)
    assert batch.divergence_BT is not None
    kl_BT = batch.divergence_BT.requires_grad_()
    batch = batch._replace(divergence_BT=kl_BT)
    loss = FullDistillation(teacher="any", mix=mix).loss(batch)
    masks, kls = mask_rows(batch.mask_BT), rows_of(kl_BT)
    nll, count = slow.sft(rows_of(batch.logprobs_BT), masks)
    assert float(loss.count) == count
    kl = sum(kls[i][t] for i, mask in enumerate(masks) for t in sampled(mask))
    assert same(loss.total, mix * kl + (1 - mix) * nll)
    (found_BT,) = torch.autograd.grad(loss.total, [kl_BT])
    assert torch.equal(found_BT, mix * batch.mask_BT)


def test_where_an_engine_only_scores_there_is_the_likelihood_alone() -> None:
    batch = pair_batch(0)._replace(divergence_BT=None)
    scored = batch._replace(logprobs_BT=batch.logprobs_BT.detach())
    nll, _ = slow.sft(rows_of(batch.logprobs_BT), mask_rows(batch.mask_BT))
    assert same(FullDistillation().loss(scored).total, nll)
    with pytest.raises(ConfigError, match="this engine loads no teacher"):
        FullDistillation(teacher="any").loss(batch)


def test_a_teacher_must_be_named() -> None:
    with pytest.raises(ConfigError, match=r"objective\.teacher: is not set; name a model"):
        _ = FullDistillation().teacher_model
    assert FullDistillation(teacher="any", direction="reverse").teacher_model == "any"
    assert FullDistillation(direction="reverse").divergence == "reverse"
    jsd = FullDistillation(direction="jsd", share=0.3, at_temperature=2.0)
    assert (jsd.divergence, jsd.teacher_share, jsd.temperature) == ("jsd", 0.3, 2.0)
    assert FullDistillation().temperature is None
