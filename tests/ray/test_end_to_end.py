"""The whole program on real Ray, vLLM and DeepSpeed with a tiny model, as a user runs it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from flowrl.runtime.ledger import read_entries
from flowrl.runtime.verify import verify_run
from tests.support.command import GRAPH, ROOT, descendants_of, flowrl, tiny_settings

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One finished run: its directory and what it printed."""
    directory = tmp_path_factory.mktemp("end_to_end")
    result = flowrl("run", GRAPH, "--name", "end-to-end", *tiny_settings(tiny), cwd=directory)
    assert result.code == 0, result.text
    return directory / "runs" / "end-to-end", result.text


def test_the_run_reports_scores_time_and_ledger(finished: tuple[Path, str]) -> None:
    _, text = finished
    for said in ("held-out", "bottleneck", "staleness", "admitted", "learned", "checkpoint", "100"):
        assert said in text, text


def test_every_admitted_group_is_accounted_for(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    entries = read_entries(run_dir / "ledger.jsonl")
    learned = [entry.group for entry in entries if entry.event == "learned"]
    assert learned == list(range(3 * 4)), "in prompt order, each once"
    assert [entry.group for entry in entries if entry.event == "admitted"] == learned, "none that was not learned"
    verdict = verify_run(run_dir)
    assert verdict.is_clean
    assert verdict.steps == 3


def test_metrics_timeline_and_rollouts_are_written(finished: tuple[Path, str]) -> None:
    import pyarrow.parquet as pq

    run_dir, _ = finished
    steps = [row for row in read_lines(run_dir / "metrics.jsonl") if row["kind"] == "step"]
    assert [row["version"] for row in steps] == [1, 2, 3]
    metrics = steps[0]["metrics"]
    assert isinstance(metrics, dict)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["logprob_gap.max"] < 1e-4, "float32 generator and learner agree"
    timeline = json.loads((run_dir / "timeline.json").read_text())
    assert {event["ph"] for event in timeline} >= {"X", "s", "f"}
    table = pq.read_table(run_dir / "rollouts")
    assert table.num_rows == 3 * 4 * 2
    assert max(table.column("staleness").to_pylist()) <= 1


def test_the_checkpoint_loads_in_transformers(finished: tuple[Path, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_dir, _ = finished
    model = run_dir / "checkpoints" / "step-000003" / "model"
    assert {path.suffix for path in model.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}
    AutoModelForCausalLM.from_pretrained(model)
    assert AutoTokenizer.from_pretrained(model).chat_template
    assert "flowrl" in (model / "README.md").read_text()


def test_nothing_of_the_run_is_left_behind(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    assert descendants_of(str(run_dir)) == []
    assert not [path for path in Path("/dev/shm").iterdir() if run_dir.name in path.name]


def test_several_replicas_and_ranks_train_together(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        tiny,
        steps=2,
        **{
            "generator.replicas": 2,
            "generator.cpus": 0.5,
            "reward.replicas": 2,
            "learner.ranks": 2,
            "learner.cpus": 0.5,
            "learner.zero_stage": 3,  # the other stages with two ranks: tests/contracts/test_training_engines.py
        },
    )
    result = flowrl("run", GRAPH, "--name", "run", *settings, cwd=tmp_path)
    assert result.code == 0, result.text
    assert "generator.1" in (tmp_path / "runs" / "run" / "timeline.json").read_text()


def test_the_critic_less_graph_trains(tiny: Path, tmp_path: Path) -> None:
    graph = ROOT / "graphs" / "group_async.py"
    settings = tiny_settings(tiny, graph, steps=2, **{"reward.function": "flowrl.rewards.verify:exact_answer"})
    result = flowrl(
        "run", graph, "--name", "run", *settings, "--set", "algorithm=flowrl.algorithms.rloo:RLOO", cwd=tmp_path
    )
    assert result.code == 0, result.text
    assert "2 of 2 steps" in result.text
