"""Ranks with parts of layers take the steps of one, publish whole weights and go on from any state.

Ranks are real processes over gloo; the plain torch engine on one rank is the measure.
"""

from __future__ import annotations

import shutil

import pytest

from tests.contracts.test_sequence_parallel import on_one
from tests.contracts.test_training_engines import (
    FSDP,
    TORCH,
    assert_same,
    gathered,
    on_ranks,
    resumption,
    take_splits,
    two_steps,
)
from tests.support.families import write_family
from tests.support.tiny import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(
    ("family", "num_ranks", "size", "settings"),
    [
        ("LlamaForCausalLM", 2, 2, {"zero_stage": 2}),
        ("LlamaForCausalLM", 2, 2, {"zero_stage": 3, "head": "value", "gradient_checkpointing": True}),
        ("Qwen3ForCausalLM", 2, 2, {"zero_stage": 3}),  # norms of heads: whole, for a part of the heads
        ("Qwen2ForCausalLM", 4, 2, {"zero_stage": 3}),  # with biases
        ("Gemma2ForCausalLM", 4, 4, {"zero_stage": 2, "attention": "sdpa"}),
    ],
)
def test_ranks_with_parts_of_layers_take_the_steps_of_one(tmp_path, family, num_ranks, size, settings):
    write_family(family, tmp_path, num_attention_heads=4, num_key_value_heads=4 if size == 4 else 2)
    settings = {**settings, "adam_eps": 1e-4}  # where a gradient is near nothing, a step is, too
    expected = on_one(two_steps, tmp_path, TORCH, tmp_path, **settings)
    found = on_ranks(num_ranks, two_steps, FSDP, tmp_path, tmp_path, tensor_parallel=size, **settings)
    assert_same(found, expected)


def test_a_rank_out_of_memory_has_the_step_taken_again_by_all(tmp_path):
    model = tiny_model(tmp_path / "source")
    smooth = {"adam_eps": 1e-4}
    expected = on_one(two_steps, tmp_path, TORCH, model, **smooth)
    found = on_ranks(2, two_steps, FSDP, model, tmp_path, tensor_parallel=2, zero_stage=3, scarce="backward", **smooth)
    assert take_splits(found) == [0, 1]
    assert_same(found, expected)


def test_training_goes_on_from_any_state_on_any_parts(tmp_path):
    model, settings = tiny_model(tmp_path / "source"), {"zero_stage": 3, "ema_decay": 0.9}
    straight, again = on_one(resumption, tmp_path / "one", FSDP, model, **settings)
    assert again == straight
    shutil.copytree(tmp_path / "one/state", tmp_path / "two/other")
    runs = on_ranks(2, resumption, FSDP, model, tmp_path / "two", tensor_parallel=2, **settings)
    shutil.copytree(tmp_path / "two/state", tmp_path / "four/other")
    runs += on_ranks(4, resumption, FSDP, model, tmp_path / "four", tensor_parallel=2, **settings)
    shutil.copytree(tmp_path / "four/state", tmp_path / "back/other")
    runs += on_one(resumption, tmp_path / "back", FSDP, model, **settings)
    assert len(runs) == 9
    for found in runs:
        assert found == [pytest.approx(figures, abs=1e-5, rel=1e-5) for figures in straight]


@pytest.mark.parametrize(("num_ranks", "size"), [(2, 2), (4, 2)])
def test_parts_are_published_whole(tmp_path, num_ranks, size):
    import torch
    from safetensors.torch import load_file

    model = tiny_model(tmp_path / "source")
    found = on_ranks(num_ranks, gathered, FSDP, model, tmp_path, tensor_parallel=size, zero_stage=3)
    expected = load_file(model / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
