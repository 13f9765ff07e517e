"""On-policy distillation: the policy's own samples, each token worth how much likelier a teacher finds it.

    g_t = clip(log pi_teacher - log pi, -max_gap, max_gap), pi being the policy as it is learned, without gradient
    A_t = coef (g_t - b), b the mean of g over the tokens of the prompt's other samples
    maximise E_t w min(rho A, clip(rho, 1 - low, 1 + high) A)

This is gradient descent on the reverse KL of each position. For pi over a vocabulary, and D = KL(pi || teacher),

    grad D = E_pi[(log pi - log pi_teacher) grad log pi] + E_pi[grad log pi]; the second mean is 0, that of b likewise
           = -E_old[(pi / pi_old) (g - b) grad log pi]

so b takes off variance and nothing else: without it nearly every token is worth less than nothing, and mass flees to
tokens that were not drawn. The gap must be that of the policy being learned. With log pi_old in its place the gradient
has E_pi[(log pi - log pi_old) grad log pi] = grad KL(pi || pi_old) more. Descent runs away from the policy that
sampled: harmless in the first update on fresh samples, where that is 0, and divergent with samples one version old.

It is GKD (Agarwal 2023, 2306.13649, section 3.1) with lambda = 1 and the reverse KL. One sampled token stands for the
whole vocabulary, and there is no account of how a token changes the positions after it (gamma = 0). The teacher is the
graph's reference node with another model, which shares the policy's vocabulary. Samples of older policies are corrected
for like those of any algorithm here. With `reward_coef` a sample's reward less its group's mean is added to each token.
`advantages` sees the policy that sampled only; `loss` makes up the difference.

Tests: tests/unit/algorithms/test_supervised.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from flowrl.algorithms.advantages import group_centred
from flowrl.algorithms.base import AdvantageBatch, Advantages, Loss, LossBatch
from flowrl.algorithms.functional import has_tokens, masked
from flowrl.algorithms.policy import PolicyGradient
from flowrl.config import Meta
from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class OnPolicyDistillation(PolicyGradient):
    """Reverse KL to a teacher on the policy's own samples."""

    coef: Annotated[float, Meta(gt=0)] = 1.0  # of the log-ratio to the teacher
    max_gap: Annotated[float, Meta(gt=0)] = 10.0  # nats; a token's log-ratio is held within
    reward_coef: Annotated[float, Meta(ge=0)] = 0.0  # of the centred reward; 0: the teacher alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl.coef:
            raise ValueError(f"kl.coef {self.kl.coef}: the reference is the teacher, whose KL is the whole loss; set 0")

    @property
    def needs_reference(self) -> bool:
        """Return True: it is the teacher."""
        return True

    @property
    def needs_group(self) -> bool:
        """Return whether rewards are compared within a group, or groups filtered by them."""
        return self.reward_coef > 0 or self.filter_groups

    @property
    def reads_scores(self) -> bool:
        """Return whether rewards are learned beside the teacher, or groups filtered by them."""
        return self.needs_group

    @property
    def centred_by(self) -> str:
        """Return what comes off each reward."""
        return "the group's own mean"

    def gap(self, logprobs_BT: Tensor, teacher_BT: Tensor) -> Tensor:
        """Return how much likelier the teacher finds each token, within max_gap."""
        return (teacher_BT - logprobs_BT).clamp(-self.max_gap, self.max_gap)

    def advantages(self, batch: AdvantageBatch) -> Advantages:
        """Return each token's gap under the policy that sampled it, less the mean of the group's other samples.

        A group of one sample has no such mean and keeps its variance. Metric: kl, the estimate per sample that is made
        smaller.
        """
        if batch.reference_BT is None:
            remedy = "add a reference node with the teacher"
            raise ConfigError("algorithm", "needs the log-probs of a teacher, which this graph does not give", remedy)
        scores_B, metrics = self.shaped_scores(batch)
        gap_BT = masked(self.gap(batch.behaviour_BT, batch.reference_BT), batch.mask_BT)
        advantages_BT = self.coef * (gap_BT - others_mean(gap_BT, batch.mask_BT)[:, None])
        if self.reward_coef:
            self.require_group(batch)
            centred_B = group_centred(scores_B, has_tokens(batch.mask_BT))
            advantages_BT = advantages_BT + self.reward_coef * centred_B[:, None]
        return Advantages(masked(advantages_BT, batch.mask_BT), None, metrics)

    def loss(self, batch: LossBatch) -> Loss:
        """Return the policy's loss with each token's gap as it is now in place of the gap when it was sampled."""
        mask_BT, teacher_BT = batch.mask_BT, batch.column("reference")
        now_BT = masked(self.gap(batch.logprobs_BT.detach(), teacher_BT), mask_BT)
        then_BT = masked(self.gap(batch.columns["behaviour"], teacher_BT), mask_BT)
        advantages_BT = batch.columns["advantages"] + self.coef * (now_BT - then_BT)
        return super().loss(batch._replace(columns={**batch.columns, "advantages": advantages_BT}))


def others_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return for each sample the mean over the masked tokens of all the others, [B]; 0 where there are none.

    >>> others_mean(torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])).tolist()
    [5.0, 2.0]
    """
    sums_B, counts_B = masked(values_BT, mask_BT).double().sum(1), mask_BT.double().sum(1)
    return ((sums_B.sum() - sums_B) / (counts_B.sum() - counts_B).clamp_min(1.0)).to(values_BT.dtype)
