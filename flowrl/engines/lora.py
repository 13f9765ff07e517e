"""Low-rank adapters on a loaded model (LoRA, Hu et al. 2021, arXiv:2106.09685, equation 3; the layers are peft's).

A linear layer becomes y = W x + scale * B (A x). W stays as it is, A [rank, in] starts random, B [out, rank] at zero,
scale = alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732). `Adapter` puts such layers
into a model, says what the model's plain weights are with them merged in, and writes them in peft's format.

Invariants:
- nothing ever writes to W;
- only A, B and the score head of a value or reward model take gradients;
- merged weights are W + scale * B A summed in float32 and rounded once to the model's dtype, under the names that the
  model has without adapters;
- heads and embeddings, tied or not, carry no adapter, nor do layers that share their weight;
- a new adapter depends on the seed alone, so every rank, engine and ZeRO stage starts from the same one.

Experts that transformers holds as one tensor are no linear layers and stay frozen. An adapter that is given as the
model itself is merged into its base before anything is loaded, and no longer trained; `start` goes on training it.
Called by trainer.

Tests: tests/unit/engines/test_lora.py
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from flowrl.engines.models import gathered
from flowrl.engines.quantization import dequantized
from flowrl.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from transformers import PreTrainedModel

    from flowrl.engines.base import Lora, TrainingConfig

    Named = list[tuple[str, nn.Parameter]]
    Whole = Callable[[Named], Iterator[tuple[str, Tensor]]]

ADAPTER = "default"  # peft's name for the only adapter of a model
PREFIX = "base_model.model."  # stands before every name in an adapter's file
CARD = """---
library_name: peft
base_model: {base}
tags: [flowrl, lora]
---
A LoRA adapter of rank {rank}, trained with flowrl. Load it with `PeftModel.from_pretrained(base, directory)` on top of
`{base}`, or continue it with `--set learner.lora.start=DIRECTORY --set learner.lora.rank={rank}`.
"""


class Adapter:
    """The low-rank adapter of one model."""

    def __init__(self, model: PreTrainedModel, config: TrainingConfig, *, where: str) -> None:
        """Put adapters into a model and freeze everything else but the score head of a value or reward model.

        Raises:
            ConfigError: the model has no such layers.
            ModelError: the adapter to start from does not fit the settings or the model.
        """
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        self._model = model
        self._dtype = model.dtype
        self._is_policy = config.head == "policy"
        names = targeted(model, config.lora, f"{where}.lora.targets")
        self._config = LoraConfig(
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            use_rslora=config.lora.use_rslora,
            target_modules=names,
            fan_in_fan_out=not isinstance(model.get_submodule(names[0]), nn.Linear),
            task_type="CAUSAL_LM" if self._is_policy else "SEQ_CLS",
            base_model_name_or_path=config.model,
        )
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            # A model of its own would have its targets renamed, where transformers fuses experts, and lose those.
            inject_adapter_in_model(self._config, nn.ModuleDict({"wrapped": model}), adapter_name=ADAPTER)
        self._layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
        if self._layers.keys() != set(names):  # peft has put some of them elsewhere, into fused experts
            what = (
                f"{', '.join(sorted(self._layers.keys() ^ set(names))[:3])} cannot be adapted in {type(model).__name__}"
            )
            raise ConfigError(
                f"{where}.lora.targets", what, "list the layers, such as [q_proj, k_proj, v_proj, o_proj]"
            )
        for layer in self._layers.values():
            for factor in (layer.lora_A, layer.lora_B):
                factor.to(self._dtype)  # as every engine holds weights; their float32 copies are the optimizer's
        if not self._is_policy:
            cast("nn.Module", model.score).requires_grad_(True)
            self._config.modules_to_save = ["score"]  # not earlier, or peft would hold a second copy of it
        self._config.inference_mode = True  # as peft writes it
        self._config.target_modules = _shortest(names, model)
        if config.lora.start:
            self._continue(Path(config.lora.start), where)

    def parameters(self) -> Named:
        """Return what an adapter's file holds, by its name in the model: A, B, and the score head."""
        named = self._model.named_parameters()
        return [pair for pair in named if _is_factor(pair[0]) or (not self._is_policy and pair[0].startswith("score."))]

    def merged(self, whole: Whole) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter of the plain model once, in the model's dtype, with the adapter merged in.

        `whole` yields parameters unsharded, one or a few at a time; so does this.
        """
        factors = {name: tensor.float().clone() for name, tensor in whole(self._factors())}
        for name, tensor in whole([pair for pair in self._model.named_parameters() if not _is_factor(pair[0])]):
            layer, is_adapted, rest = name.partition(".base_layer.")
            tensor = self._plain(name, tensor)
            if not is_adapted:
                yield name, tensor
            elif rest == "weight":
                yield f"{layer}.weight", (tensor.float() + self._delta(layer, factors)).to(self._dtype)
            else:
                yield f"{layer}.{rest}", tensor

    def stored(self, whole: Whole) -> Iterator[tuple[str, Tensor]]:
        """Yield `parameters` whole, under their names in an adapter's file."""
        return ((_stored_name(name), tensor) for name, tensor in whole(self.parameters()))

    def write(self, directory: Path, stored: Iterable[tuple[str, Tensor]]) -> None:
        """Write what `stored` yields in peft's format."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        self._config.save_pretrained(str(directory))
        tensors = {name: tensor.cpu().contiguous() for name, tensor in stored}
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        base = self._config.base_model_name_or_path
        (directory / "README.md").write_text(CARD.format(base=base, rank=self._config.r))

    def _factors(self) -> Named:
        return [pair for pair in self._model.named_parameters() if _is_factor(pair[0])]

    def _delta(self, layer: str, factors: dict[str, Tensor]) -> Tensor:
        """Return scale * B A of a layer in float32, laid out as its weight is."""
        a, b = (factors[f"{layer}.lora_{side}.{ADAPTER}.weight"] for side in "AB")
        delta = self._layers[layer].scaling[ADAPTER] * (b @ a)
        return delta.T if self._layers[layer].fan_in_fan_out else delta

    def _plain(self, name: str, tensor: Tensor) -> Tensor:
        """Return a parameter as it counts in the forward pass: dequantized where it is quantized."""
        if tensor.is_floating_point():
            return tensor
        return dequantized(self._model.get_submodule(name.rpartition(".")[0])).to(self._dtype)

    def _continue(self, directory: Path, where: str) -> None:
        """Take over the values of an adapter in peft's format.

        Raises:
            ModelError: there is none, or it was made with other settings or for another model.
        """
        from peft import LoraConfig
        from safetensors.torch import load_file

        where = f"{where}.lora.start"
        try:
            stored = LoraConfig.from_pretrained(str(directory))
            tensors = load_file(directory / "adapter_model.safetensors")
        except (OSError, ValueError, TypeError) as error:
            what = f"{directory} cannot be read as a LoRA adapter ({error})"
            raise ModelError(where, what, "give a directory in peft's format") from error
        for field in ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "lora_bias"):
            theirs, ours = getattr(stored, field), getattr(self._config, field)
            if theirs != ours:
                what = f"the adapter in {directory} has {field}={theirs}, these settings make {ours}"
                raise ModelError(where, what, "set what it was made with, or merge it with `flowrl export`")
        expected = {_stored_name(name): parameter for name, parameter in self.parameters()}
        left_out = {name for name in expected if ".score." in name}  # a policy's adapter has no head
        if not (expected.keys() - left_out <= tensors.keys() <= expected.keys()):
            odd = sorted(tensors.keys() ^ expected.keys())
            what = f"{len(odd)} tensors of the adapter in {directory} and of the model differ, such as {odd[0]}"
            raise ModelError(where, what, "give the base model and the targets that it was made with")
        with torch.no_grad():
            for name, tensor in tensors.items():
                _copy(tensor, expected[name], f"{where}: {name}")


def targeted(model: PreTrainedModel, lora: Lora, where: str) -> list[str]:
    """Return the names of the layers to adapt, in the model's order.

    Raises:
        ConfigError: a target is the end of no linear layer's name, or of one whose weight is shared, or read past its
            forward.
    """
    from transformers.pytorch_utils import Conv1D

    heads = [head for head in (model.get_output_embeddings(), getattr(model, "score", None)) if head is not None]
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and _is_plain(module) and not any(module is head for head in heads)
    ]
    parts = (part for module in model.modules() for part in module._parameters.values() if part is not None)
    owners = Counter(map(id, parts))  # an adapter beside one of several that share a weight could not be merged into it
    usable = [name for name in linear if not _is_read_by_kernels(model, name)]
    usable = [name for name in usable if owners[id(model.get_submodule(name).weight)] == 1]
    chosen = usable if lora.targets == "all-linear" else []
    for target in lora.targets if lora.targets != "all-linear" else ():
        found = [name for name in usable if name == target or name.endswith(f".{target}")]
        if not found:
            known = sorted({name.rpartition(".")[2] for name in usable})
            what = f"{target!r} is no linear layer of {type(model).__name__} that can be adapted"
            raise ConfigError(where, what, f"choose from {', '.join(known)}, or all-linear")
        chosen += found
    if not chosen:
        raise ConfigError(
            where, f"no layer of {type(model).__name__} is chosen", "name linear layers, or take all-linear"
        )
    return [name for name in usable if name in chosen]


def _shortest(names: list[str], model: nn.Module) -> list[str]:
    """Return the ends of the names where these name the same layers, as other readers of adapters expect."""
    ends = {name.rpartition(".")[2] for name in names}
    so_named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends) if so_named == set(names) else names


def _is_plain(module: nn.Module) -> bool:
    """Say whether a layer gives one tensor; routers are linear layers that go on to choose experts."""
    by = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    if not isinstance(module, nn.Linear) or by.__module__.startswith(("torch.", "bitsandbytes.")):
        return True
    shadow = copy.copy(module)  # without values, so that nothing is computed and no shard is asked for
    weight, bias = torch.empty(module.out_features, module.in_features, device="meta"), None
    if module.bias is not None:
        bias = nn.Parameter(torch.empty(module.out_features, device="meta"))
    shadow._parameters = {"weight": nn.Parameter(weight), "bias": bias}
    try:
        return isinstance(type(module).forward(shadow, torch.empty(2, module.in_features, device="meta")), Tensor)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


def _is_read_by_kernels(model: nn.Module, name: str) -> bool:
    """Say whether a layer's weight is handed to a state-space kernel, which knows nothing of an adapter around it."""
    parent, _, last = name.rpartition(".")
    return hasattr(model.get_submodule(parent), "A_log") and last != "in_proj"


def _is_factor(name: str) -> bool:
    return f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name


def _stored_name(name: str) -> str:
    """Return a parameter's name in an adapter's file."""
    return PREFIX + (name.replace(f".{ADAPTER}.weight", ".weight") if _is_factor(name) else name)


def _copy(tensor: Tensor, parameter: nn.Parameter, where: str) -> None:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    if tensor.shape != shape:
        what = f"is {tuple(tensor.shape)} in the adapter and {tuple(shape)} in the model"
        raise ModelError(where, what, "give the base model that it was made for")
    with gathered([parameter]):
        parameter.copy_(tensor)
