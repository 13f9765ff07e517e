"""Every shipped graph finds its place on one to sixteen GPUs; what the user sets stays; a GPU is shared whole."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.errors import ConfigError, FlowrlError, ResourceError
from flowrl.graph.program import load_program
from flowrl.runtime import placement
from flowrl.runtime.local import check_local
from flowrl.runtime.placement import check_resources, places
from flowrl.stages.learner import Learner
from flowrl.stages.reward import Reward
from tests.support.devices import machine

if TYPE_CHECKING:
    from flowrl.graph.program import Program

GRAPHS = Path(__file__).resolve().parents[3] / "graphs"


def placed(graph: str, num_gpus: int, *overrides: str, **how: Any) -> Program:
    placing = partial(placement.place, machine=machine(*[80] * num_gpus, **how))
    return load_program(GRAPHS / f"{graph}.py", overrides=overrides, placing=placing)


def seats(program: Program, node: str) -> list[tuple[int, ...]]:
    return [place.seats for place in places(program.graph) if place.node == node]


def test_generators_on_one_gpu_share_its_memory_and_cores_are_not_reserved_beside_gpus() -> None:
    doubled = placed("ppo_async", 2, "generator.share=learner", "generator.replicas=4", cores=1)
    single = placed("ppo_async", 2, "generator.share=learner", "generator.replicas=2", cores=1)
    of_one = single.settings.generator.gpu_memory_utilization
    assert doubled.settings.generator.gpu_memory_utilization == pytest.approx(of_one / 2)
    given = placed("ppo_async", 3, "generator.gpus=1", "learner.gpus=1", "learner.ranks=2", cores=1)
    check_resources(given.graph, machine(80, 80, 80, cores=1))
    assert all(place.cpus == 0 for place in places(given.graph) if place.gpus)


@pytest.mark.parametrize(
    ("graph", "num_gpus"),
    [*((path.stem, 8) for path in sorted(GRAPHS.glob("*.py"))), *(("ppo_async", n) for n in (1, 2, 3, 16))],
)
def test_every_graph_places_itself_and_uses_every_gpu(graph: str, num_gpus: int) -> None:
    program = placed(graph, num_gpus)
    check_resources(program.graph, machine(*[80] * num_gpus))
    assert sum(place.gpus for place in places(program.graph)) == num_gpus
    for place in places(program.graph):
        config: Any = program.graph.nodes[place.node].config
        if hasattr(config, "engine"):
            assert place.seats, f"{place.node} computes on a GPU"
            assert config.threads >= 1


def test_two_or_more_gpus_are_split_and_one_is_shared_whole() -> None:
    one, eight = placed("ppo_async", 1), placed("ppo_async", 8)
    assert (one.settings.learner.gpus, one.settings.generator.share, one.settings.generator.gpus) == (1, "learner", 0)
    assert {name: seats(one, name) for name in ("learner", "generator", "critic")} == {
        "learner": [(0,)],
        "generator": [(0,)],
        "critic": [(0,)],
    }
    assert one.settings.generator.gpu_memory_utilization < 0.5 < eight.settings.generator.gpu_memory_utilization
    assert seats(eight, "generator") == [(0,), (1,), (2,), (3,)]
    assert seats(eight, "learner") == seats(eight, "critic") == seats(eight, "reference") == [(0,), (1,), (2,), (3,)]


def test_what_is_left_to_auto_is_settled_and_written_with_the_settings() -> None:
    s = placed("group_async", 2, "learner.gpus=auto", "generator.kv_cache_bytes=auto").settings
    generator, learner = s.generator, s.learner
    assert (generator.layout, generator.max_running, generator.kv_cache_bytes) == ("processes", 256, 0)
    assert (learner.gpus, learner.threads, learner.overlap_comm) == (1, 8, True)
    without = placed("group_async", 0, "generator.layout=auto", "learner.overlap_comm=auto").settings
    assert (without.generator.layout, without.generator.max_running) == ("thread", 64)
    assert (without.learner.gpus, without.learner.overlap_comm, without.learner.attention) == (0, False, "varlen")
    with pytest.raises(ConfigError, match=r"learner\.lr"):
        placed("group_async", 2, "learner.lr=auto")


@pytest.mark.parametrize(
    ("num_gpus", "overrides", "expected"),
    [
        (8, ["learner.ranks=2"], {"learner": 2, "generator": 6}),
        (8, ["generator.replicas=2"], {"learner": 6, "generator": 2}),
        (8, ["generator.tensor_parallel=4"], {"learner": 4, "generator": 4}),
        (8, ["generator.gpus=2"], {"learner": 6, "generator": 2}),
        (8, ["generator.tensor_parallel=8"], {"learner": 8, "generator": 0}),
        (8, ["learner.gpus=1", "learner.ranks=1"], {"learner": 1, "generator": 7}),
        (4, ["critic.gpus=1", "critic.share="], {"critic": 1, "learner": 1, "generator": 2}),
        (2, ["learner.gpus=0", "critic.gpus=0", "reference.gpus=0"], {"learner": 0, "generator": 2}),
    ],
)
def test_what_the_user_sets_stays_and_the_rest_is_placed_around_it(
    num_gpus: int, overrides: list[str], expected: dict[str, int]
) -> None:
    program = placed("ppo_async", num_gpus, *overrides)
    check_resources(program.graph, machine(*[80] * num_gpus))
    found = {node: sum(p.gpus for p in places(program.graph) if p.node == node) for node in expected}
    assert found == expected
    for override in overrides:
        path, _, text = override.partition("=")
        node, _, name = path.partition(".")
        assert str(getattr(getattr(program.settings, node), name)) == text


def test_a_split_model_sees_as_many_whole_gpus_as_it_has_parts() -> None:
    apart = placed("group_async", 8, "generator.tensor_parallel=2")
    assert seats(apart, "generator") == [(0, 1), (2, 3)]
    together = placed("group_async", 8, "generator.tensor_parallel=4", "generator.share=learner")
    assert seats(together, "generator") == [(0, 1, 2, 3)]
    assert seats(together, "learner") == [(i,) for i in range(8)]


AGAIN = """
import resource, torch
from flowrl.engines.aside import give_back_to_system
def held():
    return 4096 * int(open("/proc/self/statm").read().split()[1])
