"""Which adapters vLLM is sent as they are, and which are merged before, and why."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from flowrl.engines.base import Lora, travelling
from flowrl.engines.vllm_adapters import _of_the_first, is_adaptable, unserved, write_adapter
from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

VLLM = "flowrl.engines.vllm:VllmEngine"


def model_of(directory: Path, architecture: str, **settings: int) -> Path:
    (directory / "config.json").write_text(json.dumps({"architectures": [architecture], **settings}))
    return directory


@pytest.mark.parametrize(
    ("architecture", "is_served"),
    [
        ("LlamaForCausalLM", True),
        ("Phi3ForCausalLM", True),  # inherits from the Llama of another file
        ("FalconForCausalLM", False),
        ("NobodysForCausalLM", False),
    ],
)
def test_vllms_own_files_tell_which_models_take_adapters(architecture, is_served):
    assert is_adaptable(architecture) == is_served


@pytest.mark.parametrize(
    ("architecture", "settings", "lora", "why"),
    [
        ("LlamaForCausalLM", {}, Lora(rank=8), ""),
        ("LlamaForCausalLM", {"num_local_experts": 1}, Lora(rank=8), ""),
        ("MixtralForCausalLM", {"num_local_experts": 8}, Lora(rank=8), "MixtralForCausalLM has experts"),
        ("LlamaForCausalLM", {}, Lora(rank=600), "ranks up to 512"),
        ("LlamaForCausalLM", {}, Lora(rank=8, bits=4), "in 4 bits"),
        ("FalconForCausalLM", {}, Lora(rank=8), "not known to serve adapters on FalconForCausalLM"),
        ("LlavaForConditionalGeneration", {}, Lora(rank=8), "not known to serve adapters on Llava"),
    ],
)
def test_what_vllm_cannot_serve_is_named(tmp_path, architecture, settings, lora, why):
    found = unserved(lora, model_of(tmp_path, architecture, **settings))
    assert why in found
    assert bool(found) == bool(why)


def test_an_adapter_travels_where_it_is_served_and_is_merged_elsewhere_unless_it_must_travel(tmp_path):
    served, must = Lora(rank=8), Lora(rank=8, publish="adapter")
    llama = model_of(tmp_path, "LlamaForCausalLM")
    assert travelling(served, engine=VLLM, model=llama, where="learner") == served
    for lora in (Lora(), Lora(rank=8, publish="merged")):
        assert travelling(lora, engine=VLLM, model=llama, where="learner") == Lora()
    fake = "flowrl.simulation.fake:FakeGeneration"
    assert travelling(served, engine=fake, model=llama, where="learner") == Lora()
    with pytest.raises(
        ConfigError, match=r"learner\.lora\.publish: is adapter, but .*FakeGeneration serves no adapt.*merged"
    ):
        travelling(must, engine=fake, model=llama, where="learner")
    with pytest.raises(ConfigError, match="the graph's Sampler names no engine"):
        travelling(must, engine="", model=llama, where="learner")


@pytest.mark.slow  # peft takes long to import
def test_a_written_adapter_is_read_back_by_peft_with_its_scale(tmp_path):
    from peft import LoraConfig
    from safetensors.torch import load_file

    tensors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight": torch.ones(2, 2) for side in "AB"
    }
    write_adapter(tmp_path / "adapter", Lora(rank=2, alpha=6, use_rslora=True), tensors)
    read: Any = LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (read.r, read.lora_alpha, read.use_rslora, read.target_modules) == (2, 6, True, {"q_proj"})
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys() == tensors.keys()


def test_one_adapter_is_applied_to_every_token_as_if_each_had_its_own_copy():
    copied: list[int] = []

    def plain(inputs, factors, output, adapters, scale):  # as vLLM has it
        copied.append(len(adapters))
        output[:] = scale * torch.einsum("bi, boi -> bo", inputs, factors[adapters])

    inputs, factors = torch.randn(5, 3), torch.randn(1, 2, 3)
    found, expected = torch.zeros(5, 2), torch.zeros(5, 2)
    _of_the_first(plain)(inputs, factors, found, torch.zeros(5, dtype=torch.int64), 0.5)
    plain(inputs, factors, expected, torch.zeros(5, dtype=torch.int64), 0.5)
    assert torch.allclose(found, expected)
    two = torch.randn(2, 2, 3)
    _of_the_first(plain)(inputs, two, found, torch.tensor([0, 1, 0, 1, 0]), 1.0)
    assert torch.allclose(found[1], two[1] @ inputs[1])
    assert copied == [1, 5, 5]
