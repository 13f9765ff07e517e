"""A policy's loss and a pre-training loss in one step: each divided by its own count, the texts at temperature 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from flowrl.config import Select
from flowrl.engines.base import TokenGroup
from flowrl.messages import Buffer
from tests.unit.engines.test_packing import random_groups
from tests.unit.engines.test_trainer import WeightedTokens, choose, gradients, opened

if TYPE_CHECKING:
    from pathlib import Path

POLICY = random_groups(seed=21, count=4)
TEXTS = [TokenGroup(prompt_ids=g.prompt_ids, responses=g.responses) for g in random_groups(seed=8, count=3)]
LOSS, PRETRAINING = (
    choose(WeightedTokens),
    Select(use="flowrl.algorithms.pretraining:Pretraining", options={"coef": 0.3}),
)


@pytest.mark.parametrize("budget", [2048, 40])
def test_each_loss_is_divided_by_its_own_count(budget: int, tiny_llama: Path):
    both = opened(tiny_llama, micro_batch_tokens=budget)
    both.accumulate(POLICY, LOSS)
    both.accumulate(TEXTS, PRETRAINING)
    policy, texts = opened(tiny_llama), opened(tiny_llama)
    policy.accumulate(POLICY, LOSS)
    texts.accumulate(TEXTS, PRETRAINING)
    alone = gradients(policy), gradients(texts)
    for name, found in gradients(both).items():
        torch.testing.assert_close(found, alone[0][name] + alone[1][name], atol=1e-6, rtol=1e-5)


def test_a_texts_likelihood_is_the_models_own_whatever_samples_are_drawn_at(tiny_llama: Path):
    plain, cold = opened(tiny_llama), opened(tiny_llama, temperature=0.5)
    rows = [row for group in plain.score(TEXTS) for row in group]
    nll = -sum(float(row.sum()) for row in rows) / sum(len(row) for row in rows)
    for engine in (plain, cold):
        metrics = engine.accumulate(TEXTS, PRETRAINING)
        assert metrics["nll"] == pytest.approx(nll, abs=1e-5)
        assert metrics["loss"] == pytest.approx(0.3 * nll, abs=1e-5)
    sampled = [Buffer.floats(row) for row in cold.score(TEXTS)[0]]
    assert sampled[0].tolist() != pytest.approx(rows[0].tolist(), abs=1e-2)
