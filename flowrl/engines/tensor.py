"""Tensor parallelism: N ranks run the same tokens, each with a part of every layer's matrices (Megatron, 1909.08053).

Which matrices, and whether by their outputs ("colwise") or by their inputs ("rowwise"), is transformers' own plan for a
family (`base_model_tp_plan`). A part is a DTensor of torch, so `fully_shard` shards it further over the groups of ranks
and a published version or a state on disk is whole again. What a column's ranks compute stays apart (each has its part
of the heads, of the inner width) until a row's sum over the group.

Invariants:
- a sum over the group stands before each row's result and, backward, before the gradient of what columns took in;
- each comes after a vote on whether every rank has room, backward once for all columns of one input;
- outside of the parts every rank has the same values and the same gradients, and counts for one with the others of
  its group.

Embeddings, norms and the head are whole on every rank of a group.

Called by fsdp, once, and by the stages' check.

Tests: tests/unit/engines/test_tensor.py, tests/contracts/test_tensor_parallel.py
"""

from __future__ import annotations

import re
import weakref
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from flowrl.engines.ranks import check_groups
from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    from flowrl.engines.base import Computing
    from flowrl.engines.memory import FitVote

COLUMN, ROW, SUMMED = "colwise", "rowwise", "replicated_with_grad_allreduce"
WHOLE = ("embedding_rowwise",)  # parts that a plan has and that are left whole
SHARED_OUT = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def check_parts(settings: Computing, model: Path, where: str, *, num_ranks: int) -> None:
    """Insist that a node's ranks make whole groups, and that its model's layers have parts for each rank of one.

    Raises:
        ConfigError: they do not.
    """
    size = settings.tensor_parallel
    if size == 1:
        return
    from transformers import AutoConfig

    where = f"{where}.tensor_parallel"
    check_groups(num_ranks, size, where)
    config = AutoConfig.from_pretrained(model, trust_remote_code=settings.trust_remote_code).get_text_config()
    plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    if not plan:
        raise ConfigError(where, f"transformers has no plan for the layers of {config.model_type}", "leave it 1")
    if others := sorted({style for style in plan.values() if style not in (COLUMN, ROW, SUMMED, *WHOLE)}):
        what = f"transformers' plan for {config.model_type} has {', '.join(others)}, which are not built here"
        raise ConfigError(where, what, "leave it 1")
    for name in SHARED_OUT:
        number = getattr(config, name, None)
        if isinstance(number, int) and number % size:
            what = f"{size} does not divide the model's {name}, {number}"
            raise ConfigError(where, what, "give a divisor, or sequence_parallel in its place")


class LayerParts:
    """This rank's parts of a model's layers, and the sums over its group."""

    def __init__(self, model: PreTrainedModel, mesh: DeviceMesh, room: FitVote, where: str) -> None:
        """Leave of every matrix in the plan this rank's part; `mesh` is that of a group.

        Raises:
            ConfigError: what the plan names are no plain linear layers.
        """
        import torch.distributed as dist

        self._mesh = mesh
        group = mesh.get_group()
        self._sum = room.guarded(lambda tensor: dist.all_reduce(tensor, group=group))
        self._entered: tuple[weakref.ref[Tensor], Tensor] | None = None
        self._shared: list[nn.Module] = []  # whole on every rank, and used for its part of the heads
        plan: dict[str, str] = model.config.get_text_config().base_model_tp_plan or {}
        styles = [(re.compile(rf"(.*\.)?{re.escape(name)}".replace(r"\*", r"\d+")), how) for name, how in plan.items()]
        kinds: dict[str, type[_Part]] = {COLUMN: _Column, ROW: _Row}
        for name, module in model.named_modules():
            style = next((style for pattern, style in styles if pattern.fullmatch(name)), None)
            if style == SUMMED:
                self._shared.append(module)
            elif style in kinds:
                if type(module) is not nn.Linear:
                    what = f"{name} is a {type(module).__name__}, of which no part can be taken"
                    raise ConfigError(f"{where}.tensor_parallel", what, "leave it 1")
                self._cut(module, kinds[style])

    def _cut(self, layer: nn.Linear, kind: type[_Part]) -> None:
        place, size = self._mesh.get_local_rank(), self._mesh.size()
        for name, parameter in [*layer.named_parameters(recurse=False)]:
            if name == "bias" and kind is _Row:  # added after the sum
                continue
            part = parameter.detach().chunk(size, kind.dim)[place].clone()
            whole = DTensor.from_local(part, self._mesh, [Shard(kind.dim)], run_check=False)
            setattr(layer, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
        layer.__class__ = kind
        cast("_Part", layer).parts = self

    def enter(self, states: Tensor) -> Tensor:
        """Return states for columns to take in, whose gradients are then summed over the group."""
        if self._entered is None or self._entered[0]() is not states:
            self._entered = weakref.ref(states), _Enter.apply(states, self)
        return self._entered[1]

    def leave(self, states: Tensor) -> Tensor:
        """Return the sum of the group's states."""
        self._entered = None
        return _Leave.apply(states, self)

    def summed(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the group."""
        total = tensor.contiguous().clone()
        self._sum(total)
        return total

    def complete(self) -> None:
        """Sum the gradients of which each rank has a part."""
        for parameter in chain.from_iterable(module.parameters() for module in self._shared):
            if parameter.grad is not None:
                self._sum(cast("DTensor", parameter.grad).to_local())


def has_ranks(parameter: Tensor, kind: str) -> bool:
    """Say whether a parameter is shared out over ranks: "part", those of a group; "shard", the groups as it lies."""
    return isinstance(parameter, DTensor) and kind in (parameter.device_mesh.mesh_dim_names or ())


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, parts: LayerParts) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.parts = parts
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.parts.summed(gradient), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, parts: LayerParts) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return parts.summed(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


class _Part(nn.Linear):
    """A linear layer of which this rank has a part."""

    dim: int  # of the weight that is shared out
    parts: LayerParts

    def _local(self, name: str) -> Tensor | None:
        parameter = getattr(self, name)
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class _Column(_Part):
    dim = 0

    def forward(self, input: Tensor) -> Tensor:
        weight = self._local("weight")
        assert weight is not None
        return nn.functional.linear(self.parts.enter(input), weight, self._local("bias"))


class _Row(_Part):
    dim = 1

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._local("weight"), self._local("bias")
        assert weight is not None
        found = self.parts.leave(nn.functional.linear(input, weight))
        return found if bias is None else found + bias
