"""Weights through shared memory: one file a version, in a directory of ours under /dev/shm (scratch.py).

Invariants:
- a file appears under its name only when it is complete;
- a receiver that maps it keeps its bytes even after `retire` removed the name;
- a late or restarted receiver finds the newest version as long as the sender lives.

Tests: tests/contracts/test_weights.py
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from typing import TYPE_CHECKING

import torch

from flowrl.engines.weights.base import memory, pack, verify
from flowrl.engines.weights.manifest import AnyManifest, Bucket, NearestManifest, ShmManifest, encode_manifest
from flowrl.errors import ProofError, ResourceError, TransferError
from flowrl.scratch import SHARED_MEMORY, ScratchDirectory

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path


class ShmSender:
    """Writes each version aside and renames it."""

    def __init__(self, name: str, *, bucket_bytes: int, digest_every: int = 1, root: Path = SHARED_MEMORY) -> None:
        self._where = name
        self._root = root
        self._scratch: ScratchDirectory | None = None
        self._bucket_bytes = bucket_bytes
        self._digest_every = digest_every
        self._files: dict[int, Path] = {}

    def publish(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[bytes, int]:
        """Write the tensors to a file and return the manifest and its size in bytes.

        Raises:
            ResourceError: shared memory is full or cannot be written.
        """
        try:
            if self._scratch is None:
                self._scratch = ScratchDirectory(f"weights-{self._where}", self._root)
            path = self._scratch.path / f"{version}.weights"
            aside = path.with_suffix(".partial")
            try:
                buckets = self._write(aside, tensors, hashes=version % self._digest_every == 0)
                aside.rename(path)
            except OSError:
                aside.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise self._no_room(version, error) from error
        self._files[version] = path
        manifest = ShmManifest(version=version, buckets=buckets, path=str(path))
        return encode_manifest(manifest), manifest.size_bytes

    def _write(self, path: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, hashes: bool) -> list[Bucket]:
        with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:

            def keep(bucket: Bucket, raw: torch.Tensor) -> None:
                file.seek(bucket.offset)
                file.write(memory(raw))

            return pack(tensors, bucket_bytes=self._bucket_bytes, reuse=True, hashes=hashes, keep=keep)

    def _no_room(self, version: int, error: OSError) -> ResourceError:
        root = self._root
        if error.errno != errno.ENOSPC:
            return ResourceError(self._where, f"version {version} cannot be written to {root} ({error})")
        free = shutil.disk_usage(root).free
        return ResourceError(
            self._where,
            f"version {version} does not fit into {root} ({free} bytes free, {len(self._files)} versions held)",
            "two versions must fit: give it more room (docker: --shm-size) or set transport=broadcast",
        )

    def transfer(self, version: int) -> None:
        """Return at once: the bytes left the parameters in `publish`."""

    def retire(self, version: int, keep: frozenset[int] = frozenset()) -> None:
        """Remove the files of every version before `version` but those in `keep`."""
        for old in [known for known in self._files if known < version and known not in keep]:
            self._files.pop(old).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the directory."""
        self._files.clear()
        scratch, self._scratch = self._scratch, None
        if scratch is not None:
            scratch.close()


class ShmFetcher:
    """Maps the file of a version; the pages are shared with the sender and with every other receiver."""

    note = ""

    def __init__(self, where: str) -> None:
        self._where = where

    def fetch(self, manifest: AnyManifest) -> list[torch.Tensor]:
        """Map and verify a version.

        Raises:
            ProofError: the file is short or a digest disagrees.
            TransferError: the file is not there.
        """
        assert isinstance(manifest, ShmManifest | NearestManifest)
        try:
            whole = map_file(manifest.path)
        except (OSError, ValueError) as error:
            raise TransferError(
                self._where,
                f"version {manifest.version} cannot be read from {manifest.path} ({error})",
                "shared memory reaches one machine only; across machines set transport=auto or broadcast",
            ) from error
        end = max((bucket.offset + bucket.size for bucket in manifest.buckets), default=0)
        if len(whole) < end:
            raise ProofError(
                self._where, f"{manifest.path} has {len(whole)} bytes, version {manifest.version} needs {end}"
            )
        buffers = split(whole, manifest.buckets)
        verify(manifest, buffers, self._where)
        return buffers

    def close(self) -> None:
        """Nothing is held between versions."""


def map_file(path: str) -> torch.Tensor:
    """Return a version's file, mapped."""
    with open(path, "rb") as file:
        # A private mapping: torch wants to be allowed to write, and nobody may write to the sender's pages.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapped, dtype=torch.uint8)


def split(whole: torch.Tensor, buckets: Sequence[Bucket]) -> list[torch.Tensor]:
    """Return a version's bytes bucket by bucket, in place."""
    return [whole[bucket.offset : bucket.offset + bucket.size] for bucket in buckets]
