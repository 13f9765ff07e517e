"""LoRA: the mathematics against plain weights W + scale * B A, what is published and saved, what is refused."""

from __future__ import annotations

import importlib.util
import json
import math
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch
from torch.func import functional_call

from flowrl.config import Config, resolve
from flowrl.engines.base import Lora, Ranks, Schedule, Training, TrainingConfig
from flowrl.engines.canary import compare
from flowrl.engines.lora import targeted
from flowrl.engines.quantization import check_quantization
from flowrl.engines.torch import TorchEngine
from flowrl.engines.weights import Receiver
from flowrl.errors import ConfigError, ModelError
from flowrl.messages import Buffer
from tests.support.tiny import tiny_model, tiny_tokenizer
from tests.unit.engines.test_packing import random_groups
from tests.unit.engines.test_trainer import WeightedTokens, choose

if TYPE_CHECKING:
    from pathlib import Path

GROUPS = random_groups(seed=41, count=3)
LORA = Lora(rank=4, alpha=8)


def opened(directory: Path, lora: Lora = LORA, *, seed: int = 0, draw: bool = True, **settings: Any) -> TorchEngine:
    """Open an engine; `draw` gives B random values, or nothing that an adapter does could be seen."""
    config = TrainingConfig(
        model=str(directory),
        lora=lora,
        seed=seed,
        **{"dtype": "float32", "lr": 1e-3, "schedule": Schedule(kind="constant"), **settings},
    )
    engine = TorchEngine(config, where="learner", name="test")
    engine.open(Ranks())
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for name, parameter in engine.model.named_parameters():
            if draw and (".lora_B." in name or name == "score.weight"):
                parameter.normal_(std=0.03, generator=generator)
    return engine


def trained(engine: TorchEngine) -> list[tuple[str, torch.nn.Parameter]]:
    assert engine._adapter is not None
    return engine._adapter.parameters()


def base_of(engine: TorchEngine) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in engine.model.named_parameters() if not p.requires_grad}


def published(engine: TorchEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine._parameters()}


def slow_weights(base: dict[str, torch.Tensor], factors: dict[str, torch.Tensor], scale: float) -> dict[str, Any]:
    """Return plain weights as functions of A and B, entry by entry of the rank."""
    weights = dict(base)
    for name in base:
        layer = name.removesuffix(".weight")
        if f"{layer}.A" in factors:
            a, b = factors[f"{layer}.A"], factors[f"{layer}.B"]
            weights[name] = base[name] + scale * sum(torch.outer(b[:, r], a[r]) for r in range(a.shape[0]))
    return weights


