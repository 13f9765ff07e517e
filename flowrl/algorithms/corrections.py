"""What makes up for samples drawn by an older policy: where the ratio starts from, and a weight on each token's loss.

pi_old sampled the token (behaviour log-probs), pi_prox is the policy at the start of the step. Kinds that start from
pi_old: the ratio pi / pi_old is the importance weight, and a trust region about the policy that sampled bounds it.

    behaviour      the algorithm's own clip does (PPO, 1707.06347, equation 7; GSPO, 2507.18071, equation 7)
    second_moment  no clip; of the tokens that move away (A > 0, ratio > 1 or A < 0, ratio < 1) those of the greatest
                   |log ratio| are left out, until the mean square of the rest is within `max_second_moment`
                   (M2PO, 2510.01161, algorithm 1; its threshold is 0.04)
    divergence     no clip; tokens that move away and whose binary KL from pi_old, q log(q / p) + (1 - q) log((1 - q) /
                   (1 - p)) with q, p their probability then and now, is beyond `max_divergence` are left out (DPPO,
                   2602.04879; 0.05 is the authors')

Kinds that start from pi_prox: the clip bounds this step's own movement, and weights of r = pi_prox / pi_old make up for
the staleness. With one optimizer step a version pi is pi_prox, and their clip never acts.

    truncated      min(r, cap): truncated importance sampling (Ionides 2008; IMPALA, 1802.01561, section 4.1)
    clamped        r within [floor, cap]: the same with a floor, which keeps tokens that the policy now finds unlikely
    icepop         r where floor <= r <= cap, else 0: masked on both sides (IcePop; Ring-1T, 2510.18855)
    sequence       1 where a sequence's |mean log r| <= max_drift, else 0: sequences whose geometric mean drifted go
    geometric      the mask of `sequence` times the weight of `truncated`
    decoupled      r, unbounded: decoupled PPO (2505.24298, section 5.2)
    interpolated   the same with log pi_prox = log pi_old + (d - 1) / d (log pi - log pi_old) for a token d versions
                   old, pi_old itself for d <= 1: no forward for pi_prox (A-3PO, 2512.06547)

Invariants:
- no gradient flows through a weight;
- tokens of weight 0 still count in the loss's divisor.

Called by policy.

Tests: tests/unit/algorithms/test_losses.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import torch

from flowrl.algorithms.functional import masked, sequence_mean
from flowrl.config import Config, Meta

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["behaviour", "second_moment", "divergence", "truncated", "clamped", "icepop", "sequence", "geometric",
               "decoupled", "interpolated"]  # fmt: skip
FIELDS = {  # of each kind, besides `kind`
    "second_moment": ("max_second_moment",),
    "divergence": ("max_divergence",),
    "truncated": ("cap",),
    "clamped": ("cap", "floor"),
    "icepop": ("cap", "floor"),
    "sequence": ("max_drift",),
    "geometric": ("cap", "max_drift"),
}


class Correction(Config):
    """How samples of an older policy are weighted; the loss logs the weights whatever the kind."""

    kind: Kind = "behaviour"
    cap: Annotated[float, Meta(ge=1)] = 2.0  # greatest weight; icepop: greatest ratio kept
    floor: Annotated[float, Meta(ge=0, le=1)] = 0.5  # clamped: least weight; icepop: least ratio kept
    max_drift: Annotated[float, Meta(gt=0)] = 0.1  # nats a token; greatest mean of a sequence's log ratios kept
    max_second_moment: Annotated[float, Meta(gt=0)] = 0.04  # square nats a token
    max_divergence: Annotated[float, Meta(gt=0)] = 0.05  # nats

    @property
    def starts_from_old(self) -> bool:
        """Return whether the ratio is against the policy that sampled."""
        return self.kind in ("behaviour", "second_moment", "divergence")

    @property
    def needs_proximal(self) -> bool:
        """Return whether the policy at the start of the step must be known."""
        return not self.starts_from_old and self.kind != "interpolated"

    @property
    def replaces_clip(self) -> bool:
        """Return whether tokens are left out instead of clipped."""
        return self.kind in ("second_moment", "divergence")

    @property
    def weighs_tokens(self) -> bool:
        """Return whether tokens count by pi / pi_old, however far that is from 1."""
        return self.kind not in ("behaviour", "sequence", "interpolated")

    def idle_fields(self) -> list[str]:
        """Return the fields that were changed and that this kind does not read."""
        read = FIELDS.get(self.kind, ())
        return [
            name
            for name in type(self)().__struct_fields__
            if name not in ("kind", *read) and getattr(self, name) != getattr(Correction(), name)
        ]


class TokenWeights(NamedTuple):
    """A weight for each token, and 1 where the correction capped or dropped it."""

    weights_BT: Tensor
    is_cut_BT: Tensor


def correction_weights(correction: Correction, log_ratio_BT: Tensor, mask_BT: Tensor) -> TokenWeights:
    """Return each token's weight from log(pi_prox / pi_old); 1 where the ratio starts from pi_old.

    >>> truncated = Correction(kind="truncated")
    >>> correction_weights(truncated, torch.tensor([[0.0, 3.0]]), torch.ones(1, 2)).weights_BT.tolist()
    [[1.0, 2.0]]
    """
    log_ratio_BT = masked(log_ratio_BT.detach(), mask_BT)
    ratio_BT = torch.exp(log_ratio_BT)
    match correction.kind:
        case "behaviour" | "second_moment" | "divergence":
            return TokenWeights(torch.ones_like(ratio_BT), torch.zeros_like(ratio_BT))
        case "decoupled" | "interpolated":
            return TokenWeights(ratio_BT, torch.zeros_like(ratio_BT))
        case "truncated":
            weights_BT = truncated_weight(ratio_BT, correction.cap)
        case "clamped":
            weights_BT = ratio_BT.clamp(correction.floor, correction.cap)
        case "icepop":
            weights_BT = icepop_weight(ratio_BT, correction.floor, correction.cap)
        case "sequence":
            weights_BT = sequence_keep(log_ratio_BT, mask_BT, correction.max_drift)[:, None].expand_as(ratio_BT)
            ratio_BT = torch.ones_like(ratio_BT)
        case "geometric":
            keep_B1 = sequence_keep(log_ratio_BT, mask_BT, correction.max_drift)[:, None]
            weights_BT = keep_B1 * truncated_weight(ratio_BT, correction.cap)
    return TokenWeights(weights_BT, masked((weights_BT != ratio_BT).to(ratio_BT.dtype), mask_BT))


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


def interpolated(logprobs_BT: Tensor, behaviour_BT: Tensor, age_BT: Tensor) -> Tensor:
    """Return log pi_prox between the policy that sampled a token, `age` versions ago, and the one that learns it.

    >>> interpolated(torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -2.0]), torch.tensor([1.0, 4.0])).tolist()
    [-2.0, -1.25]
    """
    age_BT = age_BT.clamp_min(1.0)
    return behaviour_BT + (age_BT - 1.0) / age_BT * (logprobs_BT.detach() - behaviour_BT)


def moves_away(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """Return where learning would take a token further from the policy that sampled it.

    >>> moves_away(torch.tensor([0.1, -0.1, -0.1]), torch.tensor([1.0, 1.0, -1.0])).tolist()
    [True, False, True]
    """
    return log_ratio * advantages > 0


def second_moment_limit(log_ratio_N: Tensor, advantages_N: Tensor, threshold: float) -> float:
    """Return the greatest |log ratio| that a token moving away may have, so that their mean square is the threshold's.

    >>> ratios = torch.tensor([0.1, -0.2, 0.5])
    >>> round(second_moment_limit(ratios, torch.tensor([1.0, -1.0, 1.0]), 0.04), 4)
    0.2
    """
    away_N = log_ratio_N.double()[moves_away(log_ratio_N, advantages_N)]
    squares_N = (away_N * away_N).sort().values
    if len(squares_N) == 0:
        return float("inf")
    means_N = squares_N.cumsum(0) / torch.arange(1, len(squares_N) + 1, dtype=torch.float64)
    num_kept = int((means_N <= threshold).sum())  # means of ascending values ascend
    if num_kept == len(squares_N):
        return float("inf")
    return float(squares_N[num_kept - 1].sqrt()) if num_kept else 0.0


def binary_kl(logprobs_BT: Tensor, behaviour_BT: Tensor) -> Tensor:
    """Return KL(pi_old || pi) of "this token or another", a lower bound of that over the vocabulary.

    >>> round(float(binary_kl(torch.tensor(0.5).log(), torch.tensor(0.25).log())), 4)
    0.1308
    """
    old_BT, now_BT = behaviour_BT.double(), logprobs_BT.detach().double()
    other_old_BT = torch.log1p(-old_BT.exp().clamp(max=1.0 - 1e-8))
    other_now_BT = torch.log1p(-now_BT.exp().clamp(max=1.0 - 1e-8))
    kl_BT = old_BT.exp() * (old_BT - now_BT) + other_old_BT.exp() * (other_old_BT - other_now_BT)
    return kl_BT.to(logprobs_BT.dtype)
