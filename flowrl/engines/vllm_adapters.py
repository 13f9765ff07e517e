"""LoRA in vLLM: which adapters it serves, and how a version's is handed to it.

vLLM holds the model as it was loaded and applies one adapter beside it, which each version replaces in place. A and B
are in the model's dtype, W is never written to. So that nothing of an update is rounded away.

Invariants:
- a model that is not known to be served so gets merged weights;
- an adapter of which vLLM would leave out a layer is refused. Its registry and model classes are read as text, for
  importing vLLM takes seconds.

Called by `VllmEngine`.

Tests: tests/contracts/test_generation_engines.py, tests/unit/engines/test_vllm_adapters.py
"""

from __future__ import annotations

import ast
import importlib.util
import json
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from vllm.lora.request import LoRARequest

    from flowrl.engines.base import Lora

MAX_RANK = 512  # that vLLM takes
ADAPTABLE = "SupportsLoRA"  # a base of vLLM's models that can be adapted
MODELS = "vllm.model_executor.models."
NUMBER = 1  # vLLM's of the only adapter


def unserved(lora: Lora, model: Path) -> str:
    """Return why vLLM cannot serve an adapter beside a model; "": it can."""
    settings: dict[str, Any] = json.loads((model / "config.json").read_bytes())
    architecture = str((settings.get("architectures") or ["a model without architectures"])[0])
    if lora.bits:
        return f"the learner holds the model in {lora.bits} bits and the generators hold it whole"
    if lora.rank > MAX_RANK:
        return f"vLLM takes ranks up to {MAX_RANK}"
    if any("expert" in name and isinstance(value, int) and value > 1 for name, value in settings.items()):
        return f"{architecture} has experts, beside which vLLM's CPU build fails to apply an adapter"
    if not architecture.endswith("ForCausalLM") or not is_adaptable(architecture):
        return f"this vLLM is not known to serve adapters on {architecture}"
    return ""


@cache
def is_adaptable(architecture: str) -> bool:
    """Return whether vLLM's class for an architecture, or one that it inherits from, takes adapters."""
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or not vllm.submodule_search_locations:
        return False
    models = Path(vllm.submodule_search_locations[0]) / "model_executor" / "models"
    for node in ast.walk(_parsed(models / "registry.py")):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == architecture and isinstance(value, ast.Tuple):
                    module, name = (str(each.value) for each in value.elts if isinstance(each, ast.Constant))
                    return _inherits(models, module, name)
    return False


def _inherits(models: Path, module: str, name: str) -> bool:
    """Return whether a class of one of vLLM's model files has the base, following its own files."""
    tree = _parsed(models / f"{module.replace('.', '/')}.py")
    origins = {
        alias.asname or alias.name: ((node.module or "").removeprefix(MODELS), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").startswith(MODELS))
        for alias in node.names
    }
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            return ADAPTABLE in bases or any(_inherits(models, *origins.get(base, (module, base))) for base in bases)
    return False


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8") if file.is_file() else "")


def engine_options(lora: Lora, model: Path) -> dict[str, Any]:
    """Return what an engine that serves one adapter is started with.

    Layers are named, for otherwise vLLM adapts the head as well, and can then score no canary.
    """
    from vllm.config.lora import MaxLoRARanks

    if not lora.rank:
        return {}
    most = min(rank for rank in get_args(MaxLoRARanks) if rank >= lora.rank)
    layers = _layers(model) if lora.targets == "all-linear" else {name.rpartition(".")[2] for name in lora.targets}
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": most, "lora_target_modules": sorted(layers)}


def _layers(model: Path) -> set[str]:
    """Return the last names of the matrices in a model's numbered layers."""
    from safetensors import safe_open

    found: set[str] = set()
    for file in model.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                parts = name.split(".")
                is_layers = parts[-1] == "weight" and any(part.isdigit() for part in parts)
                if is_layers and len(tensors.get_slice(name).get_shape()) == 2:
                    found.add(parts[-2])
    return found


def write_adapter(directory: Path, lora: Lora, tensors: dict[str, Tensor]) -> None:
    """Write a version's adapter as vLLM reads it: in peft's format, under the names that it came with."""
    from safetensors.torch import save_file

    directory.mkdir(exist_ok=True)
    layers = sorted({name.split(".")[-3] for name in tensors})
    settings = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.use_rslora}
    (directory / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": layers}))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / "adapter_model.safetensors")


def request_for(directory: Path, *, is_new: bool = False) -> LoRARequest:
    """Return what a request names the adapter by; `is_new` has vLLM read it in place of the one before."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("policy", NUMBER, str(directory), load_inplace=is_new)


def left_out(runner: Any) -> list[str]:
    """Return the layers of the adapter that a worker's model runner does not apply."""
    manager = runner.lora_manager._adapter_manager
    return sorted(set(manager.get_adapter(NUMBER).loras) - set(manager.modules))


def spare_copies() -> None:
    """Have vLLM's CPU build read the factors of the one adapter once; it copies them for every token of a step."""
    from vllm.lora.ops.torch_ops import lora_ops

    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"):
        setattr(lora_ops, name, _of_the_first(getattr(lora_ops, name)))


def _of_the_first(operation: Callable[..., None]) -> Callable[..., None]:
    """Return an operation that, where there is one adapter, takes it for all tokens by the first one's index."""

    @wraps(operation)
    def applied(inputs: Tensor, factors: Tensor, output: Tensor, adapters: Tensor, *more: Any, **named: Any) -> None:
        operation(inputs, factors, output, adapters[:1] if len(factors) == 1 else adapters, *more, **named)

    return applied