def slow_loss(model: Any, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return WeightedTokens over GROUPS, one response at a time."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for item in GROUPS:
        for s, response in enumerate(item.responses):
            ids = torch.tensor([item.prompt_ids.tolist() + response.tolist()])
            logprobs = functional_call(model, weights, kwargs={"input_ids": ids}).logits[0, :-1].log_softmax(-1)
            taken = logprobs[range(len(ids[0]) - 1 - len(response), len(ids[0]) - 1), ids[0, -len(response) :]]
            ratio = (taken - taken.detach()).exp()
            advantages = torch.tensor(item.columns["advantages"][s].tolist())
            total = total - (ratio * advantages).sum()
            count += len(response)
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 8 / 4), (True, 8 / math.sqrt(4))])
def test_gradients_and_a_step_are_those_of_plain_weights_plus_a_product(tiny_llama, use_rslora, scale):
    from transformers import LlamaForCausalLM

    engine = opened(tiny_llama, msgspec.structs.replace(LORA, use_rslora=use_rslora), weight_decay=0.1)
    plain = LlamaForCausalLM.from_pretrained(tiny_llama).double()
    parameters = dict(trained(engine))
    short = {name: name.replace("lora_", "").replace(".default.weight", "") for name in parameters}
    factors = {short[name]: p.detach().double().requires_grad_() for name, p in parameters.items()}
    loss = slow_loss(plain, slow_weights({n: p.detach() for n, p in plain.named_parameters()}, factors, scale))
    loss.backward()

    metrics = engine.accumulate(GROUPS, choose(WeightedTokens))
    assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    gradients: dict[str, Any] = {name: factors[short[name]].grad for name in parameters}
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
    for name, parameter in parameters.items():
        assert gradients[name].abs().max() > 1e-4
        assert float((parameter.grad - gradients[name]).abs().max()) < 1e-6 * norm, name
    assert engine.apply()["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for name, parameter in parameters.items():
        before, gradient = factors[short[name]].detach(), gradients[name] * min(1.0, 1.0 / (norm + 1e-6))
        # AdamW's first step: both moments' corrections cancel, and decay is apart from them.
        expected = before - 1e-3 * 0.1 * before - 1e-3 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(
            parameter.detach().double(), expected, atol=1e-5, rtol=0
        )  # a gradient near 1e-8 says little


@pytest.mark.slow
def test_only_the_adapter_is_trained_and_the_base_stays_bit_for_bit(tiny_llama):
    engine = opened(tiny_llama, draw=False)
    before, first = base_of(engine), published(engine)
    for _ in range(2):
        engine.accumulate(GROUPS, choose(WeightedTokens))
        engine.apply()
    published(engine)
    after = base_of(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name for name, p in engine.model.named_parameters() if p.grad is not None} == set()
    assert sum(p.numel() for group in engine._optimizer.param_groups for p in group["params"]) == sum(
        p.numel() for _, p in trained(engine)
    )
    changed = {name for name, tensor in published(engine).items() if not torch.equal(tensor, first[name])}
    assert changed == {n for n in first if n.endswith("_proj.weight")}


def test_a_new_adapter_changes_nothing_and_depends_on_the_seed_alone(tiny_llama):
    from safetensors.torch import load_file

    first, other = opened(tiny_llama, draw=False), opened(tiny_llama, draw=False, seed=1)
    critic = opened(tiny_llama, draw=False, head="value")  # a new head draws random numbers as well
    stored = load_file(tiny_llama / "model.safetensors")
    assert published(first).keys() == stored.keys(), "a tied head travels once, under the name in the checkpoint"
    assert all(torch.equal(tensor, stored[name]) for name, tensor in published(first).items())
    same, theirs = dict(trained(critic)), dict(trained(other))
    for name, mine in trained(first):
        assert torch.equal(mine, same[name])
        assert torch.equal(mine, theirs[name]) == (".lora_B." in name)


FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"attention_bias": True},
    "GPT2LMHeadModel": {"n_embd": 64, "n_layer": 2, "n_head": 2},
    "MixtralForCausalLM": {"num_local_experts": 2},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "use_mamba_kernels": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_give_the_log_probs_of_the_adapter(tmp_path, family):
    import transformers

    torch.manual_seed(3)
    kind = getattr(transformers, family)
    size = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.1}
    kind(kind.config_class(**{**size, **heads, **FAMILIES[family]})).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    engine = opened(tmp_path / "base")
    with_adapter = engine.score(GROUPS)
    engine.save_model(tmp_path / "run" / "model", card="card")
    merged = opened(tmp_path / "run" / "model", Lora()).score(GROUPS)
    without = opened(tmp_path / "base", Lora()).score(GROUPS)
    pairs = [(a, b) for x, y in zip(with_adapter, merged, strict=True) for a, b in zip(x, y, strict=True)]
    assert max(abs(a - b).max() for a, b in pairs) < 1e-5
    assert max(abs(a - b).max() for a, b in zip(with_adapter[0], without[0], strict=True)) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("head", ["policy", "value"])
