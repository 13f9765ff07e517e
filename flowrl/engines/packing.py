"""Lay token groups out as micro-batches so that the prompt of a group is computed once for all its responses.

A *piece* is one prompt and some of its responses: the prompt's tokens, then response 1, response 2, and so on. Every
response continues the prompt's positions and sees, through a block mask, the prompt and its own earlier tokens only.
That is exactly the mathematics of separate sequences, without the n - 1 further copies of the prompt. A row holds whole
pieces; a micro-batch is as many rows, as long as its longest piece, as the token budget allows, filled first-fit from
the longest piece down. A masked row costs the square of its length in attention, so rows are never longer than one
piece needs. A piece takes no more responses than sharing pays for (`max_shared_tokens`).

The "unmasked" layout needs no mask (attention.py): what it costs grows with tokens. So a prompt is shared by as many
responses as a micro-batch holds, and that is one row without padding.

The "padded" layout, for models whose layers cannot be masked this way (Mamba, Jamba), has one response in each piece
and one piece in each row. These are ordinary right-padded sequences with the same results. "alone" is the same with
each row run by itself, for models in which even padding or a longer row changes the others. `PackedBatch` hides which
of them it is.

States are read at one position for each response token: "before" it (the state that predicts it; for its first token
that is the prompt's last position) for log-probs and for V(s_t), or "after" it for reward models. What follows the
last position read is not computed at all, so with "before" a response's last token is never fed.

`deal` gives this rank its parts of a call, the micro-batches of one pass each. Every rank has the same number of parts,
and calls the head equally often in the parts of one place, because ZeRO-3 gathers parameters at each call; where a rank
has nothing left to do, its part is a sequence of two tokens that counts for nothing.

Called by trainer and models. Shapes: R rows, L row length, N response tokens, B responses, T longest response.

Tests: tests/unit/engines/test_packing.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from flowrl.engines.attention import AttentionSpan, block_mask, spans_of
from flowrl.engines.base import TokenGroup
from flowrl.errors import StageError
from flowrl.messages import Buffer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor


Layout = Literal["unmasked", "shared", "padded", "alone"]
Reads = Literal["before", "after"]
# The fastest first; each takes every model of those before.
LAYOUTS: tuple[Layout, ...] = ("unmasked", "shared", "padded", "alone")

# Row length in tokens at which masked attention takes as long as the rest of the model. Measured at 1,900 for a
# 135M Llama in bfloat16 on one AVX-512 core; wider models have it later, so this errs towards shorter rows.
ATTENTION_TOKENS = 2000


class Piece(NamedTuple):
    """One prompt with some of the group's responses."""

    group: int
    samples: tuple[int, ...]
    length: int  # tokens fed


Row = list[Piece]
MicroBatch = list[Row]


def max_shared_tokens(num_prompt: int) -> int:
    """Return the response tokens beyond which a prompt's sharing costs more in attention than it saves.

    A piece of prompt P and k responses of r tokens costs (P + kr) + (P + kr)^2 / A for k responses; the cost of one
    response is least at kr = sqrt(P (A + P)). `max_shared_tokens(60) == 351`.
    """
    return int(math.sqrt(num_prompt * (ATTENTION_TOKENS + num_prompt)))


