"""A run stops in order whatever asks it to, whoever reads what it says, and in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flowrl.runs.verify import judge
from flowrl.runtime.ledger import read_entries
from flowrl.stops import ECHO_S
from flowrl.telemetry.report import read_ending
from tests.support.command import ROOT
from tests.support.driven import PATIENCE_S, Driven, Terminal

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow


def check_stopped(run_dir: Path, *, with_checkpoint: bool = True) -> None:
    """Insist that a run was stopped in order."""
    ending = read_ending(run_dir)
    assert ending is not None
    assert ending.was_stopped
    assert not ending.failure
    assert bool(ending.checkpoint) == with_checkpoint
    if with_checkpoint:
        verdict = judge(read_entries(run_dir / "ledger.jsonl"), max_staleness=2, is_finished=False)
        assert verdict.is_clean, verdict
        assert len(verdict.unfinished) < 4, "less than a step was under way"
        assert ending.totals["learned"] == verdict.counts["learned"]


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """Standard output whose reader has gone away."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize(
    ("number", "sign"),
    [
        (signal.SIGTERM, '"version":7,'), (signal.SIGHUP, '"version":1,'),
        pytest.param(signal.SIGINT, '"version":1,', marks=pytest.mark.long),
        pytest.param(signal.SIGUSR1, '"version":7,', marks=pytest.mark.long),
    ],
    ids=str,
)  # fmt: skip
def test_each_signal_stops_in_order_and_the_run_goes_on_from_there(tmp_path: Path, number: int, sign: str) -> None:
    run = Driven(tmp_path)
    run.until(sign)
    run.process.send_signal(number)
    assert run.ends() == 0
    check_stopped(tmp_path)
    assert f"stopping ({signal.Signals(number).name})" in (tmp_path / "out").read_text()


SAMPLING = '"running":4'  # in state.json: the generator has begun
PHASES = {
    "first sampling": (("flow.token_s=0.2",), SAMPLING),
    "an update": (("flow.update_s=2",), '"version":1,'),
    "the final evaluation": (
        ("flow.token_s=0.2", "flow.evaluate_every=0", "flow.steps=2", "flow.is_finite=true"), '"version":2,'
    ),
}  # fmt: skip


@pytest.mark.parametrize("runtime", ["local", pytest.param("ray", marks=[pytest.mark.long, pytest.mark.ray])])
@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_in_a_terminal_stops_in_order_whatever_is_under_way(tmp_path: Path, phase: str, runtime: str) -> None:
    told, sign = PHASES[phase]
    run = Terminal(tmp_path, *told, runtime=runtime)
    run.until(sign, "state.json" if sign == SAMPLING else "metrics.jsonl")
    run.press_ctrl_c()
    assert run.ends() == 0, run.text
    check_stopped(tmp_path)
    assert "stopping (SIGINT)" in run.text
    metrics = (tmp_path / "metrics.jsonl").read_text()
    assert metrics.count('"kind":"evaluation"') == (2 if "evaluation" in phase else 0), "what is under way is ended"


