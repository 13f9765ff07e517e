"""Frozen parameters, activations computed again, state on the CPU: what they do and when they are refused."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowrl.engines.base import Lora, Ranks, Scoring, Training, TrainingConfig
from flowrl.engines.deepspeed import DeepSpeedEngine
from flowrl.engines.fsdp import Fsdp2Engine
from flowrl.engines.savings import PRODUCTS, offloading
from flowrl.engines.torch import SequenceScoringEngine, TorchEngine
from flowrl.errors import ConfigError
from flowrl.stages.training import check_model
from tests.unit.engines.test_trainer import GROUPS, WeightedTokens, choose, gradients, opened

if TYPE_CHECKING:
    from collections.abc import Callable

FROZEN = ["model.embed_tokens.*", "model.layers.0.*"]


def test_frozen_parameters_keep_their_values_and_the_others_their_gradients(tiny_llama):
    free, frozen = opened(tiny_llama, lr=1e-2), opened(tiny_llama, lr=1e-2, freeze=FROZEN)
    for engine in (free, frozen):
        engine.accumulate(GROUPS, choose(WeightedTokens))
    expected, found = gradients(free), gradients(frozen)
    still = expected.keys() - found.keys()
    assert still == {name for name in expected if name.startswith(("model.embed_tokens.", "model.layers.0."))}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)
    before = {name: parameter.clone() for name, parameter in frozen.model.named_parameters()}
    frozen.apply()
    for name, parameter in frozen.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in still)
    assert [name for name, _ in frozen._parameters()] == list(before)  # what generators are sent


def test_weight_decay_pulls_at_matrices_only(tiny_llama):
    """Without a gradient's share a step of AdamW is the decay alone: weights times 1 - lr * decay."""
    engine = opened(tiny_llama, lr=0.1, weight_decay=0.5)
    engine._ensure_training()
    before = {name: parameter.clone() for name, parameter in engine.model.named_parameters()}
    for parameter in engine.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    engine._step(0.1)
    shrunk = set()
    for name, parameter in engine.model.named_parameters():
        if not torch.equal(parameter, before[name]):
            torch.testing.assert_close(parameter, 0.95 * before[name])
            shrunk.add(name)
    matrices = {name for name, parameter in before.items() if parameter.ndim == 2 and "embed" not in name}
    tied = {"lm_head.weight"} if engine.model.config.tie_word_embeddings else set()
    assert shrunk == matrices - tied
    assert any("norm" in name for name in before.keys() - shrunk)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"freeze": ["model.layers.7.*"]}, r"learner\.freeze: .* matches none of .*; one of them is called model\.l"),
        ({"freeze": ["*"]}, r"match all .* parameters; leave some to train"),
        ({"gradient_checkpointing": True, "checkpoint_every": 3}, "3 is more than the 2 layers of LlamaFor"),
    ],
)
@pytest.mark.parametrize("head", ["policy", "value"])
def test_what_a_model_has_not_is_refused_before_it_is_loaded(tiny_llama, settings, words, head):
    with pytest.raises(ConfigError, match=words):
        check_model(Training(**settings), Path(tiny_llama), "learner", head)
    right = Training(freeze=["model.layers.1.*"], gradient_checkpointing=True)
    check_model(right, Path(tiny_llama), "learner", head)


@pytest.mark.parametrize(("every", "again"), [(1, [1, 1]), (2, [1, 0])])
def test_only_the_chosen_layers_are_computed_again_and_gradients_stay(tiny_llama, every, again):
    plain = opened(tiny_llama)
    saving = opened(tiny_llama, gradient_checkpointing=True, checkpoint_every=every)
    calls = [0, 0]
    for index, layer in enumerate(saving.model.model.layers):

        def count(*_: object, index: int = index) -> None:
            calls[index] += 1

        layer.input_layernorm.register_forward_hook(count)
    plain.accumulate(GROUPS, choose(WeightedTokens))
    saving.accumulate(GROUPS, choose(WeightedTokens))
    assert calls == [1 + more for more in again]
    found = gradients(saving)
    for name, expected in gradients(plain).items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "has_gpu", "words"),
    [
        (TorchEngine, {"offload_optimizer": True}, True, "keeps that on its device; take engine=.*DeepSpeedEngine"),
        (DeepSpeedEngine, {"offload_optimizer": True}, False, "the device is the CPU, where everything is already"),
        (DeepSpeedEngine, {"offload_optimizer": True, "zero_stage": 0}, True, "zero_stage=0 .* take zero_stage 1 or"),
        (DeepSpeedEngine, {"offload_parameters": True}, True, "zero_stage=2 .* take zero_stage 3 or more"),
        (DeepSpeedEngine, {"zero_stage": 0, "dtype": "bfloat16"}, False, "zero_stage=0 .* keeps no float32 weights"),
        (DeepSpeedEngine, {"zero_stage": 3, "lora": Lora(rank=1, bits=4)}, True, "4-bit weights cannot be sharded"),
        (Fsdp2Engine, {"zero_stage": 1}, False, "is 1, and fully_shard shards the weights too"),
        (TorchEngine, {"zero_stage": 3}, False, "is 3, and TorchEngine holds every weight whole .* leave it 2"),
        (SequenceScoringEngine, {"zero_stage": 1}, False, "is 1, and TorchEngine holds every weight whole"),
        (TorchEngine, {"attention": "flex"}, False, "FlexAttention has no backward on CPUs"),
    ],
)
def test_what_an_engine_cannot_do_or_would_not_look_at_is_refused_by_its_class(kind, settings, has_gpu, words):
    with pytest.raises(ConfigError, match=words):
        kind.check_settings(Training(**settings), "learner", has_gpu=has_gpu)


