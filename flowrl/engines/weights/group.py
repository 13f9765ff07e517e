"""A process group outside the default one, for broadcasting buckets from rank 0.

Invariant: every wait has a deadline; a group that failed once is aborted and never used again. gloo on CPUs and NCCL
on GPUs have the same surface here. Called by both sides of the broadcast transport.

Tests: tests/contracts/test_weights.py
"""

from __future__ import annotations

import contextlib
import datetime
import socket
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

if TYPE_CHECKING:
    from collections.abc import Sequence

# NCCL's watchdog ends the whole process when an operation passes the group's own timeout; ours comes first and ends
# only the group.
WATCHDOG_FACTOR = 10


class BroadcastGroup:
    """Rank `rank` of `size` processes that meet under `prefix` in a store; rank 0 is the source."""

    def __init__(
        self, store: Store, prefix: str, *, rank: int, size: int, device: torch.device, host: str, timeout_s: float
    ) -> None:
        self._rank = rank
        self._device = device
        self._timeout = datetime.timedelta(seconds=timeout_s)
        inner = PrefixStore(prefix, store)
        make = _nccl if device.type == "cuda" else _gloo
        self._group: Any = make(inner, rank, size, host, self._timeout)

    def broadcast(self, buffers: Sequence[torch.Tensor]) -> None:
        """Send the host buffers, or fill them on every other rank; one bucket of device memory at most.

        Raises:
            RuntimeError: a member is gone or the deadline passed.
        """
        for raw in buffers:
            # A host tensor is its own device copy on CPUs.
            staged = raw.to(self._device) if self._rank == 0 else torch.empty_like(raw, device=self._device)
            target = raw if self._device.type == "cpu" else staged
            options = dist.BroadcastOptions()
            options.rootRank = 0
            options.rootTensor = 0
            self._group.broadcast([target], options).wait(self._timeout)
            if self._rank != 0 and target is not raw:
                raw.copy_(target)

    def close(self) -> None:
        """Abort the group; whoever waits for it gets an error."""
        with contextlib.suppress(RuntimeError):  # it may have failed already
            self._group.abort()


def local_address(host: str) -> str:
    """Return this machine's address on the way to `host`; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return probe.getsockname()[0]


def _gloo(store: Store, rank: int, size: int, host: str, timeout: datetime.timedelta) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timeout
    options._devices = [gloo.create_device(hostname=local_address(host))]
    return gloo(store, rank, size, options)


def _nccl(store: Store, rank: int, size: int, host: str, timeout: datetime.timedelta) -> Any:
    nccl: Any = dist.ProcessGroupNCCL  # chooses its own interface (NCCL_SOCKET_IFNAME), whatever `host` is
    options = nccl.Options()
    options._timeout = timeout * WATCHDOG_FACTOR
    return nccl(store, rank, size, options)
