"""A version is examined beside training: nothing of the training waits for it, and it stays the version it was."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import pytest

from flowrl.engines.checkpoint import best_of, best_version, complete_checkpoints, damage, read_rated, version_of
from flowrl.runs.page.figures import heldout
from flowrl.telemetry.events import Evaluation
from flowrl.telemetry.metrics import events_in, row_of
from flowrl.telemetry.report import Ending, report
from flowrl.telemetry.scores import Bounds
from flowrl.telemetry.terminal import evaluation_line
from flowrl.telemetry.trackers import figures_of
from flowrl.telemetry.view import RunView
from tests.support.chaos import Chaos
from tests.support.flows import FlowSettings, Ran, flow, random_settings, run
from tests.support.recovery import UNLIMITED

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


@pytest.mark.parametrize("beside", [0, 1])
def test_the_version_that_scored_best_is_kept_also_where_its_score_comes_after_later_ones(
    beside: int, tmp_path: Path
) -> None:
    ran = run(flow(replace(SLOW, save_every=1, judge_s=0.7, beside=beside, peak=4)), tmp_path)
    best = best_version(tmp_path / "checkpoints")
    assert best is not None
    assert (best.version, best.by, best.score) == (4, "heldout", 1.0)
    kept = [path.name for path in complete_checkpoints(tmp_path / "checkpoints")]
    assert kept == ["step-000004", "step-000011", "step-000012"]
    saved = {notice.text.split()[1]: notice.time_s for notice in ran.notices if " saved in " in notice.text}
    scored = {each.version: each.time_s for each in ran.evaluations}
    assert (scored[4] > saved["6"]) == (beside == 1)  # its score came when newer ones were there
    assert any("version 4 is the best so far: heldout 1" in notice.text for notice in ran.notices)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(k, marks=pytest.mark.long) for k in range(2, 12))])
def test_whatever_the_speeds_the_best_is_kept_and_no_more_than_are_asked_for(seed: int, tmp_path: Path) -> None:
    drawn = replace(random_settings(seed), evaluate_every=1, judge_s=0.2 * (seed % 4), beside=seed % 2, peak=seed % 3)
    ran = run(flow(drawn), tmp_path)
    best = best_version(tmp_path / "checkpoints")
    assert best is not None
    scores = {each.version: each.scores[0][0] for each in ran.evaluations}
    assert best.version == min(version for version in scores if scores[version] == max(scores.values()))
    kept = [version_of(path) for path in complete_checkpoints(tmp_path / "checkpoints")]
    saved = {version: score for version, score in scores.items() if version}
    assert {*kept} == {drawn.steps - 1, drawn.steps, best_of(saved)} - {0}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(k, marks=pytest.mark.long) for k in range(2, 24))])
def test_whoever_dies_the_best_is_kept_and_versions_that_are_made_again_are_scored_again(
    seed: int, tmp_path: Path
) -> None:
    settings = replace(SLOW, save_every=1 + seed % 3, evaluate_every=1 + seed % 2, judge_s=0.3, beside=seed % 2, peak=4)
    chaos = Chaos(seed, deaths=6, mean_s=2.0, loss=0.02, fatal=0.4)
    ran = run(flow(settings), tmp_path, link=chaos.link, chaos=chaos.strike, max_restarts=UNLIMITED)
    assert chaos.struck
    rated, best = read_rated(tmp_path / "checkpoints"), best_version(tmp_path / "checkpoints")
    assert rated is not None
    assert best is not None
    assert rated.scores == {version: 1 / (1 + abs(version - 4)) for version in rated.scores}
    asked = {version for version in range(13) if version % settings.evaluate_every == 0}
    assert {12} <= {*rated.scores} <= asked
    if missing := asked - {*rated.scores}:  # whose evaluation a death cut off
        said = [notice.text for notice in ran.notices if "no score" in notice.text or "not evaluated" in notice.text]
        assert all(any(f"{version}" in text for text in said) for version in missing)
    assert best.version == best_of(rated.scores)
    saved = {version_of(path) for path in complete_checkpoints(tmp_path / "checkpoints")}
    assert saved == {12, max(saved - {12}), best_of({v: s for v, s in rated.scores.items() if v in saved})}
    assert not best.checkpoint or not damage(best.checkpoint)
    assert len({step.version for step in ran.steps}) == 12


def test_further_sets_are_scored_beside_the_held_out_prompts_and_told_by_name(tmp_path: Path) -> None:
    ran = run(flow(replace(SLOW, judge_s=0.0, steps=2, beside=1, sets={"hard": "3", "easy": "2"})), tmp_path)
    assert [(each.version, each.scores, each.sets) for each in ran.evaluations] == [
        (version, [[1.0]] * 4, {"hard": [[1.0]] * 3, "easy": [[1.0]] * 2}) for version in (0, 2)
    ]
    line = evaluation_line(ran.evaluations[0])
    assert line.startswith("held-out score 1.000 +- 0.000 (4 prompts), hard 1.000 +- 0.000 (3 prompts), easy 1.000")
    written = msgspec.json.encode(row_of(ran.evaluations[0]))
    assert [*events_in([written])] == [ran.evaluations[0]]


def test_a_benchmark_s_score_is_told_with_its_interval() -> None:
    bounds = Bounds(value=0.4, low=0.125, high=0.75, num=5, method="wilson")
    told = Evaluation(version=3, time_s=1.0, scores=[], completions=[], tasks={"mine/acc": bounds})
    assert evaluation_line(told) == "mine/acc 0.4000 [0.1250, 0.7500] (5 items) at version 3"
    assert [*events_in([msgspec.json.encode(row_of(told))])] == [told]
    assert figures_of(told) == {"tasks.mine/acc": 0.4, "version": 3}
    shown = heldout({3: msgspec.structs.replace(told, scores=[[1.0]])})
    assert shown is not None
    assert ("mine/acc, version 3", "0.4", "0.125 to 0.75") in shown.rows
    view = RunView()
    view.fold([told])
    assert "  mine/acc, version 3  0.4000 [0.1250, 0.7500]  5 items" in report(view, Ending(name="run"))
