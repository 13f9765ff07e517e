"""Weights go through shared memory where all is on one machine and they fit, else by the network."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from flowrl.engines.base import TrainingConfig
from flowrl.engines.publishing import Publisher

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize(
    ("host", "given", "taken"),
    [("127.0.0.1", "auto", "shm"), ("10.0.0.7", "auto", "nearest"), ("127.0.0.1", "broadcast", "broadcast")],
)
def test_the_transport_follows_where_the_receivers_are(device: str, host: str, given: str, taken: str) -> None:
    config = TrainingConfig(model="m", transport=given)  # pyright: ignore[reportArgumentType]
    made = Publisher(config, name="x", num_receivers=1, host=host, device=torch.device(device))
    assert made.transport == ("broadcast" if (device, taken) == ("cuda:0", "nearest") else taken)


@pytest.mark.parametrize(("free", "taken"), [(1000, "shm"), (999, "broadcast")])
def test_two_versions_that_do_not_fit_into_shared_memory_are_broadcast(
    free: int, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"0" * 300)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"0" * 200)
    total = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr("flowrl.engines.publishing.shutil.disk_usage", lambda _: total)
    config = TrainingConfig(model=str(tmp_path))
    made = Publisher(config, name="x", num_receivers=1, host="127.0.0.1", device=torch.device("cpu"))
    assert made.transport == taken
    assert ("--shm-size" in made.said) == (taken == "broadcast")
