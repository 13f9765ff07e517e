"""From a sample's score to rewards per token: normalisation, clip, length penalty, KL penalty; and group filtering.

Shapes: B samples of one prompt, T response tokens, `mask_BT` 1 on the tokens the policy sampled.

Invariants:
- a score that no environment placed lies on the last sampled token alone, the KL penalty on every sampled token
  (OpenRLHF, 2405.11143, section 3.3);
- nothing is clipped unless asked for.

What follows the run (`Shaping.running`, the adaptive KL coefficient) changes between steps only, by pure functions of
the step before. Called by the algorithms' `advantages`, `keeps` and `adapted`.

Tests: tests/unit/algorithms/test_shaping.py
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from flowrl.algorithms.functional import masked
from flowrl.config import Config, Meta, changed
from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

MIN_STD = 1e-6  # scores that differ less are equal, and there is nothing to divide by


class Shaping(Config):
    """What happens to a sample's score before it is learned, in the order of the fields."""

    mean: float = 0.0  # of scores like these, subtracted from each
    std: Annotated[float, Meta(gt=0)] = 1.0  # of the same; the score is divided by it
    # Mean and std follow the run: a step's scores are normalised by those of all steps before it.
    running: bool = False
    num_scores: Annotated[int, Meta(ge=0)] = 0  # scores that mean and std stand for when a running one begins
    clip: Annotated[float, Meta(ge=0)] = 0.0  # scores beyond +- this are clipped, to go with mean and std; 0: none
    # of an answer that was cut before its end: its score is multiplied by the factor (OpenRLHF), which makes one below
    # 0 greater, less the penalty (TRL)
    cut_factor: Annotated[float, Meta(ge=0, le=1)] = 1.0
    cut_penalty: Annotated[float, Meta(ge=0)] = 0.0
    max_tokens: Annotated[int, Meta(ge=0)] = 0  # where the length penalty is complete; 0: sampling.max_tokens
    overlong_buffer: Annotated[int, Meta(ge=0)] = 0  # tokens before max_tokens over which it grows; 0: none
    overlong_factor: Annotated[float, Meta(ge=0)] = 1.0  # the complete length penalty

    def __post_init__(self) -> None:
        if 0 < self.max_tokens < self.overlong_buffer:
            what = f"shaping.overlong_buffer {self.overlong_buffer} is longer than max_tokens {self.max_tokens}"
            raise ValueError(f"{what}; lower it")

    def said_idle(self, names: Sequence[str], why: str) -> list[str]:
        """Return a line that those of the settings which were changed have no effect; none where none was."""
        found = [f"shaping.{name}" for name in changed(self, names)]
        return [f"algorithm.{', '.join(found)}: no effect{why}"] if found else []

    def idle_settings(self, algorithm: str, *, centred_by: str, divided_by: str) -> list[str]:
        """Return which settings have no effect, and why, where an algorithm takes something off all scores, and divides
        all rewards by something, or "" for nothing.
        """
        found: list[str] = []
        if not self.overlong_buffer:
            found += self.said_idle(("max_tokens", "overlong_factor"), " while shaping.overlong_buffer is 0")
        if not self.running:
            found += self.said_idle(("num_scores",), " without shaping.running=true")
        is_centred = bool(centred_by) and not self.clip
        is_divided = bool(divided_by) and not (self.clip or self.cut_penalty or self.overlong_buffer)
        off, by = f"{algorithm} takes off {centred_by}", f"divides by {divided_by}"
        if is_divided:
            found += self.said_idle(("std",), f", for {algorithm} {by}")
        if is_centred and (is_divided or not (self.running and self.num_scores)):
            found += self.said_idle(("mean",), f", for {off}")
        if is_centred and is_divided and self.running:
            found += self.said_idle(("running", "num_scores"), f", for {off} and {by}")
        return found

    def normalised(self, rewards_B: Tensor) -> Tensor:
        """Return (R - mean) / std; Shaping(mean=1.0, std=2.0) makes 0.5 of a score of 2.0."""
        return (rewards_B - self.mean) / self.std

    def clipped(self, scores_B: Tensor) -> Tensor:
        """Return the scores within +-clip, or as they are."""
        return scores_B.clamp(-self.clip, self.clip) if self.clip else scores_B

    def penalties(self, lengths_B: Tensor, cut_B: Tensor) -> Tensor:
        """Return what is added to each score for its answer's length, in sampled tokens, and for a missing end."""
        penalties_B = -self.cut_penalty * cut_B
        if not self.overlong_buffer:
            return penalties_B
        if not self.max_tokens:
            what = f"is {self.overlong_buffer}, but max_tokens is 0 and nothing has filled it in"
            raise ConfigError("algorithm.shaping.overlong_buffer", what, "set shaping.max_tokens")
        return penalties_B + overlong_penalty(
            lengths_B, max_tokens=self.max_tokens, buffer=self.overlong_buffer, factor=self.overlong_factor
        )

    def followed(self, rewards_B: Tensor) -> dict[str, float]:
        """Return mean, std and num_scores once these scores are among them; the population's std."""
        mean, std, num_scores = merged_moments(self.mean, self.std, self.num_scores, rewards_B)
        return {"mean": mean, "std": std if std > MIN_STD else 1.0, "num_scores": num_scores}


