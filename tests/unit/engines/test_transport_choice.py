"""Weights go through shared memory where everything is on one machine, whatever the device, else by the network too."""

from __future__ import annotations

import pytest
import torch

from flowrl.engines.base import TrainingConfig
from flowrl.engines.publishing import Publisher


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize(
    ("host", "given", "taken"),
    [("127.0.0.1", "auto", "shm"), ("10.0.0.7", "auto", "nearest"), ("127.0.0.1", "broadcast", "broadcast")],
)
def test_the_transport_follows_where_the_receivers_are(device: str, host: str, given: str, taken: str) -> None:
    config = TrainingConfig(model="m", transport=given)  # pyright: ignore[reportArgumentType]
    made = Publisher(config, name="x", num_receivers=1, host=host, device=torch.device(device))
    assert made.transport == ("broadcast" if (device, taken) == ("cuda:0", "nearest") else taken)
