"""What an algorithm is: pure functions of tensors, `credit` and `loss`, held in a frozen Config.

Shapes: B sequences of one batch, T response tokens (right-padded); `mask_BT` is 1 on the tokens the policy sampled.
Invariants: nothing here reads a clock, a file, a random generator or a message; what stands under mask 0 never
changes a result; a loss returns a sum and a count so that packing, padding, micro-batches and ranks cannot change
what the engine divides once (law 7). Credit stages call `credit`, training engines call `loss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from flowrl.config import Config

if TYPE_CHECKING:
    from torch import Tensor


class CreditBatch(NamedTuple):
    """One group: B samples of one prompt, all float32."""

    rewards_B: Tensor
    mask_BT: Tensor
    behaviour_BT: Tensor  # log-probs of the sampling policy
    reference_BT: Tensor | None = None  # log-probs of the frozen reference
    values_BT: Tensor | None = None


class Credited(NamedTuple):
    """What each token is worth; advantages are not yet whitened over the step."""

    advantages_BT: Tensor
    returns_BT: Tensor | None
    metrics: dict[str, float]


class LossBatch(NamedTuple):
    """A micro-batch; `logprobs_BT` and `entropy_BT` carry gradient, the rest does not."""

    logprobs_BT: Tensor  # the policy's log-probs; for a value objective, the values
    mask_BT: Tensor
    columns: dict[str, Tensor]  # name -> [B, T]: behaviour, proximal, reference, advantages, values, returns
    entropy_BT: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """A sum and what to divide it by, both over this micro-batch; metrics likewise as (sum, count)."""

    total: Tensor
    count: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]


class Objective(Config):
    """Something to minimise over a micro-batch."""

    @property
    def needs_entropy(self) -> bool:
        """Return whether `entropy_BT` must be given."""
        return False

    def loss(self, batch: LossBatch) -> Loss:
        """Return the loss of a micro-batch as a sum and a count."""
        raise NotImplementedError


class Algorithm(Objective):
    """An online algorithm: how tokens are credited and what the policy minimises."""

    @property
    def needs_critic(self) -> bool:
        """Return whether `credit` needs values."""
        return False

    @property
    def needs_group(self) -> bool:
        """Return whether `credit` compares the samples of a group, so that one sample is not enough."""
        return False

    @property
    def whitens(self) -> bool:
        """Return whether advantages are whitened over every token of the step before the loss."""
        return False

    def keeps(self, rewards_B: Tensor) -> bool:
        """Return whether a group with these rewards is worth learning; the others are filtered."""
        return True

    def credit(self, batch: CreditBatch) -> Credited:
        """Return what each token of one group is worth."""
        raise NotImplementedError
