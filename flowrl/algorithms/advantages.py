"""Advantages: generalised advantage estimation, discounted returns, and the baselines of a group.

Shapes: B sequences (for baselines, the samples of one prompt), T response tokens, `mask_BT` 1 on the tokens the policy
sampled.

Invariants:
- tokens under mask 0 inside a sequence (an environment's) are skipped, not treated as steps, so the next step is the
  next sampled token;
- a sequence without sampled tokens has no part in a group's baseline.

Arithmetic is in float64 and the result has the dtype of its input: equal rewards give advantages of exactly 0. Called
by the algorithms' `advantages`.

Tests: tests/unit/algorithms/test_advantages.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flowrl.algorithms.functional import masked

if TYPE_CHECKING:
    from torch import Tensor

GROUP_EPSILON = 1e-6  # keeps the division finite where all rewards of a group are equal


def discounted_returns(rewards_BT: Tensor, mask_BT: Tensor, *, gamma: float) -> Tensor:
    """Return G_t = sum over k >= t of gamma^(k-t) r_k, [B, T], counting sampled tokens only.

    Source: Sutton and Barto, equation 3.8; the returns of REINFORCE++ (2501.03262).

    >>> discounted_returns(torch.tensor([[1.0, 0.0, 4.0]]), torch.ones(1, 3), gamma=0.5).tolist()
    [[2.0, 2.0, 4.0]]
    """
    order_BT = _sampled_first(mask_BT)
    packed_BT = masked(rewards_BT, mask_BT).double().gather(1, order_BT)
    return _unpacked(_discounted(packed_BT, gamma), order_BT, mask_BT, rewards_BT.dtype)


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float, after_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, both [B, T].

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, returns = A + V. There t + 1 is the next
    sampled token, and V is 0 after the last one, or `after_B`. Source: Schulman 2015, 1506.02438, equations 11 to 16.

    >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]), torch.ones(1, 2), gamma=1.0, lam=0.5)[0].tolist()
    [[0.125, 0.75]]
    """
    order_BT = _sampled_first(mask_BT)
    rewards_packed_BT = masked(rewards_BT, mask_BT).double().gather(1, order_BT)
    values_packed_BT = masked(values_BT, mask_BT).double().gather(1, order_BT)
    next_values_BT = torch.nn.functional.pad(values_packed_BT[:, 1:], (0, 1))
    if after_B is not None:
        num_sampled_B1 = (mask_BT > 0).sum(1, keepdim=True)
        is_last_BT = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device) == num_sampled_B1
        next_values_BT = torch.where(is_last_BT, after_B.double()[:, None], next_values_BT)
    deltas_BT = rewards_packed_BT + gamma * next_values_BT - values_packed_BT
    packed_BT = _discounted(deltas_BT, gamma * lam)
    advantages_BT = _unpacked(packed_BT, order_BT, mask_BT, rewards_BT.dtype)
    return advantages_BT, _unpacked(packed_BT + values_packed_BT, order_BT, mask_BT, rewards_BT.dtype)


def segments(mask_BT: Tensor, placed_BT: Tensor) -> Tensor:
    """Return which part of its sample each token is in, from 0 on: parts end where a reward is placed or a turn ends.

    >>> segments(torch.tensor([[1.0, 1.0, 0.0, 1.0]]), torch.tensor([[2.0, 0.0, 0.0, 0.0]])).tolist()
    [[0, 1, 2, 2]]
    """
    is_sampled_BT = mask_BT > 0
    is_next_sampled_BT = torch.nn.functional.pad(is_sampled_BT[:, 1:], (0, 1))
    ends_BT = is_sampled_BT & (~is_next_sampled_BT | (masked(placed_BT, mask_BT) != 0))
    return ends_BT.cumsum(1) - ends_BT.long()