def once():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt, torch.ones(25_000_000).sum()
once()
(before, _), (after, _), kept = once(), once(), held()
give_back_to_system()
print(after - before, kept - held())
"""


@pytest.mark.slow
def test_a_learner_on_a_cpu_keeps_what_it_frees_and_gives_it_back_when_it_is_told_to() -> None:
    found = placement.environment(Learner.Config(), devices=[])
    ran = subprocess.run(
        [sys.executable, "-c", AGAIN], env=os.environ | found, capture_output=True, text=True, check=True
    )
    num_faults, given_back = map(int, ran.stdout.split())
    assert num_faults < 1000, "100 MB are 24,000 pages"
    assert given_back > 90_000_000


def test_an_allocator_of_the_users_stays_and_only_what_computes_on_a_cpu_has_ours() -> None:
    assert placement.keeping_memory({"LD_PRELOAD": "/usr/lib/libtcmalloc.so.4"}) == {}
    kept = placement.keeping_memory({"LD_PRELOAD": "/mine.so", "MALLOC_CONF": "narenas:1"})
    assert kept["LD_PRELOAD"].endswith("libjemalloc.so:/mine.so")
    assert kept["MALLOC_CONF"] == "narenas:1"
    assert "LD_PRELOAD" not in placement.environment(Learner.Config(), devices=["0"])
    assert "LD_PRELOAD" not in placement.environment(Reward.Config(), devices=[])


@pytest.mark.parametrize(("ranks", "replicas"), [(1, 4), (2, 2), (4, 1)])
def test_a_scorer_has_as_many_processes_as_its_host_has_gpus_however_it_is_split(ranks: int, replicas: int) -> None:
    sharded = ["reference.engine=flowrl.engines.deepspeed:DeepSpeedEngine", "reference.zero_stage=3"]
    program = placed("ppo_async", 8, "learner.ranks=4", f"reference.ranks={ranks}", *sharded)
    assert program.settings.reference.replicas == replicas
    assert [seat for (seat,) in seats(program, "reference")] == [0, 1, 2, 3]


def test_sharers_spread_over_the_gpus_of_their_host() -> None:
    program = placed("ppo_async", 4, "learner.ranks=4", "generator.share=learner", "generator.replicas=8")
    assert [seat for (seat,) in seats(program, "generator")] == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("num_gpus", "overrides", "words"),
    [
        (2, ["learner.gpus=2"], "learner.gpus: 2 GPUs for one rank, which computes on one; set learner.gpus=1 and"),
        (2, ["learner.ranks=16", "learner.gpus=1"], "asked for .*learner 16"),
        (0, ["learner.gpus=1"], r"1 GPU asked for \(learner 1\), none present"),
        (2, ["generator.gpus=1", "generator.tensor_parallel=2"], "1 GPUs, but a replica's model is split over 2"),
        (2, ["generator.tensor_parallel=4", "generator.share=learner"], "4 GPUs, but learner has 2"),
    ],
)
def test_more_than_is_there_is_refused_in_a_line(num_gpus: int, overrides: list[str], words: str) -> None:
    with pytest.raises((ConfigError, ResourceError), match=words) as refused:
        check_resources(placed("ppo_async", num_gpus, *overrides).graph, machine(*[80] * num_gpus))
    assert isinstance(refused.value, FlowrlError)
    assert "\n" not in str(refused.value)


def test_a_run_in_one_process_is_left_as_it_is() -> None:
    assert placed("group_async", 8, "runtime=local").settings.learner.gpus == 0


@pytest.mark.parametrize("more", ["generator.replicas=2", "evaluation.beside=1"])
def test_two_vllms_in_one_process_are_refused(more: str) -> None:
    graphs = Path(__file__).resolve().parents[3] / "graphs"

    def local(*overrides: str) -> None:
        check_local(load_program(graphs / "group_async.py", overrides=["runtime=local", *overrides]).graph)

    local()
    local(more, "generator.layout=processes")
    with pytest.raises(ConfigError, match="one process holds one vLLM of layout=thread"):
        local(more)
