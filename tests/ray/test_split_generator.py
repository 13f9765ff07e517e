"""A generator whose model is split over two processes, inside a Ray actor, where vLLM would ask Ray for places."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flowrl.runs.verify import verify_run
from flowrl.telemetry.records import read_digests
from tests.support.command import ROOT, flowrl, plain_data, tiny_settings

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.long]


def test_two_processes_serve_one_model_with_digests_and_canary(tiny: Path, tmp_path: Path) -> None:
    graph = ROOT / "graphs" / "group_async.py"
    settings = tiny_settings(tiny, graph, steps=2, **plain_data(tmp_path), **{"generator.tensor_parallel": 2})
    result = flowrl("run", graph, "--name", "run", *settings, cwd=tmp_path)
    assert result.code == 0, result.text  # every version has proved its canary in both
    assert "2 of 2 steps" in result.text
    assert len(read_digests(tmp_path / "runs" / "run")) == 3
    assert verify_run(tmp_path / "runs" / "run").is_clean
    assert "tensor_parallel: 2" in (tmp_path / "runs" / "run" / "settings.yaml").read_text()
    assert "layout: processes" in (tmp_path / "runs" / "run" / "settings.yaml").read_text()
