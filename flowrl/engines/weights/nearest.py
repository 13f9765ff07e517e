"""Weights by the nearest way: shared memory for receivers on the sender's machine, broadcast for all others.

Invariants:
- a version is packed once, into shared memory, from where it is broadcast too;
- each receiver finds out for itself, at every version, which way is its own: the file is there, or it is on another
  machine. So a replica that comes back elsewhere, spread generators, or one on the learner's own GPU (NCCL would not
  take both into a group) need no setting.

Opened by transport=auto on a cluster.

Tests: tests/contracts/test_weights.py
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.engines.weights.broadcast import BroadcastFetcher, BroadcastSender
from flowrl.engines.weights.manifest import AnyManifest, NearestManifest, ShmManifest, decode_manifest, encode_manifest
from flowrl.engines.weights.shm import ShmFetcher, ShmSender, map_file, split

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from flowrl.engines.weights.base import WeightFetcher


class NearestSender:
    """A sender of each kind, over the same bytes."""

    def __init__(self, name: str, *, bucket_bytes: int, digest_every: int = 1, **options: Any) -> None:
        self._shm = ShmSender(name, bucket_bytes=bucket_bytes, digest_every=digest_every)
        self._broadcast = BroadcastSender(name, bucket_bytes=bucket_bytes, **options)

    def publish(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[bytes, int]:
        """Write the tensors to shared memory and return the manifest and its size in bytes.

        Raises:
            ResourceError: shared memory is full, or the host address cannot be listened on.
        """
        wire, size_bytes = self._shm.publish(version, tensors)
        near = decode_manifest(wire)
        assert isinstance(near, ShmManifest)
        buffers = split(map_file(near.path), near.buckets)
        far = self._broadcast.offer(version, near.buckets, buffers)
        return encode_manifest(NearestManifest(**msgspec.structs.asdict(far), path=near.path)), size_bytes

    def transfer(self, version: int) -> None:
        """Broadcast to the receivers that are elsewhere and announce themselves within half the deadline.

        Raises:
            TransferError: nobody came, or the sender was closed meanwhile.
        """
        self._broadcast.transfer(version)

    def retire(self, version: int, keep: frozenset[int] = frozenset()) -> None:
        """Forget every version before `version` but those in `keep`."""
        self._broadcast.retire(version, keep)
        self._shm.retire(version, keep)

    def close(self) -> None:
        """End a transfer under way and release everything."""
        self._broadcast.close()
        self._shm.close()


class NearestFetcher:
    """Maps the file where it is there, else takes part in the broadcast."""

    def __init__(self, far: BroadcastFetcher) -> None:
        self._near, self._far = ShmFetcher(far.where), far
        self.note = ""

    def fetch(self, manifest: AnyManifest) -> list[torch.Tensor]:
        """Receive and verify a version.

        Raises:
            ProofError: a digest disagrees.
            TransferError: the sender is gone or did not send before the deadline.
        """
        assert isinstance(manifest, NearestManifest)
        if not is_near(manifest):
            buffers = self._far.fetch(manifest)
            self.note = self._far.note
            return buffers
        self.note = ""
        buffers = self._near.fetch(manifest)
        self._far.announce_near(manifest)
        return buffers

    def close(self) -> None:
        """Leave the group and the store."""
        self._far.close()


def is_near(manifest: AnyManifest) -> bool:
    """Return whether a version's bytes are in this machine's shared memory."""
    return isinstance(manifest, ShmManifest | NearestManifest) and Path(manifest.path).exists()


def fetchers(where: str, **far: Any) -> dict[str, WeightFetcher]:
    """Return a receiver's side of every transport, by its name; nothing is connected before a version comes."""
    broadcast = BroadcastFetcher(where, **far)
    return {"shm": ShmFetcher(where), "broadcast": broadcast, "nearest": NearestFetcher(broadcast)}
