"""What the learner does to one step's groups before and after the engine: whitening, figures, the log-prob gap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from flowrl.messages import Buffer
from flowrl.stages.tokens import token_group

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.algorithms.base import Algorithm
    from flowrl.engines.base import TokenGroup, TrainingEngine
    from flowrl.messages import Samples


def step_groups(algorithm: Algorithm, batch: Sequence[Samples]) -> list[TokenGroup]:
    """Return the token groups of a step; advantages whitened over all its tokens where the algorithm says so."""
    groups = [token_group(group) for group in batch]
    if not algorithm.whitens:
        return groups
    import torch

    from flowrl.algorithms.functional import whiten

    rows = [torch.from_numpy(row.numpy().copy()) for group in groups for row in group.columns["advantages"]]
    flat = torch.cat(rows)
    whitened = iter(torch.split(whiten(flat, torch.ones_like(flat)), [len(row) for row in rows]))
    return [
        msgspec.structs.replace(
            group,
            columns={
                **group.columns,
                "advantages": [Buffer.floats(next(whitened).numpy()) for _ in group.columns["advantages"]],
            },
        )
        for group in groups
    ]


def step_metrics(batch: Sequence[Samples], staleness: Sequence[int]) -> dict[str, float]:
    """Return a step's figures that do not need the engine."""
    import numpy as np

    rewards = np.array([reward for group in batch for reward in group.rewards])
    lengths = np.array([len(sample.token_ids) for group in batch for sample in group.samples])
    cut = np.array([sample.finish == "length" for group in batch for sample in group.samples])
    figures = {
        "reward.mean": float(rewards.mean()),
        "reward.std": float(rewards.std()),
        "groups.mixed": float(np.mean([len(set(group.rewards)) > 1 for group in batch])),
        "response_tokens.mean": float(lengths.mean()),
        "response_tokens.cut": float(cut.mean()),
        "tokens": float(lengths.sum()),
        "samples": float(len(rewards)),
        "staleness.mean": float(np.mean(staleness)),
        "staleness.max": float(max(staleness)),
    }
    for name in batch[0].scores:
        figures[f"score.{name}"] = float(np.mean([score for group in batch for score in group.scores[name]]))
    for name in batch[0].metrics:
        figures[name] = float(np.mean([group.metrics[name] for group in batch]))
    return figures


def logprob_gap(engine: TrainingEngine, batch: Sequence[Samples]) -> dict[str, float]:
    """Return how far the learner's log-probs are from the generators', over tokens of the learner's own version."""
    import numpy as np

    rows = engine.score([token_group(group) for group in batch])
    gaps = [
        np.abs(ours - sample.logprobs.numpy())
        for group, ours_of_group in zip(batch, rows, strict=True)
        for ours, sample in zip(ours_of_group, group.samples, strict=True)
    ]
    flat = np.concatenate(gaps)
    return {"logprob_gap.mean": float(flat.mean()), "logprob_gap.max": float(flat.max())}
