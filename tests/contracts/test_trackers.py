"""Trackers as they are installed: wandb's service is a process of its own, Prometheus reads from a socket."""

from __future__ import annotations

import importlib
import json
import socket
import urllib.request
from typing import TYPE_CHECKING

import msgspec
import psutil
import pytest

from flowrl.errors import ConfigError
from flowrl.graph.graph import RunSettings
from flowrl.telemetry.events import EdgeStatus
from flowrl.telemetry.trackers import (
    MlflowSink,
    PrometheusSink,
    TrackioSink,
    WandbConfig,
    WandbSink,
    check_trackers,
)
from tests.unit.telemetry.streams import evaluation, step

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def test_wandb_offline_keeps_the_run_in_its_directory(tmp_path: Path) -> None:
    sink = WandbSink(WandbConfig(mode="offline"), run_dir=tmp_path, title="ppo-1")
    said = [{"prompt": "1 + 1", "completion": "2", "reward": "1"}]
    scored = msgspec.structs.replace(evaluation(1, [[1.0]]), completions=said)
    sink.consume([step(1, at=1.0, loss=0.5), scored])
    sink.close()
    importlib.import_module("wandb").teardown()  # as at the end of the process
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"heldout.mean" in log.read_bytes()
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/heldout.completions*.json")
    found = json.loads(table.read_text())
    assert found == {"columns": ["version", "prompt", "completion", "reward"], "data": [[1, "1 + 1", "2", "1"]]}


def test_prometheus_reads_the_newest_figures_on_the_loopback_interface() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"prometheus_port: {port} cannot be listened on"):
            check_trackers(RunSettings(prometheus_port=port))
    check_trackers(RunSettings(prometheus_port=port))
    sink = PrometheusSink(port)
    edge = EdgeStatus(edge="a.x -> b.y", time_s=1.0, items=3, depth=8, size_bytes=99)
    sink.consume([step(1, at=1.0, loss=0.5), step(2, at=2.0, loss=0.25), evaluation(2, [[1.0]]), edge])
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    listening = [c for c in psutil.Process().net_connections() if c.status == "LISTEN" and c.laddr.port == port]
    sink.close()
    assert {"flowrl_loss 0.25", "flowrl_version 2.0", "flowrl_heldout_mean 1.0"} <= set(lines)
    assert 'flowrl_edge_items{edge="a.x -> b.y"} 3.0' in lines
    assert [each.laddr.ip for each in listening] == ["127.0.0.1"]
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60)


@pytest.mark.filterwarnings("default")  # its database layer's own
def test_mlflow_keeps_the_figures_by_version(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    sink = MlflowSink(uri, title="ppo-1")
    sink.consume([step(1, at=1.0, loss=0.5), step(2, at=2.0, loss=0.25), evaluation(2, [[1.0]])])
    sink.close()
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("flowrl")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "ppo-1"
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(1, 0.5), (2, 0.25)]
    assert run.data.metrics["heldout.mean"] == 1.0


def test_trackio_keeps_the_figures_by_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    sink = TrackioSink("flowrl", title="ppo-1")
    sink.consume([step(1, at=1.0, loss=0.5), evaluation(1, [[1.0]])])
    sink.close()
    assert any(tmp_path.rglob("flowrl*"))
