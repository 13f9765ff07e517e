"""An adapter is merged whole or not at all: of what it lacks peft makes a new one, which changes nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from flowrl.data.adapters import WEIGHTS, merge
from flowrl.errors import ModelError
from tests.support.tiny import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

IDS = torch.tensor([[5, 60, 7, 8]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"))


def read(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def adapted(base: Path, out: Path) -> torch.Tensor:
    """Write an adapter that changes what the model says; returns the logits with it."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(read(base), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.1)
    model.save_pretrained(str(out))
    return model(IDS).logits.detach()


def rewritten(directory: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(directory / WEIGHTS)), directory / WEIGHTS)


def configured(directory: Path, **settings: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_merged_adapter_says_what_it_said_beside_its_base(base, tmp_path):
    expected = adapted(base, tmp_path / "adapter")
    rewritten(tmp_path / "adapter", lambda t: {n.replace(".weight", ".default.weight"): each for n, each in t.items()})
    merge(tmp_path / "adapter", base, tmp_path / "merged")
    torch.testing.assert_close(read(tmp_path / "merged")(IDS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda t: {f"base_model.model.{n}": each for n, each in t.items()}, {}, "8 weights are not in the adapter, "),
        (lambda t: {n: each for n, each in t.items() if "layers.0" in n}, {}, "4 weights are not in the adapter, "),
        (lambda t: t, {"target_modules": ["q_proj"]}, r"4 weights of the adapter have no place, such as .*up_proj"),
        (lambda t: t, {"use_dora": True}, r"4 weights are not in the adapter, such as \S+lora_magnitude_vector"),
    ],
)
def test_what_an_adapter_lacks_or_has_too_much_is_refused(base, tmp_path, change, settings, message):
    adapted(base, tmp_path / "adapter")
    rewritten(tmp_path / "adapter", change)
    configured(tmp_path / "adapter", **settings)
    with pytest.raises(ModelError, match=message):
        merge(tmp_path / "adapter", base, tmp_path / "merged")


def test_an_adapter_without_weights_is_refused(base, tmp_path):
    adapted(base, tmp_path / "adapter")
    (tmp_path / "adapter" / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        merge(tmp_path / "adapter", base, tmp_path / "merged")


def test_an_adapter_is_not_merged_into_half_a_model(base, tmp_path):
    from tests.unit.engines.test_models import changed

    adapted(base, tmp_path / "adapter")
    half = changed(base, tmp_path / "half", lambda t: {n: e for n, e in t.items() if "layers.1.mlp" not in n})
    with pytest.raises(
        ModelError, match=r"cannot be merged .*3 weights are not there: model\.layers\.1\.mlp\.down_proj"
    ):
        merge(tmp_path / "adapter", half, tmp_path / "merged")
