"""An asynchronous run of the whole program on real Ray, vLLM and DeepSpeed in which nearly everything dies once."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from flowrl.engines.checkpoint import checkpoint_version, newest_sound
from flowrl.runs.verify import verify_run
from tests.support.command import GRAPH, descendants_of, flowrl, plain_data, tiny_settings

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def process_of(run_dir: Path, name: str) -> int:
    """Return the process that writes a replica's log."""
    log = run_dir / "logs" / f"{name}.log"
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if Path(os.readlink(entry / "fd" / "1")) == log:
                    return int(entry.name)
            except OSError:
                continue
    raise AssertionError(f"no process of {name}")


def test_deaths_in_the_middle_of_things_cost_no_sample_and_ctrl_c_stops_in_order(tiny: Path, tmp_path: Path) -> None:
    """The learner, with whom everything starts again, waits with its death until each of the others has died alone."""
    run_dir, deaths = tmp_path / "runs" / "run", tmp_path / "deaths"
    deaths.mkdir()
    settings = tiny_settings(
        tiny,
        steps=60,
        **plain_data(tmp_path),
        **{
            "generator.replicas": 2,
            "generator.cpus": 0.5,
            "generator.engine": "tests.support.dying_engines:DyingGeneration",
            "generator.engine_options": dying(deaths, "generate:3", "update:2"),
            "reward.replicas": 2,
            "learner.ranks": 2,
            "learner.cpus": 0.5,
            "learner.zero_stage": 3,  # the other stages with two ranks: tests/contracts/test_training_engines.py
            "learner.engine": "tests.support.dying_engines:DyingTrainer",
            "learner.engine_options": dying(deaths, "hold:step:4", "step:5:1"),
            "learner.save_every": 2,
        },
    )
    restarts: list[str] = []

    def on_line(line: str) -> signal.Signals | None:
        if line.startswith("step 1/"):
            os.kill(process_of(run_dir, "reward.0"), signal.SIGKILL)
        if "its process died; restarted as incarnation" in line:
            restarts.append(line)
            if len(restarts) == 3:
                (deaths / "go").touch()
        return signal.SIGINT if line.startswith("step 7/") else None

    result = flowrl("run", GRAPH, "--name", "run", *settings, cwd=tmp_path, on_line=on_line)
    assert result.code == 0, result.text
    assert {path.name for path in deaths.iterdir()} == {"generate:3", "update:2", "step:5:1", "go"}, result.text
    assert len(restarts) == 3
    assert "everything starts again from the checkpoint of version 4" in result.text
    assert "--resume" in result.text
    checkpoint, _ = newest_sound(run_dir / "checkpoints")
    assert checkpoint is not None
    verdict = verify_run(run_dir)
    assert verdict.is_clean, verdict
    assert verdict.rollbacks == 1
    assert verdict.counts["learned"] == checkpoint_version(checkpoint) * 4, "what was learned is what was saved"
    assert len(verdict.unfinished) < 4, "less than a step was left under way"
    assert descendants_of(str(run_dir)) == []


def dying(deaths: Path, *points: str) -> str:
    """Return options of an engine of tests/support/dying_engines.py."""
    return json.dumps({"deaths": str(deaths), "points": points})
