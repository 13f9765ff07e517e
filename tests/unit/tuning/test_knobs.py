"""Knobs are found in the graph: each begins as it is, none needs more devices than there are."""

from __future__ import annotations

from typing import Any

import pytest

from flowrl.errors import ConfigError
from flowrl.graph.edges import Queue
from flowrl.graph.program import get_setting
from flowrl.tuning.knobs import Knob, Setting, graph_with, knobs_of, with_setting
from flowrl.tuning.trials import reserved
from tests.support.timed_past import ppo

ON_GPUS = ("generator.gpus=1", "generator.cpus=0", "learner.gpus=1", "learner.cpus=0")


def knobs(*overrides: str, cores: float = 1e9, gpus: float = 1e9) -> dict[str, Knob]:
    program = ppo(*overrides)

    def is_affordable(setting: Setting) -> bool:
        try:
            needed = reserved(graph_with(program, setting))
        except ConfigError:
            return False
        return needed[0] <= cores and needed[1] <= gpus

    return {
        knob.name: knob for knob in knobs_of(program.settings, program.graph, cores=cores, is_affordable=is_affordable)
    }


def values(knob: Knob) -> list[Any]:
    return [option.changes[knob.name] for option in knob.options]


def test_the_first_position_is_as_it_is_and_changes_nothing() -> None:
    overrides = ("max_staleness=2", "generator.replicas=3", "generator.max_groups=5", "depths.reward.rollouts=7")
    settings = ppo(*overrides).settings
    found = knobs(*overrides)
    for knob in found.values():
        for path, value in knob.options[0].changes.items():
            assert get_setting(settings, path) in (value, None), path
    assert values(found["max_staleness"])[0] == 2
    assert values(found["generator.replicas"])[0] == 3
    assert values(found["depths.reward.rollouts"])[0] == 7


def test_every_position_is_one_that_the_graph_takes() -> None:
    program = ppo(*ON_GPUS)
    options = [option for knob in knobs(*ON_GPUS).values() for option in knob.options]
    assert len(options) > 40
    for option in options:
        graph_with(program, option.changes)


@pytest.mark.parametrize(
    ("given", "groups", "minibatches"),
    [
        (("groups_per_step=18",), 9, 3),  # the most up to 8 that divide 18 are 6, and 9 has 3
        (("groups_per_step=16",), 32, 8),
        (("groups_per_step=16", "critic.minibatches=2"), 8, 2),  # set by hand, it stays
    ],
)
def test_the_critics_minibatches_follow_the_groups_of_a_step(given, groups, minibatches) -> None:
    config: Any = graph_with(ppo(*given), {"groups_per_step": groups}).nodes["critic"].config
    assert config.minibatches == minibatches


def test_a_step_that_the_minibatches_do_not_divide_is_no_position() -> None:
    assert values(knobs("groups_per_step=16", "learner.minibatches=16")["groups_per_step"]) == [16, 32]


def test_what_changes_what_is_learned_is_marked() -> None:
    marked = {name for name, knob in knobs().items() if knob.is_batch}
    assert marked == {"groups_per_step", "generator.group_size"}


def test_only_queues_whose_depth_is_free_have_a_knob() -> None:
    graph = ppo().graph
    free = {f"depths.{graph.address(e.target)}" for e in graph.edges if isinstance(e, Queue) and e.window is None}
    found = {name for name in knobs() if name.startswith("depths.")}
    assert found == free - {"depths.evaluation.rollouts"}  # its depth is what may be in flight


def test_positions_that_need_more_devices_than_there_are_are_left_out() -> None:
    assert max(values(knobs(cores=4)["generator.replicas"])) == 6  # of half a core each, and as much for the learner
    assert max(values(knobs(*ON_GPUS, gpus=8)["generator.replicas"])) == 6
    assert set(values(knobs(cores=1.5)["generator.replicas"])) == {1, 2}, "two on the core of the one"


def test_threads_and_the_cores_reserved_for_them_have_knobs_on_cores_only() -> None:
    found = knobs(cores=4)
    assert values(found["learner.threads"]) == values(found["generator.threads"]) == [1, 2, 3, 4]
    assert values(found["learner.cpus"]) == [1.0, 0.5, 2.0, 3.0]
    assert not {"learner.threads", "learner.cpus"} & knobs(*ON_GPUS, cores=4, gpus=8).keys()


def test_a_position_counts_as_affordable_if_the_others_at_their_least_leave_room() -> None:
    wide = ("learner.ranks=4", *ON_GPUS)
    assert 6 in values(knobs(*wide, gpus=8)["generator.replicas"]), "with one rank of the learner there is room"


def test_a_scorer_may_have_its_own_gpus_or_sit_on_the_learner_s() -> None:
    place = knobs(*ON_GPUS)["critic.share"]
    assert [option.label for option in place.options] == ["on learner", "its own GPUs"]
    program = ppo(*ON_GPUS)
    assert [reserved(graph_with(program, option.changes))[1] for option in place.options] == [2, 3]
    assert "critic.share" not in knobs(), "without GPUs there is nothing to choose"


def test_a_setting_is_replaced_at_its_path_alone() -> None:
    settings = ppo().settings
    changed = with_setting(with_setting(settings, "generator.replicas", 3), "depths.reward.rollouts", 5)
    assert get_setting(changed, "generator.replicas") == 3
    assert get_setting(changed, "depths.reward.rollouts") == 5
    empty: Any = {}
    assert with_setting(with_setting(changed, "generator.replicas", 1), "depths", empty) == settings
    assert get_setting(settings, "generator.nothing.here") is None


def test_a_changed_graph_is_checked() -> None:
    with pytest.raises(ConfigError, match="is not a port that a queue leads to"):
        graph_with(ppo(), {"depths.nothing.here": 3})


def test_no_position_is_one_that_check_refuses_for_what_the_run_settings_say() -> None:
    """As many generators at most as `cluster.most` says, and somebody left to take turns with."""
    assert values(knobs("generator.replicas=2", "cluster.most.generator=3")["generator.replicas"])[:3] == [2, 1, 3]
    with pytest.raises(ConfigError, match=r"cluster\.most\.generator: is 3, but generator\.replicas=4 are started"):
        graph_with(ppo("cluster.most.generator=3"), {"generator.replicas": 4})
    turns = ppo(*ON_GPUS, "generator.share=reference", "reference.share=", "reference.gpus=1", "generator.turns=true")
    graph_with(turns, {"reference.gpus": 1})
    with pytest.raises(ConfigError, match=r"generator\.turns: .* the devices of generator"):
        graph_with(turns, {"generator.share": ""})
