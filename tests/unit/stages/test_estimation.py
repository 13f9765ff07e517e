"""Estimating step by step: settings that follow the run depend on order alone, and a resumed run credits the same."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from flowrl.algorithms.cispo import CISPO
from flowrl.algorithms.corrections import Correction
from flowrl.algorithms.grpo import GRPO
from flowrl.algorithms.policy import KL
from flowrl.algorithms.ppo import PPO
from flowrl.algorithms.return_scale import ReturnScale
from flowrl.algorithms.shaping import Shaping
from flowrl.config import Select
from flowrl.engines.base import TokenGroup
from flowrl.errors import ConfigError, DataError
from flowrl.messages import Buffer, Referenced, Sample, VersionSpan
from flowrl.stages.advantage import Advantage
from flowrl.stages.critic import Critic, begun, check_behind, explained_variance, longer, split_after
from flowrl.stages.estimation import (
    Estimation,
    advice,
    check_sampling,
    group_fields,
    keeps_group,
    load_algorithm,
    settled,
)
from flowrl.stages.learner import Learner
from flowrl.stages.sampler import Learning, Sampler
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


def run_steps(estimation: Estimation, first: int, last: int) -> list[dict[str, float]]:
    """Credit steps first .. last - 1 and return the figures of each step's last group."""
    found: list[dict[str, float]] = []
    for step in range(first, last):
        for place in range(STEP):
            fields = estimation.advantages(group(step * STEP + place, gap=0.5 * step), None)
        found.append(fields["metrics"])
        estimation.end_step()
    return found


def adaptive() -> Estimation:
    return Estimation(ADAPTIVE, load_algorithm(ADAPTIVE, group_size=2, has_critic=False))


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
    resumed = Estimation(ADAPTIVE, load_algorithm(ADAPTIVE, group_size=2, has_critic=False), version=2)
    resumed.load(tmp_path / "advantage")
    assert run_steps(resumed, 2, 5) == whole[2:]


def test_a_setting_that_does_not_adapt_any_more_is_as_configured_after_a_resume(tmp_path: Path):
    stopped = adaptive()
    run_steps(stopped, 0, 2)
    stopped.save(tmp_path, 2)
    fixed = Select(use=ADAPTIVE.use, options={"kl": {"coef": 0.25}})
    resumed = Estimation(fixed, load_algorithm(fixed, group_size=2, has_critic=False), version=2)
    resumed.load(tmp_path)
    assert resumed.algorithm == load_algorithm(fixed, group_size=2, has_critic=False)
    assert "kl.coef" not in run_steps(resumed, 2, 3)[0]


def test_a_setting_that_adapts_from_a_resume_on_begins_as_configured(tmp_path: Path):
    fixed = Select(use=ADAPTIVE.use)
    Estimation(fixed, load_algorithm(fixed, group_size=2, has_critic=False)).save(tmp_path, 0)
    resumed = adaptive()
    resumed.load(tmp_path)
    assert run_steps(resumed, 0, 2) == run_steps(adaptive(), 0, 2)


def test_a_checkpoint_without_a_nodes_state_is_refused_where_there_was_something_to_save(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"estimation\.json: is not there, so what .* would be lost; resume from another"
    ):
        adaptive().load(tmp_path)
    choice = Select(use="flowrl.algorithms.grpo:GRPO")
    Estimation(choice, choice.load("algorithm")).load(tmp_path)  # nothing changes from step to step


def valued(returns: list[float], values: list[float], mask: list[float] | None = None) -> TokenGroup:
    columns = {"returns": [Buffer.floats(returns)], "values": [Buffer.floats(values)]}
    columns |= {} if mask is None else {"mask": [Buffer.floats(mask)]}
    return TokenGroup(prompt_ids=Buffer.ints([1]), responses=[Buffer.ints([1] * len(returns))], columns=columns)


def test_explained_variance_is_of_the_values_before_they_were_learned_over_sampled_tokens():
    groups = [valued([0.0, 4.0, 99.0], [1.0, 3.0, 7.0], [1.0, 1.0, 0.0]), valued([0.0, 4.0], [-1.0, 5.0])]
    assert explained_variance(groups) == {"critic.explained_variance": 0.75}  # errors -1, 1, 1, -1 of returns +-2


def test_returns_that_are_all_equal_have_no_variance_to_explain():
    assert explained_variance([valued([1.0, 1.0], [0.5, 0.0])]) == {}


