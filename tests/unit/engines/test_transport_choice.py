"""Weights go through shared memory where all is on one machine and they fit, else by the network."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from flowrl.engines.base import TrainingConfig
from flowrl.engines.publishing import Publisher
from flowrl.engines.vllm import VllmEngine
from flowrl.engines.weights.manifest import (
    BroadcastManifest,
    NearestManifest,
    ShmManifest,
    encode_manifest,
    transport_of,
)
from flowrl.messages import Weights

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.engines.weights.manifest import AnyManifest

FAR: dict[str, Any] = {"version": 1, "buckets": [], "host": "10.0.0.7", "port": 1, "pull_port": 2, "token": "t"}


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize(
    ("host", "given", "taken"),
    [("127.0.0.1", "auto", "shm"), ("10.0.0.7", "auto", "nearest"), ("127.0.0.1", "broadcast", "broadcast")],
)
def test_the_transport_follows_where_the_receivers_are(device: str, host: str, given: str, taken: str) -> None:
    config = TrainingConfig(model="m", transport=given)  # pyright: ignore[reportArgumentType]
    made = Publisher(config, name="x", num_receivers=1, host=host, device=torch.device(device))
    assert made.transport == taken


@pytest.mark.parametrize(
    ("host", "free", "taken"),
    [
        ("127.0.0.1", 1000, "shm"),
        ("10.0.0.7", 1000, "nearest"),
        ("127.0.0.1", 999, "broadcast"),
        ("10.0.0.7", 999, "broadcast"),
    ],
)
def test_two_versions_that_do_not_fit_into_shared_memory_are_broadcast(
    host: str, free: int, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"0" * 300)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"0" * 200)
    total = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr("flowrl.engines.publishing.shutil.disk_usage", lambda _: total)
    config = TrainingConfig(model=str(tmp_path))
    made = Publisher(config, name="x", num_receivers=1, host=host, device=torch.device("cpu"))
    assert made.transport == taken
    assert ("--shm-size" in made.said) == (taken == "broadcast")


@pytest.mark.parametrize(
    ("manifest", "waits"),
    [
        (BroadcastManifest(backend="nccl", **FAR), True),
        (BroadcastManifest(backend="gloo", **FAR), False),
        (NearestManifest(backend="nccl", path="/nowhere", **FAR), True),
        (NearestManifest(backend="nccl", path=__file__, **FAR), False),
        (ShmManifest(version=1, buckets=[], path=__file__), False),
    ],
)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_split_replica_receives_by_nccl_in_the_pause(manifest: AnyManifest, waits: bool, num_workers: int) -> None:
    engine: Any = SimpleNamespace(config=SimpleNamespace(num_workers=num_workers))
    wire = encode_manifest(manifest)
    weights = Weights(version=1, transport=transport_of(manifest), manifest=wire, canary=None, size_bytes=0)
    assert VllmEngine._shares_nccl(engine, weights) == (waits and num_workers > 1)
