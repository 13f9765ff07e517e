"""Rewards that were earned before the end reach the tokens that earned them, by hand; an environment's tokens none."""

from __future__ import annotations

from typing import Any

import pytest

from flowrl.config import Select
from flowrl.messages import Buffer, Referenced, Sample, VersionSpan
from flowrl.stages.estimation import group_fields, load_algorithm
from flowrl.stages.step import step_groups, step_metrics
from flowrl.stages.tokens import token_group

MASK = [1.0, 1.0, 0.0, 1.0]


def group(placed: list[list[float]] | None, scores: list[float]) -> Referenced:
    """Two samples of four tokens, the third an environment's."""
    sample = Sample(
        token_ids=Buffer.ints([5, 6, 7, 8]),
        logprobs=Buffer.floats([-1.0, -1.0, 0.0, -1.0]),
        versions=[VersionSpan(0, 0, 2), VersionSpan(1, 3, 4)],
        finish="stop",
        text="",
        mask=Buffer.floats(MASK),
    )
    turns = None if placed is None else [Buffer.floats(row) for row in placed]
    return Referenced(
        group_id=0, token_ids=Buffer.ints([1]), columns={}, num_samples=2, seed=0, samples=[sample] * 2,
        generator="agent.0", scores={"game": scores}, placed=turns,
        ref_logprobs=[Buffer.floats([-1.0, -1.0, 9.0, -1.0])] * 2,
    )  # fmt: skip


def credited(use: str, given: Referenced, values: Any = None, **options: Any) -> dict[str, Any]:
    choice = Select(use=f"flowrl.algorithms.{use}", options=options)
    algorithm = load_algorithm(choice, group_size=2, has_critic=values is not None)
    return group_fields(algorithm, given, values)


PLACED = group([[0.0, 0.5, 0.0, 1.0], [0.0, 0.0, 0.0, 2.0]], [1.5, 2.0])


def test_a_return_counts_what_is_earned_from_its_token_on():
    rows = credited("reinforce_pp:ReinforcePP", PLACED)["advantages"]
    assert [row.tolist() for row in rows] == [[1.5, 1.5, 0.0, 1.0], [2.0, 2.0, 0.0, 2.0]]


def test_what_is_not_placed_is_earned_at_the_end():
    rows = credited("reinforce_pp:ReinforcePP", group([[0.0, 0.5, 0.0, 0.0]] * 2, [1.5, 2.0]))["advantages"]
    assert [row.tolist() for row in rows] == [[1.5, 1.5, 0.0, 1.0], [2.0, 2.0, 0.0, 1.5]]
    rows = credited("reinforce_pp:ReinforcePP", group(None, [1.5, 2.0]))["advantages"]
    assert [row.tolist() for row in rows] == [[1.5, 1.5, 0.0, 1.5], [2.0, 2.0, 0.0, 2.0]]


def test_placed_rewards_are_scaled_and_neither_clipped_nor_shifted():
    shaping = {"shaping": {"clip": 1.25, "std": 2.0, "mean": 7.0}}
    row = credited("reinforce_pp:ReinforcePP", PLACED, **shaping)["advantages"][0].tolist()
    assert row == [0.75, 0.75, 0.0, 0.5]


def test_gae_skips_the_environment_and_sees_each_turn_s_reward():
    """gamma 1, lam 0: A_t = r_t + V_next - V_t with the environment's token left out (its value is 99)."""
    import numpy as np

    values = [np.array([1.0, 2.0, 99.0, 4.0], dtype=np.float32)] * 2
    found = credited("ppo:PPO", PLACED, values, lam=0.0, gamma=1.0)
    assert found["advantages"][0].tolist() == pytest.approx([1.0, 2.5, 0.0, -3.0])
    assert found["returns"][0].tolist() == pytest.approx([2.0, 4.5, 0.0, 1.0])


def test_a_group_baseline_goes_by_the_whole_reward():
    with_places = credited("rloo:RLOO", PLACED)["advantages"]
    without = credited("rloo:RLOO", group(None, [1.5, 2.0]))["advantages"]
    assert [row.tolist() for row in with_places] == [row.tolist() for row in without]
    assert without[0].tolist() == pytest.approx([-0.5, -0.5, 0.0, -0.5])


def test_the_learner_whitens_over_the_policy_s_tokens_and_masks_the_others():
    from flowrl.messages import Samples, extend

    use = "reinforce_pp:ReinforcePP"
    samples = extend(Samples, PLACED, **credited(use, PLACED))
    algorithm = load_algorithm(Select(use=f"flowrl.algorithms.{use}"), group_size=2, has_critic=False)
    (whitened,) = step_groups(algorithm, [samples], 1)
    advantages = [value for row in whitened.columns["advantages"] for value in row.tolist()]
    learned = [a for a, m in zip(advantages, MASK * 2, strict=True) if m]
    assert sum(learned) == pytest.approx(0.0, abs=1e-6)
    assert sum(a * a for a in learned) / 6 == pytest.approx(1.0, abs=1e-6)
    assert [row.tolist() for row in whitened.columns["mask"]] == [MASK, MASK]
    figures = step_metrics([samples], [0])
    assert (figures["tokens"], figures["response_tokens.mean"]) == (6.0, 3.0)


def test_only_groups_with_an_environment_have_a_mask():
    import msgspec

    plain = [msgspec.structs.replace(sample, mask=None) for sample in PLACED.samples]
    assert "mask" not in token_group(msgspec.structs.replace(PLACED, samples=plain)).columns
    mixed = token_group(msgspec.structs.replace(PLACED, samples=[plain[0], PLACED.samples[1]]))
    assert [row.tolist() for row in mixed.columns["mask"]] == [[1.0] * 4, MASK]
