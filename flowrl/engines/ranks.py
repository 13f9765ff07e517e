"""How ranks march together: rank 0 leads, the others follow.

Rank 0 broadcasts each command as bytes over a gloo group of its own, every rank carries it out, and every rank's answer
is gathered back as bytes; nothing is pickled.

Invariants:
- the ranks meet at one address, under a token;
- a command either ends on every rank or the ranks are broken for good;
- a rank that fails writes why into rank 0's store before it lets go of its connections, so that rank 0 raises that
  reason;
- no collective waits longer than `COLLECTIVE_TIMEOUT_S`.

A follower waits for the next command as long as rank 0 lives. With one rank all of this is nothing.

Called by trainer; `check_groups` by the ways to share work out to groups of ranks (sequence.py, tensor.py).

Tests: tests/contracts/test_training_engines.py
"""

from __future__ import annotations

import gc
import os
import socket
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from flowrl.errors import ConfigError, ResourceError, StageError, number_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flowrl.graph.stage import Ranks

COLLECTIVE_TIMEOUT_S = 300  # a peer that says nothing for this long is dead; many times a large model's step
FOLLOWER_TIMEOUT_S = 7 * 86400  # how long a follower may wait for rank 0's next command


def check_groups(num_ranks: int, size: int, where: str) -> None:
    """Insist that ranks make whole groups of a size.

    Raises:
        ConfigError: they do not.
    """
    if num_ranks % size:
        what = f"{size} does not divide {number_of(num_ranks, 'rank')}"
        raise ConfigError(where, what, "give a divisor, or other ranks")