def merged_moments(mean: float, std: float, count: int, values_B: Tensor) -> tuple[float, float, int]:
    """Return mean, population std and count of `count` earlier values and these together.

    Source: Chan, Golub and LeVeque 1979, equation 1.5.

    >>> merged_moments(1.0, 0.0, 1, torch.tensor([3.0]))
    (2.0, 1.0, 2)
    """
    values_B = values_B.double()
    num = len(values_B)
    total = count + num
    fresh_mean = float(values_B.mean())
    squares = count * std**2 + float(((values_B - fresh_mean) ** 2).sum())
    squares += (fresh_mean - mean) ** 2 * count * num / total
    return mean + (fresh_mean - mean) * num / total, math.sqrt(squares / total), total


def overlong_penalty(lengths_B: Tensor, *, max_tokens: int, buffer: int, factor: float) -> Tensor:
    """Return -min(length - (max_tokens - buffer), buffer) / buffer * factor where positive lengths exceed, else 0.

    Source: DAPO (2503.14476), section 3.4, equation 13 (factor 1).

    >>> overlong_penalty(torch.tensor([6.0, 9.0, 12.0]), max_tokens=10, buffer=4, factor=1.0).tolist()
    [0.0, -0.75, -1.0]
    """
    excess_B = (lengths_B - (max_tokens - buffer)).clamp(0.0, float(buffer))
    return 0.0 - excess_B / buffer * factor


def last_token(mask_BT: Tensor) -> Tensor:
    """Return a mask of each sequence's last sampled token; empty where a sequence has none.

    >>> last_token(torch.tensor([[1.0, 0.0, 1.0, 0.0]])).tolist()
    [[0.0, 0.0, 1.0, 0.0]]
    """
    is_sampled_BT = mask_BT > 0
    later_BT = is_sampled_BT.flip(1).cumsum(1).flip(1)
    return ((later_BT == 1) & is_sampled_BT).to(mask_BT.dtype)


def token_rewards(scores_B: Tensor, mask_BT: Tensor, kl_BT: Tensor | None, coef: float) -> Tensor:
    """Return r_t = -coef * kl_t, plus the score on the last sampled token; [B, T].

    Source: Ziegler 2019 (1909.08593), section 2; InstructGPT (2203.02155), section 3.5.

    >>> token_rewards(torch.tensor([1.0]), torch.ones(1, 2), torch.tensor([[0.5, 2.0]]), 0.5).tolist()
    [[-0.25, 0.0]]
    """
    rewards_BT = masked(scores_B[:, None].expand_as(mask_BT), last_token(mask_BT))
    return rewards_BT if kl_BT is None else masked(rewards_BT - coef * kl_BT, mask_BT)


def has_contrast(rewards_B: Tensor, mean_range: tuple[float, float] | None = None) -> bool:
    """Return whether a group can teach: its rewards differ and, if given, their mean lies strictly in the range.

    Source: DAPO (2503.14476), section 3.2, equation 11 (dynamic sampling).

    >>> has_contrast(torch.tensor([1.0, 1.0])), has_contrast(torch.tensor([1.0, 0.0]), (0.0, 1.0))
    (False, True)
    """
    if len(rewards_B) == 0 or bool((rewards_B == rewards_B[0]).all()):
        return False
    return mean_range is None or mean_range[0] < float(rewards_B.mean()) < mean_range[1]


def adapted_coef(coef: float, *, kl: float, target: float, num_samples: int, horizon: int) -> float:
    """Return the KL coefficient for the next step: coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon).

    Source: Ziegler 2019 (1909.08593), section 2.2, with the horizon of its published code.

    >>> adapted_coef(0.1, kl=9.0, target=6.0, num_samples=100, horizon=1000)
    0.10200000000000001
    """
    return coef * (1.0 + min(max(kl / target - 1.0, -0.2), 0.2) * num_samples / horizon)
