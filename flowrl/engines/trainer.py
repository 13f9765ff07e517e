"""What the training engines share: commands to the ranks, steps, publishing, saving.

`Trainer` implements `TrainingEngine`; a subclass says how gradients are accumulated, how a step is taken and how
state is stored. Every public method runs on rank 0, which checks its arguments, hands the command to the followers
and carries it out with them; an error found by the check leaves the ranks usable. What a rank computes for a command
is in passes.

Called by the learner, critic, reference and reward-model stages.

Tests: tests/unit/engines/test_trainer.py
"""

from __future__ import annotations

import math
import os
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import msgspec
import torch

from flowrl.config import Select
from flowrl.engines.agreement import check_fit, settle
from flowrl.engines.average import Average, is_saved
from flowrl.engines.base import TokenGroup
from flowrl.engines.lora import Adapter
from flowrl.engines.memory import FitVote
from flowrl.engines.models import TokenReader, choose_dtype, load_model
from flowrl.engines.objective import Sums, divide
from flowrl.engines.passes import Passes, RankValues
from flowrl.engines.publishing import Publisher, as_saved, carried_buffers, score_canary, write_model
from flowrl.engines.ranks import RankLink
from flowrl.engines.router import check_router
from flowrl.engines.savings import check_offload, freeze, recompute
from flowrl.errors import ConfigError, StageError
from flowrl.messages import Buffer, Weights, decode, encode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from flowrl.engines.base import Schedule, TrainingConfig
    from flowrl.graph.stage import Ranks, Say
    from flowrl.messages import FloatArray


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 asks of every rank."""

    name: str
    groups: list[TokenGroup] = []
    objective: Select | None = None
    version: int = 0
    canary: Buffer | None = None
    directory: str = ""
    card: str = ""


class LossScale(NamedTuple):
    """The factor by which a loss is multiplied so that its gradients do not vanish in float16."""

    now: float
    least: float  # an overflow here is none of the scale


def lr_ratio(schedule: Schedule, step: int) -> float:
    """Return the learning rate of optimizer step `step` (0, 1, ...) over its peak.

    With 2 warm-up steps of 10 and final_ratio 0.1: 0.5, 1.0, 1.0, ... down to 0.1 at step 10; with wsd and decay_ratio
    0.2 it is 1.0 up to step 8 and 0.55 at step 9.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    begin = schedule.warmup_steps
    if schedule.kind == "wsd":
        begin = max(begin, round(schedule.total_steps * (1 - schedule.decay_ratio)))
    progress = min(1.0, max(0.0, (step - begin) / max(1, schedule.total_steps - begin)))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return schedule.final_ratio + (1 - schedule.final_ratio) * left


