"""A run's directory has one driver, and none before the processes of the attempt before have ended."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

import pytest

from flowrl.errors import ConfigError
from flowrl.runtime.rundir import claim, hold

if TYPE_CHECKING:
    from pathlib import Path


def test_a_run_without_processes_is_claimed_at_once(tmp_path: Path) -> None:
    said: list[str] = []
    claim(tmp_path, said.append)
    assert said == []


def test_a_process_that_is_left_holds_the_next_driver_up(tmp_path: Path) -> None:
    hold(tmp_path)
    said: list[str] = []
    with pytest.raises(ConfigError, match="still has processes of an earlier attempt"):
        claim(tmp_path, said.append, timeout_s=0.05)
    assert "waiting for the processes of an earlier attempt" in said[0]


def test_the_next_driver_goes_on_when_the_last_process_ends(tmp_path: Path) -> None:
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_SH)
    claim(tmp_path, lambda _: os.close(lock), timeout_s=5.0)  # it ends while it is waited for


def test_processes_of_a_run_do_not_hold_each_other_up(tmp_path: Path) -> None:
    claim(tmp_path, print)
    hold(tmp_path)
    hold(tmp_path)
