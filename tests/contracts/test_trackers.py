"""wandb as it is installed: its service is a process of its own, so this is not a unit test."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import pytest

from flowrl.telemetry.trackers import WandbConfig, WandbSink
from tests.unit.telemetry.streams import evaluation, step

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def test_wandb_offline_keeps_the_run_in_its_directory(tmp_path: Path) -> None:
    sink = WandbSink(WandbConfig(mode="offline"), run_dir=tmp_path, title="ppo-1")
    sink.consume([step(1, at=1.0, loss=0.5), evaluation(1, [[1.0]])])
    sink.close()
    importlib.import_module("wandb").teardown()  # as at the end of the process
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"heldout.mean" in log.read_bytes()
