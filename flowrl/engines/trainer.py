"""What the training engines share: rank 0 leads, every rank carries out; a step is `accumulate`, then `apply`.

`Trainer` implements `TrainingEngine`; a subclass says how gradients are accumulated, how a step is taken and how
state is stored. Every public method runs on rank 0, which checks its arguments, hands a command to the followers and
carries it out with them; an error found by the check leaves the ranks usable.

Invariant (law 7): the gradient is that of sum(total) / sum(count) over all groups, so neither micro-batches, packing
nor ranks can change it. The global count is needed before the first backward, because ZeRO does not let gradients be
scaled afterwards. So each micro-batch's count is first asked of the objective with log-probs of zero, which costs no
forward. An objective whose count then differs on the true log-probs is refused. A count may therefore depend on masks
and columns only. A call whose micro-batches do not fit into memory is made again with smaller ones (memory.py); since
that clears the gradient, the calls since the last step are kept, and all of them are made again.

Called by the learner, critic, reference and reward-model stages. Shapes: N response tokens, B responses, T longest.

Tests: tests/unit/engines/test_trainer.py
"""

from __future__ import annotations

import math
import os
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import msgspec
import torch

from flowrl.config import Select
from flowrl.engines.agreement import check_fit, settle
from flowrl.engines.aside import Aside
from flowrl.engines.attention import check_attention
from flowrl.engines.average import Average, is_saved
from flowrl.engines.base import Computing, TokenGroup, Training
from flowrl.engines.compiled import check_compile, compile_layers
from flowrl.engines.lora import Adapter
from flowrl.engines.memory import Budget, FitVote, NoRoom
from flowrl.engines.models import TokenReader, choose_dtype, load_model, reads_of
from flowrl.engines.objective import Sums, add_loss, check_count, count_ahead, divide, loss_batch
from flowrl.engines.packing import LAYOUTS, PackedBatch, Part, deal, unpack
from flowrl.engines.publishing import Publisher, as_saved, carried_buffers, score_canary, write_model
from flowrl.engines.ranks import RankLink
from flowrl.engines.router import Routing, check_router
from flowrl.engines.routes import RouteReplay
from flowrl.engines.savings import DEEPSPEED, FSDP, check_offload, freeze, recompute
from flowrl.engines.sequence import SequenceSplit, check_split, take_attention
from flowrl.engines.teacher import Teacher
from flowrl.engines.tensor import check_parts
from flowrl.errors import ConfigError, StageError
from flowrl.messages import Buffer, Weights, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from flowrl.algorithms.base import Loss, Objective
    from flowrl.engines.base import Scoring, TrainingConfig
    from flowrl.engines.models import Reading
    from flowrl.engines.packing import Layout
    from flowrl.graph.stage import Ranks, Say
    from flowrl.messages import FloatArray

A = TypeVar("A")
T = TypeVar("T")
Found = dict[tuple[int, int], "FloatArray"]  # by group and sample: a value for each response token
Rows = list[tuple[int, int, Buffer]]  # the same between ranks


class _Score(msgspec.Struct, frozen=True, tag=True):
    """Score groups, or compare them with an objective's teacher."""

    groups: list[TokenGroup]
    objective: Select | None = None


class _Accumulate(msgspec.Struct, frozen=True, tag=True):
    groups: list[TokenGroup]
    objective: Select


class _Apply(msgspec.Struct, frozen=True, tag=True):
    pass


class _Publish(msgspec.Struct, frozen=True, tag=True):
    version: int
    canary: Buffer | None


class _SaveModel(msgspec.Struct, frozen=True, tag=True):
    directory: str
    card: str


class _SaveState(msgspec.Struct, frozen=True, tag=True):
    directory: str


class _LoadState(msgspec.Struct, frozen=True, tag=True):
    directory: str


class _Sleep(msgspec.Struct, frozen=True, tag=True):
    pass


class _Wake(msgspec.Struct, frozen=True, tag=True):
    pass


class _Close(msgspec.Struct, frozen=True, tag=True):
    pass


Command = _Score | _Accumulate | _Apply | _Publish | _SaveModel | _SaveState | _LoadState | _Sleep | _Wake | _Close
_pack = msgspec.msgpack.encode
_unpack_command = msgspec.msgpack.Decoder(Command).decode


