"""Models that read the policy's tokens: the same id for each, and an embedding for it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from flowrl.data.vocabulary import check_same_vocabulary
from flowrl.errors import ModelError

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