def plan(
    groups: Sequence[TokenGroup],
    *,
    layout: Layout,
    reads: Reads,
    budget: int,
    world_size: int = 1,
    whole_groups: bool = False,
) -> list[list[MicroBatch]]:
    """Deal every response out to the ranks as micro-batches of at most `budget` tokens: [rank][micro-batch].

    Ranks are balanced by tokens and all have the same number of micro-batches; one without rows is there only to
    keep step. A single sequence beyond the budget goes alone. With `whole_groups` all responses of a group share a
    micro-batch. Depends on nothing but its arguments, so every rank computes the same plan.
    """
    pieces = [_cut(index, group, layout, reads, budget) for index, group in enumerate(groups)]
    units = pieces if whole_groups else [[piece] for group in pieces for piece in group]
    units.sort(key=lambda unit: -max(piece.length for piece in unit))
    shares: list[list[list[Piece]]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for unit in units:
        rank = loads.index(min(loads))
        shares[rank].append(unit)
        loads[rank] += sum(piece.length for piece in unit)
    dealt = [_fill(share, layout, budget) for share in shares]
    most = max(len(batches) for batches in dealt)
    return [batches + [[] for _ in range(most - len(batches))] for batches in dealt]


def _cut(index: int, group: TokenGroup, layout: Layout, reads: Reads, budget: int) -> list[Piece]:
    num_prompt = len(group.prompt_ids)
    if num_prompt == 0 or any(len(response) == 0 for response in group.responses):
        raise StageError(f"group {index}", "the prompt or a response is empty", "every sequence needs both")
    unread = 1 if reads == "before" else 0
    limit = {"unmasked": budget, "shared": min(budget, num_prompt + max_shared_tokens(num_prompt))}.get(layout, 0)
    pieces: list[Piece] = []
    for sample, response in enumerate(group.responses):
        fed = len(response) - unread
        if pieces and pieces[-1].length + fed <= limit:
            last = pieces[-1]
            pieces[-1] = Piece(index, (*last.samples, sample), last.length + fed)
        else:
            pieces.append(Piece(index, (sample,), num_prompt + fed))
    return pieces


def _fill(units: list[list[Piece]], layout: Layout, budget: int) -> list[MicroBatch]:
    """Fill micro-batches first-fit from units sorted longest first."""
    batches: list[MicroBatch] = []
    waiting = units
    while waiting:
        length = max(piece.length for piece in waiting[0])
        if layout == "unmasked":
            length = max(budget, sum(piece.length for piece in waiting[0]))
        max_rows = 1 if layout == "alone" else max(1, budget // length)  # one, or ranks would differ in forwards
        batch: MicroBatch = []
        later: list[list[Piece]] = []
        for unit in waiting:
            grown = _place(unit, batch, length, layout)
            if batch and len(grown) > max_rows:
                later.append(unit)
            else:
                batch = grown
        batches.append(batch)
        waiting = later
    return batches


def _place(unit: list[Piece], batch: MicroBatch, length: int, layout: Layout) -> MicroBatch:
    rows = [list(row) for row in batch]
    for piece in unit:
        is_packed = layout in ("unmasked", "shared")
        fits = (row for row in rows if is_packed and sum(p.length for p in row) + piece.length <= length)
        row = next(fits, None)
        if row is None:
            rows.append([piece])
        else:
            row.append(piece)
    return rows


def halved(rows: MicroBatch, *, whole_groups: bool) -> int:
    """Return a budget that takes a micro-batch apart, or minus its tokens where no budget can.

    A micro-batch of 8 rows of 100 tokens gives 400; one with a single response (a single group with `whole_groups`)
    and 100 tokens gives -100.
    """
    pieces = [piece for row in rows for piece in row]
    num_tokens = len(rows) * max((sum(piece.length for piece in row) for row in rows), default=0)
    num_parts = len({piece.group for piece in pieces}) if whole_groups else sum(len(piece.samples) for piece in pieces)
    return num_tokens // 2 if num_parts > 1 else -max(1, num_tokens)


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One micro-batch ready for a model; rows of [B, T] are its responses in order of group and sample."""

    layout: Layout
    input_ids_RL: Tensor
    position_ids_RL: Tensor
    piece_RL: Tensor  # which piece a position belongs to; -1 on padding
    branch_RL: Tensor  # 0 in the prompt, else 1 + the response's place in its piece
    copies_RL: Tensor  # float32: in how many of the sequences, run alone, a position would stand; 0 on padding
    read_N: Tensor  # index into the flattened [R * L] states
    target_N: Tensor  # the response tokens themselves
    place_N: Tensor  # index into the flattened [B * T] results
    mask_BT: Tensor  # 1 on response tokens
    samples: list[tuple[int, int]]  # (group, sample) of each of the B rows
    spans: list[AttentionSpan]  # what tokens see, where no mask says it
    routes_RLAK: Tensor | None  # the experts that positions are sent to, -1 where the model chooses; None: everywhere

    def attention(self, dtype: torch.dtype, *, is_flex: bool = False) -> Any:
        """Return what a model is given for its mask.

        The additive block mask [R, 1, L, L]; without a mask the spans as integers [1, 1, S, 5], or FlexAttention's
        blocks; the 0/1 padding mask [R, L] of the other layouts.
        """
        if self.layout == "unmasked":
            device = self.piece_RL.device
            if is_flex:
                return block_mask(self.spans, self.piece_RL.shape[1], device)
            return torch.tensor(self.spans, dtype=torch.int64)[None, None]
        if self.layout != "shared":
            return (self.piece_RL >= 0).long()
        length = self.piece_RL.shape[1]
        causal_LL = torch.ones(length, length, dtype=torch.bool, device=self.piece_RL.device).tril()
        same_RLL = self.piece_RL[:, :, None] == self.piece_RL[:, None, :]
        seen_RLL = (self.branch_RL[:, None, :] == 0) | (self.branch_RL[:, :, None] == self.branch_RL[:, None, :])
        allowed_RLL = causal_LL & same_RLL & seen_RLL
        mask_RLL = torch.zeros(allowed_RLL.shape, dtype=dtype, device=allowed_RLL.device)
        return mask_RLL.masked_fill_(~allowed_RLL, torch.finfo(dtype).min)[:, None]

    def spread(self, values_N: Tensor) -> Tensor:
        """Return values of the N tokens as [B, T], zero elsewhere; gradients pass through."""
        flat = torch.zeros(self.mask_BT.numel(), dtype=values_N.dtype, device=values_N.device)
        return flat.index_copy(0, self.place_N, values_N).view_as(self.mask_BT)


def pack(
    groups: Sequence[TokenGroup], rows: MicroBatch, *, layout: Layout, reads: Reads, device: torch.device
) -> PackedBatch:
    """Return the tensors of one planned micro-batch."""
    length = max(sum(piece.length for piece in row) for row in rows)
    samples = sorted((piece.group, sample) for row in rows for piece in row for sample in piece.samples)
    order = {key: index for index, key in enumerate(samples)}
    width = max(len(groups[group].responses[sample]) for group, sample in samples)
    shape = (len(rows), length)
    ids, positions, branches = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    owners = np.full(shape, -1, dtype=np.int64)
    copies = np.zeros(shape, dtype=np.float32)
    mask = np.zeros((len(samples), width), dtype=np.float32)
    reading: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    places: list[np.ndarray] = []
    for r, row in enumerate(rows):
        start = 0
        for p, piece in enumerate(row):
            group = groups[piece.group]
            prompt = group.prompt_ids.numpy()
            end = start + len(prompt)
            owners[r, start : start + piece.length] = p
            ids[r, start:end] = prompt
            positions[r, start:end] = np.arange(len(prompt))
            copies[r, start:end] = len(piece.samples)
            for branch, sample in enumerate(piece.samples, start=1):
                response = group.responses[sample].numpy()
                fed = len(response) - (reads == "before")
                here = slice(end, end + fed)
                ids[r, here] = response[:fed]
                positions[r, here] = len(prompt) + np.arange(fed)
                branches[r, here] = branch
                copies[r, here] = 1.0
                states = np.arange(end, end + fed)
                if reads == "before":
                    states = np.concatenate(([start + len(prompt) - 1], states))
                b = order[piece.group, sample]
                reading.append(r * length + states)
                targets.append(response.astype(np.int64))
                places.append(b * width + np.arange(len(response)))
                mask[b, : len(response)] = 1.0
                end += fed
            start += piece.length
    pieces: list[tuple[int, list[int]]] = []  # the prompt's and each response's tokens, where no mask is made
    if layout == "unmasked":
        unread = reads == "before"
        for piece in rows[0]:
            group = groups[piece.group]
            pieces.append((len(group.prompt_ids), [len(group.responses[each]) - unread for each in piece.samples]))
    ids_RL, positions_RL, owners_RL, branches_RL, read_N, target_N, place_N, mask_BT = (
        torch.from_numpy(array).to(device)
        for array in (ids, positions, owners, branches, *(np.concatenate(x) for x in (reading, targets, places)), mask)
    )
    return PackedBatch(
        layout=layout,
        input_ids_RL=ids_RL,
        position_ids_RL=positions_RL,
        piece_RL=owners_RL,
        branch_RL=branches_RL,
        copies_RL=torch.from_numpy(copies).to(device),
        read_N=read_N,
        target_N=target_N,
        place_N=place_N,
        mask_BT=mask_BT,
        samples=samples,
        spans=spans_of(pieces),
        routes_RLAK=_pack_routes(groups, rows, length, reads, device),
    )


def _pack_routes(
    groups: Sequence[TokenGroup], rows: MicroBatch, length: int, reads: Reads, device: torch.device
) -> Tensor | None:
    """Return the routes of a micro-batch's positions; a prompt has those of its group's first response everywhere."""
    first = next((routes for row in rows for piece in row for routes in groups[piece.group].routes), None)
    if first is None:
        return None
    found = np.full((len(rows), length, first.num_layers, first.top_k), -1, dtype=np.int16)
    for r, row in enumerate(rows):
        start = 0
        for piece in row:
            group, at = groups[piece.group], start
            if group.routes:
                found[r, at : at + len(group.prompt_ids)] = group.routes[0].numpy()[: len(group.prompt_ids)]
                at += len(group.prompt_ids)
            for sample in piece.samples if group.routes else ():
                routes = group.routes[sample].numpy()[len(group.prompt_ids) :]
                found[r, at : at + len(routes)] = routes
                at += len(routes) + (reads == "after")  # nobody has sent the last token anywhere
            start += piece.length
    return torch.from_numpy(found).to(device)


def pack_columns(groups: Sequence[TokenGroup], batch: PackedBatch) -> dict[str, Tensor]:
    """Return the columns of a batch's responses, each [B, T] float32, zero beyond a response's end.

    Raises:
        StageError: a group lacks a column that another has, or a column is not as long as its response.
    """
    names = sorted({name for group, _ in batch.samples for name in groups[group].columns})
    return {name: _pack_column(groups, batch, name).to(batch.mask_BT.device) for name in names}


def _pack_column(groups: Sequence[TokenGroup], batch: PackedBatch, name: str) -> Tensor:
    column = np.zeros(tuple(batch.mask_BT.shape), dtype=np.float32)
    for b, (group, sample) in enumerate(batch.samples):
        if name not in groups[group].columns:
            raise StageError(f"group {group}", f"has no column {name!r} while others of the step have")
        values = groups[group].columns[name][sample].numpy()
        num_tokens = len(groups[group].responses[sample])
        if len(values) != num_tokens:
            what = f"column {name!r} of sample {sample} has {len(values)} values for {num_tokens} tokens"
            raise StageError(f"group {group}", what)
        column[b, :num_tokens] = values
    return torch.from_numpy(column)


def unpack(batches: Iterable[tuple[PackedBatch, Tensor]]) -> dict[tuple[int, int], np.ndarray]:
    """Return each response's values, by (group, sample), from batches and their [N] results."""
    found: dict[tuple[int, int], np.ndarray] = {}
    for batch, values_N in batches:
        values_BT = batch.spread(values_N).float().cpu().numpy()
        lengths = batch.mask_BT.sum(1).long().tolist()
        for key, row, num_tokens in zip(batch.samples, values_BT, lengths, strict=True):
            found[key] = row[:num_tokens].copy()
    return found


IDLE_GROUP = TokenGroup(prompt_ids=Buffer.ints([0]), responses=[Buffer.ints([0])])


class Size(NamedTuple):
    """What the memory of a pass goes by, each at its most over the ranks."""

    num_tokens: int  # rows times their length
    num_pairs: int  # rows times the square of their length, where there is a mask
    num_read: int  # response tokens


@dataclass(frozen=True)
class Part:
    """One rank's micro-batch of one pass."""

    groups: Sequence[TokenGroup]
    rows: MicroBatch  # empty: there is only step to be kept
    layout: Layout
    reads: Reads
    num_chunks: int  # calls of the head
    vote: int  # should it not fit: the budget that takes it apart, or minus its tokens
    size: Size  # the same on every rank

    def pack(self, device: torch.device) -> PackedBatch:
        """Return its tensors."""
        if self.rows:
            return pack(self.groups, self.rows, layout=self.layout, reads=self.reads, device=device)
        ((idle,),) = plan([IDLE_GROUP], layout=self.layout, reads=self.reads, budget=1)
        return pack([IDLE_GROUP], idle, layout=self.layout, reads=self.reads, device=device)


def deal(
    groups: Sequence[TokenGroup],
    *,
    layout: Layout,
    reads: Reads,
    budget: int,
    rank: int,
    world_size: int,
    whole_groups: bool,
    head_calls: Callable[[int], int],
) -> list[Part]:
    """Return this rank's parts; `head_calls` says how many calls of the head so many response tokens take."""

    def size(rows: MicroBatch) -> Size:
        pieces = [piece for row in rows for piece in row]
        length = max((sum(piece.length for piece in row) for row in rows), default=0)
        num_read = sum(len(groups[piece.group].responses[sample]) for piece in pieces for sample in piece.samples)
        return Size(len(rows) * length, len(rows) * length * length * (layout != "unmasked"), num_read)

    dealt = plan(groups, layout=layout, reads=reads, budget=budget, world_size=world_size, whole_groups=whole_groups)
    sizes = [Size(*map(max, *(size(rows) for rows in column), Size(0, 0, 0))) for column in zip(*dealt, strict=True)]
    return [
        Part(
            groups=groups,
            rows=column[rank],
            layout=layout,
            reads=reads,
            num_chunks=max(1, head_calls(most.num_read)),
            vote=halved(column[rank], whole_groups=whole_groups),
            size=most,
        )
        for column, most in zip(zip(*dealt, strict=True), sizes, strict=True)
    ]
