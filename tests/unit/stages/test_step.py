"""What the learner makes of a step's groups: ages, minibatches, changed settings, figures."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from flowrl.algorithms.corrections import Correction
from flowrl.algorithms.grpo import GRPO
from flowrl.algorithms.ppo import PPO
from flowrl.config import Select
from flowrl.engines.base import Schedule, TokenGroup
from flowrl.errors import ConfigError
from flowrl.messages import Buffer, Sample, Samples, VersionSpan
from flowrl.stages.generator import Generator
from flowrl.stages.learner import Learner
from flowrl.stages.reference import Reference
from flowrl.stages.sampler import Sampler
from flowrl.stages.step import (
    ages,
    derived,
    mean_metrics,
    minibatches,
    step_choice,
    step_groups,
    step_metrics,
    with_drift_limit,
    with_proximal,
)
from flowrl.stages.training import check_engine_of, check_schedule
from tests.unit.stages.test_estimation import ADAPTIVE, adaptive, group


def test_a_token_is_as_old_as_the_versions_published_since():
    sample = Sample(
        token_ids=Buffer.ints([1, 2, 3, 4]),
        logprobs=Buffer.floats([0.0] * 4),
        versions=[VersionSpan(3, 0, 1), VersionSpan(5, 2, 4)],  # the second token is an environment's
        finish="stop",
        text="",
    )
    assert ages(sample, 5).tolist() == [2.0, 0.0, 0.0, 0.0]


def test_the_proximal_column_is_the_policy_at_the_start_of_the_step():
    groups = [TokenGroup(prompt_ids=Buffer.ints([1]), responses=[Buffer.ints([2, 3])])]
    recomputed = with_proximal(groups, [[Buffer.floats([-3.0, -4.0]).numpy()]])
    assert recomputed[0].columns["proximal"][0].tolist() == [-3.0, -4.0]
    assert "proximal" not in groups[0].columns


def test_every_epoch_deals_each_group_once_and_the_seed_decides_how():
    dealt = [*minibatches(8, 4, 2, seed=(0, 3))]
    assert [len(places) for places in dealt] == [2] * 8
    for epoch in (dealt[:4], dealt[4:]):
        assert sorted(place for places in epoch for place in places) == [*range(8)]
    assert dealt[:4] != dealt[4:]
    assert dealt == [*minibatches(8, 4, 2, seed=(0, 3))]
    assert dealt != [*minibatches(8, 4, 2, seed=(0, 4))]
    assert dealt != [*minibatches(8, 4, 2, seed=(1, 3))]
    assert [*minibatches(3, 1, 2, seed=(0, 0))] == [[0, 1, 2]] * 2


def test_the_drift_limit_is_that_of_the_whole_updates_sampled_tokens():
    columns = {"behaviour": [Buffer.floats([-1.0] * 4)], "advantages": [Buffer.floats([1.0, 1.0, 1.0, 1.0])],
               "mask": [Buffer.floats([1.0, 1.0, 1.0, 0.0])]}  # fmt: skip
    groups = [TokenGroup(prompt_ids=Buffer.ints([1]), responses=[Buffer.ints([2] * 4)], columns=columns)]
    algorithm = PPO(correction=Correction(kind="second_moment", max_second_moment=0.05))
    # Moving away: 0.1, 0.2 and 0.5 nats; mean squares 0.01, 0.025, 0.1. The last is under no mask.
    found = with_drift_limit(algorithm, groups, [[np.array([-0.9, -0.8, -0.5, 8.0], dtype=np.float32)]])
    assert found[0].columns["drift_limit"][0].tolist() == pytest.approx([0.2] * 4)


def sampled(finish: str) -> Sample:
    return Sample(token_ids=Buffer.ints([1, 2]), logprobs=Buffer.floats([-1.0, -3.0]), versions=[VersionSpan(0, 0, 2)],
                  finish=finish, text="")  # fmt: skip


def samples(*advantages: list[float], rewards: list[float], metrics: dict[str, float]) -> Samples:
    answers = [sampled("stop"), sampled("length")]
    return Samples(
        group_id=0, token_ids=Buffer.ints([1]), columns={}, num_samples=2, seed=0, samples=answers, generator="g",
        scores={"task": rewards}, ref_logprobs=[sample.logprobs for sample in answers],
        advantages=[Buffer.floats(row) for row in advantages], metrics=metrics,
    )  # fmt: skip


def test_figures_of_groups_are_of_the_scores_that_are_learned():
    idle = samples([0.0, 0.0], [0.0, 0.0], rewards=[20.0, 30.0], metrics={"groups.mixed": 0.0})
    taught = samples([0.5, 0.5], [-0.5, -0.5], rewards=[1.0, 2.0], metrics={"groups.mixed": 1.0})
    found = step_metrics([idle, taught], [0, 0])
    assert (found["groups.mixed"], found["groups.idle"], found["response_tokens.cut"]) == (0.5, 0.5, 0.5)
    assert found["sampled_entropy"] == 2.0
    assert found["reward.mean"] == 13.25


def test_samples_that_were_given_up_are_counted():
    groups = [samples([1.0], [-1.0], rewards=[1.0, 0.0], metrics={}) for _ in range(2)]
    assert "samples.given_up" not in step_metrics(groups, [0, 0])
    spared = [msgspec.structs.replace(groups[0], num_given_up=1), groups[1]]
    assert step_metrics(spared, [0, 0])["samples.given_up"] == pytest.approx(1 / 5)  # of 5 that were begun


def test_a_step_has_the_references_column_in_all_groups_or_in_none():
    whole = samples([1.0, 1.0], [2.0, 2.0], rewards=[1.0, 2.0], metrics={"kl": 0.5})
    bare = msgspec.structs.replace(whole, ref_logprobs=[], metrics={})
    assert ["reference" in group.columns for group in step_groups(GRPO(), [whole, whole], 0)] == [True, True]
    assert ["reference" in group.columns for group in step_groups(GRPO(), [whole, bare], 0)] == [False, False]
    assert step_metrics([bare, whole], [0, 0])["kl"] == 0.5


def test_cut_answers_are_left_out_of_the_loss_and_of_the_whitening_where_the_algorithm_says_so():
    group = samples([3.0, 5.0], [9.0, 9.0], rewards=[1.0, 2.0], metrics={})
    (learned,) = step_groups(GRPO(mask_cut=True), [group], 0)
    assert [mask.tolist() for mask in learned.columns["mask"]] == [[1.0, 1.0], [0.0, 0.0]]
    (whole,) = step_groups(GRPO(), [group], 0)
    assert "mask" not in whole.columns
    (whitened,) = step_groups(PPO(mask_cut=True), [group], 0)
    assert whitened.columns["advantages"][0].tolist() == pytest.approx([-1.0, 1.0])


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
    left_out = {"loss": 6.0, "lr": 0.3, "skipped_frac": 1.0}  # a step that float16 did not take has no norm
    taken = {"loss": 2.0, "lr": 0.3, "skipped_frac": 0.0, "grad_norm": 5.0}
    expected = {"loss": 4.0, "lr": 0.3, "skipped_frac": 0.5, "grad_norm": 5.0}
    assert mean_metrics([left_out, taken]) == expected == mean_metrics([taken, left_out])


def test_the_mismatch_of_the_engines_is_that_of_a_steps_first_update():
    still, moved = {"mismatch_kl": 0.01, "fresh_frac": 0.5}, {"mismatch_kl": 0.3, "fresh_frac": 1.0}
    assert mean_metrics([still, moved]) == {"mismatch_kl": 0.01, "fresh_frac": 0.75}
    stale = {"mismatch_kl": 0.0, "fresh_frac": 0.0}  # measured on no token
    assert mean_metrics([stale, moved]) == {"fresh_frac": 0.5}
    assert derived(mean_metrics([stale, stale])) == {"fresh_frac": 0.0}


def test_the_effective_sample_size_follows_from_the_weights():
    assert derived({"is_weight": 2.0, "is_weight_sq": 5.0})["ess"] == pytest.approx(0.8)
    assert derived({"is_weight": 3.0, "is_weight_sq": 27.0})["ess"] == pytest.approx(1 / 3)  # one token of three


def test_a_mismatch_that_was_measured_on_no_token_is_not_told():
    assert derived({"fresh_frac": 0.0, "mismatch_kl": 0.0}) == {"fresh_frac": 0.0}
    assert derived({"fresh_frac": 0.5, "mismatch_kl": 0.25})["mismatch_kl"] == 0.25


def test_a_warm_up_longer_than_the_run_is_refused():
    settings = Learner.Config(schedule=Schedule(warmup_steps=10))
    said: list[str] = []
    check_schedule(settings, 10, "learner", said.append)
    with pytest.raises(ConfigError, match="10 optimizer steps, but the run takes 4: lr would never reach its peak"):
        check_schedule(settings, 4, "learner", said.append)
    check_schedule(Learner.Config(lr=0.0), 4, "learner", said.append)
    assert said == ["warning: learner.lr is 0, so that it learns nothing"]


def test_float16_is_refused_where_nothing_scales_the_loss():
    plain = "flowrl.engines.torch:TorchEngine"
    with pytest.raises(ConfigError, match=r"learner.dtype: is float16, whose gradients vanish .* TorchEngine lacks"):
        check_engine_of(Learner.Config(engine=plain, dtype="float16"), "learner", "model")
    check_engine_of(Reference.Config(engine=plain, dtype="float16"), "reference", "model")  # which learns nothing


class DrawsNoSpare:
    """A user's generation engine that knows nothing of spare samples."""

    async def generate(self, *, request_id, prompt_ids, num_samples, seed, sampling):
        raise NotImplementedError


def test_an_engine_that_draws_no_spare_samples_is_refused_before_the_start():
    engine = f"{__name__}:DrawsNoSpare"
    generator = Generator(Generator.Config(engine=engine, spare_samples=1), Sampler(model="none", group_size=8))
    with pytest.raises(ConfigError, match=r"generator.spare_samples: .*DrawsNoSpare draws none; set it to 0"):
        generator.check(print)