class RankLink:
    """One rank's connection to the others."""

    def __init__(self, ranks: Ranks, *, where: str, backend: str, needs_group: bool = False) -> None:
        """Join the others; `needs_group` makes a default process group even for one rank alone."""
        self.rank = ranks.rank
        self.world_size = ranks.world_size
        self._where = where if ranks.world_size == 1 else f"{where} rank {ranks.rank}"
        self.is_broken = False
        self._owns_group = False
        if ranks.world_size > 1 or needs_group:
            _set_environment(ranks)
            self._join(ranks, backend)

    def _join(self, ranks: Ranks, backend: str) -> None:
        import torch.distributed as dist
        from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

        if dist.is_initialized():
            if ranks.world_size > 1 or dist.get_world_size() > 1:
                what = (
                    f"this process already belongs to {dist.get_world_size()} ranks and cannot join {ranks.world_size}"
                )
                raise StageError(self._where, what, "give each engine of several ranks its own processes")
            return
        timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        if ranks.world_size == 1:  # shared by every engine alone in this process, so no engine takes it down
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1, timeout=timeout)
            return
        try:
            listener = _listener(ranks)
            store = TCPStore(
                ranks.address,
                ranks.port,
                ranks.world_size,
                is_master=ranks.rank == 0,
                timeout=timeout,
                master_listen_fd=listener,
            )
            # Who does not know the token finds none of the keys; the store has no other way to tell friend from foe.
            self._store: Any = PrefixStore(ranks.token, store)
            dist.init_process_group(
                backend,
                store=PrefixStore("ranks", self._store),
                rank=ranks.rank,
                world_size=ranks.world_size,
                timeout=timeout,
            )
            self._control: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=FOLLOWER_TIMEOUT_S))
            self._votes: Any = dist.new_group(backend="gloo", timeout=timeout)
        except (RuntimeError, OSError) as error:
            what = f"{ranks.world_size} ranks did not meet at {ranks.address}:{ranks.port} ({error})"
            raise StageError(self._where, what, "see the other ranks' logs; is the port free and reachable?") from error
        self._owns_group = True

    def form_groups(self, size: int) -> None:
        """Let every `size` ranks in a row have a group of their own, `group`."""
        import torch.distributed as dist

        timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        starts = range(0, self.world_size, size)
        groups = [dist.new_group([*range(start, start + size)], timeout=timeout) for start in starts]
        self.group: Any = groups[self.rank // size]

    def send(self, command: bytes) -> None:
        """Give the followers a command."""
        if self.is_broken:
            raise StageError(self._where, "the ranks broke in an earlier call", "restart the node")
        if self.world_size > 1:
            self._broadcast(command)

    def receive(self) -> bytes:
        """Wait for rank 0's next command."""
        return self._broadcast(b"")

    def _broadcast(self, payload: bytes) -> bytes:
        import torch
        import torch.distributed as dist

        size = torch.tensor([len(payload)], dtype=torch.int64)
        dist.broadcast(size, src=0, group=self._control)
        body = _to_tensor(payload) if self.rank == 0 else torch.empty(int(size.item()), dtype=torch.uint8)
        dist.broadcast(body, src=0, group=self._control)
        return body.numpy().tobytes()

    def gather(self, answer: bytes) -> list[bytes]:
        """Return every rank's answer on rank 0, an empty list elsewhere; waits for the slowest rank."""
        import torch
        import torch.distributed as dist

        if self.world_size == 1:
            return [answer]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(answer)], dtype=torch.int64), group=self._control)
        if self.rank > 0:
            dist.send(_to_tensor(answer), dst=0, group=self._control)
            return []
        answers = [answer]
        for rank in range(1, self.world_size):
            body = torch.empty(int(sizes[rank].item()), dtype=torch.uint8)
            dist.recv(body, src=rank, group=self._control)
            answers.append(body.numpy().tobytes())
        return answers

    def sum(self, value: float) -> float:
        """Return the sum of every rank's value, on every rank, in float64."""
        return self.sums([value])[0]

    def sums(self, values: list[float]) -> list[float]:
        """Return the sums of every rank's values, place by place, on every rank, in float64."""
        import torch
        import torch.distributed as dist

        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._control)
        return total.tolist()

    def share(self, value: int) -> list[int]:
        """Return every rank's value, on every rank."""
        import torch
        import torch.distributed as dist

        if self.world_size == 1:
            return [value]
        values = torch.zeros(self.world_size, dtype=torch.int64)
        values[self.rank] = value
        dist.all_reduce(values, group=self._votes)
        return values.tolist()

    @contextmanager
    def guard(self, doing: str) -> Iterator[None]:
        """Make any error of this block break the ranks, and name the rank it started on.

        Raises:
            StageError: with several ranks; with one rank the error travels on as it is, and so does a ResourceError.
        """
        try:
            yield
        except Exception as error:
            if self.world_size == 1:
                raise
            own = f"{type(error).__name__}: {error}"
            cause = self._first_failure()
            self._let_go(own)
            if isinstance(error, ResourceError):  # found by all ranks together
                raise
            what = f"rank {cause[0]} failed: {cause[1]}" if cause else own
            raise StageError(self._where, f"{doing}: {what}", "restart the node; its ranks are gone") from error

    def _first_failure(self) -> tuple[int, str] | None:
        """Return the rank and words of a failure that another rank has left in the store."""
        if self.is_broken:
            return None
        try:
            for rank in range(self.world_size):
                if rank != self.rank and self._store.check([f"failed/{rank}"]):
                    return rank, self._store.get(f"failed/{rank}").decode()
        except RuntimeError:  # the store went down with rank 0
            return 0, "its process is gone"
        return None

    def _let_go(self, words: str) -> None:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _abort_process_group

        if self.is_broken:
            return
        self.is_broken = True
        with suppress(RuntimeError):  # the store went down with rank 0, which then needs no telling
            self._store.set(f"failed/{self.rank}", words)
        if dist.is_initialized() and dist.get_backend() == "nccl":
            with suppress(RuntimeError):  # the error that broke the ranks is the one to raise
                _abort_process_group()  # to destroy NCCL's group is to wait for ranks that wait for this one
        elif dist.is_initialized():
            dist.destroy_process_group()
        self._control = self._votes = self.group = None
        gc.collect()  # sockets close with the last reference; the others' collectives fail then, not at the timeout

    def close(self) -> None:
        """Leave the others; they must be leaving too."""
        import torch.distributed as dist

        if self._owns_group and not self.is_broken and dist.is_initialized():
            dist.destroy_process_group()
        self._owns_group = False


def _listener(ranks: Ranks) -> int | None:
    """Return the descriptor of the socket that rank 0 listens at, on its own address alone; None on other ranks."""
    if ranks.rank > 0:
        return None
    # The store by itself would listen on every interface of the machine.
    return ranks.listener if ranks.listener >= 0 else socket.create_server((ranks.address, ranks.port)).detach()


def interface_of(address: str) -> str:
    """Return the name of the network interface that has an address, "" where none does."""
    import psutil

    found = (name for name, each in psutil.net_if_addrs().items() if address in [one.address for one in each])
    return next(found, "")


def _set_environment(ranks: Ranks) -> None:
    """Tell DeepSpeed and torch.distributed who this process is, in the only way they read it."""
    os.environ |= {
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world_size),
        "LOCAL_RANK": "0",  # the runtime gives each rank its own visible devices
        "MASTER_ADDR": ranks.address,
        "MASTER_PORT": str(ranks.port),
    }
    # gloo would take whatever the host's name leads to; a rank on another machine is told by the runtime
    if name := interface_of(ranks.address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _to_tensor(payload: bytes):  # noqa: ANN202  (torch is imported only where there are several ranks)
    import torch

    return torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)
