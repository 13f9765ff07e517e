"""What makes up for samples drawn by an older policy: a weight on each token's loss, from log(pi_prox / pi_old).

pi_old sampled the token (behaviour log-probs), pi_prox is the policy at the start of the step. The kinds:

    none       weight 1, and the surrogate's ratio is taken against pi_old instead of pi_prox (1707.06347)
    truncated  min(ratio, cap): truncated importance sampling (Ionides 2008; IMPALA, 1802.01561, section 4.1)
    icepop     ratio where floor <= ratio <= cap, else 0 (IcePop; Ring-1T, 2510.18855; its cap is 5)
    sequence   1 where a sequence's |mean log ratio| <= max_drift, else 0: whole sequences that drifted are left out
    decoupled  ratio, unbounded: decoupled PPO (2505.24298, section 5.2)

Invariant: no gradient flows through a weight; tokens of weight 0 still count in the loss's divisor. Called by policy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import torch

from flowrl.algorithms.functional import masked, sequence_mean
from flowrl.config import Config, Meta

if TYPE_CHECKING:
    from torch import Tensor


class Correction(Config):
    """How samples of an older policy are weighted; the loss logs the weights whatever the kind."""

    kind: Literal["none", "truncated", "icepop", "sequence", "decoupled"] = "truncated"
    cap: Annotated[float, Meta(ge=1)] = 2.0  # truncated: greatest weight; icepop: greatest ratio kept
    floor: Annotated[float, Meta(ge=0, le=1)] = 0.5  # icepop: least ratio kept
    max_drift: Annotated[float, Meta(gt=0)] = 0.1  # nats a token; sequence: greatest mean of log ratios kept


class TokenWeights(NamedTuple):
    """A weight for each token, and 1 where the correction capped or dropped it."""

    weights_BT: Tensor
    is_cut_BT: Tensor


def correction_weights(correction: Correction, log_ratio_BT: Tensor, mask_BT: Tensor) -> TokenWeights:
    """Return each token's weight from log(pi_prox / pi_old).

    >>> correction_weights(Correction(), torch.tensor([[0.0, 3.0]]), torch.ones(1, 2)).weights_BT.tolist()
    [[1.0, 2.0]]
    """
    log_ratio_BT = masked(log_ratio_BT.detach(), mask_BT)
    ratio_BT = torch.exp(log_ratio_BT)
    match correction.kind:
        case "none":
            return TokenWeights(torch.ones_like(ratio_BT), torch.zeros_like(ratio_BT))
        case "decoupled":
            return TokenWeights(ratio_BT, torch.zeros_like(ratio_BT))
        case "truncated":
            weights_BT = truncated_weight(ratio_BT, correction.cap)
        case "icepop":
            weights_BT = icepop_weight(ratio_BT, correction.floor, correction.cap)
        case "sequence":
            weights_BT = sequence_keep(log_ratio_BT, mask_BT, correction.max_drift)[:, None].expand_as(ratio_BT)
            ratio_BT = torch.ones_like(ratio_BT)
    return TokenWeights(weights_BT, masked((weights_BT < ratio_BT).to(ratio_BT.dtype), mask_BT))


def truncated_weight(ratio_BT: Tensor, cap: float) -> Tensor:
    """Return min(ratio, cap).

    >>> truncated_weight(torch.tensor([0.25, 5.0]), 2.0).tolist()
    [0.25, 2.0]
    """
    return ratio_BT.clamp(max=cap)


def icepop_weight(ratio_BT: Tensor, floor: float, cap: float) -> Tensor:
    """Return the ratio where floor <= ratio <= cap, else 0.

    >>> icepop_weight(torch.tensor([0.25, 1.5, 5.0]), 0.5, 2.0).tolist()
    [0.0, 1.5, 0.0]
    """
    is_kept_BT = (ratio_BT >= floor) & (ratio_BT <= cap)
    return torch.where(is_kept_BT, ratio_BT, torch.zeros_like(ratio_BT))


def sequence_keep(log_ratio_BT: Tensor, mask_BT: Tensor, max_drift: float) -> Tensor:
    """Return 1 for each sequence whose mean log ratio lies within +-max_drift, else 0; [B].

    The mean, not the sum, so that long sequences are not dropped for their length.

    >>> sequence_keep(torch.tensor([[0.3, -0.2], [0.3, 0.0]]), torch.ones(2, 2), 0.1).tolist()
    [1.0, 0.0]
    """
    return (sequence_mean(log_ratio_BT, mask_BT).abs() <= max_drift).to(log_ratio_BT.dtype)
