"""Trials: within the checks and the devices, and the same in whichever process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from flowrl.errors import FlowrlError
from flowrl.simulation.run import simulate
from flowrl.tuning.trials import Searcher, TrialPool, TuneRequest, effective, reserved, trial_pool
from tests.support.command import GRAPH
from tests.support.timed_past import SMALL, ppo, ppo_costs

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.tuning.knobs import Setting


@pytest.fixture
def request_of(tmp_path: Path) -> Any:
    path = tmp_path / "profile.json"
    path.write_bytes(msgspec.json.encode(ppo_costs()))

    def request(*overrides: str, **rest: Any) -> TuneRequest:
        return TuneRequest(graph=GRAPH, profile=path, overrides=[*SMALL, *overrides], **{"cores": 3.0, **rest})

    return request


def test_a_trial_is_what_the_simulator_says_of_the_setting(request_of: Any) -> None:
    searcher = Searcher(request_of())
    trial = searcher.measure({"max_staleness": 2}, steps=6)
    found = simulate(ppo("max_staleness=2").graph, ppo_costs(), steps=6, precision=0.02, detail="causes")
    assert (trial.samples_per_s, trial.mean_staleness) == (found.samples_per_s, found.mean_staleness)
    assert (trial.max_staleness, trial.bottleneck, trial.devices) == (2, "generator", 2.0)
    assert trial.is_measured


def test_a_look_is_shorter_and_says_so(request_of: Any) -> None:
    looked = Searcher(request_of()).look({"max_staleness": 2})
    assert looked is not None
    assert not looked.is_measured
    assert looked.bottleneck == ""


def test_less_detail_is_the_same_simulation() -> None:
    graph, costs = ppo("max_staleness=2").graph, ppo_costs()
    full, causes, speed = (simulate(graph, costs, steps=4, detail=each) for each in ("queues", "causes", "speed"))
    assert full.queues
    assert full.bottleneck == causes.bottleneck
    assert (causes.queues, speed.bottleneck, speed.shares, speed.queues) == ({}, "", {}, {})
    for less in (causes, speed):
        assert less.steps_per_s == pytest.approx(full.steps_per_s, rel=1e-9)
        assert (less.staleness, less.num_steps) == (full.staleness, full.num_steps)


@pytest.mark.parametrize(
    "setting",
    [{"generator.replicas": 3}, {"depths.nothing.here": 1}],
    ids=["four cores of three", "refused by the graph"],
)
def test_there_is_no_trial_of_a_setting_that_could_not_be_run(setting: dict[str, Any], request_of: Any) -> None:
    searcher = Searcher(request_of())
    assert searcher.look(setting) is None
    assert searcher.try_measuring(setting) is None
    assert not searcher.is_affordable(setting)
    assert TrialPool(searcher, None).look([setting, {"generator.replicas": 2}])[0].setting == {"generator.replicas": 2}


def test_a_setting_may_need_as_much_as_the_machine_has_whatever_the_graph_reserves(request_of: Any) -> None:
    searcher = Searcher(request_of(cores=0.0))  # the profile's cores, or those that the graph reserves already
    assert searcher.is_affordable({})
    assert not searcher.is_affordable({"generator.replicas": 256})


@pytest.mark.parametrize(
    ("setting", "larger"),
    [
        ({"depths.reward.rollouts": 64}, {"depths.reward.rollouts": 256}),
        ({"generator.max_groups": 64}, {"generator.max_groups": 128}),
        ({"generator.max_groups": 1, "generator.max_running": 2}, {"generator.max_running": 4}),
    ],
)
def test_limits_beyond_what_can_be_under_way_make_no_difference(
    setting: Setting, larger: Setting, request_of: Any
) -> None:
    searcher = Searcher(request_of())
    graphs = [searcher.build(each) for each in (setting, {**setting, **larger})]
    assert effective(graphs[0]) == effective(graphs[1])
    one, other = (simulate(graph, ppo_costs(), steps=6, detail="causes") for graph in graphs)
    configs: list[Any] = [graph.nodes["generator"].config for graph in graphs]
    room = [config.max_running for config in configs]
    assert one.slots["generator"] * room[0] == pytest.approx(other.slots["generator"] * room[1])
    assert one == msgspec.structs.replace(other, notes=one.notes, slots=one.slots)


@pytest.mark.parametrize(
    ("setting", "other"),
    [
        ({"depths.reward.rollouts": 1}, {"depths.reward.rollouts": 2}),
        ({"generator.max_groups": 1}, {"generator.max_groups": 2}),
        ({"generator.max_groups": 1, "generator.max_running": 1}, {"generator.max_running": 2}),
        ({"max_staleness": 1}, {"max_staleness": 2}),
    ],
)
def test_limits_that_a_run_may_reach_are_settings_of_their_own(
    setting: Setting, other: Setting, request_of: Any
) -> None:
    searcher = Searcher(request_of())
    assert effective(searcher.build(setting)) != effective(searcher.build({**setting, **other}))


def test_what_the_graph_refuses_is_raised_where_it_is_asked_for_alone(request_of: Any) -> None:
    with pytest.raises(FlowrlError):
        Searcher(request_of()).measure({"depths.nothing.here": 1})


def test_reserved_counts_replicas_and_ranks_and_nothing_that_shares() -> None:
    assert reserved(ppo("generator.replicas=3").graph) == (4.0, 0.0)
    assert reserved(ppo("learner.gpus=2", "learner.ranks=4", "learner.cpus=1").graph) == (5.0, 8.0)


@pytest.mark.slow
def test_the_same_setting_gives_the_same_trial_in_whichever_process(request_of: Any) -> None:
    request = request_of(budget=1000)
    searcher = Searcher(request)
    settings: list[Setting] = [{"max_staleness": stale, "generator.replicas": n} for stale in (0, 2) for n in (1, 2, 3)]
    with trial_pool(request, searcher) as many:
        assert many.look(settings) == TrialPool(searcher, None).look(settings)
        assert many.measure(settings[:2]) == TrialPool(searcher, None).measure(settings[:2])
