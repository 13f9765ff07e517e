"""What the learner does to one step's groups before and after the engine: columns, settings, figures.

Invariant: nothing here depends on when a group arrived, only on the groups of the step and the learner's version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from flowrl.messages import Buffer, replays_of
from flowrl.stages.tokens import mask_of, token_group

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.algorithms.base import Objective
    from flowrl.config import Select
    from flowrl.engines.base import TokenGroup, TrainingEngine
    from flowrl.messages import FloatArray, Rollouts, Sample, Scored


def step_groups(objective: Objective, batch: Sequence[Scored], version: int) -> list[TokenGroup]:
    """Return the token groups of the step that policy `version` takes, with each token's age in versions.

    Advantages are whitened over all tokens of the step where an algorithm says so.
    """
    from flowrl.algorithms.base import Algorithm

    groups = [token_group(group, age=[ages(sample, version) for sample in group.samples]) for group in batch]
    if not isinstance(objective, Algorithm) or not objective.whitens:
        return groups
    import torch

    from flowrl.algorithms.functional import whiten

    rows = [torch.from_numpy(row.numpy().copy()) for group in groups for row in group.columns["advantages"]]
    masks = [torch.from_numpy(mask_of(sample).numpy().copy()) for group in batch for sample in group.samples]
    whitened = iter(whiten(rows, masks))
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


def ages(sample: Sample, version: int) -> Buffer:
    """Return how many versions ago each token was sampled; 0 for an environment's tokens."""
    import numpy as np

    ages_T = np.zeros(len(sample.token_ids), dtype=np.float32)
    for span in sample.versions:
        ages_T[span.start : span.end] = version - span.version
    return Buffer.floats(ages_T)


def with_proximal(groups: Sequence[TokenGroup], rows: Sequence[Sequence[FloatArray]] | None) -> list[TokenGroup]:
    """Return the groups with the log-probs of the policy at the start of the step; None: those they were sampled with.

    Without this column an engine takes the log-probs of its own forward, which are the same in a step's first update.
    """
    columns = [
        group.columns["behaviour"] if rows is None else [Buffer.floats(row) for row in rows[place]]
        for place, group in enumerate(groups)
    ]
    return [
        msgspec.structs.replace(group, columns={**group.columns, "proximal": column})
        for group, column in zip(groups, columns, strict=True)
    ]


def step_choice(choice: Select, objective: Objective, batch: Sequence[Scored]) -> Select:
    """Return the objective as the step's groups were credited with it, where its settings change from step to step."""
    from flowrl.algorithms.base import Algorithm

    if not isinstance(objective, Algorithm) or not objective.adapting:
        return choice
    return choice.changed({path: batch[0].metrics[path] for path in objective.adapting})


def mean_metrics(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over a step's updates, and of `lr` the last."""
    means = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
    return means | {name: updates[-1][name] for name in ("lr",) if name in means}


def derived(figures: dict[str, float]) -> dict[str, float]:
    """Return what follows from a step's metrics, without those that were measured on no token.

    ess: the effective sample size, mean(w)^2 / mean(w^2) of the importance weights before any cap.
    """
    found = dict(figures)
    if found.get("is_weight_sq"):
        found["ess"] = found["is_weight"] ** 2 / found["is_weight_sq"]
    if found.get("fresh_frac") == 0.0:
        del found["mismatch_kl"]
    return found


def step_metrics(batch: Sequence[Scored], staleness: Sequence[int]) -> dict[str, float]:
    """Return a step's figures that do not need the engine."""
    import numpy as np

    rewards = np.array([reward for group in batch for reward in group.rewards])
    lengths = np.array([sample.num_sampled for group in batch for sample in group.samples])
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


def replay_metrics(batch: Sequence[Scored], version: int) -> dict[str, float]:
    """Return the figures of the groups that are learned again with these; none where there is no replay buffer."""
    ages_of = [version - replay.oldest_version for group in batch for replay in replays_of(group)]
    if not ages_of:
        return {}
    return {
        "replay.groups": float(len(ages_of)),
        "replay.age.mean": sum(ages_of) / len(ages_of),
        "replay.age.max": float(max(ages_of)),
    }


def logprob_gap(engine: TrainingEngine, batch: Sequence[Rollouts]) -> dict[str, float]:
    """Return how far the learner's log-probs are from the generators', over tokens of the learner's own version."""
    import numpy as np

    rows = engine.score([token_group(group) for group in batch])
    gaps = [
        np.abs(ours - sample.logprobs.numpy())[mask_of(sample).numpy() > 0]
        for group, ours_of_group in zip(batch, rows, strict=True)
        for ours, sample in zip(ours_of_group, group.samples, strict=True)
    ]
    flat = np.concatenate(gaps)
    return {"logprob_gap.mean": float(flat.mean()), "logprob_gap.max": float(flat.max())}