@pytest.mark.parametrize(("settings", "is_refused"), [
    (Training(dtype="float16"), True), (Scoring(dtype="float16", zero_stage=3), True), (Scoring(dtype="float16"), False)
])  # fmt: skip
def test_float16_is_refused_before_the_start_where_deepspeed_cannot_compute_in_it(monkeypatch, settings, is_refused):
    def check(*, has_float16: bool, has_gpu: bool) -> None:
        monkeypatch.setattr("flowrl.engines.deepspeed._has_float16", lambda: has_float16)
        DeepSpeedEngine.check_settings(settings, "learner", has_gpu=has_gpu)

    check(has_float16=True, has_gpu=False)
    check(has_float16=False, has_gpu=True)
    with (
        pytest.raises(ConfigError, match=r"learner.dtype: is float16, .*; take bfloat16")
        if is_refused
        else nullcontext()
    ):
        check(has_float16=False, has_gpu=False)


def test_a_frozen_node_is_held_against_its_engine_too():
    DeepSpeedEngine.check_settings(Scoring(zero_stage=3, offload_parameters=True), "reference", has_gpu=True)
    SequenceScoringEngine.check_settings(Scoring(zero_stage=3), "reward_model", has_gpu=False)
    with pytest.raises(ConfigError, match=r"reference\.offload_parameters"):
        DeepSpeedEngine.check_settings(Scoring(zero_stage=3, offload_parameters=True), "reference", has_gpu=False)


@pytest.mark.parametrize("kind", [TorchEngine, DeepSpeedEngine])
def test_an_engine_asks_before_it_loads(kind):
    engine = kind(TrainingConfig(model="nowhere", offload_optimizer=True), where="learner", name="test")
    with pytest.raises(ConfigError, match=r"learner\.offload_optimizer"):
        engine.open(Ranks())
    engine.close()


def test_offload_reaches_deepspeed_as_its_settings():
    settings = {"offload_optimizer": True, "offload_parameters": True, "zero_stage": 3}
    config = TrainingConfig(model="m", **settings)
    DeepSpeedEngine.check_settings(config, "learner", has_gpu=True)
    moved = {"device": "cpu", "pin_memory": True}
    assert offloading(config) == {"offload_optimizer": moved, "offload_param": moved}
    assert offloading(TrainingConfig(model="m")) == {}
    engine = DeepSpeedEngine(config, where="learner", name="test")
    engine.device, engine.dtype = torch.device("cuda"), torch.bfloat16
    assert engine._settings()["zero_optimization"]["offload_param"] == moved


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["varlen", "sdpa"])
def test_products_that_are_kept_are_not_computed_again_and_gradients_stay(tiny_llama, attention):
    plain = opened(tiny_llama, attention=attention)
    saving = opened(tiny_llama, gradient_checkpointing=True, checkpoint_keeps="products", attention=attention)
    whole = opened(tiny_llama, gradient_checkpointing=True, attention=attention)
    engines = (plain, saving, whole)
    calls = [count_operations(partial(engine.accumulate, GROUPS, choose(WeightedTokens))) for engine in engines]
    products = [sum(found[name] for name in PRODUCTS) for found in calls]
    assert products[0] == products[1] < products[2]
    assert calls[0]["rsqrt"] < calls[1]["rsqrt"] == calls[2]["rsqrt"]  # norms are computed again by both
    found = gradients(saving)
    for name, expected in gradients(plain).items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)


def count_operations(work: Callable[[], object]) -> Counter[str]:
    """Return how often torch's operators run below autograd, by name."""
    counts: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    with Counting():
        work()
    return counts