def segment_means(values_BT: Tensor, segments_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return at each token the mean, over the samples that come so far, of the value where its segment begins.

    >>> segment_means(torch.tensor([[4.0, 1.0], [2.0, 2.0]]), torch.tensor([[0, 1], [0, 0]]), torch.ones(2, 2)).tolist()
    [[3.0, 1.0], [3.0, 3.0]]
    """
    is_sampled_BT = mask_BT > 0
    means_BT = torch.zeros_like(values_BT)
    for segment in range(int(segments_BT.max()) + 1):
        inside_BT = is_sampled_BT & (segments_BT == segment)
        is_first_BT = inside_BT & (inside_BT.cumsum(1) == 1)
        mean = values_BT[is_first_BT].sum() / is_first_BT.sum().clamp_min(1)
        means_BT = torch.where(inside_BT, mean, means_BT)
    return means_BT


def segment_starts(values_T: Tensor, segments_T: Tensor, mask_T: Tensor) -> Tensor:
    """Return of one sample the value where each segment begins, and a 0 for all that come behind its last.

    >>> segment_starts(torch.tensor([4.0, 3.0, 1.0]), torch.tensor([0, 0, 1]), torch.ones(3)).tolist()
    [4.0, 1.0, 0.0]
    """
    sampled_N = segments_T[mask_T > 0]
    is_first_N = sampled_N != torch.nn.functional.pad(sampled_N[:-1], (1, 0), value=-1)
    return torch.nn.functional.pad(values_T[mask_T > 0][is_first_N], (0, 1))


def group_centred(rewards_B: Tensor, present_B: Tensor) -> Tensor:
    """Return R_i - mean(R) over the present samples, 0 for the others.

    Source: Dr. GRPO (2503.20783), section 3.2; REINFORCE++-baseline (2501.03262).

    >>> group_centred(torch.tensor([1.0, 0.0, 0.5]), torch.ones(3)).tolist()
    [0.5, -0.5, 0.0]
    """
    return _centred(rewards_B, present_B).to(rewards_B.dtype)


def group_standardised(rewards_B: Tensor, present_B: Tensor) -> Tensor:
    """Return (R_i - mean(R)) / (std(R) + 1e-6) over the present samples, 0 for the others.

    Source: GRPO, DeepSeekMath (2402.03300), section 4.1.2. The paper leaves open which standard deviation; this is
    the sample's (divided by n - 1), as in TRL and verl.

    >>> [round(a, 4) for a in group_standardised(torch.tensor([1.0, 0.0]), torch.ones(2)).tolist()]
    [0.7071, -0.7071]
    """
    centred_B = _centred(rewards_B, present_B)
    variance = (centred_B * centred_B).sum() / (present_B.double().sum() - 1.0).clamp_min(1.0)
    return (centred_B / (variance.sqrt() + GROUP_EPSILON)).to(rewards_B.dtype)


def length_weighted(rewards_B: Tensor, lengths_B: Tensor) -> Tensor:
    """Return R_i - sum_j l_j R_j / sum_j l_j, 0 for samples of no length.

    Source: OPO (2505.23585), section 3: the baseline of least variance where a gradient grows with its length.

    >>> length_weighted(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 3.0])).tolist()
    [0.75, -0.25]
    """
    lengths_B = lengths_B.double()
    rewards_B64 = masked(rewards_B.double(), lengths_B)
    first = rewards_B64[0]  # taken off before, so that equal rewards give exactly 0
    mean = (lengths_B * (rewards_B64 - first)).sum() / lengths_B.sum().clamp_min(1.0) + first
    return masked(rewards_B64 - mean, lengths_B).to(rewards_B.dtype)


def leave_one_out(rewards_B: Tensor, present_B: Tensor) -> Tensor:
    """Return R_i - mean of the other present samples, which is n / (n - 1) (R_i - mean(R)); 0 for absent ones.

    Source: RLOO (2402.14740), the REINFORCE leave-one-out estimator of Kool 2019.

    >>> leave_one_out(torch.tensor([1.0, 0.0, 0.5]), torch.ones(3)).tolist()
    [0.75, -0.75, 0.0]
    """
    count = present_B.double().sum()
    scale = count / (count - 1.0).clamp_min(1.0)
    return (_centred(rewards_B, present_B) * scale).to(rewards_B.dtype)


def _centred(rewards_B: Tensor, present_B: Tensor) -> Tensor:
    present_B = present_B.double()
    rewards_B = masked(rewards_B.double(), present_B)
    return masked(rewards_B - rewards_B.sum() / present_B.sum().clamp_min(1.0), present_B)


def _sampled_first(mask_BT: Tensor) -> Tensor:
    """Return indices [B, T] that bring each row's sampled tokens to its front, in order."""
    return torch.argsort((mask_BT <= 0).to(torch.int8), dim=1, stable=True)


def _unpacked(packed_BT: Tensor, order_BT: Tensor, mask_BT: Tensor, dtype: torch.dtype) -> Tensor:
    return masked(torch.zeros_like(packed_BT).scatter(1, order_BT, packed_BT), mask_BT).to(dtype)


def _discounted(terms_BT: Tensor, factor: float) -> Tensor:
    """Return s_t = x_t + factor s_{t+1} for every t by doubling, in log2(T) passes instead of T.

    After the pass with stride k each entry holds the 2k terms that start at it.
    """
    stride = 1
    while stride < terms_BT.shape[1]:
        later_BT = torch.nn.functional.pad(terms_BT[:, stride:], (0, stride))
        terms_BT = terms_BT + factor**stride * later_BT
        stride *= 2
    return terms_BT
