"""Training with torch's `fully_shard` (FSDP2) on CPUs (gloo) and GPUs (NCCL): weights, gradients and optimizer sharded.

A layer is gathered when it is run and dropped after it; with zero_stage 2 it stays from forward to backward.

Invariants:
- where the model is in bfloat16 the shards that are trained are float32 and a layer is gathered in bfloat16;
- gradients are summed over ranks in float32, so a step is the step of the other engines;
- the sum over ranks is no mean, so a step on n ranks is the step of one;
- every rank calls the model equally often, and between passes every parameter is sharded;
- with tensor_parallel=N every N ranks hold parts of layers (tensor.py) and take the same samples;
- shards are parts of these parts then, and what such ranks all have is written by the first of them.

Its state on disk is what torch.distributed.checkpoint writes as safetensors: one file for each rank, whose header says
where its parts lie in the whole, and JSON beside them. DCP's own format has a pickle in it, and what its ranks tell
each other is pickled; so each rank here plans for itself, writes its own parts and reads whichever it needs. Any number
of ranks goes on from any other's.

Named in node configs as `engine="flowrl.engines.fsdp:Fsdp2Engine"`.

Tests: tests/contracts/test_training_engines.py
"""

from __future__ import annotations

import dataclasses
import math
import operator
import warnings
from typing import TYPE_CHECKING, Any, ClassVar, cast

import msgspec
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor, Replicate

from flowrl.engines.aside import tensors_of
from flowrl.engines.models import load_model
from flowrl.engines.savings import decay_groups, layers_of
from flowrl.engines.tensor import LayerParts, has_ranks
from flowrl.engines.trainer import Trainer
from flowrl.errors import ConfigError, StageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn
    from torch.distributed.checkpoint import SavePlan
    from transformers import PreTrainedModel

    from flowrl.engines.base import Scoring, Training
    from flowrl.engines.memory import FitVote

PIECES = "shard-*.safetensors"  # as DCP names them
KNOWN = (  # what torch warns of: nothing here writes into what a model returns, and each rank does save for itself
    r"FSDP2-wrapped module .* returned a view tensor",
    r"torch\.distributed is disabled, unavailable or uninitialized",
)


