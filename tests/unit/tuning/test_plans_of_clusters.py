"""On a cluster a graph is planned for the nodes whose GPUs are alike, as on one machine; what the user sets stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from flowrl.graph.program import load_program
from flowrl.runtime.devices import Machine
from flowrl.runtime.launch import RunCompanion, placed_on
from flowrl.runtime.nodes import NodeReport, RayNode
from flowrl.runtime.placement import places
from flowrl.runtime.readiness import Survey, check_survey, equal_machines
from flowrl.runtime.rundir import as_yaml
from flowrl.runtime.scaling import MOST_REPLICAS, check_most
from flowrl.tuning.companion import Advised
from flowrl.tuning.machines import site_of
from tests.support.command import ROOT
from tests.support.devices import machine

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.graph.program import Program

GRAPH = ROOT / "graphs" / "ppo_async.py"
MODEL = ["model=meta-llama/Meta-Llama-3-8B-Instruct", "data.max_prompt_tokens=1024", "sampling.max_tokens=1024",
         "generator.max_model_len=2048", "groups_per_step=64", "generator.group_size=1"]  # fmt: skip
EIGHT, BARE = machine(*[80] * 8), Machine(cores=16, why_none="no driver: not found")


def surveyed(*machines: Machine, gpus: tuple[float, ...] = ()) -> Survey:
    """Return what nodes answer, of which Ray gives out so many GPUs: all that they have, unless said."""
    counts = gpus or [float(len(each.gpus)) for each in machines]
    nodes = [
        RayNode(id=f"n{k}", address=f"10.0.0.{k}", is_alive=True, cpus=float(each.cores), gpus=count)
        for k, (each, count) in enumerate(zip(machines, counts, strict=True), start=1)
    ]
    report = NodeReport(
        host_name="a", is_resolved=True, versions={}, machine=BARE, shm_bytes=1 << 30, time_s=0.0, seen="word",
        wrote="file", missing=[], differing=[],
    )  # fmt: skip
    reports = {
        node.address: msgspec.structs.replace(report, machine=msgspec.structs.replace(each, host_bytes=2 << 40))
        for node, each in zip(nodes, machines, strict=True)
    }
    return Survey(nodes, reports, report, dict.fromkeys(reports, 0.0), "word", [])


def planned(found: Survey | None, *settings: str, companion: RunCompanion | None = None) -> tuple[Program, list[str]]:
    said: list[str] = []
    program = load_program(GRAPH, overrides=settings)
    how = companion or RunCompanion()
    return placed_on(program, found, config=None, overrides=settings, companion=how, say=said.append), said


def reserved(program: Program) -> int:
    return sum(place.gpus for place in places(program.graph))


@pytest.mark.slow
def test_two_nodes_of_eight_are_planned_for_as_such_a_site_is() -> None:
    advised = Advised()
    program, said = planned(surveyed(BARE, EIGHT, EIGHT), *MODEL, companion=advised)
    lines = [*advised.foretell(program, ROOT / "none")]
    generator, learner = program.graph.nodes["generator"].config, program.graph.nodes["learner"].config
    assert reserved(program) == 16
    assert learner.gpus == 1
    assert learner.ranks > 1
    assert generator.replicas * generator.gpus + learner.ranks <= 16
    assert lines[0].startswith("placement: ")
    assert said == program.settings.cluster.nodes == []


def test_what_the_user_sets_is_kept_on_a_cluster() -> None:
    own = ["learner.gpus=1", "learner.ranks=4", "generator.gpus=2", "generator.tensor_parallel=2"]
    program, _ = planned(surveyed(EIGHT, EIGHT), *own)
    nodes = program.graph.nodes
    assert (nodes["learner"].config.ranks, nodes["generator"].config.gpus) == (4, 2)
    given, _ = planned(surveyed(EIGHT, EIGHT), *own, "placement=given")
    assert (
        given.graph.nodes["generator"].config.replicas == load_program(GRAPH).graph.nodes["generator"].config.replicas
    )


@pytest.mark.slow
def test_replicas_left_to_auto_grow_where_they_have_devices_of_their_own() -> None:
    program, _ = planned(surveyed(EIGHT, EIGHT), "generator.replicas=auto")
    assert program.graph.nodes["generator"].config.replicas == 8
    assert program.settings.cluster.most == {"generator": MOST_REPLICAS}
    program, _ = planned(surveyed(machine(80)), "generator.replicas=auto")
    assert program.graph.nodes["generator"].config.share == "learner"
    assert program.settings.cluster.most == {}
    program, _ = planned(surveyed(*[EIGHT] * 20), "generator.replicas=auto")
    check_most(program.graph, program.settings.cluster.most)


def test_nodes_of_another_kind_are_left_out_and_named() -> None:
    found = surveyed(EIGHT, machine(*[40] * 8), BARE, EIGHT)
    program, said = planned(found)
    assert reserved(program) == 16
    assert program.settings.cluster.nodes == ["10.0.0.1", "10.0.0.3", "10.0.0.4"]
    (line,) = said
    assert "the 2 nodes of 8 x Pretended (80 GiB), 64 cores" in line
    assert "10.0.0.2 has 8 x Pretended (40 GiB)" in line
    own = [f"{node}.gpus=1" for node in ("learner", "generator", "critic", "reference")]
    own = [*own, "learner.ranks=2", "critic.ranks=1"]
    program, said = planned(found, *own)
    assert said == program.settings.cluster.nodes == []


@pytest.mark.slow
def test_a_resumed_run_keeps_what_it_began_with_on_another_cluster(tmp_path: Path) -> None:
    program, _ = planned(surveyed(EIGHT, machine(*[40] * 8)))
    config = tmp_path / "settings.yaml"
    config.write_text(as_yaml(program.settings))
    resumed, said = load_program(GRAPH, config=config), []
    found = surveyed(*[machine(24)] * 3, EIGHT)
    resumed = placed_on(resumed, found, config=config, overrides=[], companion=Advised(), say=said.append)
    assert msgspec.to_builtins(resumed.settings) == msgspec.to_builtins(program.settings)
    assert said == []


@pytest.mark.slow
def test_where_no_gpu_can_be_placed_on_all_stays_as_it_was() -> None:
    for found in (None, surveyed(BARE, BARE), surveyed(BARE, gpus=(2.0,))):
        program, said = planned(found)
        assert msgspec.to_builtins(program.settings) == msgspec.to_builtins(load_program(GRAPH).settings)
        assert said == []


def test_machines_are_the_largest_group_of_equal_ones_by_what_ray_gives_out() -> None:
    machines, left_out = equal_machines(surveyed(EIGHT, machine(*[40] * 8), EIGHT, gpus=(4.0, 8.0, 4.0)))
    assert {address: len(each.gpus) for address, each in machines.items()} == {"10.0.0.1": 4, "10.0.0.3": 4}
    assert [*left_out] == ["10.0.0.2"]
    other, mixed = machine(24), machine(80, 40)
    machines, left_out = equal_machines(surveyed(machine(80, 79), machine(80, 80), other, other, mixed))
    assert [*machines] == ["10.0.0.1", "10.0.0.2"]
    assert [*left_out] == ["10.0.0.5", "10.0.0.3", "10.0.0.4"]
    assert "the parts of a split model or batch are alike" in left_out["10.0.0.5"]
    assert equal_machines(surveyed(EIGHT, gpus=(0.0,))) == ({}, {})


def test_gpus_that_cannot_be_planned_for_are_named_in_the_warning() -> None:
    old = msgspec.structs.replace(machine(80), torch_cuda="")
    found = surveyed(BARE, old, gpus=(2.0, 1.0))
    said: list[str] = []
    check_survey(found, load_program(ROOT / "graphs" / "sft.py").graph, said.append)
    (line,) = said
    assert "the cluster has 3 GPUs and the graph reserves none" in line
    assert "10.0.0.1: Ray gives out 2 GPUs, and the driver shows 0 (no driver: not found)" in line
    assert "10.0.0.2: 1 x Pretended (80 GiB), 64 cores, but torch is built for CPUs" in line


def test_a_site_of_machines_has_what_the_least_of_them_has() -> None:
    one = msgspec.structs.replace(machine(80, 80, cores=32), host_bytes=1 << 40)
    site = site_of([one, msgspec.structs.replace(one, cores=16, host_bytes=1 << 39)])
    assert (site.num_machines, site.per_machine, site.host_bytes) == (2, 2, 1 << 39)
    assert (site.machine.cores, site.whole.cores) == (16, 32)
