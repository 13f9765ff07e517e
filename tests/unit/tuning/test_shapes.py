import json
from functools import partial
from types import SimpleNamespace

import pytest

from flowrl.errors import ConfigError, ModelError
from flowrl.tuning import shapes
from flowrl.tuning.shapes import find_shape, parse_configs, shape_of

SETTINGS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}


def write_weights(directory, *, size):
    header = json.dumps({"a": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * size))


def test_of_a_mixture_only_the_routed_experts_multiply_a_token():
    shape = find_shape("mistralai/Mixtral-8x7B-Instruct-v0.1", {})
    assert shape.num_parameters == 46_702_792_704
    assert shape.active + 2 * shape.embedding == pytest.approx(12.9e9, rel=0.003)  # as 2401.04088 has it
    assert shape.largest == 8 * 2 * 14336 * 4096  # one tensor of gates and ups, as transformers holds them


def test_a_token_leaves_keys_and_values_of_every_layer():
    assert 2 * find_shape("meta-llama/Llama-2-7b-chat-hf", {}).kv == 512 * 1024  # bytes in bfloat16
    assert 2 * find_shape("meta-llama/Meta-Llama-3-8B-Instruct", {}).kv == 128 * 1024  # 8 of 32 heads
    assert find_shape("tiiuae/falcon-7b-instruct", {}).kv == 32 * 2 * 64  # one head


def test_a_score_head_takes_the_language_heads_place():
    policy = find_shape("mistralai/Mistral-7B-Instruct-v0.3", {})
    assert policy.scored().num_parameters == policy.num_parameters - 32768 * 4096 + 4096
    assert policy.scored().scored() == policy.scored()


def test_headers_say_how_many_parameters_there_are(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | {"intermediate_size": 128}))
    write_weights(tmp_path, size=42)
    shape = find_shape(str(tmp_path), {})
    assert (shape.num_parameters, shape.hidden, shape.query, shape.inner) == (42, 64, 64, 128)


@pytest.mark.slow
def test_a_config_alone_is_counted_without_making_a_model(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=2, tie_word_embeddings=False)  # fmt: skip
    config.save_pretrained(tmp_path)
    named = find_shape("nobody/knows-it", parse_configs([f"nobody/knows-it={tmp_path / 'config.json'}"]))
    assert named.num_parameters == LlamaForCausalLM(config).num_parameters()
    assert named == find_shape(str(tmp_path), {})


def cached_model(root, monkeypatch):
    """Make a hub's cache with the config of somebody's model and return the directory that is its snapshot."""
    import huggingface_hub

    snapshot = root / "models--nobody--knows-it" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(SETTINGS | {"intermediate_size": 128}))
    (root / "models--nobody--knows-it" / "refs").mkdir()
    (root / "models--nobody--knows-it" / "refs" / "main").write_text("0123")
    here = partial(huggingface_hub.try_to_load_from_cache, cache_dir=root)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", here)
    return snapshot


def test_a_run_knows_a_model_of_the_hubs_cache_by_its_headers(tmp_path, monkeypatch):
    write_weights(cached_model(tmp_path, monkeypatch), size=7)
    assert find_shape("nobody/knows-it", {}, is_for_run=True).num_parameters == 7


def hub_that_says(monkeypatch, config, weights):
    """Have the hub answer, in this process."""
    import huggingface_hub

    def info(name, timeout):
        return SimpleNamespace(safetensors=weights)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(config))
    monkeypatch.setattr(huggingface_hub, "model_info", info)
    monkeypatch.setattr(shapes, "run_in_process", lambda function, *paths, where: function(*paths))


def test_a_run_asks_the_hub_for_a_config_and_a_count_and_a_plan_does_not(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    hub_that_says(monkeypatch, tmp_path / "config.json", SimpleNamespace(total=42))
    shape = find_shape("nobody/knows-it", {}, is_for_run=True)
    assert (shape.num_parameters, shape.hidden) == (42, 64)
    with pytest.raises(ModelError, match="--model-config"):
        find_shape("nobody/knows-it", {})
    hub_that_says(monkeypatch, tmp_path / "config.json", None)
    with pytest.raises(ModelError, match="it has no safetensors"):
        find_shape("nobody/knows-it", {}, is_for_run=True)


def test_weights_that_are_in_the_cache_in_part_are_asked_for(tmp_path, monkeypatch):
    snapshot = cached_model(tmp_path, monkeypatch)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    hub_that_says(monkeypatch, snapshot / "config.json", SimpleNamespace(total=9))
    assert find_shape("nobody/knows-it", {}, is_for_run=True).num_parameters == 9


@pytest.mark.slow
def test_a_hub_that_is_not_reached_is_told_of_in_a_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"is not here, and the hub says nothing of it \(") as refused:
        find_shape("nobody/knows-it", {}, is_for_run=True)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.slow
def test_a_model_of_which_nothing_is_known_is_refused_with_what_to_do():
    with pytest.raises(ModelError, match="--model-config nobody/knows-it=FILE"):
        find_shape("nobody/knows-it", {})


def test_a_config_that_is_not_there_and_one_of_no_language_model_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not there"):
        parse_configs([f"a={tmp_path / 'none.json'}"])
    with pytest.raises(ConfigError, match="has no hidden_size"):
        shape_of({"model_type": "vision"}, 1)
