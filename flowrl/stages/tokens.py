"""Between messages and what training engines take: token groups with their per-token columns.

Tests: tests/unit/stages/test_turn_rewards.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from flowrl.engines.base import TokenGroup
from flowrl.errors import RunError
from flowrl.messages import Buffer, Example, Referenced, Rollouts, Sample, Samples

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from flowrl.algorithms.base import LossBatch
    from flowrl.messages import FloatArray


# Columns of `LossBatch` that a user's stage cannot give.
OURS = {"behaviour", "mask", "reference", "advantages", "returns", "values", "age", "drift_limit", "proximal", "label",
        "step_label", "reference_point"}  # fmt: skip


def token_group(group: Rollouts, **columns: list[Buffer]) -> TokenGroup:
    """Return a group's tokens with every per-token column it carries, and `columns` besides."""
    known: dict[str, list[Buffer]] = {"behaviour": [sample.logprobs for sample in group.samples]}
    if any(sample.mask is not None for sample in group.samples):
        known["mask"] = [mask_of(sample) for sample in group.samples]
    if isinstance(group, Referenced) and group.ref_logprobs:
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
        columns={**_of_samples(group), **known, **columns},
        routes=[sample.routes for sample in group.samples if sample.routes is not None],
    )


def _of_samples(group: Rollouts) -> dict[str, list[Buffer]]:
    """Return the columns that a user's stage gave the samples.

    Raises:
        RunError: one has the name of a column of ours, not a value for each token, or is not in every sample.
    """
    found: dict[str, list[Buffer]] = {}
    names = dict.fromkeys(name for sample in group.samples for name in sample.columns)
    for name in names:
        where = f"column {name!r} of group {group.group_id}"
        if name in OURS:
            raise RunError(where, "has the name of a column of ours", "give it another")
        found[name] = []
        for place, sample in enumerate(group.samples):
            value, length = sample.columns.get(name), len(sample.token_ids)
            if value is None:
                raise RunError(where, f"is not in sample {place}", "give it to every sample of a group")
            buffer = value if isinstance(value, Buffer) else _constant(value, length)
            if len(buffer) != length or buffer.dtype != "float32":
                what = f"sample {place} has {len(buffer)} {buffer.dtype} values for {length} tokens"
                raise RunError(where, what, "give a Buffer.floats of one value for each token, or a number")
            found[name].append(buffer)
    return found


def mask_of(sample: Sample) -> Buffer:
    """Return 1 for each token that the policy sampled and 0 for each that an environment wrote."""
    return _constant(1.0, len(sample.token_ids)) if sample.mask is None else sample.mask


def example_group(example: Example, *, mismatched: bool = False) -> TokenGroup:
    """Return an example's own responses with their columns, or those that it brings of another prompt."""
    num_own = len(example.responses) - example.num_mismatched
    part = slice(num_own, None) if mismatched else slice(num_own)
    responses = example.responses[part]
    lengths = [len(response) for response in responses]
    masks = example.masks[part] if example.masks else [_constant(1.0, length) for length in lengths]
    columns = {"mask": masks}
    if example.ref_logprobs is not None:
        columns["reference"] = example.ref_logprobs[part]
    if example.labels and not mismatched:
        columns["label"] = [_constant(*pair) for pair in zip(example.labels, lengths, strict=True)]
    if example.step_labels is not None and not mismatched:
        columns["step_label"] = example.step_labels
    return TokenGroup(prompt_ids=example.token_ids, responses=responses, columns=columns)


def with_constant(group: TokenGroup, name: str, value: float) -> TokenGroup:
    """Return the group with one more column, the same value on every token."""
    column = [_constant(value, len(response)) for response in group.responses]
    return msgspec.structs.replace(group, columns={**group.columns, name: column})


def _constant(value: float, num_tokens: int) -> Buffer:
    return Buffer.floats([value] * num_tokens)


def group_batch(group: TokenGroup, rows: Sequence[FloatArray]) -> LossBatch:
    """Return what an objective takes for one group, from its scored rows: the engine's batch without its gradient."""
    import torch

    from flowrl.algorithms.base import LossBatch

    values_BT, mask_BT = padded(rows)
    columns = {name: padded(buffers)[0] for name, buffers in group.columns.items()}
    mask_BT = columns.pop("mask", mask_BT)
    sample_B = torch.arange(len(rows))
    return LossBatch(values_BT, mask_BT, columns, group_B=torch.zeros_like(sample_B), sample_B=sample_B)


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
