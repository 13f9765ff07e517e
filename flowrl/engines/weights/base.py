"""The manifest of a published version, and packing tensors into the buckets it lists.

Invariants: a bucket is named by its blake3 digest, and a receiver verifies the digest of the bytes it is about to
load; tensors lie in a bucket as raw little-endian bytes, each at a multiple of 64, never pickled; a tensor that is
yielded under two names (tied embeddings) travels once, under the first. Called by the senders and by the receivers.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import torch
from blake3 import blake3

from flowrl.errors import ProofError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

BUCKET_BYTES = 64 << 20  # large enough to amortise a message, small enough to hold beside a model
ALIGNMENT_BYTES = 64  # a cache line; more than any dtype needs to be viewed in place


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """Where a tensor lies in its bucket."""

    name: str  # Hugging Face parameter name
    dtype: str  # torch's name without "torch."
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the bucket


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """A run of packed bytes; `offset` counts from the start of the version."""

    offset: int
    size: int
    digest: str  # blake3, hex
    tensors: list[TensorSpec]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, tag_field="transport"):
    """What a version consists of; each transport adds how to get it."""

    version: int
    buckets: list[Bucket]

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all buckets."""
        return sum(bucket.size for bucket in self.buckets)


class ShmManifest(Manifest, frozen=True, kw_only=True, tag="shm"):
    """The version is one file in shared memory."""

    path: str


class BroadcastManifest(Manifest, frozen=True, kw_only=True, tag="broadcast"):
    """The version is broadcast from rank 0 of a group formed through the store at host:port."""

    host: str
    port: int  # of the store where receivers announce themselves
    pull_port: int  # of the server for those who were not in the group
    token: str  # what the pull server wants to hear
    backend: str  # "gloo" | "nccl"
    world: int  # receivers expected, each with its tensor-parallel ranks, and the sender


AnyManifest = ShmManifest | BroadcastManifest


class WeightSender(Protocol):
    """The learner's side of a transport. Blocking; one call of `publish` or `transfer` at a time."""

    def publish(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[bytes, int]:
        """Copy the tensors while iterating and return the manifest (JSON) and its size in bytes."""
        ...

    def transfer(self, version: int) -> None:
        """Bring the bytes to the receivers that are there.

        Raises:
            TransferError: the deadline passed and no receiver was there.
        """
        ...

    def retire(self, version: int) -> None:
        """Forget every version before `version`; any thread."""
        ...

    def close(self) -> None:
        """Release memory, files, ports and threads; ends a `transfer` that is under way."""
        ...


class WeightFetcher(Protocol):
    """A receiver's side of a transport; lives in one worker."""

    def fetch(self, manifest: AnyManifest) -> list[torch.Tensor]:
        """Return one verified host buffer (uint8) for each bucket.

        Raises:
            ProofError: a digest disagrees.
            TransferError: the bytes are not there or did not arrive before the deadline.
        """
        ...

    def close(self) -> None:
        """Release connections."""
        ...


def encode_manifest(manifest: AnyManifest) -> bytes:
    """Return the manifest as JSON."""
    return msgspec.json.encode(manifest)


def decode_manifest(wire: bytes | str) -> AnyManifest:
    """Read what `encode_manifest` wrote."""
    return msgspec.json.decode(wire, type=AnyManifest)


def memory(raw: torch.Tensor) -> memoryview:
    """Return the bytes of a host buffer, shared with it."""
    array: Any = raw.numpy()
    return memoryview(array)


def digest(raw: torch.Tensor) -> str:
    """Return the blake3 digest of a host buffer, hex."""
    return blake3(memory(raw)).hexdigest()


def pack(
    tensors: Iterable[tuple[str, torch.Tensor]], *, bucket_bytes: int, reuse: bool
) -> Iterator[tuple[Bucket, torch.Tensor]]:
    """Copy tensors one by one into host buckets and yield each full one with its description.

    A tensor is copied before the next one is asked for, so its storage may be freed or reused then (gathered shards
    are). With `reuse` a yielded buffer is overwritten after the next step of the iteration.
    """
    sent: dict[int, weakref.ref[torch.Tensor]] = {}
    buffer = torch.empty(bucket_bytes, dtype=torch.uint8)
    specs: list[TensorSpec] = []
    used = start = 0
    for name, tensor in tensors:
        known = sent.get(id(tensor))
        if known is not None and known() is tensor:
            continue
        sent[id(tensor)] = weakref.ref(tensor)
        source = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        offset = _aligned(used)
        if specs and offset + source.numel() > bucket_bytes:
            yield _bucket(start, buffer[:used], specs), buffer[:used]
            start, used, offset, specs = _aligned(start + used), 0, 0, []
            buffer = buffer if reuse else torch.empty(bucket_bytes, dtype=torch.uint8)
        if source.numel() > buffer.numel():
            buffer = torch.empty(source.numel(), dtype=torch.uint8)
        buffer[used:offset].zero_()
        used = offset + source.numel()
        buffer[offset:used].copy_(source)
        specs.append(TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset))
    if specs:
        yield _bucket(start, buffer[:used], specs), buffer[:used]


def unpack(bucket: Bucket, raw: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield views of the tensors in a bucket's bytes, on whatever device these are."""
    for spec in bucket.tensors:
        dtype = getattr(torch, spec.dtype)
        count = dtype.itemsize
        for length in spec.shape:
            count *= length
        yield spec.name, raw[spec.offset : spec.offset + count].view(dtype).view(spec.shape)


def verify(manifest: Manifest, buffers: Sequence[torch.Tensor], where: str) -> None:
    """Hold every bucket received against its digest.

    Raises:
        ProofError: one of them differs, by name of its first tensor.
    """
    for index, (bucket, raw) in enumerate(zip(manifest.buckets, buffers, strict=True)):
        found = digest(raw)
        if found != bucket.digest:
            raise ProofError(
                where,
                f"bucket {index} of {len(manifest.buckets)} of version {manifest.version} ({bucket.size} bytes from "
                f"{bucket.tensors[0].name}) has digest {found[:12]}, published was {bucket.digest[:12]}",
                "the bytes changed on the way; check memory and network, then restart this generator",
            )


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _bucket(start: int, raw: torch.Tensor, specs: list[TensorSpec]) -> Bucket:
    return Bucket(offset=start, size=raw.numel(), digest=digest(raw), tensors=specs)
