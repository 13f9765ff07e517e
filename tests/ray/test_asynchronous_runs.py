"""Asynchronous runs of the whole program on real Ray, vLLM and DeepSpeed: deaths in the middle, adapters, replays."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flowrl.engines.checkpoint import checkpoint_version, newest_sound
from flowrl.runs.verify import verify_run
from flowrl.telemetry.records import read_digests
from tests.support.command import GRAPH, ROOT, descendants_of, flowrl, tiny_settings

if TYPE_CHECKING:
    from collections.abc import Callable

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


def killing(run_dir: Path, victims: dict[int, str], *, stop_at: int) -> Callable[[str], bool]:
    """Return an `on_line` that kills a victim by SIGKILL when a step is first told, and says yes at `stop_at`."""
    left = dict(victims)

    def on_line(line: str) -> bool:
        for version, victim in list(left.items()):
            if line.startswith(f"step {version}/"):
                os.kill(process_of(run_dir, victim), signal.SIGKILL)
                del left[version]
        return line.startswith(f"step {stop_at}/")

    return on_line


def test_deaths_in_the_middle_of_things_cost_no_sample_and_ctrl_c_stops_in_order(tiny: Path, tmp_path: Path) -> None:
    run_dir, deaths = tmp_path / "runs" / "run", tmp_path / "deaths"
    deaths.mkdir()
    settings = tiny_settings(
        tiny,
        steps=60,
        **{
            "generator.replicas": 2,
            "generator.cpus": 0.5,
            "generator.engine": "tests.support.deadly:DyingGeneration",
            "generator.engine_options": dying(deaths, "generate:6", "update:4"),
            "reward.replicas": 2,
            "learner.ranks": 2,
            "learner.cpus": 0.5,
            "learner.zero_stage": 3,  # the other stages with two ranks: tests/contracts/test_training_engines.py
            "learner.engine": "tests.support.deadly:DyingTrainer",
            "learner.engine_options": dying(deaths, "step:9:1"),
            "learner.save_every": 4,
        },
    )
    on_line = killing(run_dir, {6: "reward.0"}, stop_at=12)
    result = flowrl("run", GRAPH, "--name", "run", *settings, cwd=tmp_path, on_line=on_line)
    assert result.code == 0, result.text
    assert {path.name for path in deaths.iterdir()} == {"generate:6", "update:4", "step:9:1"}, result.text
    assert result.text.count("its process died; restarted as incarnation") == 3
    assert "everything starts again from the checkpoint of version 8" in result.text
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
    """Return options of an engine of tests/support/deadly.py."""
    return json.dumps({"deaths": str(deaths), "points": points})


def test_the_critic_less_graph_trains_an_adapter_and_replays(tiny: Path, tmp_path: Path) -> None:
    graph = ROOT / "graphs" / "group_async.py"
    more = {"reward.function": "flowrl.rewards.verify:exact_answer", "learner.lora.rank": 4, "replay.ratio": 1.0}
    settings = tiny_settings(tiny, graph, steps=2, **more)
    result = flowrl(
        "run", graph, "--name", "run", *settings, "--set", "algorithm=flowrl.algorithms.rloo:RLOO", cwd=tmp_path
    )
    assert result.code == 0, result.text  # vLLM takes the adapters: each version has proved its canary
    assert "2 of 2 steps" in result.text
    assert (tmp_path / "runs" / "run" / "checkpoints" / "step-000002" / "adapter" / "adapter_config.json").is_file()
    versions = read_digests(tmp_path / "runs" / "run")
    assert all(".lora_" in name for tensors in versions.values() for name in tensors), "nothing else has travelled"
    assert len(versions) == 3
    verdict = verify_run(tmp_path / "runs" / "run")
    assert verdict.is_clean
    assert verdict.counts["replayed"] == 4, "the first step's groups, along with the second's"
