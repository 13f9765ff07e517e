"""Random groups and micro-batches with ragged lengths and environment tokens, and ways to disturb them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flowrl.algorithms.base import AdvantageBatch, LossBatch
from flowrl.algorithms.functional import whiten

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from flowrl.algorithms.base import Advantages, Algorithm

NAN = float("nan")


def ragged_mask(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Rows of random length, at least 1, the longest full; about a fifth of the tokens are an environment's."""
    mask_BT = torch.zeros(rows, width)
    lengths = [*torch.randint(1, width + 1, (rows - 1,), generator=generator).tolist(), width]
    for row, length in enumerate(lengths):
        mask_BT[row, :length] = (torch.rand(length, generator=generator) > 0.2).float()
        mask_BT[row, length - 1] = 1.0
    return mask_BT


def advantage_batch(seed: int, *, rows: int = 4, width: int = 7) -> AdvantageBatch:
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(rows, width, generator=generator)

    behaviour_BT = -1.5 + normal(0.5)
    return AdvantageBatch(
        rewards_B=torch.randn(rows, generator=generator),
        mask_BT=ragged_mask(rows, width, generator),
        behaviour_BT=behaviour_BT,
        reference_BT=behaviour_BT + normal(0.3),
        values_BT=normal(0.5),
        greedy=rewarded(0.25),
    )


def rewarded(*rewards: float, greedy: float | None = None) -> AdvantageBatch:
    """A group of answers of two tokens."""
    ones_BT = torch.ones(len(rewards), 2)
    alone = None if greedy is None else rewarded(greedy)
    return AdvantageBatch(torch.tensor(rewards), ones_BT, -ones_BT, greedy=alone)


def loss_batch(seed: int, *, rows: int = 4, width: int = 7, drift: float = 0.4) -> LossBatch:
    """A micro-batch whose log-probs carry gradient; drift is the spread of log ratios in nats."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(rows, width, generator=generator)

    behaviour_BT = -1.5 + normal(0.5)
    proximal_BT = behaviour_BT + normal(drift)
    columns = {
        "behaviour": behaviour_BT,
        "proximal": proximal_BT,
        "reference": behaviour_BT + normal(0.3),
        "advantages": normal(1.0),
        "age": torch.randint(0, 5, (rows, width), generator=generator).float(),
        "values": normal(0.5),
        "returns": normal(0.5),
    }
    return LossBatch(
        logprobs_BT=(proximal_BT + normal(drift)).requires_grad_(),
        mask_BT=ragged_mask(rows, width, generator),
        columns=columns,
        entropy_BT=normal(1.0).abs(),
    )


def estimated_loss_batch(algorithm: Algorithm, group: AdvantageBatch, credited: Advantages, seed: int) -> LossBatch:
    """The micro-batch that a credited group becomes once the learner has whitened it and moved a little."""
    generator = torch.Generator().manual_seed(seed)
    advantages_BT = credited.advantages_BT
    if algorithm.whitens:
        advantages_BT = whiten(advantages_BT, group.mask_BT)
    shape = group.behaviour_BT.shape
    proximal_BT = group.behaviour_BT + 0.2 * torch.randn(shape, generator=generator)
    assert group.reference_BT is not None
    return LossBatch(
        logprobs_BT=(proximal_BT + 0.2 * torch.randn(shape, generator=generator)).requires_grad_(),
        mask_BT=group.mask_BT,
        columns={
            "behaviour": group.behaviour_BT,
            "proximal": proximal_BT,
            "reference": group.reference_BT,
            "advantages": advantages_BT,
            "drift_limit": torch.full(shape, 0.3),
        },
        entropy_BT=torch.rand(shape, generator=generator),
    )


def rows_of(tensor: Tensor) -> list[list[float]]:
    return tensor.detach().double().tolist()


def mask_rows(mask_BT: Tensor) -> list[list[int]]:
    return mask_BT.int().tolist()


def widened(values_BT: Tensor, *, left: int, right: int, filler: float) -> Tensor:
    """The rows with `filler` before and after them."""
    return torch.nn.functional.pad(values_BT.detach(), (left, right), value=filler)


def dirtied(values_BT: Tensor, mask_BT: Tensor, garbage: float) -> Tensor:
    """The values with garbage under mask 0."""
    return torch.where(mask_BT > 0, values_BT.detach(), torch.full_like(values_BT, garbage))


def mapped_loss(batch: LossBatch, change: Callable[[Tensor, float], Tensor]) -> LossBatch:
    """The batch with `change(tensor, filler)` applied to all of its tensors; the mask's filler is 0, others' nan."""
    return LossBatch(
        logprobs_BT=change(batch.logprobs_BT, NAN).detach().requires_grad_(),
        mask_BT=change(batch.mask_BT, 0.0),
        columns={name: change(column, NAN) for name, column in batch.columns.items()},
        entropy_BT=None if batch.entropy_BT is None else change(batch.entropy_BT, NAN),
    )


def mapped_advantages(batch: AdvantageBatch, change: Callable[[Tensor, float], Tensor]) -> AdvantageBatch:
    """The group with `change(tensor, filler)` applied to all of its token tensors."""
    return AdvantageBatch(
        rewards_B=batch.rewards_B,
        mask_BT=change(batch.mask_BT, 0.0),
        behaviour_BT=change(batch.behaviour_BT, NAN),
        reference_BT=None if batch.reference_BT is None else change(batch.reference_BT, NAN),
        values_BT=None if batch.values_BT is None else change(batch.values_BT, NAN),
        greedy=batch.greedy,
    )


def gradient_of(total: Tensor, batch: LossBatch) -> Tensor:
    (found_BT,) = torch.autograd.grad(total, [batch.logprobs_BT])
    return found_BT


def same(actual: Tensor, expected: list[list[float]] | list[float] | float, tolerance: float = 1e-6) -> bool:
    """Whether they differ by at most `tolerance` times the greater of 1 and the expected size."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    gap = (actual.detach().double() - wanted).abs() / wanted.abs().clamp_min(1.0)
    return bool((gap <= tolerance).all())
