"""The proof that a generator serves the weights it was sent: log-probs of a fixed sequence.

The learner scores the sequence with the weights it publishes, the generator with those it loaded, both at temperature
1; the mean absolute difference must stay below what the two implementations differ by under equal weights. It catches
what a digest cannot: bytes that arrived but are not the ones in use. Called by generation engines after every update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from flowrl.errors import ProofError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.messages import Canary


class Gap(msgspec.Struct, frozen=True):
    """How far two scorings of the canary lie apart, in nats."""

    mean: float
    max: float


NO_CANARY = Gap(float("nan"), float("nan"))


def gap_of(canary: Canary, logprobs: Sequence[float]) -> Gap:
    """Return how far log-probs lie apart from the learner's; of another number of them, infinitely far."""
    expected = canary.logprobs.numpy().astype(np.float64)
    found = np.asarray(logprobs, dtype=np.float64)
    if found.shape != expected.shape:
        return Gap(float("inf"), float("inf"))
    apart = np.abs(found - expected)
    return Gap(float(apart.mean()), float(apart.max()))


def compare(canary: Canary, logprobs: Sequence[float], *, version: int, where: str) -> Gap:
    """Return the gap between the learner's log-probs and these.

    Raises:
        ProofError: the mean gap is above `max_mean_gap`, is not a number, or the lengths differ.
    """
    if len(logprobs) != len(canary.logprobs):
        what = f"the canary of version {version} has {len(canary.logprobs)} log-probs, the engine gave {len(logprobs)}"
        raise ProofError(where, what)
    gap = gap_of(canary, logprobs)
    if not gap.mean <= canary.max_mean_gap:  # so written that NaN fails
        raise ProofError(
            where,
            f"version {version} was loaded but its canary differs from the learner's by {gap.mean:.3g} nats on "
            f"average (max {gap.max:.3g}), {canary.max_mean_gap:.3g} are allowed",
            "this generator does not serve the weights it was sent and must be restarted",
        )
    return gap
