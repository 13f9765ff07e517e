"""Ranks that run each sequence together take the steps of one: losses, log-probs, weights, packing, routes.

Ranks are real processes over gloo. Which heads can be shared out is tried in tests/unit/engines/test_sequence.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from flowrl.engines.base import Ranks
from tests.contracts.test_training_engines import (
    DEEPSPEED,
    FSDP,
    TORCH,
    assert_same,
    engine_of,
    flat,
    on_ranks,
    two_steps,
)
from tests.support.families import write_family
from tests.support.tiny import tiny_model
from tests.unit.engines.test_packing import random_groups
from tests.unit.engines.test_routes import routed
from tests.unit.engines.test_trainer import WeightedTokens, choose

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow
GROUPS = random_groups(seed=51, count=5)


def on_one(task, directory: Path, path: str, model: Path, **settings: Any) -> Any:
    if path == TORCH:
        settings.pop("zero_stage", None)
    engine = engine_of(path, model, **settings)
    engine.open(Ranks())
    found = task(engine, directory)
    engine.close()
    return found


@pytest.mark.parametrize(
    ("num_ranks", "size", "heads", "path", "settings"),
    [
        (2, 2, (6, 3), TORCH, {"gradient_checkpointing": True}),
        pytest.param(2, 2, (2, 2), DEEPSPEED, {"zero_stage": 3, "head": "value"}, marks=pytest.mark.long),
        pytest.param(2, 2, (3, 1), FSDP, {"zero_stage": 3}, marks=pytest.mark.long),
        pytest.param(4, 4, (8, 2), TORCH, {"attention": "sdpa"}, marks=pytest.mark.long),
        pytest.param(4, 4, (6, 3), DEEPSPEED, {"zero_stage": 2, "micro_batch_tokens": 400}, marks=pytest.mark.long),
        pytest.param(4, 4, (4, 1), DEEPSPEED, {"zero_stage": 3, "head": "value"}, marks=pytest.mark.long),
        pytest.param(4, 2, (4, 2), FSDP, {"zero_stage": 3, "gradient_checkpointing": True}, marks=pytest.mark.long),
    ],
)
def test_ranks_that_share_each_sequence_take_the_steps_of_one(tmp_path, num_ranks, size, heads, path, settings):
    model = tiny_model(tmp_path / "source", heads=heads)
    settings = {**settings, "adam_eps": 1e-4}  # where a gradient is near nothing, a step is, too
    expected = on_one(two_steps, tmp_path, TORCH, model, **{**settings, "attention": "varlen"})
    assert_same(on_ranks(num_ranks, two_steps, path, model, tmp_path, sequence_parallel=size, **settings), expected)


def scored(engine, directory: Path) -> list[list[float]]:
    return flat(engine.score(GROUPS))


@pytest.mark.long
@pytest.mark.parametrize("head", ["policy", "value", "reward"])
def test_frozen_models_score_as_on_one_rank(tmp_path, head):
    from tests.contracts.test_reward_models import tiny_reward_model

    model = tiny_model(tmp_path) if head == "policy" else tiny_reward_model(tmp_path, seed=3)
    settings = {"head": head, "frozen": True}
    expected = on_one(scored, tmp_path, TORCH, model, **settings)
    for path, zero_stage in ((TORCH, 0), (DEEPSPEED, 3)):
        found = on_ranks(2, scored, path, model, tmp_path, sequence_parallel=2, zero_stage=zero_stage, **settings)
        assert found == [pytest.approx(row, abs=1e-5) for row in expected]


def replayed_steps(engine, directory: Path) -> list[dict[str, float]]:
    """Take two steps on the experts that groups bring."""
    groups = routed(GROUPS)
    return [engine.accumulate(groups, choose(WeightedTokens)) | engine.apply() for _ in range(2)]


@pytest.mark.long
@pytest.mark.parametrize(("num_ranks", "path", "zero_stage"), [(2, TORCH, 0), (4, DEEPSPEED, 2), (2, FSDP, 3)])
def test_parts_of_rows_go_to_the_experts_that_the_samples_bring(tmp_path, num_ranks, path, zero_stage):
    write_family("Qwen3MoeForCausalLM", tmp_path, num_attention_heads=4, num_key_value_heads=2)
    settings = {"routing": "replay"}
    expected = on_one(replayed_steps, tmp_path, TORCH, tmp_path, **settings)
    assert 0 < expected[0]["routes_changed"] < 1
    found = on_ranks(
        num_ranks, replayed_steps, path, tmp_path, tmp_path, zero_stage=zero_stage, sequence_parallel=num_ranks,
        **settings,
    )  # fmt: skip
    # An expert has few tokens: in more places a gradient is near nothing, and Adam's step not.
    assert found == [pytest.approx(figures, abs=3e-5, rel=3e-5) for figures in expected]
