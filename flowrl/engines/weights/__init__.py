"""Weight transport: how a published policy version travels from the learner to the generators.

Two transports with one manifest: shared memory (one machine, CPUs or GPUs) and broadcast (gloo or NCCL). The sender
lives in the learner's process and never imports vLLM; the receiver is vLLM's weight-transfer engine in `receiver`.
Called by the training engines (`open_sender`) and by the vLLM workers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowrl.engines.weights.manifest import BUCKET_BYTES
from flowrl.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from flowrl.engines.weights.base import WeightSender


def open_sender(
    kind: str,
    *,
    name: str,
    num_receivers: int,
    timeout_s: float,
    device: str | torch.device,
    host: str = "127.0.0.1",
    bucket_bytes: int = BUCKET_BYTES,
) -> WeightSender:
    """Return the sender of a transport; it takes no memory, port or file before its first `publish`.

    `host` is the address a broadcast listens on and that receivers connect to.

    Raises:
        ConfigError: there is no transport of that name.
    """
    if kind == "shm":
        from flowrl.engines.weights.shm import ShmSender

        return ShmSender(name, bucket_bytes=bucket_bytes)
    if kind == "broadcast":
        from flowrl.engines.weights.broadcast import BroadcastSender

        return BroadcastSender(
            name, num_receivers=num_receivers, timeout_s=timeout_s, device=device, host=host, bucket_bytes=bucket_bytes
        )
    raise ConfigError(name, f"there is no weight transport {kind!r}", "choose shm or broadcast")
