"""Crediting step by step: settings that follow the run depend on order alone, and a resumed run credits the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flowrl.algorithms.cispo import CISPO
from flowrl.algorithms.corrections import Correction
from flowrl.algorithms.grpo import GRPO
from flowrl.algorithms.policy import KL
from flowrl.algorithms.ppo import PPO
from flowrl.config import Select
from flowrl.errors import ConfigError
from flowrl.messages import Buffer, Referenced, Sample, VersionSpan
from flowrl.stages.credit import Crediting, advice, check_sampling, load_algorithm
from flowrl.stages.critic import critic_figures
from tests.support import slow_algorithms as slow

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.algorithms.base import Algorithm

STEP = 3
ADAPTIVE = Select(
    use="flowrl.algorithms.grpo:GRPO",
    options={"kl": {"coef": 0.5, "target": 2.0, "horizon": 20}, "shaping": {"running": True}},
)


def group(number: int, *, gap: float) -> Referenced:
    """Two samples of two tokens, each token `gap` nats likelier under the policy than under the reference."""
    sample = Sample(
        token_ids=Buffer.ints([5, 6]),
        logprobs=Buffer.floats([-1.0, -1.0]),
        versions=[VersionSpan(0, 0, 2)],
        finish="stop",
        text="",
    )
    return Referenced(
        group_id=number, token_ids=Buffer.ints([1]), columns={}, num_samples=2, seed=0, samples=[sample, sample],
        generator="generator.0", scores={"task": [float(number), 1.0]},
        ref_logprobs=[Buffer.floats([-1.0 - gap] * 2)] * 2,
    )  # fmt: skip


def run_steps(crediting: Crediting, first: int, last: int) -> list[dict[str, float]]:
    """Credit steps first .. last - 1 and return the figures of each step's last group."""
    found: list[dict[str, float]] = []
    for step in range(first, last):
        for place in range(STEP):
            fields = crediting.advantages(group(step * STEP + place, gap=0.5 * step), None)
        found.append(fields["metrics"])
        crediting.end_step()
    return found


def adaptive() -> Crediting:
    return Crediting(ADAPTIVE, load_algorithm(ADAPTIVE, group_size=2, has_critic=False))


def test_each_step_is_credited_with_the_coefficient_that_the_steps_before_it_gave():
    figures = run_steps(adaptive(), 0, 5)
    kls = [2 * 0.5 * step for step in range(4)]
    expected = slow.adaptive_coefs(0.5, kls, 2 * STEP, 2.0, 20)
    assert [each["kl.coef"] for each in figures] == pytest.approx(expected, rel=1e-12)
    assert [each["shaping.num_scores"] for each in figures] == [0, 6, 12, 18, 24]
    assert figures[1]["shaping.mean"] == pytest.approx((0 + 1 + 1 + 1 + 2 + 1) / 6)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_resumed_run_credits_as_one_that_never_stopped_however_far_ahead_the_saved_one_was(
    ahead: int, tmp_path: Path
):
    whole = run_steps(adaptive(), 0, 5)
    stopped = adaptive()
    run_steps(stopped, 0, 2 + ahead)
    stopped.save(tmp_path / "advantage", 2)
    resumed = Crediting(ADAPTIVE, load_algorithm(ADAPTIVE, group_size=2, has_critic=False), version=2)
    resumed.load(tmp_path / "advantage")
    assert run_steps(resumed, 2, 5) == whole[2:]


def test_a_setting_that_does_not_adapt_any_more_is_as_configured_after_a_resume(tmp_path: Path):
    stopped = adaptive()
    run_steps(stopped, 0, 2)
    stopped.save(tmp_path, 2)
    fixed = Select(use=ADAPTIVE.use, options={"kl": {"coef": 0.25}})
    resumed = Crediting(fixed, load_algorithm(fixed, group_size=2, has_critic=False), version=2)
    resumed.load(tmp_path)
    assert resumed.algorithm == load_algorithm(fixed, group_size=2, has_critic=False)
    assert "kl.coef" not in run_steps(resumed, 2, 3)[0]


