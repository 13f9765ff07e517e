"""What training does without to save memory: frozen parameters, activations computed again, state moved to the CPU.

Each is asked for by a setting of `Training` and refused where it would do nothing: before the start by `check_savings`
and `check_offload`. Called by the stages' check, and by trainer and the DeepSpeed engine, once, on the loaded model.

Tests: tests/unit/engines/test_savings.py
"""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from flowrl.engines.base import CheckpointKeeps, Scoring, Training, TrainingConfig

DEEPSPEED, FSDP = "flowrl.engines.deepspeed:DeepSpeedEngine", "flowrl.engines.fsdp:Fsdp2Engine"


# Of torch's operators those that cost by the square of a model's width, experts' among them.
PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "_grouped_mm"})


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trained parameters in the optimizer's groups: matrices decay; norms, biases and embeddings do not.

    An embedding that is also the head is an embedding.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not weight_decay:
        return [{"params": trained, "weight_decay": 0.0}]
    embedded = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    decays = [len(getattr(p, "ds_shape", p.shape)) >= 2 and id(p) not in embedded for p in trained]
    groups = [
        {
            "params": [p for p, does in zip(trained, decays, strict=True) if does is decayed],
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    return [group for group in groups if group["params"]]


def freeze(model: PreTrainedModel, patterns: Sequence[str], where: str) -> None:
    """Let no parameter train whose name in the model one of the patterns matches: `*`, `?` and `[01]` as in a shell.

    A tied parameter goes by its first name.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matched = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matched:
            close = difflib.get_close_matches(pattern, parameters, n=1, cutoff=0.0)[0]
            what = f"{pattern!r} matches none of the {len(parameters)} parameters of {type(model).__name__}"
            raise ConfigError(f"{where}.freeze", what, f"one of them is called {close}")
        for name in matched:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        what = f"{', '.join(patterns)} match all {len(parameters)} parameters"
        raise ConfigError(f"{where}.freeze", what, "leave some to train")


def layers_of(model: nn.Module) -> list[Any]:
    """Return a model's layers, which transformers can compute again and which are sharded one by one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute(model: PreTrainedModel, *, every: int, where: str, keeps: CheckpointKeeps = "inputs") -> None:
    """Let the first of every so many layers keep only its input and compute the rest again in backward.

    Where it `keeps` the results of its matrix products too, norms, activations and attention alone are computed again.

    Raises:
        ConfigError: the model has no such layers, or cannot tell them apart.
    """
    if not model.supports_gradient_checkpointing:
        what = f"{type(model).__name__} cannot compute its layers again"
        raise ConfigError(f"{where}.gradient_checkpointing", what, "leave it false")
    chosen = {"context_fn": _keeping_products} if keeps == "products" else {}
    model.gradient_checkpointing_enable({"use_reentrant": False, **chosen})
    layers = layers_of(model)
    for layer in layers:  # which do so in train mode only; what is in them stays as it is
        layer.training = True
        for name in [name for name, value in vars(layer).items() if "drop" in name and isinstance(value, float)]:
            setattr(layer, name, 0.0)
    if every == 1:
        return
    if len(layers) < every:
        what = f"{every} is more than the {len(layers)} layers of {type(model).__name__} that can be chosen from"
        raise ConfigError(f"{where}.checkpoint_every", what, "leave it 1")
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index % every == 0


def _keeping_products() -> Any:
    """Return the contexts of torch's checkpoint in which matrix products are computed once only."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def choose(_: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        name = operation.overloadpacket.__name__
        return CheckpointPolicy.MUST_SAVE if name in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(choose)


def check_savings(settings: Training, bare: PreTrainedModel, where: str) -> None:
    """Insist, on a model without weights, that it can be frozen and recomputed as a node asks for.

    Raises:
        ConfigError: it cannot.
    """
    if settings.gradient_checkpointing:
        recompute(bare, every=settings.checkpoint_every, where=where, keeps=settings.checkpoint_keeps)
    if settings.freeze and not settings.lora.rank:
        freeze(bare, settings.freeze, where)


def check_offload(settings: Scoring | Training, where: str, *, has_gpu: bool, least_stage: dict[str, int]) -> None:
    """Insist that what is to be moved to the CPU can be; `least_stage` is the ZeRO stage that each setting needs.

    Raises:
        ConfigError: the engine cannot do it, or there is nothing to gain.
    """
    for name in ("offload_optimizer", "offload_parameters"):
        if not getattr(settings, name, False):
            continue
        if name not in least_stage:
            raise ConfigError(f"{where}.{name}", "this engine keeps that on its device", f"take engine={DEEPSPEED}")
        if not has_gpu:
            raise ConfigError(f"{where}.{name}", "the device is the CPU, where everything is already", "leave it false")
        if settings.zero_stage < least_stage[name]:
            what = f"zero_stage={settings.zero_stage} does not shard what it would move"
            raise ConfigError(f"{where}.{name}", what, f"take zero_stage {least_stage[name]} or more")


def offloading(config: TrainingConfig) -> dict[str, Any]:
    """Return DeepSpeed's settings for what is moved to the CPU, a part of its zero_optimization."""
    chosen = {"offload_optimizer": config.offload_optimizer, "offload_param": config.offload_parameters}
    return {name: {"device": "cpu", "pin_memory": True} for name, is_moved in chosen.items() if is_moved}
