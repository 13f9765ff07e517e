"""What the training engines share: commands to the ranks, micro-batches, the loss, metrics, publishing, saving.

`Trainer` implements `TrainingEngine`; a subclass says how gradients are accumulated, how a step is taken and how
state is stored. Every public method runs on rank 0, which checks its arguments, hands the command to the followers
and carries it out with them; an error found by the check leaves the ranks usable.

Invariant (law 7): the gradient is that of sum(total) / sum(count) over all groups, so neither micro-batches, packing
nor ranks can change it. The global count is needed before the first backward, because ZeRO does not let gradients be
scaled afterwards; so each micro-batch's count is first asked of the objective with log-probs of zero, which costs no
forward, and an objective whose count then differs on the true log-probs is refused. A count may therefore depend on
masks and columns only.

Called by the learner, critic, reference and reward-model stages. Shapes: N response tokens, B responses, T longest.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from flowrl.config import Select
from flowrl.engines.base import TokenGroup
from flowrl.engines.models import TokenReader, choose_dtype, choose_layout, load_model, reads_of
from flowrl.engines.objective import Sums, add_loss, check_count, count_ahead, divide, loss_batch
from flowrl.engines.packing import MicroBatch, PackedBatch, pack, plan, unpack
from flowrl.engines.publishing import Publisher, as_saved, score_canary, write_model
from flowrl.engines.ranks import Line
from flowrl.errors import ConfigError, StageError
from flowrl.messages import Buffer, Weights, decode, encode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from flowrl.algorithms.base import Objective
    from flowrl.engines.base import Schedule, TrainingConfig
    from flowrl.engines.packing import Layout
    from flowrl.graph.stage import Ranks
    from flowrl.messages import FloatArray

IDLE_GROUP = TokenGroup(
    prompt_ids=Buffer.ints([0]), responses=[Buffer.ints([0])]
)  # keeps step where a rank has no work


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 asks of every rank."""

    name: str
    groups: list[TokenGroup] = []
    objective: Select | None = None
    version: int = 0
    canary: Buffer | None = None
    directory: str = ""
    card: str = ""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank found for each of its responses."""

    rows: list[tuple[int, int, Buffer]]  # group, sample, values


def lr_ratio(schedule: Schedule, step: int) -> float:
    """Return the learning rate of optimizer step `step` (0, 1, ...) over its peak.

    With 2 warm-up steps of 10 and final_ratio 0.1: 0.5, 1.0, 1.0, ... down to 0.1 at step 10.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    span = max(1, schedule.total_steps - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / span)
    return schedule.final_ratio + (1 - schedule.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """One rank of a training engine; subclasses add the optimizer."""

    backend_of_one = False  # whether even one rank alone needs a process group

    model: PreTrainedModel
    reader: TokenReader
    _module: nn.Module  # what forward goes through: the reader, or the backend's wrapper of it

    def __init__(self, config: TrainingConfig, *, where: str, name: str, num_receivers: int = 1) -> None:
        self.config = config
        self.where = where
        self._name = name
        self._num_receivers = num_receivers
        self._num_steps = 0  # optimizer steps taken, the schedule's clock
        self._is_training = False  # whether the optimizer exists: engines that only score never make one
        self._line: Line | None = None

    # What a subclass provides.

    def _load(self) -> PreTrainedModel:
        return load_model(self.config, where=self.where, dtype=self.dtype, device=self.device)

    def _start_training(self) -> None:
        """Make the optimizer."""
        raise NotImplementedError

    def _backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's part of the loss; the parts of all ranks add up."""
        raise NotImplementedError

    def _step(self, lr: float) -> float:
        """Clip, step and clear the gradients; returns the gradient's norm before clipping."""
        raise NotImplementedError

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter once, whole, in the model's dtype; collective where parameters are sharded."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def _write_state(self, directory: Path) -> None:
        raise NotImplementedError

    def _read_state(self, directory: Path) -> None:
        raise NotImplementedError

    def _unload(self) -> None:
        """Drop the model and whatever holds process groups."""
        for name in ("_module", "reader", "model"):
            self.__dict__.pop(name, None)

    # Opening, following, closing.

    def open(self, ranks: Ranks) -> None:
        """Load the model on this rank and join the others."""
        torch.set_num_threads(self.config.threads)
        torch.manual_seed(self.config.seed)
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.dtype = choose_dtype(self.config.dtype, self.device)
        if self.device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # transformers imports DeepSpeed, which else looks for devices aloud
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        self._publisher = Publisher(
            self.config,
            name=self._name,
            num_receivers=self._num_receivers,
            host=ranks.address,
            device=self.device,
        )
        self._line = Line(ranks, where=self.where, backend=backend, needs_group=self.backend_of_one)
        with self._line.guard("open"):
            self.model = self._load()
            self.model.config.use_cache = False
            if self.config.gradient_checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.train()
            self.reader = TokenReader(self.model, head=self.config.head, temperature=self.config.temperature)
            self._module = self.reader
            self._opened()
            self._line.gather(b"")

    def _opened(self) -> None:
        """Do what must be done once the model is loaded."""

    @property
    def line(self) -> Line:
        """Return this rank's connection."""
        if self._line is None:
            raise StageError(self.where, "the engine is not open", "call open first")
        return self._line

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
        self.line.send(msgspec.msgpack.encode(command))
        with self.line.guard(command.name):
            return self.line.gather(self._carry_out(command))

    def _carry_out(self, command: Command) -> bytes:
        match command.name:
            case "score":
                return msgspec.msgpack.encode(self._score_here(command.groups))
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
            case "load_state":
                self._ensure_training()
                self._read_state(Path(command.directory))
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

    def _ensure_training(self) -> None:
        if not self._is_training:
            self._start_training()
            self._is_training = True

    def _check_schedule(self) -> None:
        schedule = self.config.schedule
        if schedule.kind == "cosine" and schedule.total_steps == 0:
            what = "the cosine schedule has total_steps=0"
            raise ConfigError(f"{self.where}.schedule", what, "give total_steps or kind=constant")

    # Scoring.

    def score(self, groups: Sequence[TokenGroup]) -> list[list[FloatArray]]:
        """Return log-probs or values of every response token, [group][sample] -> float32 [tokens]."""
        if not groups:
            return []
        answers = self._lead(Command(name="score", groups=list(groups)))
        rows: dict[tuple[int, int], FloatArray] = {}
        for answer in answers:
            for group, sample, values in msgspec.msgpack.decode(answer, type=Answer).rows:
                rows[group, sample] = values.numpy()
        return [[rows[g, s] for s in range(len(group.responses))] for g, group in enumerate(groups)]

    def _score_here(self, groups: Sequence[TokenGroup]) -> Answer:
        mine, layout = self._plan(groups, whole_groups=False)
        done: list[tuple[PackedBatch, Tensor]] = []
        with torch.no_grad():
            for rows, num_chunks in mine:
                batch = self._pack(groups, rows, layout)
                values_N, _ = self._module(batch, num_chunks=num_chunks)
                if rows:
                    done.append((batch, values_N))
        found = unpack(done)
        return Answer(rows=[(group, sample, Buffer.floats(values)) for (group, sample), values in found.items()])

    def _plan(self, groups: Sequence[TokenGroup], *, whole_groups: bool) -> tuple[list[tuple[MicroBatch, int]], Layout]:
        """Return this rank's micro-batches with the number of head calls each needs on its busiest rank."""
        layout = self._layout(max(len(g.prompt_ids) + max(len(r) for r in g.responses) for g in groups))
        dealt = plan(
            groups,
            layout=layout,
            reads=reads_of(self.config),
            budget=self.config.micro_batch_tokens,
            world_size=self.line.world_size,
            whole_groups=whole_groups,
        )
        num_chunks = [max(self._num_chunks(groups, rows) for rows in column) for column in zip(*dealt, strict=True)]
        return list(zip(dealt[self.line.rank], num_chunks, strict=True)), layout

    def _layout(self, longest: int) -> Layout:
        return choose_layout(self.model, longest)

    def _num_chunks(self, groups: Sequence[TokenGroup], rows: MicroBatch) -> int:
        pieces = [piece for row in rows for piece in row]
        num_tokens = sum(len(groups[piece.group].responses[sample]) for piece in pieces for sample in piece.samples)
        return max(1, self.reader.num_chunks(num_tokens))

    def _pack(self, groups: Sequence[TokenGroup], rows: MicroBatch, layout: Layout) -> PackedBatch:
        if rows:
            return pack(groups, rows, layout=layout, reads=reads_of(self.config), device=self.device)
        reads = reads_of(self.config)
        ((idle,),) = plan([IDLE_GROUP], layout=layout, reads=reads, budget=1)
        return pack([IDLE_GROUP], idle, layout=layout, reads=reads, device=self.device)

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

    def _accumulate_here(self, groups: Sequence[TokenGroup], chosen: Select) -> Sums:
        self._ensure_training()
        objective: Objective = chosen.load(f"{self.where}.objective")
        mine, layout = self._plan(groups, whole_groups=bool(getattr(objective, "needs_whole_groups", False)))
        counts = [count_ahead(objective, groups, self._pack(groups, rows, layout)) if rows else 0.0 for rows, _ in mine]
        global_count = self.line.sum(sum(counts))
        if global_count <= 0:
            what = f"the objective counts nothing in {len(groups)} groups"
            raise StageError(self.where, what, "are all masks 0?")
        sums: Sums = {}
        for (rows, num_chunks), count in zip(mine, counts, strict=True):
            batch = self._pack(groups, rows, layout)
            values_N, entropy_N = self._module(batch, needs_entropy=objective.needs_entropy, num_chunks=num_chunks)
            if not rows:
                # Every output takes part, or ZeRO-3 would gather parameters at other moments than on busy ranks.
                outputs = [output for output in (values_N, entropy_N) if output is not None]
                self._backward(torch.cat(outputs).sum() * 0.0)
                continue
            entropy_BT = None if entropy_N is None else batch.spread(entropy_N)
            loss = objective.loss(loss_batch(groups, batch, batch.spread(values_N), entropy_BT))
            check_count(loss.count, count, chosen.use, self.where)
            self._backward(loss.total / global_count)
            add_loss(sums, loss)
        return sums

    def apply(self) -> dict[str, float]:
        """Take the optimizer step for what has been accumulated; returns lr and grad_norm.

        Raises:
            StageError: the gradient is not finite.
        """
        self._check_schedule()
        answers = self._lead(Command(name="apply"))
        return msgspec.msgpack.decode(answers[0], type=dict[str, float])

    def _apply_here(self) -> dict[str, float]:
        self._ensure_training()
        lr = self.config.lr * lr_ratio(self.config.schedule, self._num_steps)
        grad_norm = self._step(lr)
        if not math.isfinite(grad_norm):
            what = f"the gradient's norm is {grad_norm} in optimizer step {self._num_steps}"
            raise StageError(self.where, what, "resume from the last checkpoint with a lower lr or max_grad_norm")
        self._num_steps += 1
        return {"lr": lr, "grad_norm": grad_norm}

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
        tensors = as_saved(self.model, self._parameters())
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
        """Write Hugging Face format: safetensors, config, tokenizer, model card."""
        self._lead(Command(name="save_model", directory=str(directory), card=card))

    def _save_model_here(self, directory: Path, card: str) -> None:
        whole: dict[str, Tensor] = {}
        for name, tensor in self._parameters():
            if self.line.rank == 0:
                whole[name] = tensor.cpu().clone()
        if self.line.rank == 0:
            write_model(self.model, whole, directory, source=self.config.model, card=card)

    def save_state(self, directory: Path) -> None:
        """Write everything needed to go on training: weights, optimizer, schedule."""
        self._lead(Command(name="save_state", directory=str(directory)))

    def load_state(self, directory: Path) -> None:
        """Read what `save_state` wrote."""
        self._lead(Command(name="load_state", directory=str(directory)))