def test_a_setting_that_adapts_from_a_resume_on_begins_as_configured(tmp_path: Path):
    fixed = Select(use=ADAPTIVE.use)
    Crediting(fixed, load_algorithm(fixed, group_size=2, has_critic=False)).save(tmp_path, 0)
    resumed = adaptive()
    resumed.load(tmp_path)
    assert run_steps(resumed, 0, 2) == run_steps(adaptive(), 0, 2)


def test_a_checkpoint_without_a_credit_stages_state_changes_nothing(tmp_path: Path):
    crediting = adaptive()
    crediting.load(tmp_path)
    assert run_steps(crediting, 0, 2) == run_steps(adaptive(), 0, 2)


def test_the_critics_figures_give_the_explained_variance_in_place_of_sums():
    found = critic_figures(
        {"loss": 0.5, "value_clip_frac": 0.1, "value_error": 1.0, "value_error_sq": 2.0, "returns": 3.0,
         "returns_sq": 13.0, "lr": 1e-5}
    )  # fmt: skip
    assert found == {
        "critic.loss": 0.5,
        "critic.value_clip_frac": 0.1,
        "critic.lr": 1e-5,
        "critic.explained_variance": 0.75,
    }


def test_returns_that_are_all_equal_have_no_variance_to_explain():
    moments = {"value_error": 0.0, "value_error_sq": 0.0, "returns": 1.0, "returns_sq": 1.0}
    assert critic_figures({"loss": 0.0, **moments}) == {"critic.loss": 0.0}


def test_ppo_without_any_kl_is_warned_of_and_group_algorithms_are_not():
    assert "algorithm.kl.coef is 0" in advice(PPO(kl=KL()))[0]
    assert advice(PPO()) == []
    assert advice(GRPO(kl=KL())) == []


@pytest.mark.parametrize(
    ("algorithm", "is_refused"),
    [
        (PPO(correction=Correction(kind="none")), True),
        (GRPO(correction=Correction(kind="sequence")), True),
        (PPO(), False),
        (PPO(correction=Correction(kind="decoupled")), False),
        (CISPO(), False),
        (CISPO(correction=Correction(kind="sequence")), True),
    ],
)
def test_a_cut_distribution_needs_a_correction_that_weighs_tokens(algorithm: Algorithm, is_refused: bool):
    check_sampling(algorithm, is_cut=False)
    if not is_refused:
        check_sampling(algorithm, is_cut=True)
        return
    with pytest.raises(ConfigError, match=r"sampling: top_p or top_k cuts .*; set top_p=1 and top_k=0"):
        check_sampling(algorithm, is_cut=True)


@pytest.mark.parametrize(("algorithm", "is_refused"), [(PPO(), True), (CISPO(correction=Correction()), False)])
def test_sampled_logprobs_in_the_proximal_ones_place_take_a_correction_away(algorithm: Algorithm, is_refused: bool):
    check_sampling(algorithm, is_cut=False, proximal="behaviour")
    if not is_refused:
        check_sampling(algorithm, is_cut=True, proximal="behaviour")
        return
    with pytest.raises(ConfigError, match=r"kind=truncated and learner\.proximal=recomputed"):
        check_sampling(algorithm, is_cut=True, proximal="behaviour")


def test_an_algorithm_without_values_is_refused_where_there_is_a_critic():
    with pytest.raises(ConfigError, match=r"GRPO gives the critic of this graph nothing to learn; use graphs/group"):
        load_algorithm(Select(use="flowrl.algorithms.grpo:GRPO"), group_size=2, has_critic=True)


def test_filtered_groups_need_more_than_one_sample():
    choice = Select(use="flowrl.algorithms.ppo:PPO", options={"filter_groups": True})
    with pytest.raises(ConfigError, match=r"group_size: .* but group_size is 1; set generator\.group_size"):
        load_algorithm(choice, group_size=1, has_critic=True)
