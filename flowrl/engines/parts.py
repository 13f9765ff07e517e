"""Deal a call's groups out to this rank as parts, the micro-batches of one pass each.

Every rank has the same number of parts, and calls the head equally often in the parts of one place, because ZeRO-3
gathers parameters at each call; where a rank has nothing left to do, its part is a sequence of two tokens that counts
for nothing. Called by trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowrl.engines.base import TokenGroup
from flowrl.engines.memory import Size
from flowrl.engines.packing import PackedBatch, halved, pack, plan
from flowrl.messages import Buffer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from flowrl.engines.packing import Layout, MicroBatch, Reads

IDLE_GROUP = TokenGroup(prompt_ids=Buffer.ints([0]), responses=[Buffer.ints([0])])


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
        return Size(len(rows) * length, len(rows) * length * length, num_read)

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