@pytest.mark.parametrize("second", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_second_signal_ends_the_run_as_it_is(tmp_path: Path, second: int) -> None:
    run = Driven(tmp_path, "flow.token_s=20")
    run.until(SAMPLING, "state.json")
    run.process.send_signal(signal.SIGTERM)
    run.until("stopping (SIGTERM)", "out")
    time.sleep(ECHO_S)
    run.process.send_signal(second)
    assert run.ends() == 130
    ending = read_ending(tmp_path)
    assert ending is not None
    assert ending.failure == "aborted"


@pytest.mark.long
def test_a_terminal_that_closes_under_a_shell_stops_in_order(tmp_path: Path) -> None:
    """The shell passes the signal on, and when it ends the system sends it once more."""
    command = f"{sys.executable} -m tests.support.driven {tmp_path} local > {tmp_path / 'out'}\n"
    shell = Terminal(tmp_path, command=["bash", "--norc", "-i"])
    shell.type(command)
    shell.until('"version":2,')
    shell.hang_up()
    shell.ends()
    deadline_s = time.monotonic() + PATIENCE_S
    while (tmp_path / "ending.json").exists() is False:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    check_stopped(tmp_path)


def test_who_asked_that_a_closed_terminal_be_ignored_is_heeded(tmp_path: Path) -> None:
    run = Driven(tmp_path, under=["nohup"])
    run.until('"version":2,')
    run.process.send_signal(signal.SIGHUP)
    run.until('"version":9,')
    run.process.send_signal(signal.SIGTERM)
    assert run.ends() == 0
    check_stopped(tmp_path)


def test_a_run_may_be_started_without_any_standard_stream(tmp_path: Path) -> None:
    """Else the first files that it opens are what everything prints to."""
    run = Driven(tmp_path, "flow.steps=3", "flow.is_finite=true", under=["bash", "-c", '"$@" <&- >&- 2>&-', "bash"])
    assert run.ends() == 0
    ending = read_ending(tmp_path)
    assert ending is not None
    assert ending.totals["unfinished"] == 0
    judge(read_entries(tmp_path / "ledger.jsonl"), max_staleness=2, is_finished=True)


def test_nobody_needs_to_read_what_a_stop_says(tmp_path: Path, closed_pipe: int) -> None:
    run = Driven(tmp_path, stdout=closed_pipe)
    run.until('"version":2,')
    run.process.send_signal(signal.SIGTERM)
    assert run.ends() == 0
    check_stopped(tmp_path)


def test_standard_output_may_be_a_full_disk(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        run = Driven(tmp_path, stdout=full.fileno())
    run.until('"version":2,')
    run.process.send_signal(signal.SIGTERM)
    assert run.ends() == 0
    check_stopped(tmp_path)


def test_a_stop_that_takes_longer_than_its_grace_ends_the_run_as_it_is(tmp_path: Path) -> None:
    run = Driven(tmp_path, "stop_grace_s=0.001")
    run.until('"version":2,')
    run.process.send_signal(signal.SIGTERM)
    assert run.ends() == 130
    ending = read_ending(tmp_path)
    assert ending is not None
    assert ending.failure == "aborted"
    assert "not stopped 0 s after SIGTERM: ended as it is" in (tmp_path / "out").read_text()


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
def test_a_signal_while_a_checkpoint_is_written_costs_nothing(tmp_path: Path, number: int) -> None:
    """It comes as soon as anything of the first checkpoint is there."""
    run = Driven(tmp_path)
    deadline_s = time.monotonic() + PATIENCE_S
    while not any(tmp_path.glob("checkpoints/*")) and not any(tmp_path.glob("checkpoints/.*")):
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    run.process.send_signal(number)
    assert run.ends() == 0
    check_stopped(tmp_path)
    again = Driven(tmp_path, "resume")
    again.until('"version":12,')
    again.process.send_signal(number)
    assert again.ends() == 0
    check_stopped(tmp_path)


def test_a_second_run_in_the_same_directory_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    run = Driven(tmp_path)
    run.until('"version":2,')
    for told in ((), ("resume",)):
        second = subprocess.run(
            [sys.executable, "-m", "tests.support.driven", str(tmp_path), "local", *told], cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        assert second.returncode == 2, second.stderr
        assert str(run.process.pid) in second.stderr or "lock" in second.stderr, second.stderr
        assert len(second.stderr.splitlines()) == 1
    before = len(read_entries(tmp_path / "ledger.jsonl"))
    run.until('"version":8,')
    run.process.send_signal(signal.SIGTERM)
    assert run.ends() == 0
    check_stopped(tmp_path)
    entries = read_entries(tmp_path / "ledger.jsonl")
    assert len(entries) > before
    assert not any(entry.event == "rollback" for entry in entries), "nobody began again in it"


@pytest.mark.skipif(os.geteuid() != 0, reason="making a directory immutable needs to be root")
def test_a_run_directory_that_becomes_read_only_ends_the_run_and_is_named(tmp_path: Path) -> None:
    run = Driven(tmp_path)
    run.until('"version":6,')
    if subprocess.run(["chattr", "+i", str(tmp_path / "checkpoints")], capture_output=True).returncode:
        run.process.kill()
        pytest.skip("this file system has no immutable directories")
    try:
        assert run.ends() != 0, "its next checkpoint cannot be written"
    finally:
        subprocess.run(["chattr", "-i", str(tmp_path / "checkpoints")], check=True)
    ending = read_ending(tmp_path)
    assert ending is not None
    assert f"{tmp_path}/checkpoints" in ending.failure
    assert "Operation not permitted" in ending.failure
