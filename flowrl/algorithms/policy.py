"""The loss and the advantages that the online algorithms share; each algorithm is a file that fills in what differs.

    loss = -w min(rho A, clip(rho, 1 - low, 1 + high) A) + coef KL - entropy_coef H

with rho = exp(lp - lp_old), against the policy that sampled, and w = 1; or rho = exp(lp - lp_prox), against the policy
at the start of the step, and w the correction for samples drawn by an older one (corrections.py). Where the batch has
no column "proximal" the two are the same policy, as in a step of one update. Then neither a clip against it nor the
figures of its movement say anything, and they are not given.

Invariants:
- what stands under mask 0 changes neither loss, metrics nor gradient;
- the count depends on masks alone.

Shapes: B sequences, T response tokens.

Tests: tests/contracts/test_algorithms.py
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch

from flowrl.algorithms.base import AdvantageBatch, Advantages, Algorithm, Loss, LossBatch, StepFigures
from flowrl.algorithms.corrections import (
    Correction,
    TokenWeights,
    binary_kl,
    correction_weights,
    interpolated,
    moves_away,
    second_moment_limit,
)
from flowrl.algorithms.functional import Estimator, has_tokens, kl_estimate, log_ratio, masked, possible
from flowrl.algorithms.shaping import Shaping, adapted_coef, has_contrast, token_rewards
from flowrl.algorithms.surrogate import Normalisation, clipped_surrogate, normalised
from flowrl.config import Config, Meta
from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


CUTTING = ("second_moment", "divergence", "truncated", "clamped", "icepop", "sequence", "geometric")  # corrections


CLIPS = ("clip_low", "clip_high", "dual_clip")


class KL(Config):
    """The penalty for leaving the reference."""

    coef: Annotated[float, Meta(ge=0)] = 0.0
    placement: Literal["reward", "loss"] = "reward"  # taken off every token's reward, or added to the loss
    estimator: Estimator = "k1"  # in the loss k2 or k3, for there k1 has the wrong gradient
    target: Annotated[float, Meta(ge=0)] = 0.0  # nats a sample that `coef` is steered towards; 0: coef is fixed
    horizon: Annotated[int, Meta(ge=1)] = 10_000  # samples in which a coef that is far off changes by a fifth
    # in the loss: times pi / pi_old, with its gradient, so that it is the KL of the policy that learns (DeepSeek-V3.2)
    is_weighted: bool = False

    def __post_init__(self) -> None:
        if self.placement == "loss" and self.estimator == "k1":
            raise ValueError("kl.estimator k1 has no useful gradient in the loss; use k2 or k3, or placement=reward")
        if self.is_weighted and self.placement == "reward":
            raise ValueError("kl.is_weighted weighs the term of the loss; set kl.placement=loss with estimator k3")
        if self.target and not self.coef:
            raise ValueError(f"kl.target {self.target} steers a coefficient of 0, which stays 0; give kl.coef, as 0.1")


class PolicyGradient(Algorithm):
    """Settings, loss and parts of the advantages of every algorithm that weights log-probs by them."""

    has_own_region: ClassVar[bool] = False  # whether what bounds the ratio is what the algorithm is about
    # what of its group's scores a sample's advantage is relative to; "": it does not depend on the other samples
    compares_group: ClassVar[Literal["", "mean", "mean and std"]] = ""

    clip_low: Annotated[float, Meta(ge=0, le=1)] = 0.2  # ratios count down to 1 - this
    clip_high: Annotated[float, Meta(ge=0)] = 0.2  # ratios count up to 1 + this
    dual_clip: Annotated[float, Meta(ge=0)] = 0.0  # c > 1: for A < 0 the surrogate is at least c A; 0: off
    entropy_coef: Annotated[float, Meta(ge=0)] = 0.0  # of the entropy bonus, nats
    normalisation: Normalisation = "token"  # what the loss is a mean over; see surrogate.normalised
    # Divisor of normalisation=constant, the longest response. It only scales the gradient; 0: sampling.max_tokens.
    constant_tokens: Annotated[int, Meta(ge=0)] = 0
    kl: KL = KL()
    correction: Correction = Correction()
    shaping: Shaping = Shaping()
    filter_groups: bool = False  # leave out groups whose rewards are all equal (DAPO's dynamic sampling)
    mean_range: tuple[float, float] | None = None  # of filter_groups: keep those whose mean score lies strictly within
    # Leave answers that were cut out of the loss; in their group's baseline they stay (DAPO, 2503.14476, section 3.4).
    mask_cut: bool = False

    def __post_init__(self) -> None:
        if 0.0 < self.dual_clip <= 1.0:
            raise ValueError(f"dual_clip {self.dual_clip} must be 0 (off) or above 1, or it would clip ratios of 1")
        if self.mean_range and not self.filter_groups:
            raise ValueError(f"mean_range {self.mean_range} has no effect without filter_groups=true")
        if self.correction.replaces_clip and self.has_own_region:
            what = f"correction.kind {self.correction.kind} would take the place of {type(self).__name__}'s own bound"
            raise ValueError(f"{what}; take behaviour, or PPO or GRPO")

    @property
    def bounds(self) -> tuple[str, ...]:
        """Return the settings that bound the ratio."""
        return CLIPS if self.dual_clip else CLIPS[:2]

    @property
    def needs_entropy(self) -> bool:
        """Return whether the loss has an entropy bonus."""
        return self.entropy_coef > 0

    @property
    def needs_reference(self) -> bool:
        """Return whether the penalty needs the reference's log-probs."""
        return self.kl.coef > 0

    @property
    def needs_group(self) -> bool:
        """Return whether the samples of a group are compared, to find their advantages or to filter groups."""
        return bool(self.compares_group) or self.filter_groups

    @property
    def reads_scores(self) -> bool:
        """Return whether scores are learned, or decide which groups are."""
        return True

    @property
    def centred_by(self) -> str:
        """Return what is taken off all scores alike, so that a constant more of each changes nothing; "": nothing."""
        return "the group's own mean" if self.compares_group else ""

    @property
    def divided_by(self) -> str:
        """Return what advantages are divided by, so that a unit of all rewards changes nothing; "": nothing."""
        return "the group's own std" if self.compares_group == "mean and std" else ""

    @property
    def needs_full_sampling(self) -> bool:
        """Return whether the correction gives no token the weight pi / pi_old, or only within the clip."""
        return not self.correction.weighs_tokens

    @property
    def needs_proximal(self) -> bool:
        """Return whether the ratio or its correction is against the policy at the start of the step."""
        return self.correction.needs_proximal

    @property
    def needs_drift(self) -> bool:
        """Return whether tokens are left out by how the whole of an update has drifted."""
        return self.correction.kind == "second_moment"

    def drift_limit(self, log_ratios_N: Tensor, advantages_N: Tensor) -> float:
        """Return how far a token may have moved away from the policy that sampled it, nats."""
        return second_moment_limit(log_ratios_N, advantages_N, self.correction.max_second_moment)

    @property
    def leaves_out_cut(self) -> bool:
        """Return whether answers that were cut are left out of the loss."""
        return self.mask_cut

    def idle_settings(self, num_updates: int, *, is_fresh: bool = False) -> list[str]:
        """Return which settings have no effect in a step of so many updates, and why."""
        found: list[str] = []
        kind = self.correction.kind
        bounds = ", ".join(self.bounds)
        if self.correction.replaces_clip:
            found.append(f"algorithm.{bounds}: no effect, for correction.kind={kind} takes the clip's place")
        elif num_updates == 1 and self.needs_proximal:
            found.append(
                f"algorithm.{bounds}: no effect, for with correction.kind={kind} the ratio is against the policy at "
                "the start of the step, and one optimizer step a version leaves it 1; set learner.minibatches or "
                "learner.epochs to 2 or more, or correction.kind=behaviour, which clips against the policy that sampled"
            )
        elif num_updates == 1 and is_fresh:
            found.append(
                f"algorithm.{bounds}: no effect but on what engines round, for fresh samples that are learned in one "
                "optimizer step have a ratio of 1"
            )
        if changed := self.changed(*(name for name in CLIPS if name not in self.bounds)):
            found.append(f"algorithm.{', '.join(changed)}: no effect, for {type(self).__name__} has {bounds} instead")
        if unread := self.correction.idle_fields():
            names = ", ".join(f"correction.{name}" for name in unread)
            found.append(f"algorithm.{names}: no effect with correction.kind={kind}")
        if self.normalisation != "constant" and self.constant_tokens:
            found.append(f"algorithm.constant_tokens: no effect with normalisation={self.normalisation}")
        if self.kl.horizon != KL().horizon and not self.kl.target:
            found.append("algorithm.kl.horizon: no effect while kl.target is 0")
        if not self.reads_scores:
            why = f", for {type(self).__name__} learns no score with these settings"
            found += self.shaping.said_idle(self.shaping.__struct_fields__, why)
        else:
            if self.mask_cut and not (self.needs_group or self.needs_greedy):
                why = " with mask_cut=true, which learns nothing of cut answers"
                found += self.shaping.said_idle(("cut_factor", "cut_penalty"), why)
            is_penalised = self.kl.coef > 0 and self.kl.placement == "reward"
            found += self.shaping.idle_settings(
                type(self).__name__,
                centred_by="" if self.mean_range else self.centred_by,
                divided_by="" if self.mean_range or is_penalised else self.divided_by,
            )
        own, names = type(self)().kl, ("placement", "estimator", "is_weighted")
        changed = [f"kl.{name}" for name in names if getattr(self.kl, name) != getattr(own, name)]
        if changed and not self.kl.coef:
            found.append(f"algorithm.{', '.join(changed)}: no effect while kl.coef is 0")
        return found

    @property
    def adapting(self) -> tuple[str, ...]:
        """Return the settings that follow the run: the KL coefficient, the scores' mean and std."""
        score = ("shaping.mean", "shaping.std", "shaping.num_scores") if self.shaping.running else ()
        return (("kl.coef",) if self.kl.target else ()) + score

    def adapted(self, figures: StepFigures) -> dict[str, float]:
        """Return them for the next step.

        Raises:
            ConfigError: the coefficient is to follow a KL that nobody measures.
        """
        found: dict[str, float] = {}
        if self.kl.target:
            if math.isnan(figures.kl):
                raise _no_reference("target", self.kl.target)
            found["kl.coef"] = adapted_coef(
                self.kl.coef,
                kl=figures.kl,
                target=self.kl.target,
                num_samples=len(figures.rewards_B),
                horizon=self.kl.horizon,
            )
        if self.shaping.running:
            followed = self.shaping.followed(figures.rewards_B)
            found |= {f"shaping.{name}": value for name, value in followed.items()}
        return found

    def keeps(self, batch: AdvantageBatch) -> bool:
        """Return whether a group has an answer to learn and, where groups are filtered, scores that differ.

        These are the scores that are learned, after clip, penalties and normalisation.
        """
        if self.mask_cut and batch.cut_B is not None and bool((batch.cut_B > 0).all()):
            return False
        if not self.filter_groups:
            return True
        scores_B, _ = self.shaped_scores(batch)
        return has_contrast(scores_B[has_tokens(batch.mask_BT) > 0], self.mean_range)

    # What an algorithm may do in its own way.

    def log_ratio(self, logprobs_BT: Tensor, anchor_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the logarithm of the importance ratio of each token; both arguments are 0 under mask 0."""
        return log_ratio(logprobs_BT, anchor_BT)

    def surrogates(self, log_ratio_BT: Tensor, advantages_BT: Tensor, logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return what is maximised for each token, where it depends on more than the token's own ratio."""
        return self.surrogate(torch.exp(log_ratio_BT), advantages_BT, logprobs_BT)

    def surrogate(self, ratio_BT: Tensor, advantages_BT: Tensor, logprobs_BT: Tensor) -> Tensor:
        """Return what is maximised for each token, before its correction weight."""
        return clipped_surrogate(
            ratio_BT, advantages_BT, low=self.clip_low, high=self.clip_high, dual_clip=self.dual_clip
        )

    def clipped(self, ratio_BT: Tensor, advantages_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the lower and the upper clip are active: low where A < 0, high where A > 0."""
        is_low_BT = (ratio_BT < 1.0 - self.clip_low) & (advantages_BT < 0)
        return is_low_BT, (ratio_BT > 1.0 + self.clip_high) & (advantages_BT > 0)

    # The loss.

    def loss(self, batch: LossBatch) -> Loss:
        """Return the negative weighted surrogate with its terms, normalised as the settings say.

        Metrics: policy_loss, kl_ref and entropy; logprob, of the sampled tokens; clip_frac_low and clip_frac_high,
        where the ratio can differ from 1; approx_kl (k3, proximal to new) where there is such a column; behaviour_kl
        (k3, behaviour to proximal); and mismatch_kl, the same over the fresh_frac of tokens that this very version
        sampled, so that only the engines differ (column "age", 0 where it is not given); is_weight and is_weight_sq, of
        exp(lp_prox - lp_old) before any cap, whose mean squared over mean square is the effective sample size;
        corrected_frac, capped or dropped tokens, where the correction does so.
        """
        mask_BT = batch.mask_BT
        lp_BT = possible(masked(batch.logprobs_BT, mask_BT))
        old_BT = possible(masked(batch.columns["behaviour"], mask_BT))
        advantages_BT = masked(batch.columns["advantages"], mask_BT)
        has_moved = "proximal" in batch.columns
        prox_BT = possible(masked(batch.columns["proximal"], mask_BT)) if has_moved else lp_BT.detach()
        metrics = self._policy_metrics(batch, lp_BT, prox_BT, old_BT)
        if self.correction.kind == "interpolated":
            prox_BT = interpolated(lp_BT, old_BT, masked(_ages(batch), mask_BT))
        anchor_BT = old_BT if self.correction.starts_from_old else prox_BT
        log_ratio_BT = self.log_ratio(lp_BT, anchor_BT, mask_BT)
        weights = correction_weights(self.correction, self.log_ratio(prox_BT, old_BT, mask_BT), mask_BT)
        if self.correction.replaces_clip:
            is_kept_BT = self._within_region(batch, lp_BT, old_BT, advantages_BT)
            weights = TokenWeights(is_kept_BT, masked(1.0 - is_kept_BT, mask_BT))
            loss_BT = -is_kept_BT * torch.exp(log_ratio_BT) * advantages_BT
        else:
            loss_BT = -weights.weights_BT * self.surrogates(log_ratio_BT, advantages_BT, lp_BT, mask_BT)
            if has_moved or not self.correction.needs_proximal:
                is_low_BT, is_high_BT = self.clipped(torch.exp(log_ratio_BT.detach()), advantages_BT)
                metrics["clip_frac_low"] = _mean(is_low_BT.float(), mask_BT)
                metrics["clip_frac_high"] = _mean(is_high_BT.float(), mask_BT)
        if self.correction.kind in CUTTING:
            metrics["corrected_frac"] = _mean(weights.is_cut_BT, mask_BT)
        metrics["policy_loss"] = self._normalised(loss_BT.detach(), mask_BT)
        for name, coef, term_BT in self._terms(batch, lp_BT, old_BT):
            if coef:
                loss_BT = loss_BT + coef * term_BT
            metrics[name] = _mean(term_BT.detach(), mask_BT)
        total, count = self._normalised(loss_BT, mask_BT)
        return Loss(total, count, metrics)

    def _within_region(self, batch: LossBatch, lp_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor) -> Tensor:
        """Return 1 for each token that is within the correction's trust region or moves towards it, else 0."""
        drift_BT = log_ratio(lp_BT, old_BT).detach()
        if self.correction.kind == "second_moment":
            is_beyond_BT = drift_BT.abs() > masked(batch.column("drift_limit"), batch.mask_BT) * (1.0 + 1e-6)
        else:
            is_beyond_BT = binary_kl(lp_BT, old_BT) > self.correction.max_divergence
        return 1.0 - (is_beyond_BT & moves_away(drift_BT, advantages_BT)).to(lp_BT.dtype)

    def _normalised(self, loss_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        if self.normalisation == "constant" and not self.constant_tokens:
            what = "is 0, and nothing has filled in the longest response"
            raise ConfigError("algorithm.constant_tokens", what, "set it to sampling.max_tokens")
        return normalised(loss_BT, mask_BT, self.normalisation, self.constant_tokens)

    def _terms(self, batch: LossBatch, lp_BT: Tensor, old_BT: Tensor) -> list[tuple[str, float, Tensor]]:
        """Return the further terms of the loss as (metric, coefficient, value per token)."""
        terms: list[tuple[str, float, Tensor]] = []
        is_in_loss = self.kl.placement == "loss" and self.kl.coef > 0
        if "reference" in batch.columns:
            reference_BT = masked(batch.columns["reference"], batch.mask_BT)
            if is_in_loss:
                kl_BT = kl_estimate(lp_BT, reference_BT, self.kl.estimator)
                weight_BT = torch.exp(log_ratio(lp_BT, old_BT)) if self.kl.is_weighted else torch.ones_like(lp_BT)
                terms.append(("kl_ref", self.kl.coef, weight_BT * kl_BT))
            else:
                terms.append(("kl_ref", 0.0, kl_estimate(lp_BT.detach(), reference_BT, "k3")))
        elif is_in_loss:
            raise _no_reference("coef", self.kl.coef)
        if batch.entropy_BT is not None:
            terms.append(("entropy", -self.entropy_coef, masked(batch.entropy_BT, batch.mask_BT)))
        elif self.needs_entropy:
            raise ConfigError(
                "algorithm.entropy_coef",
                f"{self.entropy_coef} needs entropies, which the engine did not give",
                "set it to 0 or use an engine that honours needs_entropy",
            )
        return terms

    def _policy_metrics(
        self, batch: LossBatch, lp_BT: Tensor, prox_BT: Tensor, old_BT: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        mask_BT = batch.mask_BT
        fresh_BT = masked((_ages(batch) == 0).to(mask_BT.dtype), mask_BT)
        raw_BT = torch.exp(log_ratio(prox_BT, old_BT))
        behaviour_kl_BT = kl_estimate(old_BT, prox_BT, "k3")
        moved = {"approx_kl": _mean(kl_estimate(prox_BT, lp_BT.detach(), "k3"), mask_BT)}
        return (moved if "proximal" in batch.columns else {}) | {
            "logprob": _mean(lp_BT.detach(), mask_BT),
            "behaviour_kl": _mean(behaviour_kl_BT, mask_BT),
            "mismatch_kl": _mean(behaviour_kl_BT, fresh_BT),
            "fresh_frac": _mean(fresh_BT, mask_BT),
            "is_weight": _mean(raw_BT, mask_BT),
            "is_weight_sq": _mean(raw_BT * raw_BT, mask_BT),
        }

    # The advantages.

    def shaped_scores(self, batch: AdvantageBatch) -> tuple[Tensor, dict[str, float]]:
        """Return each sample's score as it is learned [B], 0 for one without sampled tokens, and the group's figures.

        Where parts of a reward are placed on tokens, the whole is only divided by std. A mean taken off it or a clip
        would be charged to the last turn. Figures are means over the samples: "reward.shaped"; "reward.clipped", the
        share that the clip changed; "kl", the sum of log(pi_old / pi_ref) over tokens; and "groups.mixed", 1 where the
        learned scores differ.
        """
        present_B = has_tokens(batch.mask_BT)
        cut_B = torch.zeros_like(present_B) if batch.cut_B is None else batch.cut_B
        rewards_B = batch.rewards_B * self._cut_factor(batch)
        num_present = present_B.sum().clamp_min(1.0)
        metrics: dict[str, float] = {}
        if batch.placed_BT is not None:
            scores_B = rewards_B / self.shaping.std
        else:
            whole_B = self.shaping.normalised(rewards_B)
            scores_B = self.shaping.clipped(whole_B)
            if self.shaping.clip:
                metrics["reward.clipped"] = float(
                    masked((scores_B != whole_B).to(present_B), present_B).sum() / num_present
                )
        scores_B = masked(scores_B + self.shaping.penalties(batch.mask_BT.sum(1), cut_B), present_B)
        metrics["reward.shaped"] = float(scores_B.sum() / num_present)
        metrics["groups.mixed"] = float(has_contrast(scores_B[present_B > 0]))
        if batch.reference_BT is not None:
            kl_BT = masked(kl_estimate(batch.behaviour_BT, batch.reference_BT, "k1"), batch.mask_BT)
            metrics["kl"] = float(kl_BT.sum() / num_present)
        return scores_B, metrics

    def _cut_factor(self, batch: AdvantageBatch) -> Tensor:
        cut_B = torch.zeros_like(batch.rewards_B) if batch.cut_B is None else batch.cut_B
        return 1.0 - (1.0 - self.shaping.cut_factor) * cut_B

    def shaped_rewards(self, batch: AdvantageBatch, scores_B: Tensor) -> Tensor:
        """Return rewards per token [B, T]: the scores and, with kl.placement=reward, the penalty.

        What `placed_BT` gives to earlier tokens is divided by std as the score was, and taken off the last one's. So a
        sample's sum is its score either way: fifteen turns of reward 1 stay fifteen ones.
        """
        kl_BT = self._penalty(batch)
        if batch.placed_BT is None:
            return token_rewards(scores_B, batch.mask_BT, kl_BT, self.kl.coef)
        factor_B = self._cut_factor(batch)
        placed_BT = masked(factor_B[:, None] * batch.placed_BT / self.shaping.std, batch.mask_BT)
        return placed_BT + token_rewards(scores_B - placed_BT.sum(1), batch.mask_BT, kl_BT, self.kl.coef)

    def _penalty(self, batch: AdvantageBatch) -> Tensor | None:
        """Return the KL of each token that is taken off its reward; None where none is."""
        if self.kl.placement != "reward" or self.kl.coef == 0:
            return None
        if batch.reference_BT is None:
            raise _no_reference("coef", self.kl.coef)
        return kl_estimate(batch.behaviour_BT, batch.reference_BT, self.kl.estimator)

    def group_advantages(self, batch: AdvantageBatch, baseline: Callable[[Tensor, Tensor], Tensor]) -> Advantages:
        """Give each token of a sample the same advantage: `baseline` of the samples' whole rewards.

        A sample's whole reward is its shaped score less, with kl.placement=reward, its tokens' penalties. It is not
        added up from what its tokens earned: rounding would tell apart what was earned at different places.
        """
        self.require_group(batch)
        scores_B, metrics = self.shaped_scores(batch)
        rewards_B = scores_B.double()
        if (kl_BT := self._penalty(batch)) is not None:
            rewards_B = rewards_B - self.kl.coef * masked(kl_BT, batch.mask_BT).double().sum(1)
        advantages_B = baseline(rewards_B, has_tokens(batch.mask_BT)).to(batch.rewards_B.dtype)
        advantages_BT = masked(advantages_B[:, None].expand_as(batch.mask_BT), batch.mask_BT)
        return Advantages(advantages_BT, None, metrics)

    def require_group(self, batch: AdvantageBatch) -> None:
        """Refuse a group too small to be compared within.

        Raises:
            ConfigError: the group has one sample.
        """
        num_samples = len(batch.rewards_B)
        if num_samples < 2:
            what = f"{type(self).__name__} compares the samples of a group, but this group has {num_samples}"
            raise ConfigError("generator.group_size", what, "set it to 2 or more")


def _ages(batch: LossBatch) -> Tensor:
    """Return how many versions ago each token was sampled; 0 where it is not said."""
    return batch.columns.get("age", torch.zeros_like(batch.mask_BT))


def _mean(values_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over sampled tokens and their number."""
    return masked(values_BT, mask_BT).sum(), mask_BT.sum()


def _no_reference(setting: str, value: float) -> ConfigError:
    what = f"{value} needs the reference's log-probs, which this graph does not give"
    return ConfigError(f"algorithm.kl.{setting}", what, "add a reference node or set it to 0")
