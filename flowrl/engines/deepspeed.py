"""Training with DeepSpeed, ZeRO stages 0 to 3, on CPUs (gloo) and GPUs (NCCL).

Invariants:
- gradient accumulation is ours (`managed_gradient_accumulation` off): every backward only adds, `apply` is the one
  boundary;
- DeepSpeed's averaging over ranks is undone by scaling each rank's loss with their number, so a step on n ranks is the
  step of one.

With ZeRO-3 every rank calls the model equally often.

Its state on disk is DeepSpeed's own: each rank writes its shard as `.pt` files, so read only state that you wrote;
`state.json` beside them says how many ranks there were. A state of another number of ranks is first converted by rank 0
into DeepSpeed's universal format, in a directory of its own beside the checkpoint, whose files are sealed. A state is
loaded whole or an error says why not.

Named in node configs as `engine="flowrl.engines.deepspeed:DeepSpeedEngine"`.

Tests: tests/unit/engines/test_deepspeed_state.py
"""

from __future__ import annotations

import io
import math
import os
import shutil
import warnings
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import torch

from flowrl.engines.aside import tensors_of
from flowrl.engines.base import Training
from flowrl.engines.deepspeed_interrupt import answered_alone, clear_gradients, leave_pass, replace_collectives
from flowrl.engines.models import choose_dtype
from flowrl.engines.savings import decay_groups, offloading
from flowrl.engines.trainer import LossScale, Trainer
from flowrl.errors import ConfigError, StageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from flowrl.engines.base import Scoring, TrainingConfig
    from flowrl.engines.models import TokenReader
    from flowrl.engines.ranks import RankLink
    from flowrl.graph.stage import Say


TAG = "deepspeed"  # DeepSpeed's own directory within a state


class StateNote(msgspec.Struct, frozen=True, kw_only=True):
    """What a state is of."""

    num_steps: int  # optimizer steps taken
    num_ranks: int
    zero_stage: int


def write_state(engine: Any, directory: Path, note: StateNote, *, link: RankLink, leave_out_frozen: bool) -> None:
    """Write every rank's shard, and the note."""
    directory.mkdir(parents=True, exist_ok=True)
    engine.save_checkpoint(str(directory), tag=TAG, client_state={}, exclude_frozen_parameters=leave_out_frozen)
    if link.rank == 0:
        (directory / "state.json").write_bytes(msgspec.json.encode(note))


def read_state(
    engine: Any, directory: Path, *, zero_stage: int, link: RankLink, where: str, leave_out_frozen: bool
) -> StateNote:
    """Load a state into the engine; returns its note.

    Raises:
        StageError: there is none, it is of another ZeRO stage, or DeepSpeed refuses it.
    """
    try:
        note = msgspec.json.decode((directory / "state.json").read_bytes(), type=StateNote)
    except (OSError, msgspec.DecodeError) as error:
        raise StageError(where, f"no state of this engine in {directory} ({error})", "check --resume") from error
    if note.zero_stage != zero_stage:
        what = f"the state in {directory} was saved at zero_stage={note.zero_stage}, and zero_stage is {zero_stage} now"
        raise StageError(where, what, f"resume with zero_stage={note.zero_stage}")
    is_resharded = note.num_ranks != link.world_size and zero_stage > 0  # at stage 0 every rank holds everything
    source = _resharded(directory, link) if is_resharded else directory
    engine._config.load_universal_checkpoint = is_resharded
    loaded, _ = engine.load_checkpoint(str(source), tag=TAG, load_module_strict=not leave_out_frozen)
    engine._config.load_universal_checkpoint = False
    if loaded is None:
        what = f"DeepSpeed found no state of {note.num_ranks} ranks in {directory}"
        raise StageError(where, what, "resume from another checkpoint")
    link.sum(0.0)  # every rank has read it
    if is_resharded and link.rank == 0:
        shutil.rmtree(source)
    return note


