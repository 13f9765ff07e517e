"""Each early warning on a made run that shows the fault and on one that does not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from flowrl.telemetry.events import Evaluation, Step
from flowrl.telemetry.symptoms import SYMPTOMS, Symptoms, cut_answers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HEALTHY = {
    "kl": 0.2, "response_tokens.mean": 20.0, "sampled_entropy": 1.5, "groups.idle": 0.3, "response_tokens.cut": 0.1,
    "critic.explained_variance": 0.4, "reward.mean": 0.5, "reward.std": 0.4, "reward.clipped": 0.0,
}  # fmt: skip


def run(**figures: Sequence[float]) -> list[Step]:
    """Return a healthy run of twenty steps but for these figures."""
    return [
        Step(version=k + 1, num_steps=20, time_s=0.0, metrics={**HEALTHY, **{
            name.replace("__", "."): values[k] for name, values in figures.items()}})
        for k in range(20)
    ]  # fmt: skip


def told(steps: list[Step], evaluations: Sequence[Evaluation] = ()) -> list[str]:
    found: list[str] = []
    sink = Symptoms(lambda where, text: found.append(text))
    sink.consume([*steps, *evaluations])
    return found


def steadily(first: float, last: float) -> list[float]:
    return [first + (last - first) * k / 19 for k in range(20)]


CASES = {  # figure; a run that shows the fault, one that comes near it; part of the sentence
    "kl_growth": ("kl", [0.1 * 1.4**k for k in range(20)], steadily(0.1, 0.9), "the KL to the reference has grown"),
    "entropy_collapse": ("sampled_entropy", steadily(1.5, 0.0), steadily(1.5, 0.5), "the entropy of what is sampled"),
    "length_drift": ("response_tokens__mean", steadily(20, 80), steadily(20, 35), "answers have gone from 2"),
    "equal_rewards": ("reward__std", [1e-17] * 20, [*[0.0] * 4, *[0.01] * 16], "every sample of the last 5 steps"),
    "tiny_rewards": ("reward__std", [2e-6] * 20, [2e-3] * 20, "rewards differ by 2e-06 only"),
    "idle_groups": ("groups__idle", steadily(0.5, 1.0), steadily(0.3, 0.6), "of the groups teach nothing"),
    "cut_answers": ("response_tokens__cut", steadily(0.1, 0.9), steadily(0.0, 0.4), "of the answers are cut"),
    "clipped_scores": ("reward__clipped", [0.3] * 20, [0.05] * 20, "30% of the scores are clipped"),
    "idle_critic": ("critic__explained_variance", [0.01] * 20, steadily(0.0, 0.3), "the critic explains 0.01"),
}


def test_every_symptom_has_its_case():
    assert {symptom.__name__ for symptom in SYMPTOMS} == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_shows_the_fault_is_warned_of_once_and_one_that_does_not_is_not(name: str):
    figure, faulty, near, sentence = CASES[name]
    warnings = told(run(**{figure: faulty}))
    assert len(warnings) == 1
    assert sentence in warnings[0]
    assert told(run(**{figure: near})) == []


def long_run(kl: Callable[[int], float], *, steps: int = 300) -> list[Step]:
    figures = [{**HEALTHY, "kl": kl(k)} for k in range(steps)]
    return [Step(version=k + 1, num_steps=steps, time_s=0.0, metrics=each) for k, each in enumerate(figures)]


@pytest.mark.parametrize(
    ("kl", "is_warned"),
    [
        (lambda k: 0.05 * 1.02**k, True),  # answers of 20 tokens: 0.0025 a token, and 0.9 at the end
        (lambda k: 0.02 * k, True),
        (lambda k: 0.02 * k * (1 + 0.3 * math.sin(2.4 * k)), True),
        (lambda k: 1.8 * (1.0 - math.exp(-k / 20)), False),  # 0.09 a token, and stays there
        (lambda k: 6.0 + 0.01 * k, False),  # begun far from the reference
        (lambda k: 0.3 * math.sqrt(k) * (1 + 0.1 * math.sin(2.4 * k)), False),
        (lambda k: 0.9 + 0.05 * math.sin(k), False),
    ],
)
def test_a_slow_drift_is_told_and_one_that_comes_to_rest_is_not(kl: Callable[[int], float], is_warned: bool):
    found = told(long_run(kl))
    assert len(found) == is_warned
    assert all("and grows no slower" in text for text in found)


def test_a_resumed_run_is_held_against_how_the_run_began():
    steps = run(sampled_entropy=steadily(1.5, 0.1))
    warnings: list[str] = []
    resumed = Symptoms(lambda where, text: warnings.append(text))
    resumed.recall(steps[:18])
    assert warnings == []
    resumed.consume([*steps[15:]])  # from the checkpoint before on
    assert ["the entropy of what is sampled has fallen from 1.3" in text for text in warnings] == [True]
    fresh: list[str] = []
    Symptoms(lambda where, text: fresh.append(text)).consume([*steps[15:]])
    assert fresh == []


def test_rewards_that_the_run_scales_itself_may_be_tiny():
    tiny = run(reward__std=[2e-6] * 20, shaping__std=[2e-6] * 20)
    assert told(tiny) == []


def test_shrinking_answers_are_drift_too():
    assert "answers have gone from" in told(run(response_tokens__mean=steadily(40, 5)))[0]


@pytest.mark.parametrize("symptom", SYMPTOMS, ids=lambda symptom: symptom.__name__)
def test_a_few_steps_and_figures_that_are_not_there_say_nothing(symptom: Callable[[Sequence[Step]], str]):
    figure, faulty, _, _ = CASES[symptom.__name__]
    assert symptom(run(**{figure: faulty})[:4]) == ""
    assert symptom([Step(version=k, num_steps=9, time_s=0.0, metrics={}) for k in range(30)]) == ""


def test_what_goes_and_comes_back_is_told_again():
    waves = [1.0] * 8 + [0.0] * 6 + [1.0] * 6
    assert len(told(run(groups__idle=waves))) == 2


def evaluation(version: int, scores: list[float]) -> Evaluation:
    return Evaluation(version=version, time_s=0.0, scores=[[score] for score in scores], completions=[])


EASY, HARD = [1.0, 0.9, 0.8, 0.9, 1.0, 0.7], [0.4, 0.3, 0.3, 0.2, 0.5, 0.1]


def test_a_reward_that_rises_while_the_held_out_score_falls_is_hacked():
    rising, falling = run(reward__mean=steadily(0.2, 0.9)), run(reward__mean=steadily(0.9, 0.2))
    scored = [evaluation(6, EASY), evaluation(20, HARD)]
    found = told(rising, scored)
    assert len(found) == 1
    assert "has risen from 0.3" in found[0]
    assert "while the held-out score fell by 0.583" in found[0]
    assert told(falling, scored) == []
    assert told(rising, scored[::-1][:1]) == []
    assert told(rising, [evaluation(6, HARD), evaluation(20, EASY)]) == []
    noisy = [evaluation(6, EASY), evaluation(20, [0.9, 1.0, 0.7, 0.9, 0.9, 0.8])]
    assert told(rising, noisy) == [], "within the interval"


def test_steps_that_a_rollback_took_back_do_not_count():
    sink_found: list[str] = []
    sink = Symptoms(lambda where, text: sink_found.append(text))
    steps = run(groups__idle=[0.0] * 6 + [1.0] * 14)
    sink.consume([*steps[:8], *steps[:8], *steps[:8]])
    assert sink_found == []


@pytest.mark.parametrize(("share", "said"), [(0.94, "94% of the answers are cut"), (0.6, "")])
def test_answers_that_are_nearly_all_cut_are_told_after_the_first_step(share: float, said: str) -> None:
    said_of = cut_answers([Step(version=1, num_steps=9, time_s=0.0, metrics={"response_tokens.cut": share})])
    assert said_of.startswith(said)
    assert ("raise sampling.max_tokens" in said_of) == bool(said)
