"""Masked arithmetic that the algorithms share: sums and means, whitening, KL estimators.

Shapes: B sequences, T response tokens, `mask_BT` 1 on the tokens the policy sampled and 0 elsewhere.

Invariant: what stands under mask 0, nan and inf included, never changes a result or a gradient (values are selected,
never multiplied by the mask).

Called by the algorithms, and `whiten` by the learner, which alone sees a whole step.

Tests: tests/unit/algorithms/test_functional.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]

# Log-probability ratios beyond this many nats are held there, so that squares of ratios stay finite in float32.
MAX_LOG_RATIO = 20.0
LEAST_LOGPROB = -1e4  # of a token that a model gives no probability at all; beside it ratios are held anyway


def masked(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the values with zeros under mask 0; unlike a product it lets no nan through, backwards either.

    >>> masked(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 0.0])).tolist()
    [1.0, 0.0]
    """
    return torch.where(mask_BT > 0, values_BT, torch.zeros_like(values_BT))


def sequence_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return each sequence's mean over its masked tokens, [B]; 0 where a sequence has none.

    >>> sequence_mean(torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])).tolist()
    [2.0, 5.0]
    """
    return masked(values_BT, mask_BT).sum(1) / mask_BT.sum(1).clamp_min(1.0)


def has_tokens(mask_BT: Tensor) -> Tensor:
    """Return 1 for each sequence with at least one masked token, else 0; [B].

    >>> has_tokens(torch.tensor([[0.0, 1.0], [0.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    return (mask_BT > 0).any(1).to(mask_BT.dtype)


def last_value(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return each sequence's value at its last masked token, [B]; 0 where a sequence has none.

    >>> last_value(torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])).tolist()
    [3.0, 5.0]
    """
    places_T = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    last_B = ((mask_BT > 0) * places_T).argmax(1)
    return masked(values_BT, mask_BT).gather(1, last_B[:, None]).squeeze(1)


@overload
def whiten(values: Tensor, mask: Tensor) -> Tensor: ...
@overload
def whiten(values: Sequence[Tensor], mask: Sequence[Tensor]) -> list[Tensor]: ...
def whiten(values: Tensor | Sequence[Tensor], mask: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Return (values - mean) / sqrt(variance + 1e-8) with both taken over every masked token of the step.

    A step is one tensor of any shape or a list of them, with masks alike; the variance is the population's, both are
    summed in float64, and the result is 0 under mask 0. Source: OpenRLHF (2405.11143), section 3.3, distributed
    advantage normalisation.

    >>> whiten(torch.tensor([1.0, 3.0]), torch.ones(2)).tolist()
    [-1.0, 1.0]
    """
    parts = [values] if isinstance(values, torch.Tensor) else list(values)
    masks = [mask] if isinstance(mask, torch.Tensor) else list(mask)
    flat = torch.cat([part[m > 0].double() for part, m in zip(parts, masks, strict=True)])
    mean = flat.sum() / max(1, flat.numel())
    scale = torch.rsqrt(((flat - mean) ** 2).sum() / max(1, flat.numel()) + 1e-8)
    whitened = [
        masked(((part.double() - mean) * scale).to(part.dtype), m) for part, m in zip(parts, masks, strict=True)
    ]
    return whitened[0] if isinstance(values, torch.Tensor) else whitened


def possible(logprobs_BT: Tensor) -> Tensor:
    """Return log-probs without infinities, whose difference is no number.

    >>> possible(torch.tensor([-1.0, -float("inf")])).tolist()
    [-1.0, -10000.0]
    """
    return logprobs_BT.clamp_min(LEAST_LOGPROB)


def log_ratio(logprobs_BT: Tensor, anchor_BT: Tensor) -> Tensor:
    """Return log(pi / pi_anchor), held within +-20 nats.

    >>> log_ratio(torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -90.0])).tolist()
    [0.5, 20.0]
    """
    return (possible(logprobs_BT) - possible(anchor_BT)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def kl_estimate(logprobs_BT: Tensor, reference_BT: Tensor, estimator: Estimator) -> Tensor:
    """Return an estimate of KL(pi || ref) at tokens drawn from pi, with d = logprobs - reference.

    k1 = d, unbiased; k2 = d^2 / 2, whose gradient is that of the KL; k3 = exp(-d) - 1 + d, unbiased and never
    negative. Source: Schulman, "Approximating KL divergence" (2020). d is held within +-20 nats.

    >>> [round(float(kl_estimate(torch.tensor(-1.0), torch.tensor(-2.0), k)), 4) for k in ("k1", "k2", "k3")]
    [1.0, 0.5, 0.3679]
    """
    d_BT = log_ratio(logprobs_BT, reference_BT)
    if estimator == "k1":
        return d_BT
    if estimator == "k2":
        return 0.5 * d_BT * d_BT
    return torch.expm1(-d_BT) + d_BT


def right_side(differences: Tensor) -> Tensor:
    """Return 1 where a difference is above 0, 0 where it is below, and 1/2 where there is none."""
    return (differences.sign() + 1) / 2