def own_steps(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter a count of its steps, beside its moments, where torch's fused kernels read it.

    Out of its universal format DeepSpeed takes one that lies on the host, at stage 3 the same for all parts.
    """
    for state in optimizer.state.values():
        if "step" in state:
            count = torch.as_tensor(state["step"], dtype=torch.float32)
            state["step"] = count.to(state["exp_avg"].device, copy=True)


def _resharded(directory: Path, link: RankLink) -> Path:
    """Have rank 0 write a state in the form that any number of ranks can load; returns where."""
    checkpoint = directory.parent
    target = checkpoint.with_name(f".{checkpoint.name}.{directory.name}.universal")
    if link.rank == 0:
        from deepspeed.checkpoint.ds_to_universal import main as convert

        shutil.rmtree(target, ignore_errors=True)
        options = Namespace(
            input_folder=str(directory / TAG),
            output_folder=str(target / TAG),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            convert(options)
    link.sum(0.0)
    return target


GATHER_ELEMENTS = 1 << 24  # ZeRO-3 parameters made whole at once: as fast as all together, and bounded
# What DeepSpeed's optimizers hold beside torch's: gradients, and the flat tensors that parameters are parts of.
BUFFERS = (
    "averaged_gradients",
    "grad_partitions_flat_buffer",
    "bit16_groups_flat",
    "single_partition_of_fp32_groups",
    "fp16_partitioned_groups_flat",
    "fp32_partitioned_groups_flat",
    "fp32_groups_gradients_flat",
)
NEVER = 1 << 62  # steps between DeepSpeed's own progress lines


class DeepSpeedEngine(Trainer):
    """AdamW under ZeRO; `deepspeed` holds further DeepSpeed settings, which win over ours."""

    backend_of_one = True  # DeepSpeed insists on a process group
    shards = True
    can_offload: ClassVar = {"offload_optimizer": 1, "offload_parameters": 3}
    scales_loss: ClassVar = True

    def __init__(
        self,
        config: TrainingConfig,
        *,
        where: str,
        name: str,
        num_receivers: int = 1,
        say: Say | None = None,
        deepspeed: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, where=where, name=name, num_receivers=num_receivers, say=say)
        self._further = deepspeed or {}
        self._release_collectives: Callable[[], None] = lambda: None
        self._engine: Any = None
        self._teacher_engine: Any = None

    @classmethod
    def check_settings(cls, settings: Scoring | Training, where: str, *, has_gpu: bool) -> None:
        """Insist also on float32 weights somewhere, and on weights that can be sharded."""
        super().check_settings(settings, where, has_gpu=has_gpu)
        dtype = choose_dtype(settings.dtype, torch.device("cuda" if has_gpu else "cpu"))
        computes = settings.zero_stage == 3 or (
            isinstance(settings, Training) and not getattr(settings, "frozen", False)
        )
        if dtype == torch.float16 and computes and not has_gpu and not _has_float16():
            what = "is float16, which DeepSpeed does not compute in on these processors"
            raise ConfigError(f"{where}.dtype", what, "take bfloat16 or float32")
        if settings.zero_stage == 0 and dtype != torch.float32:
            what = f"zero_stage=0 with {dtype} keeps no float32 weights on every device"
            raise ConfigError(f"{where}.zero_stage", what, "take zero_stage 1, 2 or 3, or dtype=float32")
        if settings.zero_stage == 3 and settings.lora.bits:
            what = f"{settings.lora.bits}-bit weights cannot be sharded by zero_stage=3"
            raise ConfigError(f"{where}.lora.bits", what, "take zero_stage 2, or bits=0")

    @property
    def _ranks_meet_in_passes(self) -> bool:
        return self.config.zero_stage >= 2

    def _load_as(self, config: TrainingConfig, where: str) -> PreTrainedModel:
        _import_deepspeed(on_cpu=self.device.type == "cpu")
        if self.config.zero_stage < 3:
            return super()._load_as(config, where)
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        sharding = HfDeepSpeedConfig(self._settings())  # from_pretrained shards while this lives
        try:
            return super()._load_as(config, where)
        finally:
            del sharding
            unset_hf_deepspeed_config()

    def _opened(self) -> None:
        if self.config.zero_stage == 3:  # sharded parameters cannot even be scored without DeepSpeed's hooks
            self._shard_frozen() if self.config.frozen else self._ensure_training()

    def _settings(self) -> dict[str, Any]:
        adam = {
            "lr": self.config.lr,
            "betas": list(self.config.betas),
            "eps": self.config.adam_eps,
            "weight_decay": self.config.weight_decay,
            "torch_adam": True,  # DeepSpeed's own, on CPUs and on GPUs, are compiled on first use: minutes, and nvcc
            "fused": True,
        }
        ours = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": self.config.max_grad_norm if self.config.zero_stage else 0.0,
            "optimizer": {"type": "AdamW", "params": adam},
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            "fp16": {"enabled": self.dtype == torch.float16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_force_ds_cpu_optimizer": False,  # torch's steps on the CPU too, where state is offloaded to
            "zero_optimization": {
                "stage": self.config.zero_stage,
                "overlap_comm": self.config.overlap_comm,
                **offloading(self.config),
            },
            "steps_per_print": NEVER,
        }
        return _merge(ours, self._further)

    def _shard_frozen(self) -> None:
        self._module = self._engine = self._gathering(self.reader)
        self._replace_collectives()

    def _place_teacher(self, reader: TokenReader) -> nn.Module:
        if self.config.zero_stage < 3:
            return reader
        self._teacher_engine = self._gathering(reader)
        return self._teacher_engine

    def _gathering(self, reader: TokenReader) -> Any:
        """Return a frozen model with the hooks that gather its weights layer by layer, and no optimizer."""
        import deepspeed

        reader.requires_grad_(False)
        settings = {name: value for name, value in self._settings().items() if name != "optimizer"}
        return deepspeed.initialize(model=reader, config=settings, dist_init_required=False)[0]

    @property
    def _engines(self) -> list[Any]:
        """Return DeepSpeed's engines, the model's and a sharded teacher's, where they are there."""
        return [each for each in (self._engine, self._teacher_engine) if each is not None]

    def _start_training(self) -> None:
        import deepspeed

        self._engine, *_ = deepspeed.initialize(
            model=self.reader,
            model_parameters=decay_groups(self.reader, self.config.weight_decay),  # pyright: ignore[reportArgumentType]
            config=self._settings(),
            dist_init_required=False,
        )
        self._module = self._engine
        if self._loss_scale() is not None:
            self._engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # `apply` says it with a remedy
        self._replace_collectives()
        if self._adapter is not None:
            self.reader.register_state_dict_post_hook(_leave_out_frozen)
        if self.config.zero_stage == 0:  # here DeepSpeed clips but does not tell the norm
            self._engine.optimizer.register_step_pre_hook(self._clip)

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """Return torch's optimizer, which ZeRO's stages wrap."""
        return self._engine.optimizer.optimizer if self.config.zero_stage else self._engine.optimizer

    def _replace_collectives(self) -> None:
        voted, is_alone = self._room.guarded, self.link.world_size == 1
        self._release_collectives = replace_collectives(answered_alone if is_alone else lambda _, each: voted(each))

    def _clip(self, *_: Any) -> None:
        self._norm = torch.nn.utils.clip_grad_norm_(self.reader.parameters(), self.config.max_grad_norm or math.inf)

    def _held(self) -> Iterator[Tensor]:
        yield from super()._held()
        for reader in self._readers:
            yield from (part for each in reader.parameters() if (part := getattr(each, "ds_tensor", None)) is not None)
        if not self._is_training:
            return
        optimizer: Any = self._engine.optimizer
        yield from tensors_of(self._adam)
        for name in BUFFERS:
            yield from _tensors_in(getattr(optimizer, name, None))

    def _scratch(self) -> Iterator[Tensor]:
        buckets = getattr(self._engine.optimizer, "ipg_buckets", None) if self._is_training else None
        for bucket in (buckets or {}).values():  # of gradients on their way; of a gigabyte at stage 3
            yield from _tensors_in(bucket.buffer)

    def _backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self.link.world_size)  # DeepSpeed takes the mean over ranks, we want the sum

    def _leave_pass(self) -> None:
        for engine in self._engines:
            leave_pass(engine)

    def _clear_gradients(self) -> None:
        clear_gradients(self._engine)

    def _step(self, lr: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return float(self._norm if self.config.zero_stage == 0 else self._engine.get_global_grad_norm())

    def _loss_scale(self) -> LossScale | None:
        scaler: Any = getattr(self._engine.optimizer, "loss_scaler", None)
        return LossScale(scaler.cur_scale, scaler.min_scale) if getattr(scaler, "dynamic", False) else None

    def _whole(self, named: list[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
        if self.config.zero_stage < 3:
            yield from super()._whole(named)
            return
        import deepspeed

        for bucket in _buckets(named):
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket]):
                yield from ((name, parameter.detach()) for name, parameter in bucket)

    def _write_state(self, directory: Path) -> None:
        note = StateNote(num_steps=self._num_steps, num_ranks=self.link.world_size, zero_stage=self.config.zero_stage)
        write_state(self._engine, directory, note, link=self.link, leave_out_frozen=self._adapter is not None)

    def _read_state(self, directory: Path) -> None:
        note = read_state(
            self._engine,
            directory,
            zero_stage=self.config.zero_stage,
            link=self.link,
            where=self.where,
            leave_out_frozen=self._adapter is not None,
        )
        own_steps(self._adam)
        self._num_steps = note.num_steps

    def _unload(self) -> None:
        if torch.distributed.is_initialized():  # without its group it cannot even be destroyed
            for engine in self._engines:
                engine.destroy()
        self._release_collectives()
        self._engine = self._teacher_engine = None
        super()._unload()


def _has_float16() -> bool:
    """Return whether DeepSpeed computes in float16 on this machine's processors."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it looks for devices aloud
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    return bool(accelerator.is_fp16_supported())


def _import_deepspeed(*, on_cpu: bool) -> None:
    """Import DeepSpeed for this device and give it the process group that exists."""
    # DeepSpeed calls collectives by the names that torch is retiring; nothing a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed\.\w+. is deprecated")
    import deepspeed
    import deepspeed.ops

    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or a C++ compilation of a minute  # pyright: ignore
    deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl", verbose=False)


def _leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Take frozen parameters out of a state dict, under every name that a tied one has."""
    for name, parameter in module.named_parameters(prefix.rstrip("."), remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(name, None)


def _merge(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    merged = {**ours, **theirs}
    for key in ours.keys() & theirs.keys():
        if isinstance(ours[key], dict) and isinstance(theirs[key], dict):
            merged[key] = _merge(ours[key], theirs[key])
    return merged


def _tensors_in(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors_in(each)


def _buckets(parameters: list[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    bucket: list[tuple[str, Any]] = []
    size = 0
    for name, parameter in parameters:
        if bucket and size + parameter.ds_numel > GATHER_ELEMENTS:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, parameter))
        size += parameter.ds_numel
    yield bucket
