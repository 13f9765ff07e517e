"""A signal before a run begins ends the command, says so and leaves nothing: the console script, in a terminal."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.ray.test_faults_of_ray import started_by
from tests.support.command import ROOT, SCRIPT, plain_data, tiny_settings
from tests.support.driven import Driven, Terminal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.long]

GRAPH = ROOT / "graphs" / "group_async.py"


def press(run: Terminal) -> None:
    run.press_ctrl_c()


def to_all(number: signal.Signals) -> Callable[[Driven], None]:
    return lambda run: os.killpg(run.process.pid, number)


@pytest.mark.parametrize("stop", [press, to_all(signal.SIGTERM), to_all(signal.SIGHUP), to_all(signal.SIGUSR1)],
                         ids=["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])  # fmt: skip
def test_a_signal_before_anything_begins_says_so_and_leaves_nothing(
    tiny: Path, tmp_path: Path, stop: Callable[[Terminal], None], request: pytest.FixtureRequest
) -> None:
    run_dir, name = tmp_path / "runs" / "run", request.node.callspec.id
    settings = tiny_settings(tiny, GRAPH, **plain_data(tmp_path))
    run = Terminal(run_dir, command=[str(SCRIPT), "run", str(GRAPH), "--name", "run", *settings], cwd=tmp_path)
    run.until("checking")
    stop(run)
    assert run.ends() == 128 + signal.Signals[name], run.text
    assert "nothing has begun, and the same command may be given again" in run.text
    assert f"flowrl: stopped by {name}" in run.text
    assert "Traceback" not in run.text
    assert not run_dir.exists()
    assert started_by(run.process.pid) == run.left_behind() == []
