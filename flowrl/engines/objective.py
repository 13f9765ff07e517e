"""Between packed micro-batches and an objective: its batch, its count, its metrics.

Invariant: sums and counts of micro-batches and ranks are added up and divided once (law 7).

Called by trainer.

Tests: tests/unit/engines/test_trainer.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flowrl.algorithms.base import LossBatch
from flowrl.engines.packing import pack_columns
from flowrl.errors import StageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from flowrl.algorithms.base import Loss, Objective
    from flowrl.engines.base import TokenGroup
    from flowrl.engines.packing import PackedBatch

Sums = dict[str, tuple[float, float]]  # metric -> sum and count


def loss_batch(
    groups: Sequence[TokenGroup], batch: PackedBatch, values_BT: Tensor, entropy_BT: Tensor | None
) -> LossBatch:
    """Return what an objective takes; a column "mask" narrows the mask (multi-turn: the policy's own turns)."""
    columns = pack_columns(groups, batch)
    mask_BT = columns.pop("mask", batch.mask_BT)
    group_B, sample_B = torch.tensor(batch.samples, device=mask_BT.device).unbind(1)
    return LossBatch(
        logprobs_BT=values_BT,
        mask_BT=mask_BT,
        columns=columns,
        entropy_BT=entropy_BT,
        group_B=group_B,
        sample_B=sample_B,
    )


def count_ahead(objective: Objective, groups: Sequence[TokenGroup], batch: PackedBatch) -> float:
    """Return what the objective will count in a micro-batch, asked with values of zero, before any forward."""
    zeros_BT = torch.zeros_like(batch.mask_BT)
    entropy_BT = zeros_BT if objective.needs_entropy else None
    with torch.no_grad():
        return float(objective.loss(loss_batch(groups, batch, zeros_BT, entropy_BT)).count)


def check_count(found: Tensor, expected: float, name: str, where: str) -> None:
    """Refuse an objective whose count is not what it was ahead.

    Raises:
        StageError: they differ, so that the gradient was divided by the wrong number.
    """
    count = float(found.detach())
    if abs(count - expected) > 1e-6 * max(1.0, abs(expected)):
        what = f"{name} counts {count:g} in a micro-batch but {expected:g} with log-probs of zero"
        raise StageError(where, what, "let `count` depend on the mask and the columns only")


def add_loss(sums: Sums, loss: Loss) -> None:
    """Add a micro-batch's loss and metrics to the sums."""
    found = {"loss": (loss.total, loss.count), **loss.metrics}
    add_sums(sums, {name: (float(total.detach()), float(count.detach())) for name, (total, count) in found.items()})


def add_sums(sums: Sums, more: Sums) -> None:
    """Add one set of sums to another."""
    for name, (total, count) in more.items():
        before = sums.get(name, (0.0, 0.0))
        sums[name] = before[0] + total, before[1] + count


def divide(parts: Iterable[Sums]) -> dict[str, float]:
    """Return each metric of all parts together; `divide([{"a": (1, 2)}, {"a": (2, 4)}]) == {"a": 0.5}`."""
    sums: Sums = {}
    for part in parts:
        add_sums(sums, part)
    return {name: total / count if count else 0.0 for name, (total, count) in sums.items()}
