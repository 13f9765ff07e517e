"""Bytes against hand-made sums, and against what perf/memory.py measured of real processes."""

import pytest

from flowrl.engines.base import Lora
from flowrl.stages.generator import Generator
from flowrl.stages.learner import Learner
from flowrl.stages.reference import Reference
from flowrl.tuning.memory import Work, adapted, cached, computing, rounding, serving
from flowrl.tuning.shapes import find_shape, shape_of
from perf.memory import MEASURED, MIB, SETTINGS, SIZES, count, describe, predicted, settings_of

LLAMA3 = find_shape("meta-llama/Meta-Llama-3-8B-Instruct", {})
P = LLAMA3.num_parameters
WORK = Work(prompt=1024, response=1024)
FSDP = "flowrl.engines.fsdp:Fsdp2Engine"
TORCH = "flowrl.engines.torch:TorchEngine"


def held(*names, **settings):
    need = computing(LLAMA3, Learner.Config(**settings), WORK, "policy", on_gpu=True)
    return tuple(need.device.get(name, 0.0) / P for name in names), need


STATES = ("weights", "float32 weights", "Adam's moments", "gradients")


def test_states_take_18_bytes_a_parameter_and_zero_shards_what_its_stage_says():
    assert held(*STATES, engine=TORCH)[0] == (2, 4, 8, 4)
    assert held(*STATES, zero_stage=1, ranks=4)[0] == (2, 1, 2, 4)
    assert held(*STATES, zero_stage=2, ranks=4)[0] == (2, 1, 2, 1)
    assert held(*STATES, zero_stage=3, ranks=4)[0] == (0.5, 1, 2, 1)
    assert held(*STATES, zero_stage=0, dtype="float32", ranks=4)[0] == (4, 0, 8, 4)


def test_ranks_that_share_sequences_hold_a_part_of_their_activations():
    alone, shared = (
        held(ranks=4, sequence_parallel=size, gradient_checkpointing=True, micro_batch_tokens=1 << 17)[1].device
        for size in (1, 4)
    )
    assert shared["inputs of layers"] == alone["inputs of layers"] / 4
    assert alone["inputs of layers"] == 2 * (1 << 17) * 4096 * 32


def test_parts_of_layers_shrink_all_but_what_is_whole_in_a_group_of_ranks():
    _, whole = held(engine=FSDP, ranks=4)
    (parts,), need = held("float32 weights", engine=FSDP, ranks=4, tensor_parallel=4)
    outside = P - LLAMA3.body
    assert parts * P == pytest.approx(4 * (LLAMA3.body / 4 + outside))
    assert need.device["weights gathered"] == pytest.approx(2 * (LLAMA3.body / 4 + outside))
    assert whole.device["activations"] / 4 < need.device["activations"] < whole.device["activations"]


def test_fully_shard_keeps_float32_shards_and_gathers_a_layer_at_a_time():
    assert held(*STATES, engine=FSDP, ranks=4)[0] == (0, 1, 2, 1)
    assert held(*STATES, engine=FSDP, dtype="float32", ranks=4)[0] == (1, 0, 2, 1)
    parts, need = held("weights gathered", engine=FSDP, zero_stage=3, ranks=4)
    assert parts[0] * P == pytest.approx(2 * (2 * LLAMA3.embedding + LLAMA3.body / 16))
    assert held("weights gathered", engine=FSDP, ranks=4)[0] == (2,)
    parts, need = held(*STATES, engine=FSDP, ranks=4, offload_parameters=True)
    assert (parts, sum(need.host[name] for name in STATES[1:]) / P) == ((0, 0, 0, 0), 4)


def test_what_is_offloaded_lies_in_the_hosts_memory():
    parts, need = held(*STATES, zero_stage=3, ranks=4, offload_optimizer=True, offload_parameters=True)
    assert parts == (0, 0, 0, 0)
    assert sum(need.host[name] for name in STATES) == pytest.approx(P * (2 + 4 + 8 + 4) / 4)


def test_a_frozen_model_has_no_optimizer_at_any_stage():
    config = Reference.Config(engine="flowrl.engines.deepspeed:DeepSpeedEngine", zero_stage=3, ranks=4)
    need = computing(LLAMA3, config, WORK, "policy", on_gpu=True)
    assert need.device["weights"] == 2 * P / 4
    assert not need.device.keys() & {"float32 weights", "Adam's moments", "gradients"}


