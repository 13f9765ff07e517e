"""What a recorded sample says of its tokens besides their ids; for the page and `flowrl inspect`."""

from __future__ import annotations

import math
from typing import Any

ENVIRONMENT = -1  # the version of tokens that no policy sampled
LARGEST = 50.0  # nats: beyond, a ratio is only said to be huge


def token_ratios(row: dict[str, Any]) -> list[float | None]:
    """Return each token's importance ratio, learner over generator, None where the learner's part is not recorded.

    Log-probs of -1.0 and -2.0 make exp(1) = 2.718.
    """
    learner = row.get("learner_logprobs")
    if learner is None:
        return [None] * len(row["token_ids"])
    return [
        None if version == ENVIRONMENT else math.exp(min(ours - theirs, LARGEST))
        for ours, theirs, version in zip(learner, row["logprobs"], row["token_versions"], strict=True)
    ]
