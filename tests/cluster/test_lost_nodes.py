"""A machine of a cluster that dies, comes back, or loses its link: runs on fake engines whose generator is on it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.runs.verify import verify_run
from flowrl.telemetry.report import read_ending
from tests.support.cluster import machines
from tests.support.clustered import FLEET, Running, steps_of, told, until_step

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.cluster import Machine

pytestmark = [pytest.mark.slow, pytest.mark.ray]


LINK_LOST_S = 75.0
# Ray's own patience with a silent node, which is a minute; what follows is the same.
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000", "RAY_health_check_failure_threshold": "4",
}  # fmt: skip


def start(machine: Machine, disk: Path, *, address: str = "", **settings: object) -> Running:
    return Running(machine, disk / "log", "run", FLEET, "--address", address or machine.ray, "--name", "run",
                   "--runs-dir", disk, *told({"learner_cpus": 1, **settings}))  # fmt: skip


def stop(run: Running, run_dir: Path, *, rollbacks: int) -> None:
    run.press_ctrl_c()
    assert run.ends(90.0) == 0, run.text
    verdict = verify_run(run_dir)
    found = verdict.lost, verdict.duplicated, verdict.over_stale  # fake engines publish no digests, so it is not clean
    assert not any(found), verdict
    assert verdict.rollbacks == rollbacks, run.text
    assert not [line for line in run.text.splitlines() if "raylet" in line or "\x1b[" in line], run.text


@pytest.mark.long
def test_a_node_that_dies_is_named_and_waited_for_and_taken_up_when_another_joins(disk: Path) -> None:
    with machines(3) as (head, second, third):
        head.start_ray()
        second.start_ray(head)
        run = start(head, disk)
        until_step(run, disk / "run", 6)
        second.stop()
        run.until("node 10.77.0.2: is lost, with generator.0", within_s=240.0)
        third.start_ray(head)
        run.until("node 10.77.0.3: has joined", "generator.0: is on 10.77.0.3 now", within_s=90.0)
        until_step(run, disk / "run", steps_of(disk / "run") + 4)
        stop(run, disk / "run", rollbacks=0)


@pytest.mark.long
@pytest.mark.parametrize("seconds", [8.0, 20.0])
def test_a_lost_link_costs_time(disk: Path, seconds: float) -> None:
    with machines(2) as (head, second):
        head.start_ray()
        second.start_ray(head)
        run = start(head, disk, heartbeat_timeout_s=40)
        until_step(run, disk / "run", 6)
        second.cut()
        time.sleep(seconds)
        second.restore()
        until_step(run, disk / "run", steps_of(disk / "run") + 8)
        stop(run, disk / "run", rollbacks=0)


@pytest.mark.long
@pytest.mark.parametrize("holds", ["generator.0", "learner.0"])
def test_a_link_that_is_lost_for_longer_than_ray_waits_is_waited_for_and_ctrl_c_is_heard(
    disk: Path, holds: str
) -> None:
    """Ray takes the node for dead, which it learns when it is back: whoever started it starts it again."""
    with machines(2) as (head, second):
        head.start_ray(environment=QUICK)
        raylet = second.start_ray(head)
        home = {"cluster.home": second.address, "learner_cpus": 1} if holds == "learner.0" else {}
        run = start(head, disk, heartbeat_timeout_s=1800, **home)
        until_step(run, disk / "run", 6)
        second.cut()
        run.until("node 10.77.0.2: is lost, with ", holds, within_s=240.0)
        time.sleep(LINK_LOST_S)
        run.until("waiting at most" if holds == "learner.0" else f"{holds}: has no process yet", within_s=120.0)
        second.restore()
        raylet.wait(60)  # it ends by itself, since it is taken for dead
        second.start_ray(head)
        until_step(run, disk / "run", steps_of(disk / "run") + 8, within_s=240.0)
        second.cut()
        time.sleep(2.0)
        stop(run, disk / "run", rollbacks=1 if holds == "learner.0" else 0)


@pytest.mark.long
def test_ctrl_c_is_heard_when_the_only_generators_machine_is_gone_for_good(disk: Path) -> None:
    with machines(2) as (head, second):
        head.start_ray()
        second.start_ray(head)
        run = start(head, disk)
        until_step(run, disk / "run", 6)
        second.stop()
        run.until("generator.0: has no process yet: it needs 1 CPU; the nodes have 10.77.0.1 1 CPU", within_s=300.0)
        stop(run, disk / "run", rollbacks=0)


@pytest.mark.long
def test_the_heads_death_ends_the_run_in_order_and_it_goes_on_in_another_cluster(disk: Path) -> None:
    with machines(3) as (head, second, third):
        head.start_ray(cpus=0)
        second.start_ray(head, cpus=2)
        run = start(second, disk, address=head.ray)
        until_step(run, disk / "run", 6)
        head.stop()
        assert run.ends(180.0) == 1, run.text
        said = [line for line in run.text.splitlines() if line.startswith("flowrl: ")]
        assert len(said) == 1, run.text
        assert "resume" in said[0], said
        ending = read_ending(disk / "run")
        assert ending is not None
        assert ending.failure, "the report says why"
        before = steps_of(disk / "run")
        third.start_ray(cpus=2)
        again = Running(third, disk / "log2", "run", FLEET, "--address", third.ray, "--resume", disk / "run")
        until_step(again, disk / "run", before + 4)
        stop(again, disk / "run", rollbacks=1)


@pytest.mark.long
def test_a_node_that_joins_is_used_where_a_range_of_replicas_is_given(disk: Path) -> None:
    with machines(3) as (head, second, third):
        head.start_ray()
        second.start_ray(head)
        most: dict[str, Any] = {"cluster.most.generator": 3}
        run = start(head, disk, **most)
        until_step(run, disk / "run", 4)
        assert "generator.1" not in run.text
        third.start_ray(head)
        room = "generator: the cluster has room for {} of at most 3"
        run.until("node 10.77.0.3: has joined", room.format(2), "generator.1: joins", within_s=90.0)
        until_step(run, disk / "run", steps_of(disk / "run") + 8)
        third.stop()
        run.until("node 10.77.0.3: is lost", room.format(1), within_s=240.0)
        until_step(run, disk / "run", steps_of(disk / "run") + 4)
        stop(run, disk / "run", rollbacks=0)
