"""The manifest of a published version: its tensors, the buckets they lie in, their digests, and how to get them.

Invariants:
- plain JSON and free of torch, so that whoever records or compares versions can read it;
- every tensor is named once, with the blake3 digest of its bytes, which a receiver holds against what it is about to
  load.

Written by the senders.

Tests: tests/contracts/test_weights.py
"""

from __future__ import annotations

import msgspec

BUCKET_BYTES = 64 << 20  # large enough to amortise a message, small enough to hold beside a model


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """Where a tensor lies in its bucket."""

    name: str  # Hugging Face parameter name
    dtype: str  # torch's name without "torch."
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the bucket
    size: int  # bytes
    digest: str  # blake3, hex; "": the version was published without


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """A run of packed bytes; `offset` counts from the start of the version."""

    offset: int
    size: int
    tensors: list[TensorSpec]


class WeightManifest(msgspec.Struct, frozen=True, kw_only=True, tag_field="transport"):
    """What a version consists of; each transport adds how to get it."""

    version: int
    buckets: list[Bucket]

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all buckets."""
        return sum(bucket.size for bucket in self.buckets)


class ShmManifest(WeightManifest, frozen=True, kw_only=True, tag="shm"):
    """The version is one file in shared memory."""

    path: str


class BroadcastManifest(WeightManifest, frozen=True, kw_only=True, tag="broadcast"):
    """The version is broadcast from rank 0 of a group formed through the store at host:port."""

    host: str
    port: int  # of the store where receivers announce themselves
    pull_port: int  # of the server for those who were not in the group
    token: str  # what the pull server wants to hear
    backend: str  # "gloo" | "nccl"


class NearestManifest(BroadcastManifest, frozen=True, kw_only=True, tag="nearest"):
    """The version is a file for those on the sender's machine, and broadcast to the others."""

    path: str


AnyManifest = ShmManifest | BroadcastManifest | NearestManifest


def transport_of(manifest: AnyManifest) -> str:
    """Return the name of the transport that brings a manifest's version."""
    return str(manifest.__struct_config__.tag)


class _Listing(msgspec.Struct, frozen=True):
    """What every transport's manifest has; engines without weights have none of it."""

    buckets: list[Bucket] = []


def encode_manifest(manifest: AnyManifest) -> bytes:
    """Return the manifest as JSON."""
    return msgspec.json.encode(manifest)


def decode_manifest(wire: bytes | str) -> AnyManifest:
    """Read what `encode_manifest` wrote."""
    return msgspec.json.decode(wire, type=AnyManifest)


def tensor_digests(wire: bytes) -> dict[str, str]:
    """Return the digest of each tensor of a published version by name, whatever the transport."""
    listing = msgspec.json.decode(wire, type=_Listing)
    return {spec.name: spec.digest for bucket in listing.buckets for spec in bucket.tensors}
