"""Real deaths on real Ray, vLLM and DeepSpeed with a tiny model: the run goes on and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.engines.checkpoint import checkpoint_version, newest_sound
from flowrl.runtime.verify import verify_run
from tests.support.command import GRAPH, descendants_of, flowrl, tiny_settings

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


def steps_of(run_dir: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["version"]: row["metrics"] for row in rows if row["kind"] == "step"}


def test_killed_generators_and_learners_cost_no_sample_and_ctrl_c_stops_in_order(tiny: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "run"
    settings = tiny_settings(tiny, GRAPH, steps=60, **{"learner.save_every": 4})
    on_line = killing(run_dir, {2: "generator.0", 6: "reward.0", 10: "learner.0"}, stop_at=16)
    result = flowrl("run", GRAPH, "--name", "run", *settings, cwd=tmp_path, on_line=on_line)
    assert result.code == 0, result.text
    assert "generator.0: its process died; restarted as incarnation 1" in result.text
    assert "everything starts again from the checkpoint of version" in result.text
    assert "--resume" in result.text
    checkpoint, _ = newest_sound(run_dir / "checkpoints")
    assert checkpoint is not None
    verdict = verify_run(run_dir)
    assert verdict.is_clean, verdict
    assert verdict.rollbacks == 1
    assert verdict.counts["learned"] == checkpoint_version(checkpoint) * 4, "what was learned is what was saved"
    assert len(verdict.unfinished) < 4, "less than a step was left under way"
    assert descendants_of(str(run_dir)) == []


def is_driver(process: Path, tmp_path: Path) -> bool:
    try:
        command = (process / "cmdline").read_bytes().split(b"\0")
        return b"flowrl.cli" in command and Path(os.readlink(process / "cwd")) == tmp_path
    except OSError:
        return False


def test_a_killed_synchronous_run_resumes_and_ends_bit_for_bit_like_one_that_was_not(
    tiny: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / "killed"
    settings = tiny_settings(
        tiny, GRAPH, steps=40, max_staleness=0, **{"learner.lr": 1e-3, "critic.lr": 1e-3, "learner.save_every": 1}
    )

    def kill_driver(line: str) -> bool:
        if line.startswith("step 3/"):
            driver = next(p for p in Path("/proc").iterdir() if is_driver(p, tmp_path))
            os.kill(int(driver.name), signal.SIGKILL)
        return False

    killed = flowrl("run", GRAPH, "--name", "killed", *settings, cwd=tmp_path, on_line=kill_driver)
    assert killed.code == -signal.SIGKILL
    resumed = flowrl("run", GRAPH, "--resume", run_dir, cwd=tmp_path)
    assert resumed.code == 0, resumed.text
    verdict = verify_run(run_dir)
    assert verdict.is_clean, verdict
    assert verdict.counts["learned"] == 40 * 4
    straight = flowrl("run", GRAPH, "--name", "straight", *settings, cwd=tmp_path)
    assert straight.code == 0, straight.text
    ours, theirs = steps_of(run_dir), steps_of(tmp_path / "runs" / "straight")
    for version in ours:
        for name in ("loss", "grad_norm", "reward.mean"):
            assert ours[version].get(name) == theirs[version].get(name), (version, name)
    assert max(ours) == 40
    models = [
        tmp_path / "runs" / name / "checkpoints/step-000040/model/model.safetensors" for name in ("killed", "straight")
    ]
    assert models[0].read_bytes() == models[1].read_bytes()