class Trainer(Passes):
    """One rank of a training engine; subclasses add the optimizer."""

    backend_of_one = False  # whether even one rank alone needs a process group
    can_offload: ClassVar[dict[str, int]] = {}  # setting -> the least ZeRO stage it needs

    _adapter: Adapter | None

    def __init__(
        self, config: TrainingConfig, *, where: str, name: str, num_receivers: int = 1, say: Say | None = None
    ) -> None:
        """Load nothing yet; `say` is told in words what the user should know."""
        super().__init__(config, where=where, say=say or (lambda text: None))
        self._name = name
        self._num_receivers = num_receivers
        self._num_steps = 0  # optimizer steps taken, the schedule's clock
        self._has_stepped = False  # in this process
        self._average = Average(config.ema_decay) if config.ema_decay else None

    # What a subclass provides.

    def _load(self) -> PreTrainedModel:
        return load_model(self.config, where=self.where, dtype=self.dtype, device=self.device)

    def _step(self, lr: float) -> float:
        """Clip, step and clear the gradients; returns the gradient's norm before clipping."""
        raise NotImplementedError

    def _loss_scale(self) -> LossScale | None:
        """Return the factor of the loss where it adapts to what overflows (float16), else None."""
        return None

    def _whole(self, named: list[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters whole, in the model's dtype; collective where parameters are sharded."""
        return ((name, parameter.detach()) for name, parameter in named)

    def _write_state(self, directory: Path) -> None:
        raise NotImplementedError

    def _read_state(self, directory: Path) -> None:
        raise NotImplementedError

    def _unload(self) -> None:
        """Drop the model and whatever holds process groups."""
        for name in ("_module", "reader", "model", "_adapter"):
            self.__dict__.pop(name, None)
        self._teacher = None

    # Opening, following, closing.

    def open(self, ranks: Ranks) -> None:
        """Load the model on this rank and join the others."""
        torch.set_num_threads(self.config.threads)
        torch.manual_seed(self.config.seed)
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.dtype = choose_dtype(self.config.dtype, self.device)
        if self.device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # transformers imports DeepSpeed, which else looks for devices aloud
        check_offload(self.config, self.device, self.where, least_stage=self.can_offload)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        self._publisher = Publisher(
            self.config,
            name=self._name,
            num_receivers=self._num_receivers,
            host=ranks.address,
            device=self.device,
        )
        self._line = RankLink(ranks, where=self.where, backend=backend, needs_group=self.backend_of_one)
        self._room = FitVote(self._line, where=self.where, ranks_meet=self._ranks_meet_in_passes)
        with self._line.guard("open"):
            self.model = self._load()
            self._adapter = Adapter(self.model, self.config, where=self.where) if self.config.lora.rank else None
            self.model.config.use_cache = False
            if self.config.router_aux_loss:
                check_router(self.model.config, self.where)
            if self.config.gradient_checkpointing:
                recompute(self.model, every=self.config.checkpoint_every, where=self.where)
            if self.config.freeze:
                freeze(self.model, self.config.freeze, self.where)
            self.reader = TokenReader(self.model, head=self.config.head, temperature=self.config.temperature)
            self._module = self.reader
            self._opened()
            settle(self.reader, self._module, self.config, where=self.where)
            self._line.gather(b"")

    def _opened(self) -> None:
        """Do what must be done once the model is loaded."""

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter of the plain model once, whole; adapters are merged in."""
        if self._adapter is not None:
            return self._adapter.merged(self._whole)
        return self._whole([*self.model.named_parameters()])

    def follow(self) -> None:
        """Serve as a rank other than 0 until rank 0 closes; returns then."""
        while True:
            with self.line.guard("following"):
                command = msgspec.msgpack.decode(self.line.receive(), type=Command)
            with self.line.guard(command.name):
                self.line.gather(self._carry_out(command))
            if command.name == "close":
                return

    def _lead(self, command: Command) -> list[bytes]:
        """Have every rank carry out a command; returns their answers, rank 0's first."""
        if self.line.rank != 0:
            raise StageError(self.where, f"{command.name} was called on rank {self.line.rank}", "call it on rank 0")
        if command.groups:
            check_fit(command.groups, self.reader, self.where)
        self.line.send(msgspec.msgpack.encode(command))
        with self.line.guard(command.name):
            return self.line.gather(self._carry_out(command))

    def _carry_out(self, command: Command) -> bytes:
        match command.name:
            case "score":
                return msgspec.msgpack.encode(self._score_here(command.groups))
            case "compare" if command.objective is not None:
                return msgspec.msgpack.encode(self._score_here(command.groups, command.objective))
            case "accumulate" if command.objective is not None:
                return msgspec.msgpack.encode(self._accumulate_here(command.groups, command.objective))
            case "apply":
                return msgspec.msgpack.encode(self._apply_here())
            case "publish":
                return self._publish_here(command.version, command.canary)
            case "save_model":
                self._save_model_here(Path(command.directory), command.card)
            case "save_state":
                self._ensure_training()
                self._write_state(Path(command.directory))
                if self._average is not None and self._average.tensors:
                    self._average.write(Path(command.directory))
            case "load_state":
                self._ensure_training()
                self._read_state(Path(command.directory))
                self._read_average(Path(command.directory))
            case "close":
                pass
            case _:
                raise StageError(self.where, f"unknown command {command.name!r}")
        return b""

    def close(self) -> None:
        """Release the ranks, the transport and the model."""
        if self._line is None:
            return
        line, self._line = self._line, None
        try:
            self._publisher.close()
            if line.rank == 0 and not line.is_broken:
                line.send(msgspec.msgpack.encode(Command(name="close")))
                line.gather(b"")
        finally:
            self._unload()
            line.close()

    def _check_schedule(self) -> None:
        schedule = self.config.schedule
        if schedule.kind != "constant" and schedule.total_steps == 0:
            what = f"the {schedule.kind} schedule has total_steps=0"
            raise ConfigError(f"{self.where}.schedule", what, "give total_steps or kind=constant")

    # Scoring.

    def score(self, groups: Sequence[TokenGroup]) -> list[list[FloatArray]]:
        """Return log-probs or values of every response token, [group][sample] -> float32 [tokens]."""
        if not groups:
            return []
        return self._rows(Command(name="score", groups=list(groups)))

    def compare(self, groups: Sequence[TokenGroup], objective: Select) -> list[list[FloatArray]]:
        """Return the KL between the objective's teacher and the model at every response token, as `score` does."""
        return self._rows(Command(name="compare", groups=list(groups), objective=objective))

    def _rows(self, command: Command) -> list[list[FloatArray]]:
        answers = self._lead(command)
        rows: dict[tuple[int, int], FloatArray] = {}
        for answer in answers:
            for group, sample, values in msgspec.msgpack.decode(answer, type=RankValues).rows:
                rows[group, sample] = values.numpy()
        return [[rows[g, s] for s in range(len(group.responses))] for g, group in enumerate(command.groups)]

    # Training.

    def accumulate(self, groups: Sequence[TokenGroup], objective: Select) -> dict[str, float]:
        """Run forward and backward over the groups; the gradient is that of total / count over all of them.

        Further calls before `apply` add to it. Returns the objective's metrics, each divided once by its own global
        count, and "loss".
        """
        if not groups:
            raise StageError(self.where, "no groups to learn from", "give at least one")
        objective.load(f"{self.where}.objective")
        self._check_schedule()
        answers = self._lead(Command(name="accumulate", groups=list(groups), objective=objective))
        return divide(msgspec.msgpack.decode(answer, type=Sums) for answer in answers)

    def learned(self) -> dict[tuple[int, int], FloatArray]:
        """Return the log-probs or values that the last `accumulate` learned from, as far as rank 0 has them."""
        return self._learned

    def apply(self) -> dict[str, float]:
        """Take the optimizer step for what has been accumulated; returns lr and grad_norm.

        Where the loss is scaled, a gradient that overflows at this scale takes no step and lowers it: then there is no
        grad_norm, and skipped_frac is 1.

        Raises:
            StageError: the gradient is not finite, whatever the scale.
        """
        self._check_schedule()
        answers = self._lead(Command(name="apply"))
        return msgspec.msgpack.decode(answers[0], type=dict[str, float])

    def _apply_here(self) -> dict[str, float]:
        self._ensure_training()
        lr = self.config.lr * lr_ratio(self.config.schedule, self._num_steps)
        if self._num_steps == 0:
            self._update_average()  # it starts from the weights as they were loaded
        scale = self._loss_scale()
        grad_norm = self._step(lr)
        is_finite = math.isfinite(grad_norm)
        if not is_finite and (scale is None or scale.now <= scale.least):
            what = f"the gradient's norm is {grad_norm} in optimizer step {self._num_steps}"
            raise StageError(self.where, what, "resume from the last checkpoint with a lower lr or max_grad_norm")
        self._since_step = []
        scaled = {} if scale is None else {"loss_scale": scale.now, "skipped_frac": float(not is_finite)}
        if not is_finite:
            return {"lr": lr, **scaled}
        if not self._has_stepped:  # the optimizer's state is in memory now
            self._scoring.forget_fitted()
            self._learning.forget_fitted()
            self._has_stepped = True
        self._num_steps += 1
        self._update_average()
        return {"lr": lr, "grad_norm": grad_norm, **scaled}

    def _update_average(self) -> None:
        if self._average is None:
            return
        weights = self._parameters()
        if self.line.rank == 0:
            self._average.update(weights)
        for _ in weights:  # takes its part in the gathering
            pass

    # Publishing.

    def publish(self, version: int, canary: Buffer | None) -> Weights:
        """Offer the current weights as `version`; returns the message for the generators."""
        answers = self._lead(Command(name="publish", version=version, canary=canary))
        weights = decode(answers[0])
        assert isinstance(weights, Weights)
        return weights

    def _publish_here(self, version: int, tokens: Buffer | None) -> bytes:
        canary = None
        if tokens is not None:
            canary = score_canary(self._module, tokens, dtype=self.dtype, device=self.device)
        tensors = as_saved(self.model, chain(self._parameters(), carried_buffers(self.model)))
        if self.line.rank == 0:
            return encode(self._publisher.publish(version, tensors, canary))
        for _ in tensors:  # takes its part in the gathering
            pass
        return b""

    def transfer(self, version: int) -> None:
        """Wait until the bytes of `version` no longer depend on the parameters; rank 0 only, any thread."""
        self._publisher.transfer(version)

    def retire(self, version: int) -> None:
        """Forget the bytes of every version before `version`; rank 0 only, any thread."""
        self._publisher.retire(version)

    # Saving.

    def save_model(self, directory: Path, *, card: str) -> None:
        """Write Hugging Face format: safetensors, config, tokenizer, model card.

        Beside it `adapter` and `ema_model`, the average of the weights, where there are such.
        """
        self._lead(Command(name="save_model", directory=str(directory), card=card))

    def _save_model_here(self, directory: Path, card: str) -> None:
        extra: dict[str, Any] = {"source": self.config.model, "card": card, "chat_template": self.config.chat_template}
        extra |= {"trust_remote_code": self.config.trust_remote_code}
        whole: dict[str, Tensor] = {}
        for name, tensor in self._parameters():
            if self.line.rank == 0:
                whole[name] = tensor.cpu().clone()
        if self.line.rank == 0:
            write_model(self.model, whole, directory, **extra)
        if self._adapter is not None:
            trained = {name: tensor.clone() for name, tensor in self._whole(self._adapter.parameters())}
            if self.line.rank == 0:
                self._adapter.write(directory.with_name("adapter"), trained.items())
        if self._average is not None and self._average.tensors:
            averaged = {name: tensor.to(self.dtype) for name, tensor in self._average.tensors.items()}
            write_model(self.model, averaged, directory.with_name("ema_model"), **extra)

    def save_state(self, directory: Path) -> None:
        """Write everything needed to go on training: weights, optimizer, schedule."""
        self._lead(Command(name="save_state", directory=str(directory)))

    def load_state(self, directory: Path) -> None:
        """Read what `save_state` wrote."""
        self._lead(Command(name="load_state", directory=str(directory)))

    def _read_average(self, directory: Path) -> None:
        if self._average is None:
            return
        self._average.tensors = {}
        if self._num_steps == 0:  # it starts with the first step
            return
        if is_saved(directory):
            if self.line.rank == 0:
                self._average.read(directory)
            return
        self._update_average()
        if self.line.rank == 0:
            self._say(f"{directory} has no average of the weights: it starts at step {self._num_steps}")
