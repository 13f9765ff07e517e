"""What the learner does to one step's groups before and after the engine: columns, settings, figures.

Invariant: nothing here depends on when a group arrived, only on the groups of the step and the learner's version.

Tests: tests/unit/stages/test_step.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from flowrl.errors import ConfigError
from flowrl.messages import Buffer, Samples, replays_of
from flowrl.stages.estimation import is_cut
from flowrl.stages.tokens import mask_of, token_group, with_constant

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flowrl.algorithms.base import Objective
    from flowrl.config import Select
    from flowrl.engines.base import TokenGroup, TrainingEngine
    from flowrl.messages import FloatArray, Rollouts, Sample, Scored


def step_groups(objective: Objective, batch: Sequence[Scored], version: int) -> list[TokenGroup]:
    """Return the token groups of the step that policy `version` takes, with each token's age in versions.

    Advantages are whitened over all learned tokens of the step where an algorithm says so.
    """
    from flowrl.algorithms.base import Algorithm

    groups = with_reference_or_without(
        [learned_group(objective, group, age=[ages(sample, version) for sample in group.samples]) for group in batch]
    )
    if not isinstance(objective, Algorithm) or not objective.whitens:
        return groups
    import torch

    from flowrl.algorithms.functional import whiten

    rows = [torch.from_numpy(row.numpy().copy()) for group in groups for row in group.columns["advantages"]]
    masks = [
        torch.from_numpy(mask.numpy().copy())
        for group, learned in zip(batch, groups, strict=True)
        for mask in learned.columns.get("mask") or [mask_of(sample) for sample in group.samples]
    ]
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


def learned_group(objective: Objective, group: Rollouts, **columns: list[Buffer]) -> TokenGroup:
    """Return a group's tokens and columns, with nothing to learn in answers that the objective leaves out."""
    if objective.leaves_out_cut:
        columns["mask"] = [
            Buffer.floats([0.0] * len(sample.token_ids)) if is_cut(sample) else mask_of(sample)
            for sample in group.samples
        ]
    return token_group(group, **columns)


def with_reference_or_without(groups: list[TokenGroup]) -> list[TokenGroup]:
    """Return a step's groups without the reference's column where some have none, for then no loss uses it."""
    if all("reference" in group.columns for group in groups):
        return groups
    return [
        msgspec.structs.replace(
            group, columns={name: rows for name, rows in group.columns.items() if name != "reference"}
        )
        for group in groups
    ]


def check_divides(num_parts: int, num_groups: int, where: str) -> None:
    """Insist on minibatches of equal size.

    Raises:
        ConfigError: there are more minibatches than groups, or they are not of one size.
    """
    if num_groups % num_parts:
        what = f"{num_parts} minibatches do not divide {num_groups} groups_per_step"
        raise ConfigError(where, what, "choose a divisor")


