"""Reading a packed batch gives the numbers of a plain forward of each sequence."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from flowrl.data.models import tensors_in
from flowrl.engines import models
from flowrl.engines.base import TrainingConfig
from flowrl.engines.models import (
    TokenReader,
    _class_with_score,
    check_weights,
    choose_dtype,
    choose_layout,
    load_model,
)
from flowrl.engines.packing import pack, plan, unpack
from flowrl.errors import ModelError
from tests.unit.engines.test_packing import CPU, random_groups

if TYPE_CHECKING:
    from flowrl.algorithms.base import Head


def load(directory, head: Any = "policy") -> Any:
    config = TrainingConfig(model=str(directory), head=head, dtype="float32")
    return load_model(config, where="learner", dtype=torch.float32, device=CPU)


@torch.no_grad()
def plain(model, groups, head):
    """Forward each sequence alone, without cache, mask or packing."""
    found = {}
    for g, item in enumerate(groups):
        for s, response in enumerate(item.responses):
            prompt = item.prompt_ids.tolist()
            ids = torch.tensor([prompt + response.tolist()])
            states = model.base_model(input_ids=ids).last_hidden_state[0]
            if head == "policy":
                logprobs = model.lm_head(states[:-1]).log_softmax(-1)
                found[g, s] = logprobs[torch.arange(len(prompt) - 1, len(ids[0]) - 1), ids[0, len(prompt) :]]
            else:
                first = len(prompt) if head == "reward" else len(prompt) - 1
                found[g, s] = model.score(states)[first : first + len(response), 0]
    return found


def worst_difference(found, expected):
    return max(float((torch.from_numpy(found[key]) - expected[key]).abs().max()) for key in expected)


def read(reader, groups, layout, reads, budget, **options):
    (batches,) = plan(groups, layout=layout, reads=reads, budget=budget)
    packed = [pack(groups, rows, layout=layout, reads=reads, device=CPU) for rows in batches]
    return unpack((batch, reader(batch, **options)[0].detach()) for batch in packed)


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("budget", [1, 40, 4000])
def test_log_probs_are_those_of_a_plain_forward(tiny_llama, layout, budget):
    model, groups = load(tiny_llama), random_groups(seed=5, count=6)
    expected = plain(model, groups, "policy")
    found = read(TokenReader(model, head="policy", temperature=1.0), groups, layout, "before", budget)
    assert worst_difference(found, expected) <= 1e-5


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize(("head", "reads"), [("value", "before"), ("reward", "after")])
def test_values_are_read_before_and_rewards_after_each_token(tiny_reward_model, layout, head, reads):
    model, groups = load(tiny_reward_model, head), random_groups(seed=6, count=5)
    expected = plain(model, groups, head)
    found = read(TokenReader(model, head=head, temperature=1.0), groups, layout, reads, 60)
    assert worst_difference(found, expected) <= 1e-5


def test_chunks_change_neither_log_probs_nor_gradients(tiny_llama):
    model, groups = load(tiny_llama), random_groups(seed=8, count=3)
    reader = TokenReader(model, head="policy", temperature=0.7)
    ((rows,),) = plan(groups, layout="shared", reads="before", budget=4000)
    batch = pack(groups, rows, layout="shared", reads="before", device=CPU)
    results = []
    for num_chunks in (1, 4):
        model.zero_grad()
        logprobs_N, entropy_N = reader(batch, needs_entropy=True, num_chunks=num_chunks)
        (logprobs_N.square().sum() + entropy_N.sum()).backward()
        gradient = model.lm_head.weight.grad.clone()
        results.append((logprobs_N.detach(), entropy_N.detach(), gradient))
    for one, four in zip(*results, strict=True):
        torch.testing.assert_close(one, four, atol=1e-4, rtol=1e-4)
    assert reader.num_chunks(1) == 1
    reader.max_logits = 3200
    assert reader.num_chunks(11) == 2  # 320 words in the vocabulary


def test_entropy_and_temperature_are_those_of_the_sampling_distribution(tiny_llama):
    model, groups = load(tiny_llama), random_groups(seed=9, count=1)
    ((rows,),) = plan(groups, layout="padded", reads="before", budget=4000)
    batch = pack(groups, rows, layout="padded", reads="before", device=CPU)
    logprobs_N, entropy_N = TokenReader(model, head="policy", temperature=0.5)(batch, needs_entropy=True)
    logits = model(input_ids=batch.input_ids_RL, attention_mask=batch.attention(torch.float32)).logits
    dist = torch.distributions.Categorical(logits=logits.flatten(0, 1)[batch.read_N] / 0.5)
    torch.testing.assert_close(logprobs_N, dist.log_prob(batch.target_N), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy_N, dist.entropy(), atol=1e-5, rtol=1e-5)


def test_a_value_model_from_a_language_model_starts_at_zero(tiny_llama):
    reader = TokenReader(load(tiny_llama, "value"), head="value", temperature=1.0)
    found = read(reader, random_groups(seed=1, count=2), "shared", "before", 500)
    assert all(not values.any() for values in found.values())


def test_a_value_model_from_a_reward_model_keeps_its_head(tiny_reward_model):
    assert load(tiny_reward_model, "value").score.weight.abs().sum() > 0


def test_a_sequence_beyond_the_sliding_window_is_padded(tiny_llama):
    model = load(tiny_llama)
    assert choose_layout(model, longest=100, kind="sdpa") == "shared"
    model.config.sliding_window = 64
    assert choose_layout(model, longest=100, kind="sdpa") == "padded"
    assert choose_layout(model, longest=64, kind="sdpa") == "shared"


def test_a_missing_directory_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(tmp_path / "nowhere")


def test_a_model_without_tokenizer_is_a_model_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no tokenizer"):
        load(tmp_path)


def test_pickled_weights_are_a_model_error(tiny_llama, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).symlink_to(tiny_llama / name)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be loaded as a policy model"):
        load(tmp_path)


def test_auto_takes_bfloat16_only_where_the_processor_is_faster_in_it(monkeypatch):
    for bfloat16, expected in (("fast", torch.bfloat16), ("slow", torch.float32), ("none", torch.float32)):
        monkeypatch.setattr(models, "bfloat16_here", lambda answer=bfloat16: answer)
        assert choose_dtype("auto", CPU) == expected
    assert choose_dtype("float32", CPU) == torch.float32


def changed(directory, out, change, **settings):
    """Copy a model with its weights and its config.json changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(directory, out)
    tensors = change(load_file(directory / "model.safetensors"))
    save_file({name: each.contiguous() for name, each in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return out


def as_it_is(tensors):
    return tensors


CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"]}


@pytest.mark.parametrize(
    ("head", "change", "settings", "message"),
    [
        (
            "policy",
            lambda t: {name: each for name, each in t.items() if not name.startswith("model.layers.1.mlp.up")},
            {},
            r"the weights in \S+ lack 1 that LlamaForCausalLM has \(model\.layers\.1\.mlp\.up_proj\.weight\)",
        ),
        (
            "policy",
            lambda t: {f"module.{name}": each for name, each in t.items()},
            {},
            r"lack 21 that .*besides they hold module\.model\.embed_tokens\.weight, ",
        ),
        ("policy", as_it_is, {"num_hidden_layers": 3}, r"lack 9 that LlamaForCausalLM has \(model\.layers\.2\."),
        ("policy", as_it_is, {"tie_word_embeddings": False}, r"lack 1 that LlamaForCausalLM has \(lm_head\.weight\)"),
        (
            "policy",
            as_it_is,
            {"vocab_size": 321},
            r"is \[320, 64\] in \S+ and \[321, 64\] in LlamaForCausalLM by its con",
        ),
        (
            "policy",
            as_it_is,
            {"hidden_size": "64"},
            r"cannot be loaded as a policy model \(Validation error for field 'hi",
        ),
        ("policy", as_it_is, {"model_type": "vit"}, r"has no causal language model for the ViTConfig in "),
        *(
            (
                head,
                as_it_is,
                {"quantization_config": {"quant_method": how, "bits": 4}},
                rf"are quantized \({how}, by the",
            )
            for head, how in (("policy", "gptq"), ("policy", "fp8"), ("value", "awq"), ("reward", "bitsandbytes"))
        ),
        ("policy", as_it_is, CLASSIFIER, r"is a classifier \(LlamaForSequenceClassification\)"),
        ("policy", as_it_is, {"is_encoder_decoder": True}, r"is an encoder-decoder \(LlamaForCausalLM\)"),
        ("reward", as_it_is, CLASSIFIER, r"lack 1 that LlamaForSequenceClassification has \(score\.weight"),
        (
            "reward",
            lambda t: t | {"score.weight": torch.ones(2, 64)},
            CLASSIFIER,
            r"score\.weight is \[2, 64\] in \S+ and \[1, 64\] in LlamaForSequenceClassification",
        ),
    ],
)
def test_weights_that_would_be_made_up_are_refused_before_and_when_a_model_is_loaded(
    tiny_llama, tmp_path, head, change, settings, message
):
    directory = changed(tiny_llama, tmp_path / "model", change, **settings)
    with pytest.raises(ModelError, match=message):
        check_weights(directory, head, "learner", tensors_in(directory, "learner"))
    with pytest.raises(ModelError, match=message):
        load(directory, head)


@pytest.mark.parametrize("head", ["policy", "value"])
def test_weights_that_a_model_has_no_place_for_are_said(tiny_llama, tmp_path, head: Any):
    directory = changed(tiny_llama, tmp_path / "model", as_it_is, num_hidden_layers=1)
    check_weights(directory, head, "learner", tensors_in(directory, "learner"))
    said = list[str]()
    config = TrainingConfig(model=str(directory), head=head, dtype="float32")
    load_model(config, where="learner", dtype=torch.float32, device=CPU, say=said.append)
    (line,) = said
    assert line.startswith(f"9 weights in {directory}, for which Llama")
    assert "(model.layers.1.input_layernorm.weight, " in line


def test_whole_models_are_taken_without_a_word(tiny_llama, tiny_reward_model):
    said, heads = list[str](), cast("list[Head]", ["policy", "value", "reward"])
    for directory, head in zip((tiny_llama, tiny_llama, tiny_reward_model), heads, strict=True):
        check_weights(directory, head, "learner", tensors_in(directory, "learner"))
        config = TrainingConfig(model=str(directory), head=head, dtype="float32")
        load_model(config, where="learner", dtype=torch.float32, device=CPU, say=said.append)
    assert not said


def test_a_head_of_ours_does_not_take_the_name_of_another_of_transformers():
    """Whoever loads it by that name would get a head of random numbers."""
    from transformers import ElectraConfig, GraniteConfig

    size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    found = [_class_with_score(kind(**size), "learner").__name__ for kind in (ElectraConfig, GraniteConfig)]
    assert found == ["ElectraForCausalLMForSequenceClassification", "GraniteForSequenceClassification"]
