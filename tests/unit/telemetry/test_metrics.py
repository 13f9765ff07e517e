"""metrics.jsonl: a line for each figure, readable at any moment."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from flowrl.telemetry.metrics import MetricsFile, read_evaluations
from tests.unit.telemetry.streams import evaluation, notice, random_run, span, status, step

if TYPE_CHECKING:
    from pathlib import Path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_kind_of_line_is_there_as_soon_as_its_event(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = MetricsFile(path)
    sink.consume([step(3, at=9.0, staleness=(0, 1, 1), reward__mean=0.5), span("a", "b", 0, 1)])
    assert lines(path) == [
        {"kind": "step", "version": 3, "num_steps": 40, "time_s": 9.0, "metrics": {"reward.mean": 0.5},
         "staleness": {"0": 1, "1": 2}}
    ]  # fmt: skip
    sink.consume([evaluation(3, [[0.0, 1.0], [1.0, 1.0]]), notice("slow"), status(at=10.0), status(at=11.0, done=4)])
    assert [line["kind"] for line in lines(path)] == ["step", "evaluation", "notice"]
    sink.close()
    assert (lines(path)[1]["mean"], lines(path)[1]["num_prompts"]) == (0.75, 2)
    assert [(line["kind"], line["done"]) for line in lines(path)[3:]] == [("status", 4)]


def test_nan_is_written_as_null(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "metrics.jsonl")
    sink.consume([step(1, at=1.0, loss=math.nan)])
    sink.close()
    assert lines(tmp_path / "metrics.jsonl")[0]["metrics"] == {"loss": None}


def test_a_resumed_run_appends_after_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    first.consume([evaluation(0, [[0.5]])])
    first.close()
    path.write_text(path.read_text() + '{"kind": "st')
    second = MetricsFile(path)
    second.consume([step(2, at=1.0)])
    second.close()
    assert json.loads(path.read_text().splitlines()[-1])["version"] == 2
    assert read_evaluations(path) == [evaluation(0, [[0.5]])]


def test_a_whole_run_reads_back(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "metrics.jsonl")
    sink.consume(random_run(0))
    sink.close()
    kinds = [line["kind"] for line in lines(tmp_path / "metrics.jsonl")]
    assert kinds == ["step"] * 6 + ["status"] * 2
