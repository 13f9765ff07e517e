"""A whole run of the critic-less graph on real vLLM and DeepSpeed: an adapter, and groups that are learned twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flowrl.runs.verify import verify_run
from flowrl.telemetry.records import read_digests
from tests.support.command import ROOT, flowrl, plain_data, tiny_settings

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def test_the_critic_less_graph_trains_an_adapter_and_replays(tiny: Path, tmp_path: Path) -> None:
    graph = ROOT / "graphs" / "group_async.py"
    more = {"learner.lora.rank": 4, "replay.ratio": 1.0, "algorithm": "flowrl.algorithms.rloo:RLOO", "runtime": "local"}
    settings = tiny_settings(tiny, graph, steps=2, **plain_data(tmp_path), **more)
    result = flowrl("run", graph, "--name", "run", *settings, cwd=tmp_path)
    assert result.code == 0, result.text  # vLLM takes the adapters: each version has proved its canary
    assert "2 of 2 steps" in result.text
    assert (tmp_path / "runs" / "run" / "checkpoints" / "step-000002" / "adapter" / "adapter_config.json").is_file()
    versions = read_digests(tmp_path / "runs" / "run")
    assert all(".lora_" in name for tensors in versions.values() for name in tensors), "nothing else has travelled"
    assert len(versions) == 3
    verdict = verify_run(tmp_path / "runs" / "run")
    assert verdict.is_clean
    assert verdict.counts["replayed"] == 4, "the first step's groups, along with the second's"
