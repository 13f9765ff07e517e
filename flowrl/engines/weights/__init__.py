"""Weight transport: how a published policy version travels from the learner to the generators.

Shared memory (one machine, CPUs or GPUs), broadcast (gloo or NCCL), or each receiver's nearest of the two. The sender
lives in the learner's process and never imports vLLM; vLLM's receiver is its weight-transfer engine in `receiver`, any
other engine takes a version in with `Receiver`. Called by the training engines (`open_sender`) and generation engines.

Tests: tests/contracts/test_weights.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowrl.engines.weights.manifest import BUCKET_BYTES
from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from flowrl.engines.weights.base import WeightFetcher, WeightSender
    from flowrl.messages import Weights


def open_sender(
    kind: str,
    *,
    name: str,
    num_receivers: int,
    timeout_s: float,
    device: str | torch.device,
    host: str = "127.0.0.1",
    bucket_bytes: int = BUCKET_BYTES,
    digest_every: int = 1,
) -> WeightSender:
    """Return the sender of a transport; it takes no memory, port or file before its first `publish`.

    `host` is the address a broadcast listens on and that receivers connect to; of `digest_every` versions one is
    hashed.

    Raises:
        ConfigError: there is no transport of that name.
    """
    where: dict[str, Any] = {"device": device, "host": host}
    packed: dict[str, Any] = {"bucket_bytes": bucket_bytes, "digest_every": digest_every}
    if kind == "shm":
        from flowrl.engines.weights.shm import ShmSender

        return ShmSender(name, **packed)
    if kind == "broadcast":
        from flowrl.engines.weights.broadcast import BroadcastSender

        return BroadcastSender(name, num_receivers=num_receivers, timeout_s=timeout_s, **where, **packed)
    if kind == "nearest":
        from flowrl.engines.weights.nearest import NearestSender

        return NearestSender(name, num_receivers=num_receivers, timeout_s=timeout_s, **where, **packed)
    raise ConfigError(name, f"there is no weight transport {kind!r}", "choose shm or broadcast")


class Receiver:
    """Takes in published versions, whatever their transport, for an engine of one process."""

    def __init__(
        self, where: str, *, replica: int = 0, device: str | torch.device = "cpu", timeout_s: float = 120.0
    ) -> None:
        """Connect to nothing yet; `replica` tells the receivers of a broadcast apart."""
        self._where, self._replica, self._device, self._timeout_s = where, replica, device, timeout_s
        self._fetchers: dict[type, WeightFetcher] = {}

    def receive(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Fetch a version and hold it against its digests, all of it, then yield its tensors by name; blocking.

        The names and shapes are those of a saved checkpoint; the tensors are views of buffers that live with them.

        Raises:
            ProofError: a digest disagrees.
            TransferError: the bytes did not arrive before the deadline.
        """
        import torch

        from flowrl.engines.weights.base import unpack
        from flowrl.engines.weights.manifest import decode_manifest

        manifest = decode_manifest(weights.manifest)
        if type(manifest) not in self._fetchers:
            self._fetchers[type(manifest)] = self._fetcher(weights.transport, torch.device(self._device))
        buffers = self._fetchers[type(manifest)].fetch(manifest)
        for bucket, raw in zip(manifest.buckets, buffers, strict=True):
            yield from unpack(bucket, raw.to(self._device))

    def _fetcher(self, transport: str, device: torch.device) -> WeightFetcher:
        from flowrl.engines.weights.nearest import fetchers

        far = {"replica": self._replica, "rank": 0, "size": 1, "device": device, "timeout_s": self._timeout_s}
        return fetchers(self._where, **far)[transport]

    def close(self) -> None:
        """Release connections."""
        for fetcher in self._fetchers.values():
            fetcher.close()
        self._fetchers = {}
