"""The passes of a training engine: forward over a call's groups to score them, forward and backward to learn them.

Invariant (law 7): the gradient is that of sum(total) / sum(count) over all groups, so neither micro-batches, packing
nor ranks can change it. The global count is needed before the first backward, because ZeRO does not let gradients be
scaled afterwards; so each micro-batch's count is first asked of the objective with log-probs of zero, which costs no
forward, and an objective whose count then differs on the true log-probs is refused. A count may therefore depend on
masks and columns only. A call whose micro-batches do not fit into memory is made again with smaller ones (memory.py);
since that clears the gradient, the calls since the last step are kept, and all of them are made again.

`Passes` is what trainer's `Trainer` builds on; its methods run on every rank together.
Shapes: N response tokens, B responses, T longest.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

import msgspec
import torch

from flowrl.engines.memory import Budget, FitVote, NoRoom
from flowrl.engines.models import reads_of
from flowrl.engines.objective import Sums, add_loss, check_count, count_ahead, loss_batch
from flowrl.engines.packing import LAYOUTS, PackedBatch, unpack
from flowrl.engines.parts import Part, deal
from flowrl.engines.router import Routing
from flowrl.engines.teacher import Teacher
from flowrl.errors import StageError
from flowrl.messages import Buffer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from flowrl.algorithms.base import Loss, Objective
    from flowrl.config import Select
    from flowrl.engines.base import TokenGroup, TrainingConfig
    from flowrl.engines.models import TokenReader
    from flowrl.engines.packing import Layout
    from flowrl.engines.ranks import RankLink
    from flowrl.engines.teacher import Reading
    from flowrl.graph.stage import Say
    from flowrl.messages import FloatArray

A = TypeVar("A")
T = TypeVar("T")


class RankValues(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank found for each of its responses."""

    rows: list[tuple[int, int, Buffer]]  # group, sample, values


