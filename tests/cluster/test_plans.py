"""A graph on a cluster with GPUs, which are pretended: what `check` and `run` make of what real nodes of Ray answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.cluster import machines
from tests.support.clustered import FLEET, GROUP, command, placed
from tests.support.command import ROOT, tiny_settings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.support.cluster import Machine

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.long]

# In the command and in Ray's processes: two GPUs on every machine, of 40 GiB on the third, and a torch for them.
PRETENDED = """
import socket, sys
from flowrl.runtime import devices
from tests.support.devices import PretendedNvml

devices.cuda_of_torch = lambda: "13.0"
sys.modules["pynvml"] = PretendedNvml([40.0 if socket.gethostname() == "machine3" else 80.0] * 2)
"""


def said_of(machine: Machine, disk: Path, arguments: Sequence[object]) -> tuple[int, str]:
    started = machine.start(command(*arguments), PYTHONPATH=f"{ROOT}:{disk}")
    said, _ = started.communicate(timeout=180.0)
    return started.returncode, said


def test_the_gpus_of_equal_nodes_are_planned_for_and_others_left_out(model: Path, disk: Path) -> None:
    (disk / "sitecustomize.py").write_text(PRETENDED)
    with machines(3) as (head, second, third):
        head.start_ray(gpus=2)
        second.start_ray(head, gpus=2)
        third.start_ray(head, gpus=2)
        asked = [GROUP, "--address", head.ray, *tiny_settings(model, GROUP)]
        code, said = said_of(head, disk, ["check", *asked])
        assert code == 0, said
        assert "placed on the 2 nodes of 2 x Pretended (80 GiB)" in said
        assert "10.77.0.3 has 2 x Pretended (40 GiB)" in said
        assert "\nplacement: " in said
        nodes = [line for line in said.splitlines() if line.startswith("node 10.77.")]
        assert ["learner" in nodes[0], len(nodes)] == [True, 2]
        code, said = said_of(head, disk, ["check", *asked, "--set", "cluster.nodes=[10.77.0.2, 10.77.0.3]"])
        assert code == 0, said
        assert "placed on the 1 node of 2 x Pretended (80 GiB)" in said


def test_the_learners_first_rank_is_on_a_node_that_may_be_used(disk: Path) -> None:
    with machines(3) as (head, second, third):
        head.start_ray()
        second.start_ray(head)
        third.start_ray(head)
        settings = ["steps=3", "cluster.nodes=[10.77.0.2, 10.77.0.3]"]
        told = [part for each in settings for part in ("--set", each)]
        code, said = head.run(command("run", FLEET, "--address", head.ray, "--runs-dir", disk, "--name", "run", *told))
        assert code == 0, said
        assert {line.partition(" on ")[2] for line in placed(said)} == {"10.77.0.2", "10.77.0.3"}
