"""What is maximised for each token, and how a sum over tokens becomes a sum and a count.

Shapes: B sequences, T response tokens, `mask_BT` 1 on the tokens the policy sampled; ratio = pi / pi_anchor.

Invariant: a total and its count add up over micro-batches to those of the whole batch, and counts depend on masks
alone.

Called by policy, value and the algorithms.

Tests: tests/unit/algorithms/test_losses.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from flowrl.algorithms.functional import has_tokens, masked, sequence_mean

if TYPE_CHECKING:
    from torch import Tensor

Normalisation = Literal["token", "sequence", "constant"]


def clipped_surrogate(
    ratio_BT: Tensor, advantages_BT: Tensor, *, low: float, high: float, dual_clip: float = 0.0
) -> Tensor:
    """Return min(ratio A, clip(ratio, 1 - low, 1 + high) A); with a dual clip c, at least c A where A < 0.

    Sources: PPO (1707.06347), equation 7; asymmetric range, DAPO (2503.14476), section 3.1; dual clip (1912.09729),
    c > 1, 0 for none.

    >>> ratios, advantages = torch.tensor([2.0, 9.0]), torch.tensor([1.0, -1.0])
    >>> [round(s, 4) for s in clipped_surrogate(ratios, advantages, low=0.2, high=0.3, dual_clip=3.0).tolist()]
    [1.3, -3.0]
    """
    clipped_BT = ratio_BT.clamp(1.0 - low, 1.0 + high)
    surrogate_BT = torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    if not dual_clip:
        return surrogate_BT
    floored_BT = torch.maximum(surrogate_BT, dual_clip * advantages_BT)
    return torch.where(advantages_BT < 0, floored_BT, surrogate_BT)


def weighted_logprob(
    ratio_BT: Tensor, advantages_BT: Tensor, logprobs_BT: Tensor, *, low: float, high: float
) -> Tensor:
    """Return sg(clip(ratio, 1 - low, 1 + high)) A log pi: the weight is clipped, no token loses its gradient.

    Source: CISPO, MiniMax-M1 (2506.13585), equations 4 and 5.

    >>> ratio, advantage, logprob = torch.tensor(9.0), torch.tensor(1.0), torch.tensor(-0.5)
    >>> float(weighted_logprob(ratio, advantage, logprob, low=1.0, high=3.0))
    -2.0
    """
    return ratio_BT.detach().clamp(1.0 - low, 1.0 + high) * advantages_BT * logprobs_BT


def sequence_log_ratio(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return each sequence's mean log ratio on each of its tokens: the log of GSPO's length-normalised ratio.

    Source: GSPO (2507.18071), equation 7.

    >>> sequence_log_ratio(torch.tensor([[0.5, 0.0]]), torch.ones(1, 2)).tolist()
    [[0.25, 0.25]]
    """
    return masked(sequence_mean(log_ratio_BT, mask_BT)[:, None].expand_as(log_ratio_BT), mask_BT)


def normalised(
    values_BT: Tensor, mask_BT: Tensor, normalisation: Normalisation, constant_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return the total and the count whose quotient over a step is its mean.

    token: mean over all sampled tokens (DAPO, 2503.14476, section 3.3). sequence: mean over sequences of their token
    means (GRPO, 2402.03300, equation 3). constant: mean over sequences of their sums / constant_tokens (Dr. GRPO,
    2503.20783, section 3.2). Sequences without sampled tokens count nowhere.

    >>> total, count = normalised(torch.tensor([[1.0, 3.0], [4.0, 9.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
    ...                           "sequence", 1)
    >>> float(total), float(count)
    (6.0, 2.0)
    """
    if normalisation == "token":
        return masked(values_BT, mask_BT).sum(), mask_BT.sum()
    num_sequences = has_tokens(mask_BT).sum()
    if normalisation == "sequence":
        return sequence_mean(values_BT, mask_BT).sum(), num_sequences
    return masked(values_BT, mask_BT).sum() / constant_tokens, num_sequences


def clipped_value_error(values_BT: Tensor, old_BT: Tensor, returns_BT: Tensor, clip: float) -> Tensor:
    """Return 0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) for each token; c = 0 clips nothing.

    Source: the reference implementation of PPO (openai/baselines, ppo2); OpenRLHF (2405.11143), section 3.3.

    >>> values, old, returns = torch.tensor(1.0), torch.tensor(0.0), torch.tensor(2.0)
    >>> float(clipped_value_error(values, old, returns, 0.5))
    1.125
    """
    error_BT = (values_BT - returns_BT) ** 2
    if clip:
        clipped_BT = old_BT + (values_BT - old_BT).clamp(-clip, clip)
        error_BT = torch.maximum(error_BT, (clipped_BT - returns_BT) ** 2)
    return 0.5 * error_BT
