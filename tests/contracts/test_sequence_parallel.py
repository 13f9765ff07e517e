"""Ranks that run each sequence together take the steps of one: losses, log-probs, weights, packing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flowrl.engines.base import Ranks, TrainingConfig
from flowrl.engines.sequence import check_split
from flowrl.errors import ConfigError
from tests.contracts.test_training_engines import (
    DEEPSPEED,
    FSDP,
    TORCH,
    assert_same,
    engine_of,
    on_two_ranks,
    two_steps,
)
from tests.support.tiny import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("path", "settings"),
    [
        (TORCH, {"gradient_checkpointing": True}),
        pytest.param(DEEPSPEED, {"zero_stage": 3, "head": "value"}, marks=pytest.mark.long),
        pytest.param(FSDP, {"zero_stage": 3}, marks=pytest.mark.long),
    ],
)
def test_two_ranks_that_share_each_sequence_take_the_steps_of_one(model, tmp_path, path, settings):
    alone = engine_of(TORCH, model, **settings)
    alone.open(Ranks())
    expected = two_steps(alone, tmp_path)
    alone.close()
    assert_same(on_two_ranks("steps", path, model, tmp_path, sequence_parallel=2, **settings), expected)


def test_groups_that_do_not_come_out_are_refused_with_the_numbers(model):
    for size, ranks, words in (
        (2, 3, "2 does not divide 3 ranks"),
        (3, 3, "3 does not divide the model's 2 attention"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_split(TrainingConfig(model="", sequence_parallel=size), model, "learner", num_ranks=ranks)
