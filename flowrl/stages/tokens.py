"""Between messages and what training engines take: token groups with their per-token columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowrl.engines.base import TokenGroup
from flowrl.messages import Buffer, Referenced, Rollouts, Samples

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from flowrl.messages import FloatArray


def token_group(group: Rollouts, **columns: list[Buffer]) -> TokenGroup:
    """Return a group's tokens with every per-token column it carries, and `columns` besides."""
    known: dict[str, list[Buffer]] = {"behaviour": [sample.logprobs for sample in group.samples]}
    if isinstance(group, Referenced):
        known["reference"] = group.ref_logprobs
    if isinstance(group, Samples):
        known["advantages"] = group.advantages
        if group.returns is not None:
            known["returns"] = group.returns
        if group.values is not None:
            known["values"] = group.values
    return TokenGroup(
        prompt_ids=group.token_ids,
        responses=[sample.token_ids for sample in group.samples],
        columns={**known, **columns},
    )


def padded(rows: Sequence[Buffer] | Sequence[FloatArray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows as a right-padded float32 [B, T] tensor and its mask."""
    import numpy as np
    import torch

    arrays = [np.array(row.numpy() if isinstance(row, Buffer) else row, dtype=np.float32) for row in rows]
    width = max(len(array) for array in arrays)
    values_BT = torch.zeros(len(arrays), width)
    mask_BT = torch.zeros(len(arrays), width)
    for index, array in enumerate(arrays):
        values_BT[index, : len(array)] = torch.from_numpy(array)
        mask_BT[index, : len(array)] = 1.0
    return values_BT, mask_BT


def unpadded(values_BT: torch.Tensor, group: Rollouts) -> list[Buffer]:
    """Return the rows of a padded tensor cut to each response's length."""
    return [
        Buffer.floats(row[: len(sample.token_ids)].numpy())
        for row, sample in zip(values_BT, group.samples, strict=True)
    ]
