"""Trackers: what they are given, and that they never cost a run."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.errors import ConfigError
from flowrl.graph.graph import RunSettings
from flowrl.telemetry.trackers import TensorBoardSink, WandbConfig, check_trackers, figures_of
from tests.unit.telemetry.streams import evaluation, notice, step

if TYPE_CHECKING:
    from pathlib import Path

HAS_TENSORBOARD = any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX"))


def test_trackers_keep_a_step_s_figures_and_the_heldout_score() -> None:
    assert figures_of(step(3, at=1.0, reward__mean=0.5)) == {"reward.mean": 0.5, "version": 3}
    assert figures_of(evaluation(2, [[0.0, 1.0], [1.0, 1.0]])) == {"heldout.mean": 0.75, "version": 2}
    assert figures_of(notice("x")) == {}


def of(**settings: Any) -> RunSettings:
    return RunSettings(**settings)


@pytest.mark.parametrize(
    ("setting", "package"),
    [
        ("tensorboard", "tensorboardX"),
        ("mlflow", "mlflow"),
        ("trackio", "trackio"),
        ("prometheus_port", "prometheus_client"),
    ],
)
def test_a_tracker_that_is_not_installed_is_refused_before_the_run(
    setting: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / package).mkdir()  # a directory of its name is no package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    check_trackers(of())
    value = {"tensorboard": True, "prometheus_port": 9100}.get(setting, "sqlite:///x.db")
    with pytest.raises(ConfigError, match=f"{setting}: needs the package {package}; pip install {package}, or set"):
        check_trackers(of(**{setting: value}))


@pytest.mark.skipif(not HAS_TENSORBOARD, reason="no TensorBoard writer is installed")
def test_tensorboard_files_are_written(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.consume([step(1, at=1.0, loss=0.5)])
    sink.close()
    assert list(tmp_path.glob("events*"))


@pytest.mark.slow
def test_wandb_online_without_a_key_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="wandb login"):
        check_trackers(of(wandb=WandbConfig(mode="online")))


@pytest.mark.parametrize("path", ["collections:deque", "collections:nothing"])
def test_what_is_no_sink_is_refused_before_the_run(path: str) -> None:
    with pytest.raises(ConfigError, match=r"sinks\.mine"):
        check_trackers(of(sinks={"mine": path}))