def minibatches(num_groups: int, num_parts: int, epochs: int, *, seed: tuple[int, int]) -> Iterator[list[int]]:
    """Yield the places of the groups of each update, in every epoch each group once, dealt anew from the seed.

    `seed` is the node's and the version. A step of one minibatch keeps the prompts' order.
    """
    import numpy as np

    for epoch in range(epochs):
        order = [*range(num_groups)]
        if num_parts > 1:
            order = np.random.default_rng([*seed, epoch]).permutation(num_groups).tolist()
        for part in range(num_parts):
            yield sorted(order[num_groups * part // num_parts : num_groups * (part + 1) // num_parts])


def with_drift_limit(
    objective: Objective, groups: Sequence[TokenGroup], rows: Sequence[Sequence[FloatArray]]
) -> list[TokenGroup]:
    """Return an update's groups with the limit that their drift sets, from their log-probs before the update."""
    import numpy as np
    import torch

    drifts: list[FloatArray] = []
    worths: list[FloatArray] = []
    for group, rows_of_group in zip(groups, rows, strict=True):
        for place, row in enumerate(rows_of_group):
            kept = (
                group.columns["mask"][place].numpy() > 0 if "mask" in group.columns else np.ones(len(row), dtype=bool)
            )
            drifts.append((row - group.columns["behaviour"][place].numpy())[kept])
            worths.append(group.columns["advantages"][place].numpy()[kept])
    limit = objective.drift_limit(torch.from_numpy(np.concatenate(drifts)), torch.from_numpy(np.concatenate(worths)))
    return [with_constant(group, "drift_limit", limit) for group in groups]


def ages(sample: Sample, version: int) -> Buffer:
    """Return how many versions ago each token was sampled; 0 for an environment's tokens."""
    import numpy as np

    ages_T = np.zeros(len(sample.token_ids), dtype=np.float32)
    for span in sample.versions:
        ages_T[span.start : span.end] = version - span.version
    return Buffer.floats(ages_T)


def with_proximal(groups: Sequence[TokenGroup], rows: Sequence[Sequence[FloatArray]]) -> list[TokenGroup]:
    """Return the groups with the log-probs of the policy at the start of the step.

    Without this column a loss takes the log-probs that it is given, which are the same in a step's only update.
    """
    return [
        msgspec.structs.replace(group, columns={**group.columns, "proximal": [Buffer.floats(row) for row in found]})
        for group, found in zip(groups, rows, strict=True)
    ]


def step_choice(choice: Select, objective: Objective, batch: Sequence[Scored]) -> Select:
    """Return the objective as the step's advantages were found with it, where its settings change from step to step."""
    from flowrl.algorithms.base import Algorithm

    if not isinstance(objective, Algorithm) or not objective.adapting:
        return choice
    return choice.changed({path: batch[0].metrics[path] for path in objective.adapting})


def mean_metrics(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over those of a step's updates that have it, of `lr` the last.

    Of `mismatch_kl` it is the first, and none where that had no token of the learner's version: only then has the
    policy not moved since, and the engines alone differ.
    """
    found: dict[str, list[float]] = {}
    for update in updates:
        for name, value in update.items():
            found.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in found.items()}
    if "mismatch_kl" in means:
        del means["mismatch_kl"]
        if updates[0].get("fresh_frac", 1.0) and "mismatch_kl" in updates[0]:
            means["mismatch_kl"] = updates[0]["mismatch_kl"]
    return means | {name: updates[-1][name] for name in ("lr",) if name in means}


def derived(figures: dict[str, float]) -> dict[str, float]:
    """Return what follows from a step's metrics, without those that were measured on no token.

    ess: the effective sample size, mean(w)^2 / mean(w^2) of the importance weights before any cap.
    """
    found = dict(figures)
    if found.get("is_weight_sq"):
        found["ess"] = found["is_weight"] ** 2 / found["is_weight_sq"]
    if found.get("fresh_frac") == 0.0:
        found.pop("mismatch_kl", None)
    return found


def step_metrics(batch: Sequence[Scored], staleness: Sequence[int]) -> dict[str, float]:
    """Return a step's figures that do not need the engine.

    reward.* are as the scorers gave them; `reward.shaped` and `groups.mixed`, where an algorithm gives them, are of the
    scores that are learned. `groups.idle` is the share of groups in which every advantage is 0, before any whitening.
    `sampled_entropy` estimates the entropy of the policies that sampled, from their own log-probs, nats a token.
    """
    import numpy as np

    rewards = np.array([reward for group in batch for reward in group.rewards])
    lengths = np.array([sample.num_sampled for group in batch for sample in group.samples])
    cut = np.array([is_cut(sample) for group in batch for sample in group.samples])
    sampled = [sample for group in batch if group.generator for sample in group.samples]
    surprise = -sum(float(sample.logprobs.numpy().sum(dtype=np.float64)) for sample in sampled)
    figures = {
        "reward.mean": float(rewards.mean()),
        "reward.std": float(rewards.std()),
        "groups.mixed": float(np.mean([len(set(group.rewards)) > 1 for group in batch])),
        "response_tokens.mean": float(lengths.mean()),
        "response_tokens.cut": float(cut.mean()),
        "sampled_entropy": surprise / max(1, sum(sample.num_sampled for sample in sampled)),
        "tokens": float(lengths.sum()),
        "samples": float(len(rewards)),
        "staleness.mean": float(np.mean(staleness)),
        "staleness.max": float(max(staleness)),
    }
    if given_up := sum(group.num_given_up for group in batch):
        figures["samples.given_up"] = given_up / (given_up + len(rewards))
    worths = [group.advantages for group in batch if isinstance(group, Samples)]
    if worths:
        figures["groups.idle"] = float(np.mean([not any(row.numpy().any() for row in rows) for rows in worths]))
    for name in batch[0].scores:
        figures[f"score.{name}"] = float(np.mean([score for group in batch for score in group.scores[name]]))
    for name in dict.fromkeys(name for group in batch for name in group.metrics):  # some are of some groups only
        figures[name] = float(np.mean([group.metrics[name] for group in batch if name in group.metrics]))
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
    """Return how far the learner's log-probs are from the generators', over tokens of the learner's own version.

    Nothing where no generator sampled any of the batch: a pair that was given brings no log-probs.
    """
    import numpy as np

    batch = [group for group in batch if group.generator]
    if not batch:
        return {}
    rows = engine.score([token_group(group) for group in batch])
    gaps = [
        np.abs(ours - sample.logprobs.numpy())[mask_of(sample).numpy() > 0]
        for group, ours_of_group in zip(batch, rows, strict=True)
        for ours, sample in zip(ours_of_group, group.samples, strict=True)
    ]
    flat = np.concatenate(gaps)
    return {"logprob_gap.mean": float(flat.mean()), "logprob_gap.max": float(flat.max())}
