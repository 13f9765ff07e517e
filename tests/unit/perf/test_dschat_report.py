"""From a run's events to the steps, from the steps to the causes of a gain, from those to the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import yaml

from flowrl.graph.program import load_program
from flowrl.simulation.costs import DecodeCost
from flowrl.telemetry.events import Event, Span, Step
from perf.dschat import _overrides_of
from perf.dschat_gains import busy_share, causes, ceilings, mean
from perf.dschat_report import Measured, Results, Setting, markdown, read_results
from perf.dschat_runs import GRAPH, SYSTEMS, System, joined, settings, step_times, without
from perf.dschat_workload import StepTimes, Workload

if TYPE_CHECKING:
    from pathlib import Path

WORK = Workload(groups=1, group_size=2, warmup=1, steps=1, reward_model="rm", cores=2)


def times(wall: float, generation: float, scoring: float, training: float, sync: float = 0.0) -> StepTimes:
    other = max(0.0, wall - generation - scoring - training - sync)
    return StepTimes(wall_s=wall, generation_s=generation, sync_s=sync, scoring_s=scoring, training_s=training,
                     other_s=other, samples=8, tokens=80, lengths=(10,) * 8)  # fmt: skip


def span(name: str, start_s: float, end_s: float, group: int | None = None, **args: Any) -> Span:
    groups = [] if group is None else [group]
    return Span(node="any", replica=0, name=name, start_s=start_s, end_s=end_s, groups=groups, args=args)


def update(version: int, time_s: float) -> Step:
    return Step(version=version, num_steps=3, time_s=time_s, metrics={"samples": 2, "tokens": 7})


def test_a_run_s_steps_are_what_its_timeline_shows():
    events: list[Event] = [
        update(1, 10.0),
        span("publish v1", 10.0, 12.0),
        span("weight update v1", 10.5, 12.0, pause_s=0.5),
        span("generate", 12.0, 16.0, 1, lengths=[3, 4]),
        span("score", 15.0, 17.0, 1),  # one second beside generation
        span("value", 17.0, 18.0, 1),
        span("critic step 2", 18.5, 19.0),
        span("step 1", 18.0, 20.0, 1),
        update(2, 20.0),
    ]
    (step,) = step_times(events, WORK)
    assert (step.wall_s, step.sync_s, step.generation_s, step.scoring_s, step.training_s) == (10, 2, 4, 3, 2)
    assert (step.other_s, step.overlap_s) == (0, 1)
    assert step.lengths == (3, 4)


def test_a_generator_that_pauses_for_weights_is_not_generating():
    events: list[Event] = [
        update(1, 0.0),
        span("generate", 0.0, 10.0, 1, lengths=[1, 1]),
        span("weight update v1", 2.0, 6.0, pause_s=1.0),
        span("step 1", 0.0, 5.5, 1),
        update(2, 10.0),
    ]
    (step,) = step_times(events, WORK)
    assert (step.generation_s, step.training_s, step.sync_s) == (9.0, 5.5, 0.5)  # half of the pause is hidden


def test_joined_and_without_keep_what_they_should():
    assert joined([(0, 2), (1, 5), (7, 9), (20, 30)], (1, 8)) == [(1, 5), (7, 8)]
    assert without([(0, 9), (10, 12)], [(2, 3), (8, 11)]) == [(0, 2), (3, 8), (11, 12)]
    assert without([(0, 4)], [(0, 4)]) == []


def test_the_busy_share_of_a_batch_by_slots_and_by_costs():
    assert busy_share([2, 2, 8]) == 0.5
    assert busy_share([2, 2, 8], DecodeCost(step_s=3.0, sample_s=1.0)) == pytest.approx(2 / 3)
    assert busy_share([5, 5]) == 1.0


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_causes_add_up_to_the_difference(share: float):
    slow, fast = times(10.0, 5.0, 2.0, 2.0, 0.5), times(6.0, 5.5, 1.5, 3.0)
    found = causes(slow, fast, share)
    assert sum(found.values()) == pytest.approx(4.0)
    assert found["overlap"] == pytest.approx(4.0)  # 10 seconds of work in 6
    assert found["long tail"] == pytest.approx((1 - share) * 5.0)


def test_the_ceiling_says_where_asynchrony_cannot_win():
    lost, won = ceilings(times(9.0, 4.0, 2.0, 6.0), times(12.5, 4.0, 2.0, 6.0, 0.5), times(6.0, 2.0, 1.0, 3.0), 1.0)[
        ::-1
    ]
    assert lost.name == "colocated"
    assert (lost.least_s, lost.best_s, lost.serial_s) == (8.0, 6.0, 6.0)
    assert "Asynchrony cannot win here" in lost.verdict()
    assert won.allowed == pytest.approx(12.5 / 8.0)
    assert won.gained == pytest.approx(12.5 / 9.0)
    assert "cannot win" not in won.verdict()


def test_the_mean_keeps_the_identity_of_a_step():
    found = mean([times(10.0, 5.0, 2.0, 2.0), times(6.0, 5.0, 2.0, 2.0)])
    assert (found.wall_s, found.overlap_s, found.samples) == (8.0, 1.5, 8)


def test_every_system_and_every_pair_is_in_the_tables_and_json_gives_them_again():
    systems = (
        Measured(name="DSChat-style, P = 256", kind="baseline", steps=(times(30.0, 5.0, 10.0, 15.0),), settings={}),
        Measured(name="colocated", kind="colocated", steps=(times(6.0, 2.0, 1.0, 3.0),), settings={"set": []}),
        Measured(name="disaggregated", kind="disaggregated", steps=(times(12.0, 4.0, 2.0, 6.0),), settings={}),
        Measured(name="asynchronous", kind="asynchronous", steps=(times(8.0, 4.0, 2.0, 6.0),), settings={}),
    )
    results = Results(
        machine="m", versions={"torch": "2"}, command="c", settings=(Setting(work=WORK, systems=systems),)
    )
    text = markdown(results)
    assert "| asynchronous | 8.00 (8.00 to 8.00), 1 steps | 1.00 (median" in text
    assert "| 3.75 |" in text  # over the baseline
    for pair in ("colocated over DSChat", "asynchronous over colocated", "asynchronous over disaggregated"):
        assert pair in text
    assert "Asynchrony cannot win here" in text
    assert markdown(read_results(msgspec.json.encode(results))) == text


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_system_s_settings_make_a_graph(system: System, tmp_path: Path):
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(settings(WORK, system)))
    program = load_program(GRAPH, config=config)
    made = program.settings
    assert made.max_staleness == (1 if system == "asynchronous" else 0)
    assert made.generator.threads == (2 if system == "colocated" else 1)
    assert (made.algorithm.options["kl"], made.learner.schedule.kind) == ({"coef": 0.1}, "constant")
    assert type(program.graph.nodes["reward_model_0"]).__name__ == "RewardModel"


def test_overrides_are_for_every_system_or_for_one():
    given = ["learner.lr=1", "asynchronous:generator.threads=2", "reward.function=mine:score"]
    assert _overrides_of(given, "asynchronous") == ["learner.lr=1", "generator.threads=2", "reward.function=mine:score"]
    assert _overrides_of(given, "colocated") == ["learner.lr=1", "reward.function=mine:score"]
