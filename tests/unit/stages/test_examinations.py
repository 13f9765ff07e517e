"""A version is examined beside training: nothing of the training waits for it, and it stays the version it was."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import pytest

from flowrl.telemetry.metrics import events_in, row_of
from flowrl.telemetry.terminal import evaluation_line
from tests.support.flows import FlowSettings, Ran, flow, random_settings, run

if TYPE_CHECKING:
    from pathlib import Path

STEADY = FlowSettings(
    seed=0, steps=12, groups_per_step=2, window=1, max_staleness=1, generators=1, scorers=1, depth=8, token_s=0.01,
    sigma=0.0, update_s=0.0, score_s=0.0, train_s=0.5, filter_every=0, initial=4,
)  # fmt: skip
SLOW = replace(STEADY, evaluate_every=4, judge_s=0.4)  # 1.6 s and more for an evaluation, 4 s for its four steps


def end_s(ran: Ran) -> float:
    return max(step.time_s for step in ran.steps) - min(step.time_s for step in ran.steps)


def evaluated(ran: Ran) -> list[int]:
    return [each.version for each in ran.evaluations]


def test_training_does_not_wait_for_an_evaluation_beside_it(tmp_path: Path) -> None:
    alone = run(flow(STEADY), tmp_path / "alone")
    between = run(flow(SLOW), tmp_path / "between")
    beside = run(flow(replace(SLOW, beside=1)), tmp_path / "beside")
    assert evaluated(between) == evaluated(beside) == [0, 4, 8, 12]
    assert end_s(beside) == pytest.approx(end_s(alone))
    assert end_s(between) > end_s(alone) + 1


def test_versions_that_come_too_fast_are_left_out_and_said_but_for_the_first_and_the_last(tmp_path: Path) -> None:
    ran = run(flow(replace(SLOW, evaluate_every=1, judge_s=0.9, beside=1)), tmp_path)
    found = evaluated(ran)
    assert (found[0], found[-1]) == (0, 12)
    assert found == sorted(set(found))
    left_out = [notice.text for notice in ran.notices if "is not evaluated" in notice.text]
    assert len(left_out) == 13 - len(found) > 0


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_speeds_every_evaluation_is_of_the_version_that_was_asked_for(seed: int, tmp_path: Path) -> None:
    drawn = random_settings(seed)
    ran = run(flow(replace(drawn, evaluate_every=seed % 3, judge_s=0.1 * (seed % 5), beside=1 + seed % 2)), tmp_path)
    found = evaluated(ran)
    assert (found[0], found[-1]) == (0, drawn.steps)
    assert not [notice for notice in ran.notices if "was not evaluated" in notice.text]  # by another version's weights
    assert len(ran.steps) == drawn.steps


def test_further_sets_are_scored_beside_the_held_out_prompts_and_told_by_name(tmp_path: Path) -> None:
    ran = run(flow(replace(SLOW, judge_s=0.0, steps=2, beside=1, sets={"hard": "3", "easy": "2"})), tmp_path)
    assert [(each.version, each.scores, each.sets) for each in ran.evaluations] == [
        (version, [[1.0]] * 4, {"hard": [[1.0]] * 3, "easy": [[1.0]] * 2}) for version in (0, 2)
    ]
    line = evaluation_line(ran.evaluations[0])
    assert line.startswith("held-out score 1.000 +- 0.000 (4 prompts), hard 1.000 +- 0.000 (3 prompts), easy 1.000")
    written = msgspec.json.encode(row_of(ran.evaluations[0]))
    assert [*events_in([written])] == [ran.evaluations[0]]