def test_peft_loads_the_adapter_and_transformers_the_merged_model(tiny_llama, tmp_path, head):
    import transformers
    from peft import PeftModel

    engine = opened(tiny_llama, head=head)
    engine.save_model(tmp_path / "model", card="card")
    kind: Any = transformers.LlamaForCausalLM if head == "policy" else transformers.LlamaForSequenceClassification
    options: dict[str, Any] = {} if head == "policy" else {"num_labels": 1}
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tiny_llama)
    assert written["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    base = kind.from_pretrained(written["base_model_name_or_path"], **options)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    merged = kind.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[5, 60, 7, 8, 9]])
    with torch.no_grad():
        found, expected = merged(input_ids=ids).logits, adapted(input_ids=ids).logits
        mine = engine.model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.squeeze(), expected.squeeze(), atol=1e-5, rtol=1e-5)


def test_a_published_version_proves_itself_by_digest_and_canary(tiny_llama):
    from transformers import LlamaForCausalLM

    from flowrl.engines.weights.base import unpack, verify
    from flowrl.engines.weights.manifest import decode_manifest
    from flowrl.engines.weights.shm import ShmFetcher

    engine = opened(tiny_llama)
    ids = [40 + (7 * i) % 200 for i in range(24)]
    weights = engine.publish(0, Buffer.ints(ids))
    manifest = decode_manifest(weights.manifest)
    buffers = ShmFetcher("test").fetch(manifest)
    verify(manifest, buffers, "test")
    receiver = LlamaForCausalLM.from_pretrained(tiny_llama)
    arrived = {n: t for bucket, raw in zip(manifest.buckets, buffers, strict=True) for n, t in unpack(bucket, raw)}
    assert arrived.keys() == dict(receiver.named_parameters()).keys()
    receiver.load_state_dict(arrived, strict=False)
    with torch.no_grad():
        logprobs = receiver(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    assert weights.canary is not None
    taken = logprobs[range(len(ids) - 1), ids[1:]].tolist()
    assert compare(weights.canary, taken, version=0, where="test").max < 1e-5
    engine.close()


def test_an_adapter_that_travels_is_the_one_in_its_file_byte_for_byte(tiny_llama, tmp_path):
    from safetensors.torch import load_file

    engine = opened(tiny_llama, Lora(rank=4, alpha=8, publish="adapter"))
    weights = engine.publish(0, Buffer.ints([5, 6, 7]))
    arrived = dict(Receiver("test").receive(weights))
    engine.save_model(tmp_path / "model", card="card")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert arrived.keys() == saved.keys()
    assert all(torch.equal(arrived[name], saved[name]) for name in saved)
    alone = sum(tensor.nbytes for tensor in saved.values())
    assert alone <= weights.size_bytes < alone + 64 * len(saved), "no byte of the model, but for where tensors begin"
    engine.close()


def test_training_goes_on_from_a_written_adapter(tiny_llama, tmp_path):
    first = opened(tiny_llama)
    first.save_model(tmp_path / "model", card="card")
    lora = msgspec.structs.replace(LORA, start=str(tmp_path / "adapter"))
    second = opened(tiny_llama, lora, seed=5, draw=False)
    for (name, mine), (_, theirs) in zip(trained(first), trained(second), strict=True):
        assert torch.equal(mine, theirs), name
    critic = opened(tiny_llama, lora, head="value", draw=False)  # a policy's adapter says nothing of a head
    assert not dict(critic.model.named_parameters())["score.weight"].any()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 8}, "has r=4, these settings make 8; set what it was made with"),
        ({"alpha": 16}, "has lora_alpha=8, these settings make 16"),
        ({"targets": ["q_proj"]}, r"24 tensors of the adapter in .* and of the model differ"),
    ],
)
def test_an_adapter_made_otherwise_is_refused(tiny_llama, tmp_path, settings, said):
    opened(tiny_llama).save_model(tmp_path / "model", card="card")
    lora = msgspec.structs.replace(LORA, start=str(tmp_path / "adapter"), **settings)
    with pytest.raises(ModelError, match=said):
        opened(tiny_llama, lora)


