"""Synchronous runs of the whole program on real vLLM and DeepSpeed: one left alone, one on Ray whose driver is killed.

The first is on the local runtime, and the second must end bit for bit like it.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.cli import main
from flowrl.runs.retrain import first_difference
from flowrl.runs.verify import verify_run
from flowrl.runtime.ledger import read_entries
from flowrl.runtime.rundir import holders
from flowrl.telemetry.metrics import read_steps
from tests.support.command import GRAPH, Result, descendants_of, flowrl, plain_data, tiny_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = [pytest.mark.slow, pytest.mark.ray]

STEPS = 6


class Pair:
    """Two runs in one directory, under settings by which every run ends with the same weights."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory = directory
        self._model = model
        self.straight = directory / "runs" / "straight"
        self.killed = directory / "runs" / "killed"
        self.resumed = Result(-1, [])

    def settings(self) -> Sequence[str]:
        # Until there is a file `go` the last version but one is not taken in, so that a run cannot end.
        held = json.dumps({"deaths": str(self.directory), "points": [f"hold:update:{STEPS - 1}"]})
        return tiny_settings(
            self._model, steps=STEPS, max_staleness=0, **plain_data(self.directory),
            **{"learner.lr": 1e-3, "critic.lr": 1e-3, "learner.save_every": 1, "critic.save_model": True,
               "generator.engine": "tests.support.dying_engines:DyingGeneration", "generator.engine_options": held},
        )  # fmt: skip

    def run(self) -> None:
        """Run one to its end; kill the driver of the other, on Ray, after its second step, and resume it."""
        go = self.directory / "go"
        go.touch()
        alone = flowrl("run", GRAPH, "--name", "straight", *self.settings(), "--set", "runtime=local",
                       cwd=self.directory)  # fmt: skip
        assert alone.code == 0, alone.text
        go.unlink()
        killed = flowrl("run", GRAPH, "--name", "killed", *self.settings(), cwd=self.directory, on_line=kill_at_two)
        assert killed.code == -signal.SIGKILL, killed.text
        while holders(self.killed / "lock"):  # what outlives its driver would go on
            time.sleep(0.05)
        go.touch()
        self.resumed = flowrl("run", GRAPH, "--resume", self.killed, cwd=self.directory)
        assert self.resumed.code == 0, self.resumed.text


def kill_at_two(line: str) -> signal.Signals | None:
    return signal.SIGKILL if line.startswith("step 2/") else None


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    pair = Pair(tmp_path_factory.mktemp("pair"), tiny)
    pair.run()
    return pair


def test_the_killed_run_ends_bit_for_bit_like_the_one_that_was_left_alone(runs: Pair) -> None:
    assert first_difference(runs.straight, runs.killed, range(STEPS)) is None
    models = [each / f"checkpoints/step-{STEPS:06d}/model/model.safetensors" for each in (runs.straight, runs.killed)]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_every_admitted_group_is_accounted_for(runs: Pair) -> None:
    entries = read_entries(runs.straight / "ledger.jsonl")
    learned = [entry.group for entry in entries if entry.event == "learned"]
    assert learned == list(range(STEPS * 4)), "in prompt order, each once"
    assert [entry.group for entry in entries if entry.event == "admitted"] == learned, "none that was not learned"
    for run_dir in (runs.straight, runs.killed):
        verdict = verify_run(run_dir)
        assert verdict.is_clean, verdict
        assert (verdict.steps, verdict.counts["learned"]) == (STEPS, STEPS * 4)


def test_the_run_reports_scores_time_and_ledger(runs: Pair) -> None:
    text = runs.resumed.text
    for said in ("held-out", "bottleneck", "staleness", "admitted", "learned", "checkpoint", "100"):
        assert said in text, text


def test_metrics_timeline_and_rollouts_are_written(runs: Pair) -> None:
    import pyarrow.parquet as pq

    steps = read_steps(runs.straight / "metrics.jsonl")
    assert list(steps) == list(range(1, STEPS + 1))
    assert not [name for step in steps.values() for name, value in step.items() if value is None], "all are finite"
    assert 0.0 < (steps[1]["logprob_gap.max"] or 0.0) < 1e-4, "float32 generator and learner agree"
    assert max(read_steps(runs.killed / "metrics.jsonl")) == STEPS  # what a killed driver had not written yet is lost
    timeline: list[dict[str, Any]] = json.loads((runs.straight / "timeline.json").read_text())
    assert {event["ph"] for event in timeline} >= {"X", "s", "f"}
    table = pq.read_table(runs.killed / "rollouts")
    assert table.num_rows == STEPS * 4 * 2
    assert set(table.column("staleness").to_pylist()) == {0}


def test_the_checkpoint_loads_in_transformers(runs: Pair) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = runs.killed / "checkpoints" / f"step-{STEPS:06d}" / "model"
    assert {path.suffix for path in model.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}
    AutoModelForCausalLM.from_pretrained(model)
    assert AutoTokenizer.from_pretrained(model).chat_template
    assert "flowrl" in (model / "README.md").read_text()


def test_the_critic_is_exported_with_its_head(runs: Pair, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    assert main(["export", str(runs.killed), str(tmp_path / "critic"), "--node", "critic"]) == 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic").score.weight.any()
    assert "flowrl.algorithms.value:ValueLoss" in (tmp_path / "critic" / "README.md").read_text()


def test_nothing_of_the_run_is_left_behind(runs: Pair) -> None:
    assert descendants_of(str(runs.killed)) == []
    assert not [path for path in Path("/dev/shm").iterdir() if "killed" in path.name]
