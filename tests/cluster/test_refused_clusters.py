"""Clusters that cannot be: one line with the node's address, and nothing started."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from perf.faults import leaping_clock
from tests.support.cluster import machines
from tests.support.clustered import FLEET, GROUP, command
from tests.support.command import tiny_settings
from tests.support.tiny import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.cluster import Machine

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.long]


def refused(machine: Machine, disk: Path, *arguments: object, **environment: str) -> str:
    """Return the one line by which a run is refused: within half a minute, on a machine that has nothing else to do."""
    log = disk / "refused"
    started = machine.start(command("run", *arguments, "--name", "run", "--runs-dir", disk), log=log, **environment)
    code = started.wait(180.0)
    said = log.read_text()
    assert code == 2, said
    assert "\x1b[" not in said, "nothing of Ray's own words reaches the terminal"
    (line,) = [line for line in said.splitlines() if line.startswith("flowrl: ")]
    return line


def test_another_token(disk: Path) -> None:
    with machines(1) as (head,):
        head.start_ray(environment={"RAY_AUTH_TOKEN": "a" * 64})
        line = refused(head, disk, FLEET, "--address", head.ray, RAY_AUTH_TOKEN="b" * 64)
        assert "refuses this machine's token" in line


def test_another_ray_on_the_head(disk: Path) -> None:
    (disk / "sitecustomize.py").write_text("import ray\n\nray.__version__ = '2.11.0'\n")
    with machines(1) as (head,):
        head.start_ray(environment={"PYTHONPATH": str(disk)})
        line = refused(head, disk, FLEET, "--address", head.ray)
        assert "2.11.0" in line


def test_a_node_without_the_model(disk: Path) -> None:
    with machines(2) as (head, second):
        head.start_ray()
        second.start_ray(head)
        model = tiny_model(head.file("/tmp") / "model")
        settings = tiny_settings(model, GROUP)
        there = [str(each).replace(str(model), "/tmp/model") for each in settings]
        line = refused(head, disk, GROUP, "--address", head.ray, *there)
        assert "node 10.77.0.2: has no /tmp/model" in line


def test_clocks_that_differ_by_minutes(disk: Path) -> None:
    ahead = leaping_clock(disk / "clock")
    if not ahead:
        pytest.skip("no C compiler is here")
    (disk / "clock").write_text("300\n")
    with machines(2) as (head, second):
        head.start_ray()
        second.start_ray(head, environment=ahead)
        line = refused(head, disk, FLEET, "--address", head.ray)
        assert re.search(r"node 10\.77\.0\.2: its clock is 30\d s ahead of this machine's", line), line
