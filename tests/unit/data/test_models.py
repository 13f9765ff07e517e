from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flowrl.data.models import COPIES, PATTERNS, inspect_model, prepare_model
from flowrl.errors import ModelError


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_whole_directory_is_returned_as_it_is(tiny):
    assert prepare_model(str(tiny)) == tiny.resolve()


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", r"no \*\.safetensors"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_missing_part_is_named(model, missing, said):
    (model / missing).unlink()
    with pytest.raises(ModelError, match=said):
        prepare_model(str(model))


def test_other_weight_files_are_named_where_safetensors_lack(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"found pytorch_model\.bin.*save_pretrained"):
        prepare_model(str(model))


def test_adapter_without_its_base_is_refused(model):
    (model / "config.json").rename(model / "adapter_config.json")
    with pytest.raises(ModelError, match="names no base_model_name_or_path"):
        prepare_model(str(model))


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_cut_off_weights_are_refused(model, kept):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"cut off|not a whole"):
        prepare_model(str(model))


def test_shard_that_the_index_names_must_be_there(model):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks model-00002\.safetensors"):
        prepare_model(str(model))


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "vocab.txt", "qwen.tiktoken"])
def test_a_tokenizer_of_any_kind_is_one(model: Path, name: str):
    (model / "tokenizer.json").rename(model / name)
    assert prepare_model(str(model)) == model


def test_weights_that_lie_there_twice_are_counted_once(model: Path):
    before = inspect_model(model).num_parameters
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")
    assert inspect_model(model).num_parameters == before


@pytest.mark.slow  # imports huggingface_hub
def test_of_a_repository_all_that_is_read_is_fetched_and_no_weights_twice():
    from huggingface_hub.utils import filter_repo_objects

    read = ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "spiece.model",
            "merges.txt", "vocab.txt", "qwen.tiktoken", "chat_template.jinja", "additional_chat_templates/rag.jinja",
            "modeling_own.py"]  # fmt: skip
    others = ["consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin", "original/a.pth"]
    assert list(filter_repo_objects([*read, *others], allow_patterns=PATTERNS, ignore_patterns=COPIES)) == read


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "a/b/c"])
def test_path_that_is_not_there_is_never_looked_up_on_the_hub(name):
    with pytest.raises(ModelError, match="no such directory"):
        prepare_model(name)


@pytest.mark.slow  # imports huggingface_hub
def test_unreachable_model_says_what_to_do():
    with pytest.raises(ModelError, match=r"nobody/nothing: cannot be fetched.*SmolLM2-135M-Instruct, which is bundled"):
        prepare_model("nobody/nothing")


def test_card_is_what_the_model_is(tiny):
    from transformers import AutoModelForCausalLM

    card = inspect_model(tiny)
    loaded = AutoModelForCausalLM.from_pretrained(tiny)
    assert card.num_parameters == sum(p.numel() for p in loaded.parameters())
    assert (card.architecture, card.max_context, card.vocab_size) == ("LlamaForCausalLM", 512, 320)
    assert (card.tied, card.dtype, card.has_chat_template) == (True, "float32", True)


@pytest.mark.slow  # a process of its own
def test_importing_data_and_rewards_loads_nothing_heavy():
    modules = "flowrl.data.prompts, flowrl.data.models, flowrl.rewards.function, flowrl.rewards.verify"
    heavy = ["torch", "transformers", "datasets", "pyarrow", "reasoning_gym", "huggingface_hub", "jinja2"]
    code = f"import sys, {modules}; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
