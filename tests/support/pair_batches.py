"""Random micro-batches of pairs for the offline objectives, and ways to disturb them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flowrl.algorithms.base import LossBatch
from tests.unit.algorithms.cases import NAN, ragged_mask

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def pair_batch(seed: int, *, pairs: int = 3, width: int = 6) -> LossBatch:
    """A micro-batch of pairs with every column an offline objective may read; log-probs carry gradient."""
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * pairs

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(rows, width, generator=generator)

    reference_BT = -1.5 + normal(0.5)
    is_step_end_BT = torch.rand(rows, width, generator=generator) < 0.5
    labels_B1 = (torch.rand(rows, 1, generator=generator) < 0.5).float()
    columns = {
        "reference": reference_BT,
        "proximal": reference_BT + normal(0.3),
        "label": labels_B1.expand(rows, width).clone(),
        "step_label": torch.where(is_step_end_BT, torch.rand(rows, width, generator=generator), NAN),
        "reference_point": torch.full((rows, width), 0.3),
        "values": normal(0.5),
        "returns": normal(0.5),
    }
    return LossBatch(
        logprobs_BT=(reference_BT + normal(0.6)).requires_grad_(),
        mask_BT=ragged_mask(rows, width, generator),
        columns=columns,
        group_B=torch.arange(pairs).repeat_interleave(2),
        sample_B=torch.tensor([0, 1]).repeat(pairs),
        divergence_BT=normal(0.5).abs(),
    )


def changed(batch: LossBatch, change: Callable[[Tensor, float], Tensor]) -> LossBatch:
    """The batch with `change(tensor, filler)` applied to its token tensors; the mask's filler is 0, others' nan."""
    return batch._replace(
        logprobs_BT=change(batch.logprobs_BT.detach(), NAN).requires_grad_(),
        mask_BT=change(batch.mask_BT, 0.0),
        columns={name: change(column, NAN) for name, column in batch.columns.items()},
        divergence_BT=None if batch.divergence_BT is None else change(batch.divergence_BT, NAN),
    )


def rows_taken(batch: LossBatch, rows: Tensor) -> LossBatch:
    """The batch with these rows, in this order."""
    assert batch.group_B is not None
    assert batch.sample_B is not None
    taken = changed(batch, lambda tensor, _: tensor[rows])
    return taken._replace(group_B=batch.group_B[rows], sample_B=batch.sample_B[rows])
