"""Runs on two machines, in network and mount namespaces, as a user starts them: real Ray, vLLM and DeepSpeed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from flowrl.runs.verify import verify_run
from flowrl.runtime.rundir import holders
from tests.support.clustered import FLEET, GROUP, Running, command, placed
from tests.support.command import tiny_settings

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.cluster import Machine

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def test_ranks_and_generators_on_both_machines_and_code_that_only_one_has(
    pair: list[Machine], model: Path, disk: Path
) -> None:
    head = pair[0]
    user = head.file("/tmp/user")
    user.mkdir()
    (user / "graph.py").write_text(GROUP.read_text())
    (user / "my_words.py").write_text("GOOD = 'e'\n")
    (user / "my_reward.py").write_text(
        "from my_words import GOOD\n\n\ndef score(completion, **rest):\n    return float(completion.count(GOOD))\n"
    )
    settings = {
        "reward.function": "my_reward.py:score", "learner.ranks": 2, "learner.zero_stage": 3, "learner.cpus": 0.6,
        "generator.replicas": 2, "generator.cpus": 0.4,
    }  # fmt: skip
    code, said = head.run(
        command("run", "/tmp/user/graph.py", "--address", head.ray, "--name", "run", "--runs-dir", disk,
                *tiny_settings(model, GROUP, **settings)),
        within_s=240.0,
    )  # fmt: skip
    assert code == 0, said
    assert "user code: node 10.77.0.2 has no graph.py as it is here" in said
    there = {line.partition(" on ")[2]: line for line in placed(said)}
    assert "learner.0" in there["10.77.0.1"]
    assert "learner.0" in there["10.77.0.2"], "its other rank"
    assert "generator." in there["10.77.0.1"], "one generator takes its weights from shared memory"
    assert "generator." in there["10.77.0.2"], "and one by broadcast"
    assert "3 of 3 steps" in said
    verdict = verify_run(disk / "run")
    assert verdict.is_clean, verdict
    parts = sorted(path.name for path in (disk / "run" / "checkpoints" / "step-000003").rglob("*optim_states.pt"))
    assert len(parts) == 2, "each rank has saved its part, in one place"
    assert holders(disk / "run" / "lock") == []


def test_a_directory_that_one_machine_does_not_see_is_refused_by_its_address(pair: list[Machine]) -> None:
    head = pair[0]
    code, said = head.run(command("run", FLEET, "--address", head.ray, "--name", "private", "--runs-dir", "/tmp/runs"))
    assert code == 2, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("flowrl: node 10.77.0.2: does not see the run's directory"), said


@pytest.mark.long
def test_more_than_the_cluster_has_is_said_and_one_ctrl_c_ends_the_waiting(pair: list[Machine], disk: Path) -> None:
    head = pair[0]
    run = Running(head, disk / "log", "run", FLEET, "--address", head.ray, "--name", "run", "--runs-dir", disk,
                  "--set", "generators=3")  # fmt: skip
    run.until("no room for generator.")
    assert "the nodes have 10.77.0.1 1 CPU; 10.77.0.2 1 CPU" in run.text
    run.press_ctrl_c()
    assert run.ends() == 0, run.text
    head_lines = [line for line in run.text.splitlines() if "raylet" in line or "\x1b[" in line]
    assert head_lines == [], "nothing of Ray's own words reaches the terminal"


@pytest.mark.long
@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("10.77.0.1:6390", "nothing answers at 10.77.0.1:6390"),
        ("10.77.0.9:6379", "nothing answers at 10.77.0.9:6379"),
    ],
)
def test_an_address_without_a_head_is_one_line(pair: list[Machine], disk: Path, address: str, words: str) -> None:
    began_s = time.monotonic()
    code, said = pair[0].run(command("run", FLEET, "--address", address, "--name", "run", "--runs-dir", disk))
    assert code == 2, said
    assert words in said.strip().splitlines()[-1]
    assert time.monotonic() - began_s < 30.0
