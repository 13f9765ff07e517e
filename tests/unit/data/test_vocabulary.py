"""Models that read the policy's tokens: the same id for each, and an embedding for it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from flowrl.data.models import check_reach, inspect_model
from flowrl.data.vocabulary import check_same_vocabulary
from flowrl.errors import DataError, ModelError

if TYPE_CHECKING:
    from pathlib import Path


def model(directory: Path, tokens: list[str], *, rows: int = 64) -> Path:
    """A directory with a word-level tokenizer and a config, and no weights in its safetensors."""
    directory.mkdir()
    vocab = {token: index for index, token in enumerate(["<unk>", *tokens])}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
                 "pre_tokenizer": None, "post_processor": None, "decoder": None,
                 "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}}  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows}))
    (directory / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return directory


def test_more_tokens_and_padded_embeddings_do_no_harm(tmp_path: Path):
    policy = model(tmp_path / "policy", ["a", "b"], rows=3)
    check_same_vocabulary(policy, model(tmp_path / "critic", ["a", "b", "c"], rows=128), "critic_model")
    check_same_vocabulary(policy, policy, "critic_model")


@pytest.mark.parametrize(
    ("tokens", "rows", "sentence"),
    [
        (["b", "a"], 64, "gives 2 of the policy's 3 tokens another id: 'a' is 1 in"),
        (["a"], 64, "gives 1 of the policy's 3 tokens another id: 'b' is 2 in .* and is none there"),
        (["a", "b"], 2, "embeds 2 tokens, the policy's tokenizer has 3"),
    ],
)
def test_another_vocabulary_is_refused(tokens: list[str], rows: int, sentence: str, tmp_path: Path):
    policy = model(tmp_path / "policy", ["a", "b"])
    with pytest.raises(ModelError, match=sentence) as caught:
        check_same_vocabulary(policy, model(tmp_path / "critic", tokens, rows=rows), "critic_model")
    assert str(caught.value).endswith("choose a model with the policy's tokenizer")


def test_a_model_with_positions_for_less_than_may_come_is_refused(tmp_path: Path):
    policy, critic = model(tmp_path / "policy", ["a", "b"]), model(tmp_path / "critic", ["a", "b"])
    settings = {"model_type": "llama", "vocab_size": 64, "max_position_embeddings": 32}
    (critic / "config.json").write_text(json.dumps(settings))
    check_same_vocabulary(policy, critic, "critic_model", longest=32)
    with pytest.raises(ModelError, match=r"positions for 32 tokens, and a prompt with its response may have 33"):
        check_same_vocabulary(policy, critic, "critic_model", longest=33)
    scaled = {**settings, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (critic / "config.json").write_text(json.dumps(scaled))
    check_same_vocabulary(policy, critic, "critic_model", longest=64)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([1, 64, 2], "a.jsonl:3: token 64 is in it, and .* embeds 64 \\(0 to 63\\); take the tokenizer that the model"),
        ([1] * 33, "a.jsonl:3: has 33 tokens, and .* positions for 32; leave longer rows out"),
    ],
)
def test_data_beyond_a_models_tokens_and_positions_are_refused(ids: list[int], said: str, tmp_path: Path):
    policy = model(tmp_path / "policy", ["a", "b"])
    settings = {"model_type": "llama", "vocab_size": 64, "max_position_embeddings": 32}
    (policy / "config.json").write_text(json.dumps(settings))
    check_reach(inspect_model(policy), "a.jsonl:3", [63] * 32, 32)
    with pytest.raises(DataError, match=said):
        check_reach(inspect_model(policy), "a.jsonl:3", ids, len(ids))
