"""Synchronous runs of the whole program on real Ray, vLLM and DeepSpeed: one left alone, one whose driver is killed."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.cli import main
from flowrl.runs.retrain import first_difference
from flowrl.runs.verify import verify_run
from flowrl.runtime.ledger import read_entries
from tests.support.command import GRAPH, descendants_of, flowrl, tiny_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = [pytest.mark.slow, pytest.mark.ray]

STEPS = 16


@dataclass(frozen=True)
class Finished:
    run_dir: Path
    text: str  # what it printed


def synchronous_settings(model: Path) -> Sequence[str]:
    """Return settings under which every run ends with the same weights."""
    rates = {"learner.lr": 1e-3, "critic.lr": 1e-3}
    saving = {"learner.save_every": 1, "critic.save_model": True}
    return tiny_settings(model, steps=STEPS, max_staleness=0, **rates, **saving)


@pytest.fixture(scope="session")
def straight(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished run that nothing happened to."""
    directory = tmp_path_factory.mktemp("straight")
    result = flowrl("run", GRAPH, "--name", "straight", *synchronous_settings(tiny), cwd=directory)
    assert result.code == 0, result.text
    return Finished(directory / "runs" / "straight", result.text)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_reports_scores_time_and_ledger(straight: Finished) -> None:
    text = straight.text
    for said in ("held-out", "bottleneck", "staleness", "admitted", "learned", "checkpoint", "100"):
        assert said in text, text


def test_every_admitted_group_is_accounted_for(straight: Finished) -> None:
    run_dir = straight.run_dir
    entries = read_entries(run_dir / "ledger.jsonl")
    learned = [entry.group for entry in entries if entry.event == "learned"]
    assert learned == list(range(STEPS * 4)), "in prompt order, each once"
    assert [entry.group for entry in entries if entry.event == "admitted"] == learned, "none that was not learned"
    verdict = verify_run(run_dir)
    assert verdict.is_clean
    assert verdict.steps == STEPS


def test_metrics_timeline_and_rollouts_are_written(straight: Finished) -> None:
    import pyarrow.parquet as pq

    run_dir = straight.run_dir
    steps = [row for row in read_lines(run_dir / "metrics.jsonl") if row["kind"] == "step"]
    assert [row["version"] for row in steps] == list(range(1, STEPS + 1))
    metrics = steps[0]["metrics"]
    assert isinstance(metrics, dict)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["logprob_gap.max"] < 1e-4, "float32 generator and learner agree"
    timeline = json.loads((run_dir / "timeline.json").read_text())
    assert {event["ph"] for event in timeline} >= {"X", "s", "f"}
    table = pq.read_table(run_dir / "rollouts")
    assert table.num_rows == STEPS * 4 * 2
    assert set(table.column("staleness").to_pylist()) == {0}


def test_the_checkpoint_loads_in_transformers(straight: Finished) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_dir = straight.run_dir
    model = run_dir / "checkpoints" / f"step-{STEPS:06d}" / "model"
    assert {path.suffix for path in model.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}
    AutoModelForCausalLM.from_pretrained(model)
    assert AutoTokenizer.from_pretrained(model).chat_template
    assert "flowrl" in (model / "README.md").read_text()


def test_the_critic_is_exported_with_its_head(straight: Finished, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    assert main(["export", str(straight.run_dir), str(tmp_path / "critic"), "--node", "critic"]) == 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic").score.weight.any()
    assert "flowrl.algorithms.value:ValueLoss" in (tmp_path / "critic" / "README.md").read_text()


def test_nothing_of_the_run_is_left_behind(straight: Finished) -> None:
    run_dir = straight.run_dir
    assert descendants_of(str(run_dir)) == []
    assert not [path for path in Path("/dev/shm").iterdir() if run_dir.name in path.name]


def is_driver(process: Path, tmp_path: Path) -> bool:
    try:
        command = (process / "cmdline").read_bytes().split(b"\0")
        return b"flowrl.cli" in command and Path(os.readlink(process / "cwd")) == tmp_path
    except OSError:
        return False


def test_a_killed_synchronous_run_resumes_and_ends_bit_for_bit_like_one_that_was_not(
    tiny: Path, tmp_path: Path, straight: Finished
) -> None:
    run_dir = tmp_path / "runs" / "killed"

    def kill_driver(line: str) -> bool:
        if line.startswith("step 3/"):
            driver = next(p for p in Path("/proc").iterdir() if is_driver(p, tmp_path))
            os.kill(int(driver.name), signal.SIGKILL)
        return False

    killed = flowrl("run", GRAPH, "--name", "killed", *synchronous_settings(tiny), cwd=tmp_path, on_line=kill_driver)
    assert killed.code == -signal.SIGKILL
    resumed = flowrl("run", GRAPH, "--resume", run_dir, cwd=tmp_path)
    assert resumed.code == 0, resumed.text
    verdict = verify_run(run_dir)
    assert verdict.is_clean, verdict
    assert verdict.counts["learned"] == STEPS * 4
    assert first_difference(straight.run_dir, run_dir, range(STEPS)) is None
    models = [each / f"checkpoints/step-{STEPS:06d}/model/model.safetensors" for each in (run_dir, straight.run_dir)]
    assert models[0].read_bytes() == models[1].read_bytes()
