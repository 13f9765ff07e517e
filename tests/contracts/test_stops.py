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
from flowrl.telemetry.report import read_ending
from tests.support.command import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

PATIENCE_S = 300.0  # only a test that fails waits so long


class Driven:
    """A run of tests/support/driven.py in a process of its own."""

    def __init__(self, run_dir: Path, *told: str, stdout: int | None = None, runtime: str = "local") -> None:
        run_dir.mkdir(exist_ok=True)
        self.run_dir = run_dir
        command = [sys.executable, "-m", "tests.support.driven", str(run_dir), runtime, *told]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with (run_dir / "out").open("ab") as out:
            where = out.fileno() if stdout is None else stdout
            self.process = subprocess.Popen(command, stdout=where, stderr=subprocess.DEVNULL, env=environment, cwd=ROOT)

    def until(self, sign: str, name: str = "metrics.jsonl", *, patience_s: float = PATIENCE_S) -> None:
        """Wait until a file of the run holds a sign."""
        deadline_s = time.monotonic() + patience_s
        path = self.run_dir / name
        while not (path.exists() and sign in path.read_text(errors="replace")):
            assert time.monotonic() < deadline_s, f"no {sign!r} in {name}"
            assert self.process.poll() is None, f"it ended with {self.process.returncode} before {sign!r}"
            time.sleep(0.02)

    def ends(self) -> int:
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("sign", ['"version":1,', '"version":7,'], ids=["first step", "between checkpoints"])
def test_each_signal_stops_in_order_and_the_run_goes_on_from_there(tmp_path: Path, number: int, sign: str) -> None:
    run = Driven(tmp_path)
    run.until(sign)
    run.process.send_signal(number)
    assert run.ends() == 0
    check_stopped(tmp_path)
    assert f"stopping ({signal.Signals(number).name})" in (tmp_path / "out").read_text()


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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
    (tmp_path / "checkpoints").mkdir()
    if subprocess.run(["chattr", "+i", str(tmp_path / "checkpoints")], capture_output=True).returncode:
        pytest.skip("this file system has no immutable directories")
    try:
        run = Driven(tmp_path)
        assert run.ends() != 0, "its first checkpoint cannot be written"
    finally:
        subprocess.run(["chattr", "-i", str(tmp_path / "checkpoints")], check=True)
    ending = read_ending(tmp_path)
    assert ending is not None
    assert f"{tmp_path}/checkpoints" in ending.failure
    assert "Operation not permitted" in ending.failure
