"""flowrl from Python: the same settings, errors and files as the command line, in scripts and in notebooks."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import flowrl
from flowrl.api import _outside_loop, overrides_of
from flowrl.errors import ConfigError, DataError, GraphError
from flowrl.rewards.verify import exact_answer
from tests.support.command import ROOT

pytestmark = pytest.mark.slow

SFT = ROOT / "graphs" / "sft.py"


def settings(tiny: Path, **more: Any) -> dict[str, Any]:
    learner = {"dtype": "float32", "engine": "flowrl.engines.torch:TorchEngine", "lr": 1e-3}
    return {"model": tiny, "steps": 2, "examples_per_step": 2, "runtime": "local", "hints": False, "learner": learner,
            "data": {"num_train": 16, "num_heldout": 4}, **more}  # fmt: skip


def test_a_run_inside_a_running_loop_leaves_what_a_run_leaves(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    said: list[str] = []

    async def notebook() -> flowrl.Run:
        assert "staleness" in flowrl.check(SFT, settings(tiny), say=said.append)
        return flowrl.run(SFT, settings(tiny), name="first", say=said.append)

    run = asyncio.run(notebook())
    assert run.path == tmp_path / "runs" / "first"
    assert any(line.startswith("run directory") for line in said)
    again = flowrl.load_run("runs/first")
    assert [step["version"] for step in again.steps] == [1, 2]
    assert all(step["loss"] > 0 for step in again.steps)
    assert again.settings["learner"]["lr"] == 1e-3
    assert again.evaluations == [] or again.evaluations[-1]["version"] == 2
    assert again.verify().is_clean
    assert "2 steps" in again.report or "step" in again.report
    assert (again.model / "config.json").is_file()
    with pytest.raises(DataError, match="has no rollouts"):
        again.rollouts("reward < 0")


def test_errors_are_those_of_the_command_line(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(flowrl.FlowrlError, match="learner has no setting 'lrr', did you mean 'lr'"):
        flowrl.check(SFT, settings(tiny, learner={"lrr": 1}))
    with pytest.raises(GraphError, match=r"no such graph file; `flowrl init \.` writes"):
        flowrl.run("nowhere.py")
    with pytest.raises(ConfigError, match="holds no run"):
        flowrl.load_run("runs/none")
    assert not Path("runs").exists()


def test_settings_are_written_as_on_the_command_line():
    given = {
        "steps": 2, "model": Path("/m"), "data": {"tasks": [{"name": "gcd"}], "on_bad": "skip"}, "learner.lr": 1e-6,
        "hints": False, "critic": None, "reward.function": exact_answer, "learner": {"engine_options": {}, "x": "7"},
    }  # fmt: skip
    assert overrides_of(given) == [
        "steps=2", "model=/m", "data.tasks=[{name: gcd}]", "data.on_bad=skip", "learner.lr=1.0e-06", "hints=false",
        "critic=null", "reward.function=flowrl.rewards.verify:exact_answer", "learner.engine_options={}", "learner.x=7",
    ]  # fmt: skip
    for value in (lambda completions: 0, object()):
        with pytest.raises(ConfigError, match=r"reward\.function: "):
            overrides_of({"reward.function": value})


def test_an_interrupt_in_a_notebook_stops_the_run_and_not_the_waiting_for_it():
    stopped = threading.Event()

    def body() -> str:
        for _ in range(600):  # one that comes before it is waited for stops nothing
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            if stopped.wait(0.2):
                return "stopped as asked"
        return "never told"

    async def notebook() -> str:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a notebook; asyncio.run puts its own there
        return _outside_loop(body, interrupt=stopped.set)

    assert asyncio.run(notebook()) == "stopped as asked"


def test_what_fails_in_the_thread_fails_here():
    async def notebook() -> None:
        _outside_loop(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(notebook())


def test_the_package_and_its_api_load_nothing_heavy():
    code = (
        "import flowrl, sys; flowrl.run, flowrl.check, flowrl.load_run, flowrl.Run, flowrl.FlowrlError\n"
        "print([name for name in ('torch', 'ray', 'vllm', 'deepspeed', 'numpy', 'pyarrow') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
