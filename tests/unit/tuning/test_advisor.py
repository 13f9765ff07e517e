"""Advice from a run's own graph and profile, against costs that a reader can add up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from flowrl.graph.program import plan_of
from flowrl.tuning.advisor import advice
from tests.unit.simulation.test_run import graph, profile

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.simulation.costs import Profile

pytestmark = pytest.mark.slow


def advised(run_dir: Path, costs: Profile) -> list[str]:
    (run_dir / "profile.json").write_bytes(msgspec.json.encode(costs))
    return advice(run_dir, plan_of(graph(2)), None)


def test_a_second_generator_doubles_a_run_that_waits_for_the_first(tmp_path: Path) -> None:
    now, best = advised(tmp_path, profile(train_s=0.0))
    assert now == "simulated from this run's profile: 5 samples/s as it is"  # 2 groups of 2 in 8 tokens of 0.1 s
    assert best == "a second generator is worth +100% (--set generator.replicas=2)"


def test_no_replica_is_advised_beyond_what_the_settings_allow(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("cluster: {most: {generator: 1}}\n")
    assert advised(tmp_path, profile(train_s=0.0))[1].startswith("one more replica is worth nothing, of any node")


def test_a_run_that_waits_for_its_learner_needs_no_other_replica(tmp_path: Path) -> None:
    lines = advised(tmp_path, profile(train_s=10.0))
    assert len(lines) == 2
    assert lines[1].startswith("one more replica is worth nothing, of any node")


def test_without_a_profile_there_is_no_advice(tmp_path: Path) -> None:
    assert advice(tmp_path, plan_of(graph(2)), None) == []
