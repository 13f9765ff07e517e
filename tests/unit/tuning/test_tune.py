"""Tuning: what is looked at closer, what is recommended, and how the budget is spent."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowrl.errors import ConfigError
from flowrl.tuning.tune import Trial, TuneRequest, Tuning, closer, describe, evenly, parse_budget, simplest, tune
from flowrl.tuning.verification import chosen, in_words
from tests.support.command import GRAPH
from tests.support.timed_past import SMALL, ppo_costs

PATHS: Any = {"graph": Path("graph.py"), "profile": Path("profile.json")}


def trial(samples_per_s: float, stale: int = 0, *, devices: float = 1.0, **setting: int) -> Trial:
    return Trial(setting=dict(setting), samples_per_s=samples_per_s, mean_staleness=float(stale), bottleneck="learner",
                 max_staleness=stale, devices=devices)  # fmt: skip


def test_a_budget_says_settings_devices_or_both() -> None:
    assert parse_budget([], **PATHS) == TuneRequest(**PATHS)
    assert parse_budget(["300"], **PATHS).budget == 300
    found = parse_budget(["settings=10,gpus=16", "cpus=8"], **PATHS)
    assert (found.budget, found.gpus, found.cores) == (10, 16.0, 8.0)


@pytest.mark.parametrize("text", ["fast", "gpu=4", "cores=4", "settings=many", ""])
def test_a_budget_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not understood"):
        parse_budget([text], **PATHS)


def test_what_no_other_of_less_staleness_beats_by_much_is_looked_at_closer() -> None:
    best = [trial(1.0, 0, a=1), trial(2.0, 1, a=2), trial(1.92, 1, a=3)]
    beaten = [trial(0.9, 0, a=4), trial(1.8, 1, a=5), trial(1.8, 2, a=6), trial(9.0, 0, group_size=1)]
    assert {t.setting["a"] for t in closer([*best, *beaten])} == {1, 2, 3}


def test_of_equals_the_one_on_fewest_devices_and_with_fewest_changes_is_taken() -> None:
    rich = trial(2.0, devices=8.0)
    cheap, plain = trial(1.99, devices=4.0, a=1, b=2), trial(1.985, devices=4.0, a=1)
    others = [rich, cheap, plain, trial(1.9, devices=1.0), trial(2.0, 1, devices=1.0)]
    assert simplest(rich, others) is plain


def test_every_position_of_every_knob_is_drawn_about_as_often() -> None:
    drawn = list(evenly([2, 3, 5], 60))
    assert len(set(drawn)) > 25, "and not always together"
    for place, size in enumerate((2, 3, 5)):
        assert Counter(each[place] for each in drawn) == dict.fromkeys(range(size), 60 // size)


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    path = tmp_path_factory.mktemp("tune") / "profile.json"
    path.write_bytes(msgspec.json.encode(ppo_costs(train_s=0.5)))
    return tune(TuneRequest(graph=GRAPH, profile=path, overrides=list(SMALL), budget=48, cores=3.0))


@pytest.mark.slow
def test_the_budget_is_kept_and_the_front_falls_nowhere(tuning: Tuning) -> None:
    assert 40 < tuning.num_trials <= 48
    rates = [t.samples_per_s for t in tuning.front]
    stale = [t.mean_staleness for t in tuning.front]
    assert rates == sorted(rates)
    assert all(fresh <= staler + 0.01 for fresh, staler in itertools.pairwise(stale))
    assert all(t.is_measured for t in tuning.front)


@pytest.mark.slow
def test_what_is_recommended_is_good_affordable_and_learns_the_same(tuning: Tuning) -> None:
    best = max(t.samples_per_s for t in tuning.front)
    assert tuning.recommended.samples_per_s >= 0.95 * best
    assert tuning.recommended.samples_per_s > 1.4 * tuning.present.samples_per_s  # a second generator, a third core
    assert tuning.recommended.devices <= 3.0
    assert tuning.recommended.setting["generator.replicas"] == 2
    assert not {"groups_per_step", "generator.group_size"} & tuning.recommended.setting.keys()


@pytest.mark.slow
def test_each_knob_alone_is_told_against_the_present_and_the_command_is_said(tuning: Tuning) -> None:
    assert tuning.sensitivity["generator.replicas"]["2"] > 1.3
    assert tuning.sensitivity["max_staleness"]["0"] < 0.95
    text = describe(tuning)
    assert "generator.replicas: 2 +" in text
    assert any(line.startswith(f"{tuning.command} (+") for line in text.splitlines())
    assert re.search(r"  staleness 0\.00 in place of \d\.\d\d costs \d+%: \S", text)
    assert "--set generator.replicas=2" in tuning.command


@pytest.mark.slow
def test_the_settings_to_verify_are_the_recommended_the_present_and_then_the_fastest(tuning: Tuning) -> None:
    first, second, *rest = chosen(tuning, 100)
    assert first is tuning.recommended
    assert second.setting == {}
    assert in_words(second.setting) == "as it is"
    assert len({in_words(t.setting) for t in [first, second, *rest]}) == 2 + len(rest), "none is run twice"
    assert chosen(tuning, 1) == [first]
