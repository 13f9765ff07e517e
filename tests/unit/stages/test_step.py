"""What the learner makes of a step's groups: ages, proximal columns, changed settings, figures."""

from __future__ import annotations

import pytest

from flowrl.algorithms.ppo import PPO
from flowrl.config import Select
from flowrl.engines.base import TokenGroup
from flowrl.messages import Buffer, Sample, VersionSpan
from flowrl.stages.step import ages, derived, mean_metrics, step_choice, with_proximal
from tests.unit.stages.test_credit_steps import ADAPTIVE, adaptive, group


def test_a_token_is_as_old_as_the_versions_published_since():
    sample = Sample(
        token_ids=Buffer.ints([1, 2, 3, 4]),
        logprobs=Buffer.floats([0.0] * 4),
        versions=[VersionSpan(3, 0, 1), VersionSpan(5, 2, 4)],  # the second token is an environment's
        finish="stop",
        text="",
    )
    assert ages(sample, 5).tolist() == [2.0, 0.0, 0.0, 0.0]


def test_the_proximal_policy_is_recomputed_or_the_one_that_sampled():
    behaviour = [Buffer.floats([-1.0, -2.0])]
    groups = [
        TokenGroup(prompt_ids=Buffer.ints([1]), responses=[Buffer.ints([2, 3])], columns={"behaviour": behaviour})
    ]
    recomputed = with_proximal(groups, [[Buffer.floats([-3.0, -4.0]).numpy()]])
    assert recomputed[0].columns["proximal"][0].tolist() == [-3.0, -4.0]
    assert with_proximal(groups, None)[0].columns["proximal"] is behaviour
    assert "proximal" not in groups[0].columns


def test_the_loss_takes_the_settings_that_its_groups_were_credited_with():
    crediting = adaptive()
    crediting.advantages(group(1, gap=4.0), None)
    crediting.end_step()
    fields = crediting.advantages(group(2, gap=0.0), None)
    learned = group(2, gap=0.0)
    batch = [learned.__class__(**{**{n: getattr(learned, n) for n in learned.__struct_fields__}, **{
        "metrics": fields["metrics"]}})]  # fmt: skip
    choice = step_choice(ADAPTIVE, ADAPTIVE.load("algorithm"), batch)
    assert choice.load("algorithm") == crediting.algorithm
    assert choice.load("algorithm").kl.coef == pytest.approx(0.5 * (1 + 0.2 * 2 / 20))
    fixed = Select(use="flowrl.algorithms.ppo:PPO")
    assert step_choice(fixed, PPO(), batch) is fixed


def test_a_steps_metrics_are_the_mean_of_its_updates_and_the_last_learning_rate():
    updates = [{"loss": 1.0, "lr": 0.1}, {"loss": 2.0, "lr": 0.3}]
    assert mean_metrics(updates) == {"loss": 1.5, "lr": 0.3}
    assert mean_metrics(updates[:1]) == updates[0]


def test_the_effective_sample_size_follows_from_the_weights():
    assert derived({"is_weight": 2.0, "is_weight_sq": 5.0})["ess"] == pytest.approx(0.8)
    assert derived({"is_weight": 3.0, "is_weight_sq": 27.0})["ess"] == pytest.approx(1 / 3)  # one token of three


def test_a_mismatch_that_was_measured_on_no_token_is_not_told():
    assert derived({"fresh_frac": 0.0, "mismatch_kl": 0.0}) == {"fresh_frac": 0.0}
    assert derived({"fresh_frac": 0.5, "mismatch_kl": 0.25})["mismatch_kl"] == 0.25