def test_an_adapter_of_another_models_shape_is_refused(tiny_llama, tmp_path):
    from safetensors.torch import load_file, save_file

    opened(tiny_llama).save_model(tmp_path / "model", card="card")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, file)
    with pytest.raises(ModelError, match=r"lora_A.weight: is \(4, 63\) in the adapter and \(4, 64\) in the model"):
        opened(tiny_llama, msgspec.structs.replace(LORA, start=str(tmp_path / "adapter")))


def test_targets_are_the_ends_of_names_and_others_are_refused(tiny_llama):
    engine = opened(tiny_llama, Lora(rank=2, targets=["q_proj", "layers.1.mlp.up_proj"]))
    names = {name.partition(".lora_")[0] for name, _ in trained(engine)}
    assert names == {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    for target in ("lm_head", "q_prj"):
        with pytest.raises(ConfigError, match=f"'{target}' is no linear layer.*; choose from down_proj, gate_proj"):
            opened(tiny_llama, Lora(rank=2, targets=[target]))
    with pytest.raises(ConfigError, match=r"targets: no layer of LlamaForCausalLM is chosen"):
        opened(tiny_llama, Lora(rank=2, targets=[]))


class Settings(Config):
    learner: Training = Training()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rank=4", "dropout=0.1"], "learner.lora: dropout 0.1: .*; leave it 0"),
        (["bits=4"], "learner.lora: bits 4 and start '' need an adapter; give its rank"),
        (["rank=4", "bits=5"], "learner.lora.bits"),
        (["rank=4", "targets=q_proj"], "learner.lora.targets"),
        (["rank=-1"], "learner.lora.rank"),
        (["rnk=4"], "did you mean 'rank'"),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        resolve(Settings, overrides=[f"learner.lora.{each}" for each in overrides])


def test_layers_that_share_a_weight_carry_no_adapter(tiny_llama):
    """One beside each of them could not be merged into the weight (Zamba has a block that several layers share)."""
    engine = opened(tiny_llama, lora=Lora(), draw=False)
    first, second = engine.model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    names = targeted(engine.model, Lora(rank=2, targets="all-linear"), "learner.lora.targets")
    assert not any("up_proj" in name for name in names)
    assert len(names) == 12
    with pytest.raises(ConfigError, match="'up_proj' is no linear layer of LlamaForCausalLM that can be adapted"):
        targeted(engine.model, Lora(rank=2, targets=["up_proj"]), "learner.lora.targets")
    engine.close()


def test_settings_take_a_list_of_targets():
    overrides = ["learner.lora.rank=16", "learner.lora.targets=[q_proj, v_proj]"]
    assert resolve(Settings, overrides=overrides).learner.lora == Lora(rank=16, targets=["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("is_there", "has_gpu", "missing"),
    [
        (False, True, "package bitsandbytes (pip install bitsandbytes)"),
        (True, False, "a CUDA device"),
        (False, False, "package bitsandbytes (pip install bitsandbytes) and a CUDA device"),
    ],
)
def test_quantization_names_all_that_is_missing(monkeypatch, is_there, has_gpu, missing):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if is_there else None)
    with pytest.raises(ConfigError) as refused:
        check_quantization(Lora(rank=4, bits=4), "learner", has_gpu=has_gpu)
    assert str(refused.value) == (
        f"learner.lora.bits: 4-bit weights need {missing}; set it to 0, for LoRA on unquantized weights"
    )
    check_quantization(Lora(rank=4), "learner", has_gpu=has_gpu)


def test_an_untied_head_stays_as_it_is(tmp_path):
    engine = opened(tiny_model(tmp_path, tied=False))
    head = published(engine)["lm_head.weight"]
    assert torch.equal(head, dict(engine.model.named_parameters())["lm_head.weight"])
