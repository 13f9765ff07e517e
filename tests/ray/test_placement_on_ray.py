"""Where processes land on a Ray that is told of GPUs: whole devices, sharers on those of their host, no endless wait.

Ray's GPUs are numbers to it: what a process sees is looked at, and nothing computes on them.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from flowrl.errors import ResourceError
from flowrl.graph.graph import ClusterConfig
from flowrl.runtime.cluster import Cluster
from flowrl.runtime.ray import RayWorkers, run_ray
from flowrl.runtime.rundir import Claim
from flowrl.runtime.supervisor import Options, Start
from tests.support.devices import machine
from tests.support.seen_gpus import seated

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def test_gpus_are_reserved_whole_and_shared_whole_and_what_has_no_room_is_named(tmp_path: Path) -> None:
    graph = seated(
        generator={"gpus": 2, "tensor_parallel": 2, "replicas": 1, "layout": "processes"},
        learner={"gpus": 1},
        scorer={"share": "learner"},
    )
    many = seated(generator={"gpus": 1, "replicas": 4}, learner={"gpus": 1})
    run_dir, other = tmp_path / "run", tmp_path / "other"
    for each in (run_dir, other):
        each.mkdir()

    async def body(cluster: Cluster) -> None:
        with contextlib.closing(Claim(other)) as claimed:
            options = Options(run_dir=other, placing=ClusterConfig(place_timeout_s=3.0))
            workers = RayWorkers(many, options, cluster, claimed)
            with pytest.raises(ResourceError, match=r"no room for .*\(1 GPU\).*; the nodes have 127\.0\.0\.1 .*3 GPU"):
                await workers.open(Start())
            await workers.close()
        await run_ray(graph, Options(run_dir=run_dir), cluster)

    with Cluster(graph, None, machine=machine(80, 80, 80)) as cluster:
        asyncio.run(body(cluster))
    seen = {path.name: path.read_text() for path in (run_dir / "seen").iterdir()}
    assert len(seen["generator.0"].split(",")) == 2
    assert {*seen["generator.0"].split(","), seen["learner.0"]} == {"0", "1", "2"}
    assert [seen[f"scorer.{i}"] for i in range(3)] == [seen["learner.0"]] * 3


def test_a_machine_with_fewer_gpus_than_the_graph_asks_for_is_refused_before_ray_starts(tmp_path: Path) -> None:
    cluster = Cluster(seated(learner={"gpus": 1}, generator={"gpus": 1}), None, machine=machine(80))
    with pytest.raises(ResourceError, match=r"2 GPUs asked for \(generator 1, learner 1\), 1 present"):
        cluster.__enter__()
