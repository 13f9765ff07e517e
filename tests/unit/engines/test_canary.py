"""How far a generator's canary may lie from the learner's."""

from __future__ import annotations

import numpy as np
import pytest

from flowrl.engines.canary import compare
from flowrl.errors import ProofError
from flowrl.messages import Buffer, Canary

BFLOAT16 = 0.15


def proved(*gaps: float, bound: float = BFLOAT16):
    """Prove one version after another, each apart from the learner by a gap; returns the last one's."""
    first = found = None
    for version, gap in enumerate(gaps):
        canary = Canary(token_ids=Buffer.ints(range(5)), logprobs=Buffer.floats([-2.0] * 4), max_mean_gap=bound)
        theirs = np.array([-2.0 - gap, -2.0 + gap] * 2).tolist()
        found = compare(canary, theirs, version=version, where="generator", first=first)
        first = first or found
    return found


@pytest.mark.parametrize(
    ("gaps", "bound", "allowed"),
    [
        ((0.14,), BFLOAT16, 0.15),
        ((0.06, 0.17), BFLOAT16, 0.18),
        ((0.14, 0.4, 0.41), BFLOAT16, 0.42),
        ((0.0, 0.04), BFLOAT16, 0.045),
        ((2e-6, 2e-4), 1e-3, 3e-4),
    ],
)
def test_the_bound_follows_from_what_the_first_version_gave(gaps, bound, allowed):
    gap = proved(*gaps, bound=bound)
    assert gap is not None
    assert gap.allowed == pytest.approx(allowed, rel=1e-5)


@pytest.mark.parametrize(
    ("gaps", "bound", "said"),
    [
        ((0.16,), BFLOAT16, r"by 0.16 nats .*, 0.15 are allowed; this generator"),
        (
            (0.06, 0.09, 0.19),
            BFLOAT16,
            r"sion 2 .* 0.18 are allowed \(3 times the first version's, which was 0.06\)",
        ),
        ((0.0, 0.05), BFLOAT16, r"0.045 are allowed"),
        ((2e-6, 4e-4), 1e-3, r"0.0003 are allowed"),
        ((0.06, float("nan")), BFLOAT16, r"by nan nats"),
    ],
)
def test_a_version_further_apart_than_that_is_not_served(gaps, bound, said):
    with pytest.raises(ProofError, match=said):
        proved(*gaps, bound=bound)
