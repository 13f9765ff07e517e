"""The proof that a generator serves the weights it was sent: log-probs of a fixed sequence.

The learner scores the sequence with the weights it publishes, the generator with those it loaded, both at temperature
1; the mean absolute difference must stay below what the two implementations differ by under equal weights. That depends
on the model, the dtype and the kernels. The first version that an engine proves is held against a bound for all models
of the dtype; later ones against MARGIN times what the first gave. It catches what a digest cannot: bytes that arrived
but are not the ones in use. Called by generation engines after every update.

Tests: tests/unit/engines/test_canary.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from flowrl.errors import ProofError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.messages import Canary


MARGIN = 3.0  # SmolLM2-135M in bfloat16 gives 0.061 to 0.095 nats under equal weights, a stale or wrong layer 0.5
LEAST = 0.1  # of the dtype's bound, counts as the first gap where that was smaller: nearly flat logits hardly round


class Gap(msgspec.Struct, frozen=True):
    """How far two scorings of the canary lie apart, in nats."""

    mean: float
    max: float
    allowed: float = float("nan")  # mean


NO_CANARY = Gap(float("nan"), float("nan"))


def gap_of(canary: Canary, logprobs: Sequence[float]) -> Gap:
    """Return how far log-probs lie apart from the learner's; of another number of them, infinitely far."""
    expected = canary.logprobs.numpy().astype(np.float64)
    found = np.asarray(logprobs, dtype=np.float64)
    if found.shape != expected.shape:
        return Gap(float("inf"), float("inf"))
    apart = np.abs(found - expected)
    return Gap(float(apart.mean()), float(apart.max()))


def compare(canary: Canary, logprobs: Sequence[float], *, version: int, where: str, first: Gap | None = None) -> Gap:
    """Return the gap between the learner's log-probs and these; `first` is that of the first version proved.

    Raises:
        ProofError: the mean gap is above what is allowed, is not a number, or the lengths differ.
    """
    if len(logprobs) != len(canary.logprobs):
        what = f"the canary of version {version} has {len(canary.logprobs)} log-probs, the engine gave {len(logprobs)}"
        raise ProofError(where, what)
    allowed, why = canary.max_mean_gap, ""
    if first is not None:
        allowed = MARGIN * max(first.mean, LEAST * canary.max_mean_gap)
        why = f" ({MARGIN:g} times the first version's, which was {first.mean:.3g})"
    gap = msgspec.structs.replace(gap_of(canary, logprobs), allowed=allowed)
    if not gap.mean <= allowed:  # so written that NaN fails
        raise ProofError(
            where,
            f"version {version} was loaded but its canary differs from the learner's by {gap.mean:.3g} nats on "
            f"average (max {gap.max:.3g}), {allowed:.3g} are allowed{why}",
            "this generator does not serve the weights it was sent and must be restarted",
        )
    return gap
