"""Sequence parallelism: N ranks run one micro-batch together, each a part of every row (DeepSpeed-Ulysses, 2309.14509).

Rank i of a group holds the i-th of N equal parts of each row, with the positions its tokens have in the whole. So all
that works token by token runs as it is. Attention exchanges: every rank gets all tokens of a part of the heads, runs
attention over whole rows, masked or not, and hands its results back. Of the states after the last layer those that are
read are dealt out again, as many to each rank, whose head judges them. What it finds is told to all.

Invariants:
- the loss is divided by N times the count (each rank counts all), and the gradient of what was told is summed over the
  group. So the sum over ranks is the gradient of one;
- ranks of a group have the same parts of a call, and a data-parallel rank is a group.

Models whose attention is torch's own are taken, where they read right in layout "unmasked" or "shared". Where N does
not divide the heads of keys, each is repeated as often as that takes; where it does not divide those of queries, each
of them has keys of its own and heads of zeros are added up to a multiple of N. So the busiest rank has no more heads
than it would have of an uneven deal. A ring would not pad, but want kernels that return their normaliser, one exchange
a rank and layer, and an answer of its own for spans and masks. Called by trainer, once, and by models in each pass.
Shapes: R rows, L row length, N ranks of a group, H heads, D their size.

Tests: tests/unit/engines/test_sequence.py, tests/contracts/test_sequence_parallel.py
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from flowrl.engines.attention import attend, has_mask
from flowrl.engines.ranks import check_groups
from flowrl.errors import ConfigError
from flowrl.model_files import text_config

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
    """Insist that a node's ranks make whole groups, and that there is a head for each rank of a group.

    Raises:
        ConfigError: they do not.
    """
    size = settings.sequence_parallel
    if size == 1:
        return
    where = f"{where}.sequence_parallel"
    if settings.tensor_parallel > 1:
        what = f"is {size} beside tensor_parallel={settings.tensor_parallel}, and ranks are shared out by one of them"
        raise ConfigError(where, what, "leave one of them 1")
    check_groups(num_ranks, size, where)
    read = json.loads((model / "config.json").read_bytes())
    heads = text_config(read).get("num_attention_heads")
    if isinstance(heads, int) and heads < size:
        what = f"{size} ranks, but the model has {heads} attention heads to share out"
        raise ConfigError(where, what, f"give at most {heads}")
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

    def exchange(self, parts: Tensor, received: list[int] | None = None, sent: list[int] | None = None) -> Tensor:
        """Send a part to every rank of the group, and return what each of them sent here.

        Parts lie one behind the other along the first dimension, so long as `sent` and `received` say, else equal.
        """
        shape = parts.shape if received is None else (sum(received), *parts.shape[1:])
        found = parts.new_empty(shape)
        self._exchange(found, parts, received, sent)
        return found

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

    def own(self, values_N: Tensor) -> Tensor:
        """Return what this rank judges of what is there for each token that is read."""
        return values_N.tensor_split(self.size)[self.place]

    def deal(self, states: Tensor, read_N: Tensor, length: int) -> Tensor:
        """Return the states that this rank judges, of all ranks' parts of rows, [R, L / N, ...] here.

        `read_N` are the places that are read, in flattened rows of `length`.
        """
        width = states.shape[1]
        holder_N = read_N % length // width
        place_N = torch.div(read_N, length, rounding_mode="floor") * width + read_N % length % width
        own = holder_N == self.place
        sent = [int(part.sum()) for part in own.tensor_split(self.size)]
        holders = self.own(holder_N)
        received = holders.bincount(minlength=self.size).tolist()
        found = _Exchange.apply(states.flatten(0, 1).index_select(0, place_N[own]), self, received, sent)
        return found.index_select(0, holders.argsort(stable=True).argsort())

    def tell(self, values: Tensor, num_read: int) -> Tensor:
        """Return what every rank found, in order, from this one's; its gradient is the sum over the group."""
        sizes = [len(part) for part in torch.arange(num_read).tensor_split(self.size)]
        same = values.expand(self.size, *values.shape).flatten(0, 1)
        return _Exchange.apply(same, self, sizes, [len(values)] * self.size)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float | None,
        dropout: float, **options: Any,
    ) -> Tensor:  # fmt: skip
        """Return attention over whole rows for this rank's part of them, [R, L / N, H, D]."""
        num_heads, num_keys = query.shape[1], key.shape[1]
        spare = -num_heads % self.size
        repeats = num_heads // num_keys if spare else self.size // math.gcd(num_keys, self.size)
        heads = (query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1))
        q, k, v = (self._to_heads(functional.pad(each, (0, 0, 0, 0, 0, spare))) for each in heads)
        if has_mask(mask):
            is_grouped = q.shape[1] != k.shape[1]
            found = functional.scaled_dot_product_attention(
                q, k, v, mask, dropout, scale=scaling, enable_gqa=is_grouped
            )
        else:
            found = attend(module, q, k, v, mask, scaling=scaling, dropout=dropout, **options)[0].transpose(1, 2)
        parts = found.unflatten(2, (self.size, -1)).movedim(2, 0)
        whole = _Exchange.apply(parts, self).movedim(0, 1).flatten(1, 2)
        return whole[:, :num_heads].transpose(1, 2).contiguous()

    def _to_heads(self, part: Tensor) -> Tensor:
        """Return [R, H / N, L, D] from [R, H, L / N, D]."""
        parts = _Exchange.apply(part.unflatten(1, (self.size, -1)).movedim(1, 0), self)
        return parts.movedim(0, 2).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """An exchange of parts; what went there comes back as a gradient."""

    @staticmethod
    def forward(
        ctx: Any, parts: Tensor, split: SequenceSplit, received: list[int] | None = None, sent: list[int] | None = None
    ) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.split, ctx.back = split, (sent, received)
        return split.exchange(parts.contiguous(), received, sent)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.split.exchange(gradient.contiguous(), *ctx.back), None, None, None


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
