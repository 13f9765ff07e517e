"""Algorithms and objectives, tried on a few answers before a run, so that what a user's own gets wrong is found there.

Invariants:
- what is asked is what a run asks: advantages of a group with a cut answer, the count with log-probs of zero, the loss;
- a loss is asked of micro-batches apart and together;
- what only a run has (a column of a user's own stage) is not held against an algorithm.

Called by the stages that load them, in `flowrl check` and before every start.

Tests: tests/unit/stages/test_trial.py
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from flowrl.algorithms.base import MissingColumnError
from flowrl.errors import ConfigError, FlowrlError, said_briefly

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from flowrl.algorithms.base import AdvantageBatch, Algorithm, Loss, LossBatch, Objective

GUIDE = "mend it; docs/extend/algorithm.md says what it is given"
LENGTH = 3  # tokens of the longest made-up answer


def try_algorithm(algorithm: Algorithm, use: str, group_size: int, *, has_turns: bool) -> None:
    """Ask an algorithm what a made-up group is worth, one of its answers cut, and what it loses on two such groups.

    Raises:
        ConfigError: it fails, gives not one finite number for each token, or its loss is none (`try_loss`).
    """
    if algorithm.is_blank:
        return
    where, size = f"algorithm: {use}", f"a made-up group of {group_size} answers"
    batch = _made_up_group(algorithm, group_size, has_turns=has_turns)
    if algorithm.needs_greedy:
        batch = batch._replace(greedy=_made_up_group(algorithm, 1, has_turns=has_turns))
    try:
        algorithm.keeps(batch)
        found_BT = algorithm.advantages(batch).advantages_BT
        shape, is_finite = tuple(found_BT.shape), bool(found_BT.isfinite().all())
    except FlowrlError:
        raise
    except Exception as error:  # whatever a user's code raises
        raise ConfigError(where, f"fails on {size} ({said_briefly(error)})", GUIDE) from error
    if shape != (wanted := tuple(batch.mask_BT.shape)):
        raise ConfigError(where, f"gives advantages of shape {shape}, not {wanted}", "return one number a token")
    if not is_finite:
        raise ConfigError(where, f"gives advantages that are not finite for {size}", "see what it divides by")
    try_objective(algorithm, where, group_size)


def try_objective(objective: Objective, where: str, group_size: int) -> None:
    """Ask an objective for its loss on made-up answers with every column that a step of online learning has.

    A loss that needs another one, which a user's stage may give, is left to the run.

    Raises:
        ConfigError: it gives none that could be learned from (`try_loss`).
    """
    parts = [_made_up_step(objective, group_size, shift=0.01 * place) for place in range(2)]
    if not objective.needs_whole_groups:
        parts = [_row(part, row) for part in parts for row in range(group_size)]
    with suppress(MissingColumnError):
        try_loss(objective, where, parts)


def try_loss(objective: Objective, where: str, parts: Sequence[LossBatch]) -> Sequence[float]:
    """Ask an objective for its loss on some micro-batches, apart and together; returns what it counts in each.

    Raises:
        ConfigError: it fails; is not a finite sum with a finite gradient; counts otherwise than with log-probs of
            zero; or does not add up.
    """
    whole = _joined(parts)
    try:
        (total, count), *apart = [_loss_of(objective, each, where) for each in (whole, *parts)]
        ahead = float(objective.loss(_with_values(whole, 0.0 * whole.logprobs_BT)).count)
    except FlowrlError:
        raise
    except KeyError as error:
        if error.args and error.args[0] not in whole.columns:
            raise MissingColumnError("objective", f"needs the column {error.args[0]!r}", GUIDE) from error
        raise ConfigError(where, f"fails on {_some(whole)} ({said_briefly(error)})", GUIDE) from error
    except Exception as error:  # whatever a user's code raises
        raise ConfigError(where, f"fails on {_some(whole)} ({said_briefly(error)})", GUIDE) from error
    if not math.isclose(ahead, count, rel_tol=1e-6):
        what = f"counts {count:g} in {_some(whole)}, and {ahead:g} with log-probs of zero"
        raise ConfigError(where, what, "let `count` depend on the mask and the columns alone")
    totals, counts = zip(*apart, strict=True)
    for name, together, sums in (("total", total, totals), ("count", count, counts)):
        if not math.isclose(together, math.fsum(sums), rel_tol=1e-4, abs_tol=1e-5):
            what = f"has a `{name}` of {together:g} for {_some(whole)}, and of {math.fsum(sums):g} for the same apart"
            raise ConfigError(where, what, "return a sum as `total` and what to divide it by as `count`, no mean")
    return counts


def _some(batch: LossBatch) -> str:
    return f"{len(batch.mask_BT)} answers"


def _loss_of(objective: Objective, batch: LossBatch, where: str) -> tuple[float, float]:
    """Return the total and the count of a loss, which has a gradient."""
    from flowrl.engines.objective import add_loss

    values_BT = batch.logprobs_BT.clone().requires_grad_()
    loss: Loss = objective.loss(_with_values(batch, values_BT))
    add_loss({}, loss)
    if not loss.total.requires_grad:
        raise ConfigError(where, "has a loss without a gradient", "compute it from batch.logprobs_BT, not detached")
    loss.total.backward()
    total, gradient_BT = float(loss.total.detach()), values_BT.grad
    if not math.isfinite(total) or (gradient_BT is not None and not bool(gradient_BT.isfinite().all())):
        what = f"has a loss of {total:g} on {_some(batch)}, or a gradient that is not finite"
        raise ConfigError(where, what, "see what it divides by, and what it takes the logarithm of")
    return total, float(loss.count)


def _with_values(batch: LossBatch, values_BT: Tensor) -> LossBatch:
    """Return the batch with these log-probs, and entropies and divergences that follow from them where it has any."""
    return batch._replace(
        logprobs_BT=values_BT,
        entropy_BT=None if batch.entropy_BT is None else -0.5 * values_BT,
        divergence_BT=None if batch.divergence_BT is None else 0.1 * values_BT**2,
    )


def _mask(count: int) -> Tensor:
    import torch

    lengths_B = 1 + torch.arange(count) % LENGTH
    return (torch.arange(LENGTH) < lengths_B[:, None]).float()


def _made_up_group(algorithm: Algorithm, count: int, *, has_turns: bool) -> AdvantageBatch:
    import torch

    from flowrl.algorithms.base import AdvantageBatch

    mask_BT = _mask(count)
    return AdvantageBatch(
        rewards_B=torch.arange(count) % 2 + 0.5, mask_BT=mask_BT, behaviour_BT=-mask_BT, reference_BT=-1.1 * mask_BT,
        values_BT=0.1 * mask_BT if algorithm.needs_critic else None,
        placed_BT=mask_BT / 4 if has_turns else None,
        cut_B=(torch.arange(count) == count - 1).float(),
        after_B=torch.zeros(count) if algorithm.needs_after else None,
    )  # fmt: skip


def _made_up_step(objective: Objective, count: int, *, shift: float) -> LossBatch:
    """Return a group as it is learned: log-probs near those that sampled it, answers of either worth."""
    import torch

    from flowrl.algorithms.base import LossBatch

    mask_BT = _mask(count)
    values_BT = -mask_BT * (1 + shift + 0.1 * torch.arange(count * LENGTH).view(count, LENGTH) / (count * LENGTH))
    worths_B1 = 1.0 - 1.5 * (torch.arange(count)[:, None] % 2)
    columns: dict[str, Any] = {
        "behaviour": values_BT + 0.01 * mask_BT, "reference": values_BT - 0.02 * mask_BT,
        "advantages": worths_B1 * mask_BT, "age": 0 * mask_BT, "values": 0.1 * mask_BT, "returns": 0.3 * mask_BT,
    }  # fmt: skip
    if objective.needs_proximal:
        columns["proximal"] = values_BT + 0.005 * mask_BT
    if objective.needs_drift:
        ratios_N, worths_N = (each[mask_BT > 0] for each in (values_BT - columns["behaviour"], columns["advantages"]))
        columns["drift_limit"] = objective.drift_limit(ratios_N, worths_N) * mask_BT
    sample_B = torch.arange(count)
    return LossBatch(
        logprobs_BT=values_BT, mask_BT=mask_BT, columns=columns,
        entropy_BT=mask_BT if objective.needs_entropy else None,
        group_B=torch.zeros_like(sample_B), sample_B=sample_B,
        divergence_BT=mask_BT if objective.teacher_model else None,
    )  # fmt: skip


def _row(batch: LossBatch, row: int) -> LossBatch:
    """Return one answer of a batch as a micro-batch."""
    columns = {name: each[row : row + 1] for name, each in batch.columns.items()}
    others = {name: each for name, each in batch._asdict().items() if name != "columns" and each is not None}
    return batch._replace(columns=columns, **{name: each[row : row + 1] for name, each in others.items()})


def _joined(parts: Sequence[LossBatch]) -> LossBatch:
    """Return micro-batches as one, their rows padded to the longest and their groups numbered on."""
    import torch

    longest = max(part.mask_BT.shape[1] for part in parts)

    def together(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(each, (0, longest - each.shape[1])) for each in tensors])

    first = parts[0]
    columns = {name: together([part.columns[name] for part in parts]) for name in first.columns}
    fields = {
        name: together([getattr(part, name) for part in parts])
        for name in ("logprobs_BT", "mask_BT", "entropy_BT", "divergence_BT")
        if getattr(first, name) is not None
    }
    groups = [torch.full_like(part.group_B, place) for place, part in enumerate(parts) if part.group_B is not None]
    samples = [part.sample_B for part in parts if part.sample_B is not None]
    return first._replace(columns=columns, group_B=torch.cat(groups), sample_B=torch.cat(samples), **fields)
