"""Sequence parallelism: N ranks run one micro-batch together, each a part of every row (DeepSpeed-Ulysses, 2309.14509).

Rank i of a group holds the i-th of N equal parts of each row, with the positions its tokens have in the whole. So all
that works token by token runs as it is. Attention exchanges: every rank gets all tokens of a part of the heads, runs
attention over whole rows, masked or not, and hands its results back. The states after the last layer are gathered, and
every rank reads and judges all response tokens. Invariants: the loss is divided by N times the count (each rank counts
all), and the gradient of what was gathered is summed over the group. So the sum over ranks is the gradient of one;
ranks of a group have the same parts of a call, and a data-parallel rank is a group.

Models whose attention is torch's own are taken, where they read right in layout "unmasked" or "shared"; N must divide
their query heads, and keys and values are repeated where it does not divide theirs. Called by trainer, once, and by
models in each pass. Shapes: R rows, L row length, N ranks of a group, H heads, D their size.

Tests: tests/contracts/test_sequence_parallel.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from flowrl.engines.attention import attend, has_mask
from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel

    from flowrl.engines.base import Computing
    from flowrl.engines.memory import FitVote
    from flowrl.engines.packing import PackedBatch
    from flowrl.engines.ranks import RankLink

NAME = "flowrl_sequence"  # of the attention function among those of transformers
_splits: list[SequenceSplit] = []  # of this process, which belongs to one group of ranks at most


def check_split(settings: Computing, model: Path, where: str, *, num_ranks: int) -> None:
    """Insist that a node's ranks make whole groups, and that each rank of a group gets as many heads.

    Raises:
        ConfigError: they do not.
    """
    size = settings.sequence_parallel
    if size == 1:
        return
    where = f"{where}.sequence_parallel"
    if num_ranks % size:
        raise ConfigError(where, f"{size} does not divide {num_ranks} ranks", "give a divisor, or other ranks")
    read = json.loads((model / "config.json").read_bytes())
    heads = {**read, **(read.get("text_config") or {})}.get("num_attention_heads")
    if isinstance(heads, int) and heads % size:
        what = f"{size} does not divide the model's {heads} attention heads"
        raise ConfigError(where, what, f"give a divisor of {heads}")
    if getattr(settings, "router_aux_loss", 0.0):
        raise ConfigError(where, "router_aux_loss counts whole rows of tokens", "set it to 0, or router_aux_loss")


class SequenceSplit:
    """This rank's part of every row, and the exchanges with the others of its group."""

    def __init__(self, link: RankLink, room: FitVote, size: int) -> None:
        import torch.distributed as dist

        link.form_groups(size)
        self.size = size
        self.place = link.rank % size
        self._exchange = room.guarded(lambda *args: dist.all_to_all_single(*args, group=link.group))
        _splits[:] = [self]

    def exchange(self, parts_N: Tensor) -> Tensor:
        """Send part i to rank i of the group; returns what each of them sent here."""
        found_N = torch.empty_like(parts_N)
        self._exchange(found_N, parts_N)
        return found_N

    def part(self, values_RL: Tensor) -> Tensor:
        """Return this rank's part of rows."""
        return values_RL.chunk(self.size, 1)[self.place]

    def padded(self, batch: PackedBatch) -> PackedBatch:
        """Return a batch whose rows N divides, without a mask or under a 4D one."""
        more, routes = (0, -batch.input_ids_RL.shape[1] % self.size), batch.routes_RLAK
        return replace(
            batch,
            layout="unmasked" if batch.layout == "unmasked" else "shared",
            input_ids_RL=functional.pad(batch.input_ids_RL, more),
            position_ids_RL=functional.pad(batch.position_ids_RL, more),
            piece_RL=functional.pad(batch.piece_RL, more, value=-1),
            branch_RL=functional.pad(batch.branch_RL, more),
            copies_RL=functional.pad(batch.copies_RL, more),
            routes_RLAK=None if routes is None else functional.pad(routes, (0, 0, 0, 0, *more), value=-1),
        )

    def gather(self, states: Tensor, length: int) -> Tensor:
        """Return all parts of rows, [R, L, ...], from this rank's; its gradient is the sum over the group."""
        parts = _Exchange.apply(states.expand(self.size, *states.shape), self)
        return parts.movedim(0, 1).flatten(1, 2)[:, :length]

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float | None,
        dropout: float, **options: Any,
    ) -> Tensor:  # fmt: skip
        """Return attention over whole rows for this rank's part of them, [R, L / N, H, D]."""
        repeats = query.shape[1] // key.shape[1] if key.shape[1] % self.size else 1
        q, k, v = (
            self._to_heads(each)
            for each in (query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1))
        )
        if has_mask(mask):
            is_grouped = q.shape[1] != k.shape[1]
            found = functional.scaled_dot_product_attention(
                q, k, v, mask, dropout, scale=scaling, enable_gqa=is_grouped
            )
        else:
            found = attend(module, q, k, v, mask, scaling=scaling, dropout=dropout, **options)[0].transpose(1, 2)
        parts = found.unflatten(2, (self.size, -1)).movedim(2, 0)
        return _Exchange.apply(parts, self).movedim(0, 1).flatten(1, 2).transpose(1, 2).contiguous()

    def _to_heads(self, part: Tensor) -> Tensor:
        """Return [R, H / N, L, D] from [R, H, L / N, D]."""
        parts = _Exchange.apply(part.unflatten(1, (self.size, -1)).movedim(1, 0), self)
        return parts.movedim(0, 2).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """An exchange of parts; what went there comes back as a gradient."""

    @staticmethod
    def forward(ctx: Any, parts_N: Tensor, split: SequenceSplit) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.split = split
        return split.exchange(parts_N.contiguous())

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.split.exchange(gradient_N.contiguous()), None


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, dropout: float = 0.0,
    scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Be an attention function of transformers: torch's own, over the group where spans or a longer mask are given."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or (has_mask(attention_mask) and attention_mask.shape[-1] == query.shape[2]):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    found = _splits[0].attend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options)
    return found, None


def take_attention(model: PreTrainedModel, where: str) -> None:
    """Have a model attend by the function above.

    Raises:
        ConfigError: it attends by another than torch's own.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    own = model.config.get_text_config()._attn_implementation
    if own != "sdpa":
        what = f"{type(model).__name__} attends by {own}, whose rows cannot be split"
        raise ConfigError(f"{where}.sequence_parallel", what, "leave it 1")
    register: Callable[..., None] = AttentionInterface.register
    register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