def test_an_adapter_is_rank_times_both_sides_of_each_layer():
    h, q, k, f = 4096, 4096, 1024, 14336
    assert adapted(LLAMA3, Lora(rank=16)) == 16 * 32 * (h + q + 2 * (h + k) + q + h + 3 * (h + f))
    assert adapted(LLAMA3, Lora(rank=16, targets=["q_proj", "v_proj"])) == 16 * 32 * (h + q + h + k)
    mixtral = find_shape("mistralai/Mixtral-8x7B-Instruct-v0.1", {})
    assert adapted(mixtral, Lora(rank=1)) == 32 * (h + q + 2 * (h + k) + q + h)  # fused experts have none


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer_whole():
    each = 16 * 4096 + 8 * 4096 + 8 * 14336 + 24  # bytes of a token in a layer, as autograd was seen to save
    plain = held(engine=TORCH, micro_batch_tokens=4096)[1].device
    masked = held(engine=TORCH, micro_batch_tokens=4096, attention="sdpa")[1].device
    saving = held(engine=TORCH, micro_batch_tokens=4096, gradient_checkpointing=True)[1].device
    assert plain["activations"] == 4096 * 32 * each
    assert masked["activations"] == 4096 * 32 * each + 2 * 4096 * 2048
    assert saving["activations"] == 4096 * each
    assert saving["inputs of layers"] == 2 * 4096 * 4096 * 32
    kept = held(
        engine=TORCH, micro_batch_tokens=4096, gradient_checkpointing=True, checkpoint_keeps="products"
    )[1].device  # fmt: skip
    of_token = 4096 + 2 * 1024 + 2 * 4096 + 2 * 14336  # queries; keys and values; both ways back; gate and up
    assert kept["products of layers"] == 2 * 4096 * 32 * of_token
    assert all(kept[part] == saving[part] for part in ("activations", "inputs of layers"))


def test_the_cache_holds_what_runs_together_at_its_longest():
    config = Generator.Config(max_running=64, max_groups=4, group_size=8, max_model_len=1024)
    assert cached(LLAMA3, config, WORK) == 128 * 1024 * 1024 * 32


def served(shape, **options):
    return serving(shape, Generator.Config(dtype="bfloat16", engine_options=options), on_gpu=True).device["weights"]


def test_rounded_weights_are_those_of_layers_and_all_else_keeps_its_dtype():
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)  # q and o, k and v, gate, up and down
    assert LLAMA3.matrices == matrices == 6_979_321_856
    assert P - matrices == 2 * 128256 * 4096 + 65 * 4096  # embedding and head, norms
    assert served(LLAMA3) == 2 * P
    for method in ("fp8", "fp8_per_tensor", "fp8_per_channel"):
        assert served(LLAMA3, quantization=method) == 2 * P - matrices
    assert served(LLAMA3, quantization="fp8_per_block") == 2 * P - matrices + 4 * matrices / 16384
    assert served(LLAMA3, quantization="mxfp4") == 2 * (P - matrices) + matrices / 2 + matrices / 32


def test_what_rounds_experts_alone_leaves_attention_as_it_is():
    mixtral = find_shape("mistralai/Mixtral-8x7B-Instruct-v0.1", {})
    experts = 32 * 8 * 3 * 4096 * 14336
    whole = 2 * mixtral.num_parameters
    assert served(mixtral, quantization="int8_per_channel_weight_only") == whole - experts
    assert served(mixtral, quantization="nvfp4_per_token") == whole - 2 * experts + experts * 9 / 16
    assert served(LLAMA3, quantization="nvfp4_per_token") == 2 * P


def test_a_cache_is_as_wide_as_its_own_dtype():
    config = Generator.Config(dtype="float32", engine_options={"kv_cache_dtype": "fp8"}, max_groups=8, group_size=8)
    one_token = 2 * 8 * 128 * 32  # keys and values of 8 heads in 32 layers, a byte each
    assert cached(LLAMA3, config, Work(prompt=256, response=256)) == one_token * 512 * 64
    assert rounding(config) == ["KV cache at 1 byte a number (fp8)"]


def test_what_is_not_known_is_planned_as_if_it_were_not_there_and_said():
    by_layer = {"quantization": "fp8", "quantization_config": {"ignore": ["lm_head"]}}
    for options in ({"quantization": "torchao"}, by_layer):
        assert served(LLAMA3, **options) == 2 * P
        assert "is not known" in rounding(Generator.Config(engine_options=options))[0]
    assert cached(LLAMA3, Generator.Config(engine_options={"kv_cache_dtype": "nvfp4"}), WORK) == cached(
        LLAMA3, Generator.Config(), WORK
    )


@pytest.mark.parametrize("place", sorted(MEASURED))
def test_real_processes_took_what_is_predicted_within_a_tenth(place):
    own = 52 * MIB  # that any process takes for modules and code: more than a tenth where little else is held
    setting = SETTINGS[place]
    settings = settings_of(*SIZES[setting.size])
    shape = shape_of(settings, count(*SIZES[setting.size]))
    assert predicted(setting, shape) == pytest.approx(MEASURED[place] * MIB, rel=0.1, abs=own), describe(setting)
