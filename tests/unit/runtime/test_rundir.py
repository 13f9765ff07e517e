"""A run's directory has one driver, and none before the processes of the attempt before have ended."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

import pytest

from flowrl.errors import ConfigError, DataError, LastingError, ResourceError, RunError, files_named
from flowrl.runtime.ledger import Ledger
from flowrl.runtime.rundir import claim, create_run_dir, existing_run, hold
from flowrl.telemetry.files import RecordFile, fence, replace_file, unfence

if TYPE_CHECKING:
    from pathlib import Path


def hold_elsewhere(directory: Path) -> int:
    """Hold the lock as a process of the run does; returns its descriptor."""
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def test_a_run_without_processes_is_claimed_at_once(tmp_path: Path) -> None:
    said: list[str] = []
    claim(tmp_path, said.append).close()
    assert said == []


def test_a_process_that_is_left_holds_the_next_driver_up(tmp_path: Path) -> None:
    hold_elsewhere(tmp_path)
    said: list[str] = []
    with pytest.raises(ConfigError, match="still has processes of an earlier attempt"):
        claim(tmp_path, said.append, timeout_s=0.05)
    assert "waiting for the processes of an earlier attempt" in said[0]


def test_the_next_driver_goes_on_when_the_last_process_ends(tmp_path: Path) -> None:
    lock = hold_elsewhere(tmp_path)
    claim(tmp_path, lambda _: os.close(lock), timeout_s=5.0).close()  # it ends while it is waited for


def test_processes_of_a_run_do_not_hold_each_other_up(tmp_path: Path) -> None:
    claimed = claim(tmp_path, print)
    attempt = claimed.begin_attempt()
    first, second = hold_elsewhere(tmp_path), hold_elsewhere(tmp_path)
    assert attempt == 1
    assert not claimed.is_alone()
    os.close(first)
    os.close(second)
    assert claimed.is_alone()
    claimed.close()


def test_a_run_has_one_driver(tmp_path: Path) -> None:
    first = claim(tmp_path, print)
    with pytest.raises(ConfigError, match=rf"is driven by another flowrl already \(process {os.getpid()}\)"):
        claim(tmp_path, print)
    first.close()
    claim(tmp_path, print).close()


def test_a_ledger_that_was_removed_or_replaced_is_noticed_at_the_next_cut(tmp_path: Path) -> None:
    """What goes on to be written to a file without a name is lost, and a new file hides it."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.admit(0)
    ledger.cut(0)
    (tmp_path / "ledger.jsonl").rename(tmp_path / "moved")
    for _ in range(2):
        with pytest.raises(LastingError, match=r"ledger\.jsonl: was removed or replaced while it was written"):
            ledger.cut(1)
        (tmp_path / "ledger.jsonl").touch()
    ledger.close()


def test_what_the_system_says_of_a_file_is_one_line(tmp_path: Path) -> None:
    said = r"/none/file: cannot be used \(No such file or directory\); see whose"
    with pytest.raises(ResourceError, match=said), files_named():
        (tmp_path / "none" / "file").touch()


def test_a_machine_that_sees_another_directory_under_the_same_path_joins_no_run(tmp_path: Path) -> None:
    """What it wrote there would be lost to the run."""
    with pytest.raises(RunError, match=r"is not the run's on this machine: attempt 0 stands there, not 3"):
        hold(tmp_path, 3)
    (tmp_path / "lock").write_text("damaged")
    with pytest.raises(DataError, match="lock: holds no number"):
        hold(tmp_path, 3)
    unfence()


def test_a_process_of_an_older_attempt_writes_no_more(tmp_path: Path) -> None:
    """It may be on a machine that was cut off, or stopped, and wake up beside its successor."""
    claimed = claim(tmp_path, print)
    old = claimed.begin_attempt()
    fence(tmp_path / "lock", old)
    try:
        record = RecordFile(tmp_path / "records")
        record.append(b"before\n")
        replace_file(tmp_path / "whole", b"before")
        claimed.begin_attempt()
        with pytest.raises(RunError, match="attempt 1 was replaced by attempt 2 and writes no more"):
            record.append(b"after\n")
        with pytest.raises(RunError, match="writes no more"):
            replace_file(tmp_path / "whole", b"after")
        assert (tmp_path / "records").read_bytes() == b"before\n"
        assert (tmp_path / "whole").read_bytes() == b"before"
    finally:
        unfence()
        claimed.close()


def test_a_directory_that_no_record_can_name_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / os.fsdecode(b"m\xfcnchen")
    with pytest.raises(ConfigError, match=r"m\\udcfcnchen: is not UTF-8"):
        create_run_dir(directory)
    assert not directory.exists()
    directory.mkdir()
    (directory / "settings.yaml").touch()
    with pytest.raises(ConfigError, match=r"m\\udcfcnchen: is not UTF-8"):
        existing_run(directory)


def test_a_directory_in_which_no_run_was_written_is_free_and_any_other_is_not(tmp_path: Path) -> None:
    claim(create_run_dir(tmp_path / "run"), print).close()  # killed before its settings were written
    assert create_run_dir(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run" / "settings.yaml").touch()
    with pytest.raises(ConfigError, match="holds a run already"):
        create_run_dir(tmp_path / "run")
