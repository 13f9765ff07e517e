"""On-policy distillation: the policy's own samples, each token worth how much likelier a teacher finds it.

    A_t = coef * clip(log pi_teacher - log pi_old, -max_gap, max_gap)
    maximise E_t min(rho A, clip(rho, 1 - low, 1 + high) A)

Its gradient is, in the mean over tokens that the policy draws, that of the reverse KL(student || teacher) of each
position: GKD (2306.13649) with lambda = 1 and the reverse KL, one sampled token for the whole vocabulary, and no credit
for how a token changes the positions after it (gamma = 0; Agarwal 2023, section 3.1). The teacher is the graph's
reference node with another model, which shares the policy's vocabulary. Samples of older policies are corrected for
like those of any algorithm here. With `reward_coef` a sample's reward less its group's mean is added to each token.
"""

from __future__ import annotations

from typing import Annotated

from flowrl.algorithms.advantages import group_centred
from flowrl.algorithms.base import CreditBatch, Credited
from flowrl.algorithms.functional import has_tokens, masked
from flowrl.algorithms.policy import PolicyGradient
from flowrl.config import Meta
from flowrl.errors import ConfigError


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

    def credit(self, batch: CreditBatch) -> Credited:
        """Return each token's log-ratio to the teacher; metric: kl, the estimate per sample that is made smaller."""
        if batch.reference_BT is None:
            remedy = "add a reference node with the teacher"
            raise ConfigError("algorithm", "needs the log-probs of a teacher, which this graph does not give", remedy)
        scores_B, metrics = self.shaped_scores(batch)
        gap_BT = masked(batch.reference_BT - batch.behaviour_BT, batch.mask_BT).clamp(-self.max_gap, self.max_gap)
        advantages_BT = self.coef * gap_BT
        if self.reward_coef:
            self.require_group(batch)
            centred_B = group_centred(scores_B, has_tokens(batch.mask_BT))
            advantages_BT = advantages_BT + self.reward_coef * centred_B[:, None]
        return Credited(masked(advantages_BT, batch.mask_BT), None, metrics)
