"""One run on real Ray, vLLM and DeepSpeed is stopped in every phase, and goes on each time by the command it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from flowrl.runs.verify import verify_run
from flowrl.runtime.rundir import holders
from flowrl.stops import ECHO_S
from flowrl.telemetry.metrics import read_steps
from flowrl.telemetry.report import read_ending
from tests.ray.test_faults_of_ray import started_by
from tests.support.command import ROOT, SCRIPT, plain_data, tiny_settings
from tests.support.driven import PATIENCE_S, Driven, Terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.long]

GRAPH = ROOT / "graphs" / "group_async.py"
HELD_S = 5.0  # an update is held by then: there is one after each step
REWARD = """
import pathlib, time
here = pathlib.Path(__file__).parent
def score(completion, **row):
    with (here / "scored").open("a") as file:
        file.write(".")
    time.sleep(0.3 if (here / "slow").exists() else 0.0)
    return float(completion.count("e"))
"""
SAID = re.compile(r"(?:continue|begin again)(?: it)?(?: with)?: +(flowrl run .*?)\r?$", re.MULTILINE)


class Story:
    """The run, and what the directory beside it tells its reward function and its generator."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory = directory
        self.run_dir = directory / "runs" / "run"
        (directory / "reward.py").write_text(REWARD)
        (directory / "go").touch()
        held = json.dumps({"deaths": str(directory), "points": [f"hold:update:{each}" for each in range(1, 40)]})
        told = plain_data(directory) | {
            "generator.engine": "tests.support.dying_engines:DyingGeneration", "generator.engine_options": held,
            "reward.function": f"{directory}/reward.py:score", "learner.save_every": 1,
        }  # fmt: skip
        settings = tiny_settings(model, GRAPH, steps=30, **told)
        self.begin = [str(SCRIPT), "run", str(GRAPH), "--name", "run", *settings]
        self.next = self.begin  # the command that goes on

    def terminal(self, *more: str) -> Terminal:
        return Terminal(self.run_dir, command=[*self.next, *more], cwd=self.directory)

    @contextmanager
    def slow(self) -> Iterator[None]:
        """Let every score take its time."""
        (self.directory / "slow").touch()
        yield
        (self.directory / "slow").unlink()

    @property
    def num_scored(self) -> int:
        path = self.directory / "scored"
        return path.stat().st_size if path.exists() else 0

    @property
    def version(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return max(read_steps(path), default=0) if path.exists() else 0

    def wait(self, run: Driven, is_so: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not is_so():
            assert run.process.poll() is None, getattr(run, "text", "it has ended")
            assert time.monotonic() < deadline_s, getattr(run, "text", "it takes too long")
            if isinstance(run, Terminal):
                run.look()
            time.sleep(0.002)

    def wait_for_score(self, run: Terminal) -> None:
        """Wait until the run has something scored; before it began its checks had, too."""
        run.until("run directory", "what it shows alone")
        before = self.num_scored
        self.wait(run, lambda: self.num_scored > before)

    def ended(self, run: Driven, code: int = 0, *, has_checkpoint: bool = True, is_done: bool = False) -> None:
        """Insist that it ended as it should and left nothing, and take down the command that goes on."""
        assert run.ends() == code, getattr(run, "text", "")
        assert started_by(run.process.pid) == []
        assert holders(self.run_dir / "lock") == []
        if isinstance(run, Terminal):
            assert run.left_behind() == []
            assert "Traceback" not in run.text, run.text
        ending = read_ending(self.run_dir)
        assert ending is not None
        assert bool(ending.failure) == bool(code), ending
        assert bool(ending.checkpoint) == has_checkpoint, ending
        assert not any((self.run_dir / "checkpoints").glob(".*.partial")), "half a checkpoint"
        if has_checkpoint:
            verdict = verify_run(self.run_dir)
            assert verdict.lost == verdict.duplicated == verdict.over_stale == [], verdict
        said = SAID.findall(run.text) if isinstance(run, Terminal) and not run.is_hung_up else [ending.resume]
        assert said == ([] if is_done else [ending.resume]), run.text if isinstance(run, Terminal) else said
        self.next = [str(SCRIPT), *shlex.split(said[0])[1:]] if said else []


def to_all(number: signal.Signals) -> Callable[[Driven], None]:
    return lambda run: os.killpg(run.process.pid, number)


def test_a_run_that_is_stopped_in_every_phase_goes_on_by_what_it_says(tiny: Path, tmp_path: Path) -> None:
    story = Story(tmp_path, tiny)

    run = story.terminal()  # while its actors start
    story.wait(run, (story.run_dir / "logs" / "learner.0.log").exists)
    to_all(signal.SIGTERM)(run)
    story.ended(run, has_checkpoint=False)
    assert "nothing is under way yet" in run.text
    assert "--from-start" in story.next

    with story.slow():  # in the first generation, by a terminal that is closed
        run = story.terminal()
        story.wait_for_score(run)
        run.hang_up()
    story.ended(run)
    assert story.version < 4

    run = story.terminal()  # in an update of the weights
    before = story.version
    story.wait(run, lambda: story.version > before)
    (tmp_path / "go").unlink()
    time.sleep(HELD_S)
    run.press_ctrl_c()
    run.until("stopping (SIGINT)", "what it shows alone")
    (tmp_path / "go").touch()
    story.ended(run)

    run = story.terminal()  # in a checkpoint's writing
    before = story.version
    story.wait(run, lambda: story.version > before and any((story.run_dir / "checkpoints").glob(".step*")))
    to_all(signal.SIGTERM)(run)
    story.ended(run)

    with story.slow():  # twice in a row
        run = story.terminal()
        story.wait_for_score(run)
        run.press_ctrl_c()
        run.until("stopping (SIGINT)", "what it shows alone")
        time.sleep(ECHO_S)  # sooner it would be the first one's echo
        run.press_ctrl_c()
        story.ended(run, 130)

    reading, writing = os.pipe()  # nobody reads what it says
    os.close(reading)
    stop_unheard(story, writing, signal.SIGTERM)
    stop_unheard(story, os.open("/dev/full", os.O_WRONLY), signal.SIGINT)

    last = story.version + 1  # in the final evaluation
    with story.slow():
        run = story.terminal("--set", f"steps={last}")
        story.wait(run, lambda: story.version == last)
        before = story.num_scored
        story.wait(run, lambda: story.num_scored > before)
        run.press_ctrl_c()
        story.ended(run, is_done=True)
    assert verify_run(story.run_dir).is_clean


def stop_unheard(story: Story, stdout: int, number: signal.Signals) -> None:
    """Go on with a standard output that takes nothing, and stop in the middle of what follows."""
    run = Driven(story.run_dir, command=story.next, stdout=stdout, cwd=story.directory, start_new_session=True)
    os.close(stdout)
    before = story.version
    story.wait(run, lambda: story.version > before)
    run.process.send_signal(number)
    story.ended(run)