class LossScale(NamedTuple):
    """The factor by which a loss is multiplied so that its gradients do not vanish in float16."""

    now: float
    least: float  # an overflow here is none of the scale


class Trainer:
    """One rank of a training engine; subclasses add the optimizer."""

    backend_of_one = False  # whether even one rank alone needs a process group
    shards = False  # whether it looks at zero_stage
    takes_parts = False  # whether it looks at tensor_parallel
    can_offload: ClassVar[dict[str, int]] = {}  # setting -> the least ZeRO stage it needs
    scales_loss: ClassVar[bool] = False  # without which float16's gradients vanish

    device: torch.device
    dtype: torch.dtype
    model: PreTrainedModel
    reader: TokenReader
    _module: nn.Module  # what forward goes through: the reader, or the backend's wrapper of it
    _adapter: Adapter | None
    _publisher: Publisher
    _room: FitVote

    def __init__(
        self, config: TrainingConfig, *, where: str, name: str, num_receivers: int = 1, say: Say | None = None
    ) -> None:
        """Load nothing yet; `say` is told in words what the user should know."""
        self.config = config
        self.where = where
        self._say = say or (lambda text: None)
        self._name = name
        self._num_receivers = num_receivers
        self._link: RankLink | None = None
        self._is_training = False  # whether the optimizer exists: engines that only score never make one
        self._scoring = Budget(config.micro_batch_tokens, where=where)
        self._learning = Budget(config.micro_batch_tokens, where=where)
        self._since_step: list[_Accumulate] = []  # what the gradient is of
        self._learned: Found = {}  # what the last call's loss was of
        self._num_steps = 0  # optimizer steps taken, the schedule's clock
        self._has_stepped = False  # in this process
        self._teacher: Teacher | None = None
        self._aside = Aside(config.aside_dir)
        self._average = Average(config.ema_decay) if config.ema_decay else None

    @classmethod
    def check_settings(cls, settings: Scoring | Training, where: str, *, has_gpu: bool) -> None:
        """Insist, before anything is loaded, on what this engine can do on such a device with settings that it uses.

        Raises:
            ConfigError: one of them it could not carry out, or would not look at.
        """
        check_attention(settings.attention, where, has_gpu=has_gpu)
        check_offload(settings, where, has_gpu=has_gpu, least_stage=cls.can_offload)
        check_compile(settings, where, has_gpu=has_gpu)
        trains = isinstance(settings, Training) and not getattr(settings, "frozen", False)
        if trains and settings.dtype == "float16" and not cls.scales_loss:
            what = f"is float16, whose gradients vanish without the loss scaling that {cls.__name__} lacks"
            raise ConfigError(f"{where}.dtype", what, f"take bfloat16, or engine={DEEPSPEED}")
        if not cls.takes_parts and settings.tensor_parallel > 1:
            what = f"is {settings.tensor_parallel}, and {cls.__name__} runs every layer whole"
            raise ConfigError(f"{where}.tensor_parallel", what, f"leave it 1, or take engine={FSDP}")
        if not cls.shards and settings.zero_stage not in (0, default := Computing().zero_stage):
            what = f"is {settings.zero_stage}, and {cls.__name__} holds every weight whole on each rank"
            raise ConfigError(f"{where}.zero_stage", what, f"leave it {default}, or take engine={DEEPSPEED}")

    # What a subclass provides.

    @property
    def _ranks_meet_in_passes(self) -> bool:
        """Say whether a forward or backward waits for other ranks."""
        return False

    def _load(self) -> PreTrainedModel:
        return self._load_as(self.config, self.where)

    def _load_as(self, config: TrainingConfig, where: str) -> PreTrainedModel:
        """Load a model, the engine's own or a teacher beside it."""
        return load_model(config, where=where, dtype=self.dtype, device=self.device, say=self._tell)

    def _place_teacher(self, reader: TokenReader) -> nn.Module:
        """Return what is called to read with a teacher."""
        return reader

    def _tell(self, text: str) -> None:
        """Say what the user should know, once for all ranks."""
        if self.link.rank == 0:
            self._say(text)

    def _opened(self) -> None:
        """Do what must be done once the model is loaded."""

    def _start_training(self) -> None:
        """Make the optimizer."""
        raise NotImplementedError

    def _backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's part of the loss; the parts of all ranks add up."""
        raise NotImplementedError

    def _leave_pass(self) -> None:
        """Clear away what a forward or backward that was broken off has left besides gradients."""

    def _clear_gradients(self) -> None:
        """Forget every gradient since the last step."""
        raise NotImplementedError

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

    # Opening, leading, following, closing.

    def open(self, ranks: Ranks) -> None:
        """Load the model on this rank and join the others."""
        torch.set_num_threads(self.config.threads)
        torch.manual_seed(self.config.seed)
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.dtype = choose_dtype(self.config.dtype, self.device)
        if self.device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # transformers imports DeepSpeed, which else looks for devices aloud
        self.check_settings(self.config, self.where, has_gpu=self.device.type == "cuda")
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        self._publisher = Publisher(
            self.config,
            name=self._name,
            num_receivers=self._num_receivers,
            host=ranks.address,
            device=self.device,
        )
        self._link = RankLink(ranks, where=self.where, backend=backend, needs_group=self.backend_of_one)
        is_split = self.config.sequence_parallel > 1
        self._room = FitVote(self._link, where=self.where, ranks_meet=self._ranks_meet_in_passes or is_split)
        with self._link.guard("open"):
            for check in (check_split, check_parts):
                check(self.config, Path(self.config.model), self.where, num_ranks=ranks.world_size)
            self.model = self._load()
            if is_split:
                take_attention(self.model, self.where)
            self._adapter = Adapter(self.model, self.config, where=self.where) if self.config.lora.rank else None
            self.model.config.use_cache = False
            if self.config.router_aux_loss:
                check_router(self.model.config, self.where)
            if self.config.gradient_checkpointing:
                every, keeps = self.config.checkpoint_every, self.config.checkpoint_keeps
                recompute(self.model, every=every, where=self.where, keeps=keeps)
            if self.config.freeze:
                freeze(self.model, self.config.freeze, self.where)
            self.reader = TokenReader(
                self.model,
                head=self.config.head,
                temperature=self.config.temperature,
                attention=self.config.attention,
            )
            if self.config.compile:
                compile_layers(self.model, self.where)
            if is_split:
                self.reader.split = SequenceSplit(self._link, self._room, self.config.sequence_parallel)
            if self.config.routing == "replay":
                self.reader.replay = RouteReplay(self.model, self.where)
            self._module = self.reader
            self._opened()
            if self.reader.replay is not None:
                self.reader.replay.settle(self.model, self._module, self.device)
            settle(self.reader, self._module, self.config, where=self.where)
            if is_split and "shared" not in self.reader.layouts:
                what = f"rows of {type(self.model).__name__} take no block mask and cannot be split"
                raise ConfigError(f"{self.where}.sequence_parallel", what, "leave it 1")
            for said in (self.reader.attention_in_words(), self._publisher.said if not self.config.frozen else ""):
                if said:
                    self._tell(said)
            self._link.gather(b"")

    @property
    def link(self) -> RankLink:
        """Return this rank's connection."""
        if self._link is None:
            raise StageError(self.where, "the engine is not open", "call open first")
        return self._link

    def follow(self) -> None:
        """Serve as a rank other than 0 until rank 0 closes; returns then."""
        while True:
            with self.link.guard("following"):
                command = _unpack_command(self.link.receive())
            with self.link.guard(_words(command)):
                self.link.gather(self._carry_out(command))
            if isinstance(command, _Close):
                return

    def _lead(self, command: Command) -> list[bytes]:
        """Have every rank carry out a command; returns their answers, rank 0's first."""
        if self.link.rank != 0:
            raise StageError(self.where, f"{_words(command)} was called on rank {self.link.rank}", "call it on rank 0")
        if isinstance(command, _Score | _Accumulate):
            check_fit(command.groups, self.reader, self.where)
        self.link.send(_pack(command))
        with self.link.guard(_words(command)):
            return self.link.gather(self._carry_out(command))

    def _carry_out(self, command: Command) -> bytes:
        match command:
            case _Score():
                return _pack(self._score(command))
            case _Accumulate():
                return _pack(self._accumulate(command))
            case _Apply():
                return _pack(self._apply())
            case _Publish():
                return self._publish(command)
            case _SaveModel():
                self._save_model(Path(command.directory), command.card)
            case _SaveState():
                self._save_state(Path(command.directory))
            case _LoadState():
                self._load_state(Path(command.directory))
            case _Sleep():
                self._put_aside()
            case _Wake():
                self._take_back()
            case _Close():
                pass
        return b""

    # Turns on its devices.

    def sleep(self) -> None:
        """Put aside what it holds on its devices, on every rank; nothing else is called before `wake`."""
        self._lead(_Sleep())

    def wake(self) -> None:
        """Be as before `sleep`, to the bit."""
        self._lead(_Wake())

    @property
    def _readers(self) -> list[TokenReader]:
        """Return the model's reader and, where it is there, the teacher's."""
        return [self.reader, *([] if self._teacher is None else [self._teacher.reader])]

    def _held(self) -> Iterator[Tensor]:
        """Yield the tensors that it holds on its device between two calls; a subclass adds the optimizer's."""
        for model in self._readers:
            yield from model.buffers()
            for parameter in model.parameters():
                yield from (parameter, *([] if parameter.grad is None else [parameter.grad]))

    def _scratch(self) -> Iterator[Tensor]:
        """Yield the tensors whose contents nothing needs between two calls."""
        return iter(())

    def _put_aside(self) -> None:
        for parameter in self.reader.parameters():
            if not hasattr(parameter, "to_local") and not parameter.untyped_storage().resizable():
                parameter.data = parameter.detach().clone()  # it lay in the mapping of the model's file
        own = (each for each in self._held() if each.device.type == self.device.type)  # not what is offloaded already
        self._aside.put(own, self._scratch())

    def _take_back(self) -> None:
        self._aside.back()

    def close(self) -> None:
        """Release the ranks, the transport and the model."""
        if self._link is None:
            return
        link, self._link = self._link, None
        try:
            self._publisher.close()
            if link.rank == 0 and not link.is_broken:
                link.send(_pack(_Close()))
                link.gather(b"")
        finally:
            self._unload()
            link.close()

    # Passes: forward over a call's groups, in parts that fit into memory.

    def _parts(
        self, groups: Sequence[TokenGroup], budget: Budget, *, objective: Objective | None, learns: bool = False
    ) -> list[Part]:
        has_teacher = objective is not None and self._teacher_of(objective) is not None
        whole_groups = learns and objective is not None and objective.needs_whole_groups
        lone = not has_teacher and not (learns and objective is not None and objective.needs_entropy)
        calls, size = self.reader.num_chunks, self.config.sequence_parallel
        together = size * self.config.tensor_parallel  # ranks that have the same parts
        layout = self._layout(max(len(g.prompt_ids) + max(len(r) for r in g.responses) for g in groups))
        if layout not in ("unmasked", "shared") and size > 1:
            what = f"{type(self.model).__name__} takes no block mask over these sequences, whose rows cannot be split"
            raise StageError(self.where, what, "leave sequence_parallel 1, or take shorter sequences")
        if layout == "alone" and whole_groups and self._ranks_meet_in_passes and self.link.world_size > 1:
            what = f"{type(self.model).__name__} runs these sequences one by one, and ranks would wait for each other"
            raise StageError(self.where, what, "take zero_stage 0 or 1, one rank, or shorter sequences")
        return deal(
            groups,
            layout=layout,
            reads=reads_of(self.config),
            budget=budget.num_tokens,
            rank=self.link.rank // together,
            world_size=self.link.world_size // together,
            whole_groups=whole_groups,
            # Logits of both are held where there is a teacher.
            head_calls=lambda num_tokens: calls(-(-num_tokens // size) * (1 + has_teacher), lone=lone),
        )

    def _layout(self, longest: int) -> Layout:
        return LAYOUTS[max(LAYOUTS.index(reader.layout(longest)) for reader in self._readers)]

    def _attempt(self, budget: Budget, work: Callable[[A], T], argument: A) -> T | None:
        """Return `work(argument)`, or None where memory did not suffice for it and the budget is smaller now."""
        try:
            return work(argument)
        except NoRoom as failure:
            votes = failure.votes
        self._leave_pass()  # here, where the frames of the failed pass are gone, and its activations with them
        found = budget.shrink(votes)
        if self.link.rank == 0:
            self._say(found)
        return None

    def _teacher_of(self, objective: Objective) -> Teacher | None:
        """Return the objective's teacher, loading it where it is not there yet; None where it has none."""
        name = objective.teacher_model
        if name and (self._teacher is None or self._teacher.directory != name):
            size = int(self.model.config.get_text_config().vocab_size)
            self._teacher = Teacher(
                name, self.config, where=self.where, vocab_size=size, load=self._load_as, place=self._place_teacher
            )
        return self._teacher if name else None

    def _read(self, batch: PackedBatch, objective: Objective | None) -> Reading | None:
        """Return what the objective's teacher knows at the tokens of a batch."""
        teacher = None if objective is None else self._teacher_of(objective)
        if teacher is None or objective is None:
            return None
        temperature = self.config.temperature if objective.temperature is None else objective.temperature
        direction, share = objective.divergence, objective.teacher_share
        return teacher.read(batch, direction=direction, share=share, temperature=temperature)

    # Scoring.

    def score(self, groups: Sequence[TokenGroup]) -> list[list[FloatArray]]:
        """Return log-probs or values of every response token, [group][sample] -> float32 [tokens]."""
        return self._rows(_Score(list(groups))) if groups else []

    def compare(self, groups: Sequence[TokenGroup], objective: Select) -> list[list[FloatArray]]:
        """Return the KL between the objective's teacher and the model at every response token, as `score` does."""
        return self._rows(_Score(list(groups), objective))

    def _rows(self, command: _Score) -> list[list[FloatArray]]:
        rows = {
            (group, sample): values.numpy()
            for answer in self._lead(command)
            for group, sample, values in msgspec.msgpack.decode(answer, type=Rows)
        }
        return [[rows[g, s] for s in range(len(group.responses))] for g, group in enumerate(command.groups)]

    def _score(self, command: _Score) -> Rows:
        objective: Objective | None = command.objective and command.objective.load(f"{self.where}.objective")
        found = None
        while found is None:
            found = self._attempt(self._scoring, partial(self._score_parts, objective), command.groups)
        return [(group, sample, Buffer.floats(values)) for (group, sample), values in found.items()]

    @torch.no_grad()
    def _score_parts(self, objective: Objective | None, groups: Sequence[TokenGroup]) -> Found:
        done: list[tuple[PackedBatch, Tensor]] = []
        for part in self._parts(groups, self._scoring, objective=objective):
            with self._room.one_pass(part.size, part.vote, self._scoring):
                batch = part.pack(self.device)
                reading = self._read(batch, objective)
                values_N, divergence_N = self._module(batch, num_chunks=part.num_chunks, reading=reading)
            if part.rows:
                done.append((batch, values_N if divergence_N is None else divergence_N))
        return unpack(done)

    # A step: forward and backward over groups, as often as the caller likes, and then the optimizer's.

    def accumulate(self, groups: Sequence[TokenGroup], objective: Select) -> dict[str, float]:
        """Run forward and backward over the groups; the gradient is that of total / count over all of them.

        Further calls before `apply` add to it. Returns the objective's metrics, each divided once by its own global
        count, and "loss".
        """
        if not groups:
            raise StageError(self.where, "no groups to learn from", "give at least one")
        found: Objective = objective.load(f"{self.where}.objective")
        if self.reader.replay is not None and not found.is_beside:
            self.reader.replay.check(groups)
        self._check_schedule()
        answers = self._lead(_Accumulate(list(groups), objective))
        return divide(msgspec.msgpack.decode(answer, type=Sums) for answer in answers)

    def _check_schedule(self) -> None:
        schedule = self.config.schedule
        if schedule.kind != "constant" and schedule.total_steps == 0:
            what = f"the {schedule.kind} schedule has total_steps=0"
            raise ConfigError(f"{self.where}.schedule", what, "give total_steps or kind=constant")

    def _accumulate(self, call: _Accumulate) -> Sums:
        self._ensure_training()
        calls = [call]
        while (sums := self._attempt(self._learning, self._learn_all, calls)) is None:
            self._clear_gradients()
            calls = [*self._since_step, call]
        self._since_step.append(call)
        replayed = {} if self.reader.replay is None else self.reader.replay.figures()
        return sums | self._learning.figures() | replayed

    def _ensure_training(self) -> None:
        if self.config.frozen:
            raise StageError(self.where, "the model is frozen", "train with a node that has an optimizer")
        if not self._is_training:
            self._start_training()
            self._is_training = True

    def _learn_all(self, calls: list[_Accumulate]) -> Sums:
        """Add the gradient of each call; returns the sums of the last."""
        return [self._learn(call.groups, call.objective) for call in calls][-1]

    def _learn(self, groups: Sequence[TokenGroup], chosen: Select) -> Sums:
        objective: Objective = chosen.load(f"{self.where}.objective")
        parts = self._parts(groups, self._learning, objective=objective, learns=True)
        counts = [count_ahead(objective, groups, part.pack(self.device)) if part.rows else 0.0 for part in parts]
        # Ranks with parts of layers have whole gradients of the same groups; those with parts of rows add theirs up.
        global_count = self.link.sum(sum(counts)) / self.config.tensor_parallel
        if global_count <= 0:
            what = f"the objective counts nothing in {len(groups)} groups"
            raise StageError(self.where, what, "are all masks 0?")
        routing = self._count_routes(parts) if self.config.router_aux_loss and not objective.is_beside else None
        sums: Sums = {}
        self._learned = {}
        for part, count in zip(parts, counts, strict=True):
            with self._room.one_pass(part.size, part.vote, self._learning):
                loss = self._learn_part(part, objective, global_count, routing)
            if loss is not None:
                check_count(loss.count, count, chosen.use, self.where)
                add_loss(sums, loss)
        return sums

    def _count_routes(self, parts: list[Part]) -> Routing:
        """Return what share of the step's tokens each expert gets, and how many tokens there are."""
        counts_AE = torch.zeros((), dtype=torch.float32)
        num_tokens = 0.0
        with torch.no_grad():
            for part in parts:
                with self._room.one_pass(part.size, part.vote, self._learning):
                    batch = part.pack(self.device)
                    routed_AE, _ = self._module(batch, num_chunks=part.num_chunks, routing=Routing())
                counts_AE = counts_AE + routed_AE.cpu().double() * bool(part.rows)
                num_tokens += float(batch.copies_RL.sum()) * bool(part.rows)
        *counts, num_tokens = self.link.sums([*counts_AE.flatten().tolist(), num_tokens])
        shares_AE = (torch.tensor(counts, dtype=torch.float32) / num_tokens).view(counts_AE.shape).to(self.device)
        return Routing(shares_AE, num_tokens)

    def _learn_part(
        self, part: Part, objective: Objective, global_count: float, routing: Routing | None
    ) -> Loss | None:
        batch = part.pack(self.device)
        reading = self._read(batch, objective)
        values_N, further_N, *routed = self._module(
            batch,
            needs_entropy=objective.needs_entropy,
            num_chunks=part.num_chunks,
            temperature=objective.temperature,
            reading=reading,
            routing=routing,
        )
        if not part.rows:
            # Every output takes part, or ZeRO-3 would gather parameters at other moments than on busy ranks.
            outputs = [output.sum() for output in (values_N, further_N, *routed) if output is not None]
            self._backward(torch.stack(outputs).sum() * 0.0)
            return None
        further_BT = None if further_N is None else batch.spread(further_N)
        values = loss_batch(part.groups, batch, batch.spread(values_N), further_BT if reading is None else None)
        loss = objective.loss(values if reading is None else values._replace(divergence_BT=further_BT))
        total = loss.total / global_count
        if routing is not None:
            total = total + self.config.router_aux_loss * routed[0] / routing.num_tokens
            loss.metrics["router_loss"] = (routed[0], batch.copies_RL.sum())
        self._backward(total)
        self._learned |= unpack([(batch, values_N.detach())])
        return loss

    def learned(self) -> Found:
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
        return msgspec.msgpack.decode(self._lead(_Apply())[0], type=dict[str, float])

    def _apply(self) -> dict[str, float]:
        self._ensure_training()
        lr = self.config.lr * self.config.schedule.ratio(self._num_steps)
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
        if self._average is not None:
            self._on_rank_0(self._average.update, self._parameters())

    # Publishing and saving: the whole weights, on rank 0.

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter of the plain model once, whole; adapters are merged in."""
        if self._adapter is not None:
            return self._adapter.merged(self._whole)
        return self._whole([*self.model.named_parameters()])

    def _on_rank_0(self, take: Callable[[Iterator[tuple[str, Tensor]]], T], tensors: Iterator[Any]) -> T | None:
        """Let rank 0 take tensors; the others take their part in gathering them."""
        if self.link.rank == 0:
            return take(tensors)
        for _ in tensors:
            pass
        return None

    def publish(self, version: int, canary: Buffer | None) -> Weights:
        """Offer the current weights as `version`; returns the message for the generators."""
        weights = decode(self._lead(_Publish(version, canary))[0])
        assert isinstance(weights, Weights)
        return weights

    def _publish(self, command: _Publish) -> bytes:
        canary = None
        if command.canary is not None:
            canary = score_canary(self._module, command.canary, dtype=self.dtype, device=self.device)
        if self._adapter is not None and self.config.lora.publish == "adapter":
            tensors = self._adapter.stored(self._whole)
        else:
            tensors = chain(self._parameters(), carried_buffers(self.model))
            if self.link.rank == 0:  # the others only take their part in the gathering
                tensors = as_saved(self.model, tensors)
        weights = self._on_rank_0(lambda each: self._publisher.publish(command.version, each, canary), tensors)
        return b"" if weights is None else encode(weights)

    def transfer(self, version: int) -> None:
        """Wait until the bytes of `version` no longer depend on the parameters; rank 0 only, any thread."""
        self._publisher.transfer(version)

    def retire(self, version: int, keep: frozenset[int] = frozenset()) -> None:
        """Forget the bytes of every version before `version` but those in `keep`; rank 0 only, any thread."""
        self._publisher.retire(version, keep)

    def save_model(self, directory: Path, *, card: str) -> None:
        """Write Hugging Face format: safetensors, config, tokenizer, model card.

        Beside it `adapter` and `ema_model`, the average of the weights, where there are such.
        """
        self._lead(_SaveModel(str(directory), card))

    def _save_model(self, directory: Path, card: str) -> None:
        extra: dict[str, Any] = {"source": self.config.model, "card": card, "chat_template": self.config.chat_template}
        extra |= {"trust_remote_code": self.config.trust_remote_code}
        whole = self._on_rank_0(lambda each: {name: tensor.cpu().clone() for name, tensor in each}, self._parameters())
        if whole is not None:
            write_model(self.model, whole, directory, **extra)
        if self._adapter is not None:
            trained = {name: tensor.clone() for name, tensor in self._adapter.stored(self._whole)}
            if self.link.rank == 0:
                self._adapter.write(directory.with_name("adapter"), trained.items())
        if self._average is not None and self._average.tensors:
            averaged = {name: tensor.to(self.dtype) for name, tensor in self._average.tensors.items()}
            write_model(self.model, averaged, directory.with_name("ema_model"), **extra)

    def save_state(self, directory: Path) -> None:
        """Write everything needed to go on training: weights, optimizer, schedule."""
        self._lead(_SaveState(str(directory)))

    def _save_state(self, directory: Path) -> None:
        self._ensure_training()
        self._write_state(directory)
        if self._average is not None and self._average.tensors:
            self._average.write(directory)

    def load_state(self, directory: Path) -> None:
        """Read what `save_state` wrote."""
        self._lead(_LoadState(str(directory)))

    def _load_state(self, directory: Path) -> None:
        self._ensure_training()
        self._read_state(directory)
        if self._average is None:
            return
        self._average.tensors = {}
        if self._num_steps == 0:  # it starts with the first step
            return
        if is_saved(directory):
            if self.link.rank == 0:
                self._average.read(directory)
            return
        self._update_average()
        if self.link.rank == 0:
            self._say(f"{directory} has no average of the weights: it starts at step {self._num_steps}")


def _words(command: Command) -> str:
    """Return what a command is called in messages: `_SaveModel` is "save model"."""
    name = type(command).__name__.strip("_")
    return "".join(f" {c.lower()}" if c.isupper() else c for c in name).strip()
