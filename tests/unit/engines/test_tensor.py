"""What layers cannot be shared out over ranks is refused with the numbers, before anything is loaded."""

from __future__ import annotations

import json

import pytest

from flowrl.engines.base import Lora, TrainingConfig
from flowrl.engines.fsdp import Fsdp2Engine
from flowrl.engines.tensor import check_parts
from flowrl.engines.torch import SequenceScoringEngine, TorchEngine
from flowrl.errors import ConfigError

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("family", "further", "size", "ranks", "words"),
    [
        ("llama", {}, 2, 3, "2 does not divide 3 ranks"),
        ("llama", {}, 4, 4, "4 does not divide the model's num_key_value_heads, 2"),
        ("llama", {"intermediate_size": 97}, 2, 2, "2 does not divide the model's intermediate_size, 97"),
        ("gpt2", {}, 2, 2, "transformers has no plan for the layers of gpt2"),
        ("mixtral", {}, 2, 2, "plan for mixtral has moe_tp_experts, packed_colwise, which are not built here"),
    ],
)
def test_layers_without_parts_for_every_rank_are_refused(tmp_path, family, further, size, ranks, words):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **SMALL, **further}))
    with pytest.raises(ConfigError, match=words):
        check_parts(TrainingConfig(model="", tensor_parallel=size), tmp_path, "learner", num_ranks=ranks)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_families_of_dense_layers_have_parts(tmp_path, family):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **SMALL}))
    check_parts(TrainingConfig(model="", tensor_parallel=2), tmp_path, "learner", num_ranks=4)


@pytest.mark.parametrize(
    ("engine", "further", "words"),
    [
        (TorchEngine, {}, "TorchEngine runs every layer whole; leave it 1, or take engine=flowrl.engines.fsdp"),
        (Fsdp2Engine, {"lora": Lora(rank=4)}, "adapters beside parts of layers are not built"),
        (Fsdp2Engine, {"compile": True}, "layers cannot be compiled with tensor_parallel"),
    ],
)
def test_what_an_engine_cannot_do_with_parts_is_refused(engine, further, words):
    config = TrainingConfig(model="", tensor_parallel=2, dtype="float32", **further)
    with pytest.raises(ConfigError, match=words):
        engine.check_settings(config, "learner", has_gpu=False)


def test_reward_models_are_read_in_parts_by_the_engine_that_has_them():
    SequenceScoringEngine.check_settings(
        TrainingConfig(model="", tensor_parallel=2, dtype="float32"), "reward", has_gpu=False
    )
