"""Packing tensors into the buckets that a manifest lists, and what senders and fetchers of a transport do.

Invariants:
- a receiver holds the bytes of every tensor against its digest before they are loaded, unless the version was published
  without (`digest_every`);
- tensors lie in a bucket as raw little-endian bytes, each at a multiple of 64, never pickled;
- a tensor that is yielded under two names (tied embeddings) travels once, under the first;
- two buckets are in flight at most, one that is filled while the other is hashed and kept beside it.

Called by senders and receivers.

Tests: tests/contracts/test_weights.py
"""

from __future__ import annotations

import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import torch
from blake3 import blake3

from flowrl.engines.weights.manifest import Bucket, TensorSpec
from flowrl.errors import ProofError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from flowrl.engines.weights.manifest import AnyManifest, WeightManifest

ALIGNMENT_BYTES = 64  # a cache line; more than any dtype needs to be viewed in place
ONE_THREAD_BYTES = 1 << 20  # hashed sooner by one thread than several are started


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

    def retire(self, version: int, keep: frozenset[int] = frozenset()) -> None:
        """Forget every version before `version` but those in `keep`; any thread."""
        ...

    def close(self) -> None:
        """Release memory, files, ports and threads; ends a `transfer` that is under way."""
        ...


class WeightFetcher(Protocol):
    """A receiver's side of a transport; lives in one worker."""

    note: str  # how the last version came, where that was not as it should be

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


def memory(raw: torch.Tensor) -> memoryview:
    """Return the bytes of a host buffer, shared with it."""
    array: Any = raw.numpy()
    return memoryview(array)


def digest(raw: torch.Tensor) -> str:
    """Return the blake3 digest of a host buffer, hex; as many threads as torch has here take part."""
    threads = torch.get_num_threads() if raw.numel() > ONE_THREAD_BYTES else 1
    return blake3(memory(raw), max_threads=threads).hexdigest()


def pack(
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    bucket_bytes: int,
    reuse: bool,
    keep: Callable[[Bucket, torch.Tensor], None],
    hashes: bool = True,
) -> list[Bucket]:
    """Copy tensors one by one into host buckets, give each full one to `keep` and return what they hold.

    A tensor is copied before the next one is asked for, so its storage may be freed or reused then (gathered shards
    are). `keep` is called in order by a thread of its own while the next bucket is being filled; with `reuse` a buffer
    is overwritten once `keep` has returned, and pinned where tensors come from a GPU. Without `hashes` tensors have no
    digest ("").
    """
    sent: dict[int, weakref.ref[torch.Tensor]] = {}
    buffers = [torch.empty(0, dtype=torch.uint8)] * 2
    leaving: list[Future[Bucket]] = []
    specs: list[TensorSpec] = []
    used = start = 0

    def leave(start: int, raw: torch.Tensor, specs: list[TensorSpec]) -> Bucket:
        told = [msgspec.structs.replace(s, digest=digest(_bytes_of(s, raw))) for s in specs] if hashes else specs
        bucket = Bucket(offset=start, size=raw.numel(), tensors=told)
        keep(bucket, raw)
        return bucket

    with ThreadPoolExecutor(1, "flowrl-pack") as beside:
        for name, tensor in tensors:
            known = sent.get(id(tensor))
            if known is not None and known() is tensor:
                continue
            sent[id(tensor)] = weakref.ref(tensor)
            source = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            offset = _aligned(used)
            if specs and offset + source.numel() > bucket_bytes:
                leaving.append(beside.submit(leave, start, buffers[len(leaving) % 2][:used], specs))
                start, used, offset, specs = _aligned(start + used), 0, 0, []
            place = len(leaving) % 2
            if not specs:
                if len(leaving) > 1:
                    leaving[-2].result()  # its buffer is free then
                size = max(bucket_bytes, source.numel())
                if not reuse or buffers[place].numel() != size:
                    buffers[place] = torch.empty(size, dtype=torch.uint8, pin_memory=reuse and source.is_cuda)
            buffer = buffers[place]
            buffer[used:offset].zero_()
            used = offset + source.numel()
            buffer[offset:used].copy_(source)
            dtype = str(tensor.dtype).removeprefix("torch.")
            specs.append(TensorSpec(name, dtype, tuple(tensor.shape), offset, used - offset, ""))
        if specs:
            leaving.append(beside.submit(leave, start, buffers[len(leaving) % 2][:used], specs))
        return [bucket.result() for bucket in leaving]


def unpack(bucket: Bucket, raw: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield views of the tensors in a bucket's bytes, on whatever device these are."""
    for spec in bucket.tensors:
        yield spec.name, _bytes_of(spec, raw).view(getattr(torch, spec.dtype)).view(spec.shape)


def verify(manifest: WeightManifest, buffers: Sequence[torch.Tensor], where: str) -> None:
    """Hold every tensor received against its digest, where it has one.

    Raises:
        ProofError: one of them differs, by its name.
    """
    for bucket, raw in zip(manifest.buckets, buffers, strict=True):
        for spec in bucket.tensors:
            found = digest(_bytes_of(spec, raw)) if spec.digest else ""
            if found != spec.digest:
                raise ProofError(
                    where,
                    f"{spec.name} of version {manifest.version} ({spec.size} bytes) has digest {found[:12]}, "
                    f"published was {spec.digest[:12]}",
                    "the bytes changed on the way; check memory and network, then restart this generator",
                )


def _bytes_of(spec: TensorSpec, raw: torch.Tensor) -> torch.Tensor:
    return raw[spec.offset : spec.offset + spec.size]


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