@pytest.mark.parametrize("is_scaled", [False, True])
def test_a_critic_that_began_with_a_scale_learns_in_its_units_whether_or_not_the_scale_goes_on(is_scaled: bool):
    sampler = Sampler(model="", engine="")
    learning = Learning(algorithm=Select(use="flowrl.algorithms.ppo:PPO"), steps=1, groups_per_step=1, max_staleness=0)
    critic = Critic(Critic.Config(), sampler, learning, Learner.Config())
    loaded = ReturnScale(weight=1.0, mean=10.0, square=100.0 + 0.25**2)  # a unit of 2
    critic._scale, critic._is_scaled = loaded, is_scaled
    given: list[TokenGroup] = []
    engine: Any = SimpleNamespace(accumulate=lambda groups, _: given.extend(groups) or {}, apply=dict)

    async def compute(work: Any, *args: Any) -> Any:
        return work(*args)

    context: Any = SimpleNamespace(now=lambda: 0.0, compute=compute, span=lambda *_: None, version=0)
    asyncio.run(critic._train(context, engine, [(valued([14.0, 8.0], [12.0, 9.0]), loaded)]))
    now = loaded.seen([14.0, 8.0]) if is_scaled else loaded
    assert critic._scale == now
    assert given[0].columns["values"][0].tolist() == [1.0, -0.5], "what the network said"
    expected = [(14.0 - now.mean) / now.unit, (8.0 - now.mean) / now.unit]
    assert given[0].columns["returns"][0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("shift", [100.0, -7.0])
def test_the_first_step_is_valued_about_what_a_sample_has_earned_whatever_the_rewards_shift(shift: float):
    def first_step(shift: float) -> tuple[list[float], list[list[float]]]:
        earned: list[float] = []
        ppo, scales, worths = PPO(kl=KL(), shaping=Shaping(std=2.0)), list[float](), list[list[float]]()
        for number in range(3):
            known = msgspec.structs.replace(group(number, gap=0.0), scores={"task": [shift + number, shift + 1.0]})
            scale = begun(ppo, known, earned)
            values = [np.full(2, scale.mean, dtype=np.float32)] * 2
            scales.append(scale.mean)
            worths += [row.tolist() for row in group_fields(ppo, known, values)["advantages"]]
        return scales, worths

    plain, shifted = first_step(0.0), first_step(shift)
    assert plain[0] == [0.25, 0.375, 0.5]  # means of (0, 1), (1, 1), (2, 1), halved, of the groups so far
    assert shifted[0] == pytest.approx([each + shift / 2 for each in plain[0]])
    for one, other in zip(plain[1], shifted[1], strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_turns_rewards_are_valued_about_nothing_at_first():
    known = msgspec.structs.replace(group(2, gap=0.0), placed=[Buffer.floats([1.0, 1.0])] * 2)
    assert begun(PPO(kl=KL()), known, []) == ReturnScale()


def test_the_value_behind_a_cut_answer_is_read_before_one_more_token():
    whole, cut = group(0, gap=0.0).samples[0], msgspec.structs.replace(group(0, gap=0.0).samples[0], finish="length")
    pair = msgspec.structs.replace(group(0, gap=0.0), samples=[whole, cut])
    assert [response.tolist() for response in longer(pair).responses] == [[5, 6], [5, 6, 6]]
    rows, after = split_after(
        pair, [np.array([0.1, 0.2], dtype=np.float32), np.array([0.3, 0.4, 0.5], dtype=np.float32)]
    )
    assert [row.tolist() for row in rows] == [pytest.approx([0.1, 0.2]), pytest.approx([0.3, 0.4])]
    assert after == [0.0, pytest.approx(0.5)]
    values = [np.array([0.1, 0.2], dtype=np.float32), np.array([0.3, 0.4], dtype=np.float32)]
    ppo = PPO(kl=KL(), lam=1.0, gamma=0.5, bootstrap_cut=True)
    returns = group_fields(ppo, pair, values, after)["returns"]
    # The cut one is rewarded with 1 at its end, and has 0.5 * 0.5 more to come.
    assert [row.tolist() for row in returns] == [[0.0, 0.0], pytest.approx([0.625, 1.25])]
    without = group_fields(msgspec.structs.replace(ppo, bootstrap_cut=False), pair, values, after)["returns"]
    assert without[1].tolist() == pytest.approx([0.5, 1.0])


def test_a_critic_needs_a_position_behind_the_longest_answer():
    check_behind(511, 512)
    check_behind(512, 0)
    with pytest.raises(ConfigError, match=r"bootstrap_cut: reads a token behind answers of 512 tokens .* has 512 posi"):
        check_behind(512, 512)


@pytest.mark.parametrize(("use", "is_warned"), [("ReinforcePP", True), ("ReinforcePPBaseline", False)])
def test_whitened_turns_without_a_baseline_by_turn_are_warned_of(use: str, is_warned: bool):
    choice = Select(use=f"flowrl.algorithms.reinforce_pp:{use}")
    learning = Learning(algorithm=choice, steps=1, groups_per_step=1, max_staleness=0)
    for max_turns in (1, 3):
        said: list[str] = []
        sampler = Sampler(model="", engine="", group_size=2, max_turns=max_turns)
        Advantage(Advantage.Config(), sampler, learning).check(said.append)
        expected = ["warning: where turns are rewarded, late turns"] * (is_warned and max_turns > 1)
        assert [line.partition(", which")[0] for line in said] == expected


def test_the_longest_response_fills_what_an_algorithm_leaves_open_and_nothing_else():
    constant = settled(Select(use="flowrl.algorithms.dr_grpo:DrGRPO"), 32)
    assert constant.load("algorithm").constant_tokens == 32
    chosen = Select(use="flowrl.algorithms.dapo:DAPO", options={"shaping": {"overlong_buffer": 4, "max_tokens": 16}})
    assert settled(chosen, 32) == chosen
    open_ended = Select(use="flowrl.algorithms.dapo:DAPO", options={"shaping": {"overlong_buffer": 4}})
    assert settled(open_ended, 32).load("algorithm").shaping.max_tokens == 32
    assert settled(Select(use="flowrl.algorithms.ppo:PPO"), 32).options == {}


def test_a_group_whose_answers_were_all_cut_is_not_kept_where_they_are_left_out():
    pair = group(0, gap=0.0)
    cut = msgspec.structs.replace(pair.samples[0], finish="length")
    all_cut = msgspec.structs.replace(pair, samples=[cut, cut])
    assert not keeps_group(GRPO(mask_cut=True), all_cut)
    assert keeps_group(GRPO(mask_cut=True), msgspec.structs.replace(pair, samples=[cut, pair.samples[0]]))
    assert keeps_group(GRPO(), all_cut)


def test_ppo_without_any_kl_is_warned_of_and_group_algorithms_are_not():
    assert "algorithm.kl.coef is 0" in advice(PPO(kl=KL()))[0]
    assert advice(PPO()) == []
    assert advice(GRPO(kl=KL())) == []


@pytest.mark.parametrize(
    ("kind", "max_staleness", "num_updates", "better"),
    [
        ("behaviour", 1, 16, ""),
        ("truncated", 1, 1, ""),
        ("truncated", 4, 1, "behaviour"),
        ("behaviour", 8, 2, ""),
        ("behaviour", 4, 4, "interpolated where that is above a tenth"),
        ("interpolated", 8, 4, ""),
        ("behaviour", 9, 1, "divergence or second_moment, whose papers go further"),
        ("truncated", 9, 1, "divergence or second_moment, whose papers go further"),
        ("second_moment", 64, 1, ""),
        ("interpolated", 1, 4, "behaviour"),
    ],
)
def test_old_samples_under_a_correction_that_is_not_for_them_are_warned_of(kind, max_staleness, num_updates, better):
    algorithm = GRPO(correction=Correction(kind=kind))
    said = advice(algorithm, max_staleness=max_staleness, num_updates=num_updates)
    assert [line.partition("; take algorithm.correction.kind=")[2] for line in said] == (
        [f"{better} (docs/learning.md)"] if better else []
    )


@pytest.mark.parametrize(
    ("algorithm", "is_refused"),
    [
        (PPO(), True),
        (PPO(correction=Correction(kind="divergence")), False),
        (GRPO(correction=Correction(kind="sequence")), True),
        (PPO(correction=Correction(kind="interpolated")), True),
        (PPO(correction=Correction(kind="truncated")), False),
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


def test_an_algorithm_without_values_is_refused_where_there_is_a_critic():
    with pytest.raises(ConfigError, match=r"GRPO gives the critic of this graph nothing to learn; use graphs/group"):
        load_algorithm(Select(use="flowrl.algorithms.grpo:GRPO"), group_size=2, has_critic=True)


def test_filtered_groups_need_more_than_one_sample():
    choice = Select(use="flowrl.algorithms.ppo:PPO", options={"filter_groups": True})
    with pytest.raises(ConfigError, match=r"group_size: .* but group_size is 1; set generator\.group_size"):
        load_algorithm(choice, group_size=1, has_critic=True)