class Passes:
    """One rank's passes over its model."""

    device: torch.device
    dtype: torch.dtype
    model: PreTrainedModel
    reader: TokenReader
    _module: nn.Module  # what forward goes through: the reader, or the backend's wrapper of it
    _room: FitVote

    def __init__(self, config: TrainingConfig, *, where: str, say: Say) -> None:
        self.config = config
        self.where = where
        self._say = say
        self._line: RankLink | None = None
        self._is_training = False  # whether the optimizer exists: engines that only score never make one
        self._scoring = Budget(config.micro_batch_tokens, where=where)
        self._learning = Budget(config.micro_batch_tokens, where=where)
        self._since_step: list[tuple[Sequence[TokenGroup], Select]] = []  # what the gradient is of
        self._teacher: Teacher | None = None
        self._learned: dict[tuple[int, int], FloatArray] = {}  # (group, sample) -> what the last call's loss was of

    # What a subclass provides.

    @property
    def _ranks_meet_in_passes(self) -> bool:
        """Say whether a forward or backward waits for other ranks."""
        return False

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

    # What it gives.

    @property
    def line(self) -> RankLink:
        """Return this rank's connection."""
        if self._line is None:
            raise StageError(self.where, "the engine is not open", "call open first")
        return self._line

    def _ensure_training(self) -> None:
        if not self._is_training:
            self._start_training()
            self._is_training = True

    def _score_here(self, groups: Sequence[TokenGroup], chosen: Select | None = None) -> RankValues:
        """Score the groups, or with a chosen objective compare them with its teacher."""
        objective: Objective | None = None if chosen is None else chosen.load(f"{self.where}.objective")
        found = None
        while found is None:
            found = self._attempt(self._scoring, partial(self._score_parts, objective), groups)
        return RankValues(rows=[(group, sample, Buffer.floats(values)) for (group, sample), values in found.items()])

    def _score_parts(
        self, objective: Objective | None, groups: Sequence[TokenGroup]
    ) -> dict[tuple[int, int], FloatArray]:
        done: list[tuple[PackedBatch, Tensor]] = []
        teacher = None if objective is None else self._teacher_of(objective)
        with torch.no_grad():
            for part in self._parts(groups, self._scoring, has_teacher=teacher is not None):
                with self._room.one_pass(part.size, part.vote, self._scoring):
                    batch = part.pack(self.device)
                    reading = None if objective is None else self._read(batch, objective)
                    values_N, divergence_N = self._module(batch, num_chunks=part.num_chunks, reading=reading)
                if part.rows:
                    done.append((batch, values_N if divergence_N is None else divergence_N))
        return unpack(done)

    def _teacher_of(self, objective: Objective) -> Teacher | None:
        """Return the objective's teacher, loading it where it is not there yet; None where it has none."""
        name = objective.teacher_model
        if name and (self._teacher is None or self._teacher.directory != name):
            vocab_size = int(self.model.config.get_text_config().vocab_size)
            self._teacher = Teacher(name, self.config, where=self.where, dtype=self.dtype, device=self.device,
                                    vocab_size=vocab_size)  # fmt: skip
        return self._teacher if name else None

    def _read(self, batch: PackedBatch, objective: Objective) -> Reading | None:
        """Return what the objective's teacher knows at the tokens of a batch."""
        teacher = self._teacher_of(objective)
        if teacher is None:
            return None
        temperature = self.config.temperature if objective.temperature is None else objective.temperature
        direction, share = objective.divergence, objective.teacher_share
        return teacher.read(batch, direction=direction, share=share, temperature=temperature)

    def _parts(
        self, groups: Sequence[TokenGroup], budget: Budget, *, whole_groups: bool = False, has_teacher: bool = False
    ) -> list[Part]:
        calls = self.reader.num_chunks
        layout = self._layout(max(len(g.prompt_ids) + max(len(r) for r in g.responses) for g in groups))
        if layout == "alone" and whole_groups and self._ranks_meet_in_passes and self.line.world_size > 1:
            what = f"{type(self.model).__name__} runs these sequences one by one, and ranks would wait for each other"
            raise StageError(self.where, what, "take zero_stage 0 or 1, one rank, or shorter sequences")
        return deal(
            groups,
            layout=layout,
            reads=reads_of(self.config),
            budget=budget.num_tokens,
            rank=self.line.rank,
            world_size=self.line.world_size,
            whole_groups=whole_groups,
            head_calls=(lambda num_tokens: calls(2 * num_tokens)) if has_teacher else calls,  # logits of both are held
        )

    def _layout(self, longest: int) -> Layout:
        readers = [self.reader, *([] if self._teacher is None else [self._teacher.reader])]
        return LAYOUTS[max(LAYOUTS.index(reader.layout(longest)) for reader in readers)]

    def _attempt(self, budget: Budget, work: Callable[[A], T], argument: A) -> T | None:
        """Return `work(argument)`, or None where memory did not suffice for it and the budget is smaller now."""
        try:
            return work(argument)
        except NoRoom as failure:
            votes = failure.votes
        self._leave_pass()  # here, where the frames of the failed pass are gone, and its activations with them
        found = budget.shrink(votes)
        if self.line.rank == 0:
            self._say(found)
        return None

    def _accumulate_here(self, groups: Sequence[TokenGroup], chosen: Select) -> Sums:
        self._ensure_training()
        calls = [(groups, chosen)]
        while (sums := self._attempt(self._learning, self._learn_all, calls)) is None:
            self._clear_gradients()
            calls = [*self._since_step, (groups, chosen)]
        self._since_step.append((groups, chosen))
        return sums | self._learning.figures()

    def _learn_all(self, calls: list[tuple[Sequence[TokenGroup], Select]]) -> Sums:
        """Add the gradient of each call; returns the sums of the last."""
        return [self._learn(groups, chosen) for groups, chosen in calls][-1]

    def _learn(self, groups: Sequence[TokenGroup], chosen: Select) -> Sums:
        objective: Objective = chosen.load(f"{self.where}.objective")
        has_teacher = self._teacher_of(objective) is not None
        parts = self._parts(groups, self._learning, whole_groups=objective.needs_whole_groups, has_teacher=has_teacher)
        counts = [count_ahead(objective, groups, part.pack(self.device)) if part.rows else 0.0 for part in parts]
        global_count = self.line.sum(sum(counts))
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
        counts_AE = torch.zeros(())
        num_tokens = 0.0
        with torch.no_grad():
            for part in parts:
                with self._room.one_pass(part.size, part.vote, self._learning):
                    batch = part.pack(self.device)
                    routed_AE, _ = self._module(batch, num_chunks=part.num_chunks, routing=Routing())
                counts_AE = counts_AE + routed_AE.cpu().double() * bool(part.rows)
                num_tokens += float(batch.copies_RL.sum()) * bool(part.rows)
        *counts, num_tokens = self.line.sums([*counts_AE.flatten().tolist(), num_tokens])
        shares_AE = (torch.tensor(counts) / num_tokens).view(counts_AE.shape).float().to(self.device)
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