class Fsdp2Engine(Trainer):
    """AdamW over the shards of every rank."""

    backend_of_one = True  # a mesh of devices is one of a process group
    shards = True
    takes_parts = True
    can_offload: ClassVar = {"offload_parameters": 2}
    _layer_parts: LayerParts | None = None

    @property
    def _ranks_meet_in_passes(self) -> bool:
        return True

    @classmethod
    def check_settings(cls, settings: Scoring | Training, where: str, *, has_gpu: bool) -> None:
        """Insist also on weights that can be sharded."""
        super().check_settings(settings, where, has_gpu=has_gpu)
        if settings.zero_stage < 2:
            what = f"is {settings.zero_stage}, and fully_shard shards the weights too"
            raise ConfigError(f"{where}.zero_stage", what, "take 2 (a layer stays gathered until backward) or 3")
        if settings.lora.bits:
            what = f"{settings.lora.bits}-bit weights cannot be sharded by fully_shard"
            raise ConfigError(f"{where}.lora.bits", what, "take DeepSpeed at zero_stage 2, or bits=0")
        if settings.tensor_parallel > 1 and settings.lora.rank:
            what = f"is {settings.tensor_parallel}, and adapters beside parts of layers are not built"
            raise ConfigError(f"{where}.tensor_parallel", what, "leave it 1, or train without lora")

    def _load(self) -> PreTrainedModel:
        on_host = torch.device("cpu")  # a layer comes to its device as it is sharded
        return load_model(self.config, where=self.where, dtype=self.dtype, device=on_host, say=self._tell)

    def _opened(self) -> None:
        self._check_one_dtype()
        if self.config.frozen:
            self.reader.requires_grad_(False)
        for parameter in self.reader.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        for words in KNOWN:
            warnings.filterwarnings("ignore", category=UserWarning, message=words)
        size = self.config.tensor_parallel
        shape = (self.link.world_size // size, size)
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("shard", "part"))
        if size > 1:
            self._layer_parts = LayerParts(self.model, mesh["part"], self._room, self.where)
        policy: dict[str, Any] = {
            "mesh": mesh["shard"],
            "mp_policy": MixedPrecisionPolicy(self.dtype, torch.float32, cast_forward_inputs=False),
            "offload_policy": CPUOffloadPolicy() if self.config.offload_parameters else OffloadPolicy(),
        }
        for layer in layers_of(self.model):
            fully_shard(layer, reshard_after_forward=self.config.zero_stage == 3, **policy)
        fully_shard(self.reader, **policy)
        self.reader.device = self.device
        for module in self._sharded():
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
            module.set_custom_all_gather(_VotedAllGather(self._room))
            module.set_custom_reduce_scatter(_VotedReduceScatter(self._room))
        self._root.set_reduce_scatter_unused_params(True)  # or ranks whose tokens chose other experts would differ
        self.reader.register_forward_hook(self._drop_gathered)

    def _check_one_dtype(self) -> None:
        others = [name for name, parameter in self.model.named_parameters() if parameter.dtype != self.dtype]
        if others:
            what = f"{len(others)} parameters of {type(self.model).__name__} are not in {self.dtype} ({others[0]})"
            raise ConfigError(f"{self.where}.engine", what, "take dtype=float32, or the DeepSpeed engine")

    @property
    def _root(self) -> FSDPModule:
        return cast("FSDPModule", self.reader)

    def _sharded(self) -> list[FSDPModule]:
        return [module for module in self.reader.modules() if isinstance(module, FSDPModule)]

    def _drop_gathered(self, *_: object) -> None:
        """Shard again what a pass without backward has left gathered, or the next would not see a step in between."""
        if not torch.is_grad_enabled():
            for module in self._sharded():
                module.reshard()

    def _start_training(self) -> None:
        self._optimizer = torch.optim.AdamW(
            decay_groups(self.reader, self.config.weight_decay),
            lr=self.config.lr,
            betas=self.config.betas,
            eps=self.config.adam_eps,
            fused=True,
        )

    def _trained(self) -> list[tuple[str, DTensor]]:
        """Return what is trained, as this rank's shards, under the model's names."""
        return [(name, cast("DTensor", each)) for name, each in self.model.named_parameters() if each.requires_grad]

    def _held(self) -> Iterator[Tensor]:
        yield from super()._held()
        if self._is_training:
            yield from tensors_of(self._optimizer)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _leave_pass(self) -> None:
        for parameter in self.reader.parameters():
            if not has_ranks(parameter, "shard"):  # gathered, with a gradient that no other rank has a part in
                parameter.grad = None
        self._root.reset_iter_state()

    def _clear_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def _step(self, lr: float) -> float:
        if self._layer_parts is not None:
            self._layer_parts.complete()
        trained = [each for _, each in self._trained() if each.grad is not None]
        gradients = [cast("DTensor", each.grad).to_local() for each in trained]
        # Of what all ranks of a group have, each counts for its share.
        shares = [1.0 if has_ranks(each, "part") else 1.0 / self.config.tensor_parallel for each in trained]
        squares = (float(grad.double().square().sum()) for grad in gradients)
        norm = math.sqrt(self.link.sum(sum(map(operator.mul, squares, shares))))
        if math.isfinite(norm):
            if self.config.max_grad_norm:
                torch._foreach_mul_(gradients, min(1.0, self.config.max_grad_norm / (norm + 1e-6)))
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _whole(self, named: list[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in named:
            whole = cast("DTensor", parameter.detach().to(self.device))
            if has_ranks(whole, "part"):  # one kind of ranks after the other: torch, left to find an order, warns
                whole = whole.redistribute(placements=[Replicate(), whole.placements[1]])
            yield name, whole.full_tensor().to(self.dtype)

    def _write_state(self, directory: Path) -> None:
        """Write the parameters in float32 and both moments as safetensors, the counters as JSON."""
        directory.mkdir(parents=True, exist_ok=True)
        if self.link.rank == 0:
            for old in directory.glob(PIECES):
                old.unlink()
            note = {"num_steps": self._num_steps, "num_ranks": self.link.world_size}
            (directory / "state.json").write_bytes(msgspec.json.encode(note))
        self.link.sum(0.0)  # nothing old is there any more
        writer, is_first = _OwnFile(str(directory), self.link.rank), self.link.rank % self.config.tensor_parallel == 0
        state = {name: each for name, each in self._state().items() if is_first or has_ranks(each, "part")}
        dcp.save(state, storage_writer=writer, planner=_OwnParts(), no_dist=True)

    def _read_state(self, directory: Path) -> None:
        try:
            note = msgspec.json.decode((directory / "state.json").read_bytes(), type=dict[str, int])
            found, expected = len([*directory.glob(PIECES)]), note["num_ranks"]
        except (OSError, KeyError, msgspec.DecodeError) as error:
            what = f"no state of this engine in {directory} ({error})"
            raise StageError(self.where, what, "check --resume") from error
        if found != expected:
            what = f"{directory} has the parts of {found} ranks, {expected} wrote it"
            raise StageError(self.where, what, "resume from another checkpoint")
        self._num_steps = note["num_steps"]
        self._optimizer.state.clear()
        for _, each in self._trained() if self._num_steps else ():
            moments = {key: torch.zeros_like(each) for key in ("exp_avg", "exp_avg_sq")}
            count = torch.tensor(float(self._num_steps), dtype=torch.float32, device=each.device)
            self._optimizer.state[each] = {"step": count, **moments}
        with torch.no_grad():
            dcp.load(self._state(), storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)
        self.link.sum(0.0)  # every rank has read it

    def _state(self) -> dict[str, DTensor]:
        """Return this rank's part of everything that is stored, to be written from or read into."""
        found: dict[str, DTensor] = {}
        for name, each in self._trained():
            found[f"parameter/{name}"] = each
            for key in ("exp_avg", "exp_avg_sq") if self._num_steps else ():
                found[f"{key}/{name}"] = self._optimizer.state[each][key]
        return found

    def _unload(self) -> None:
        super()._unload()
        self.__dict__.pop("_optimizer", None)


class _VotedAllGather(DefaultAllGather):
    """Gathers after a vote on whether every rank has room."""

    def __init__(self, room: FitVote) -> None:
        self._collective = room.guarded(super().__call__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._collective(*args, **kwargs)


class _VotedReduceScatter(DefaultReduceScatter):
    """The same for sums of gradients."""

    def __init__(self, room: FitVote) -> None:
        self._collective = room.guarded(super().__call__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._collective(*args, **kwargs)


class _OwnParts(DefaultSavePlanner):
    """A plan of what this rank has; that the parts of all ranks make a whole is `fully_shard`'s to see to."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata({})


class _OwnFile(HuggingFaceStorageWriter):
    """Writes one file, of this rank."""

    def __init__(self, path: str, rank: int) -> None:
        super().__init__(path, save_distributed=True)
        self._rank = rank

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data={"shard_index": self._rank + 1}) for plan in plans]
