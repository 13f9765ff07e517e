"""Weights by broadcast: one collective from the learner to all generators, gloo on CPUs and NCCL on GPUs.

How a version travels: `publish` packs it into host buckets (the parameters may change from then on) and names the
store's address in the manifest; each receiver announces itself in the store; when all are there, or half the deadline
has passed, `transfer` writes the plan (who is in which group) and broadcasts to those in it.

Invariants:
- no wait is without a deadline;
- the dead are left out and the living go on;
- whoever came for a version is waited for at the next, so that a receiver which is gone holds the sender up once;
- a group outside torch's default one is formed anew when its members change or it failed once, and ends no process,
  whatever befalls it;
- the workers of one replica hold a version once, received and verified by the first of them, whose memory the others
  map;
- a receiver that is late, restarted, new or in a broken group pulls the same buckets from the sender's server.

Tests: tests/contracts/test_weights.py
"""

from __future__ import annotations

import contextlib
import datetime
import mmap
import os
import socket
import time
import uuid
from itertools import count
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from flowrl.engines.weights.base import pack, verify
from flowrl.engines.weights.manifest import AnyManifest, BroadcastManifest, Bucket, encode_manifest
from flowrl.engines.weights.pull import PullServer, pull
from flowrl.engines.weights.shm import map_file, split
from flowrl.errors import ResourceError, RunError, TransferError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


# torch reads these when a group is made. Its watchdog ends the whole process when an operation of the group fails or
# passes its timeout, as when a generator dies; 2 lets it clean up the group and leave the process alone.
HARMLESS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}


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
        self._stream: Any = None  # of the device, beside the one on which the learner trains or the generator samples

    def broadcast(self, buffers: Sequence[torch.Tensor]) -> None:
        """Send the host buffers, or fill them on every other rank; one bucket of device memory at most.

        Raises:
            RuntimeError: a member is gone or the deadline passed.
        """
        if self._device.type != "cuda":
            self._broadcast(buffers)
            return
        self._stream = self._stream or torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            self._broadcast(buffers)
        self._stream.synchronize()

    def _broadcast(self, buffers: Sequence[torch.Tensor]) -> None:
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
    options._timeout = timeout
    before = {name: os.environ.get(name) for name in HARMLESS}
    os.environ |= HARMLESS
    try:
        return nccl(store, rank, size, options)
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class Member(msgspec.Struct, frozen=True, array_like=True):
    """One receiving worker; `incarnation` tells a restarted one from its predecessor."""

    replica: int
    rank: int  # tensor-parallel rank in its replica
    size: int  # tensor-parallel ranks of its replica
    incarnation: str
    is_near: bool = False  # it has the bytes already, by shared memory


class _Kept(msgspec.Struct, frozen=True):
    """Where the first worker of a replica keeps a version, or why it has none."""

    path: str = ""
    failure: str = ""


class _Plan(msgspec.Struct, frozen=True):
    """Who receives a version together, in rank order behind the sender."""

    group: int
    members: list[Member]


class BroadcastSender:
    """Rank 0: keeps the store, the pull server and the host buckets of the versions not yet retired."""

    def __init__(
        self,
        name: str,
        *,
        num_receivers: int,
        timeout_s: float,
        device: str | torch.device,
        host: str,
        bucket_bytes: int,
        digest_every: int = 1,
    ) -> None:
        self._where = name
        self._digest_every = digest_every
        self._num_receivers = num_receivers
        self._timeout_s = timeout_s
        self._device = torch.device(device)
        self._host = host
        self._bucket_bytes = bucket_bytes
        self._held: dict[int, list[torch.Tensor]] = {}
        self._store: Store | None = None
        self._port = 0  # of the store
        self._server: PullServer | None = None
        self._group: BroadcastGroup | None = None
        self._plan = _Plan(group=0, members=[])
        self._last: int | None = None  # the version that was transferred before
        self._transferring: int | None = None
        self._is_closed = False

    def publish(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[bytes, int]:
        """Pack the tensors on the host and return the manifest and its size in bytes.

        Raises:
            ResourceError: the host address cannot be listened on.
        """
        held: list[torch.Tensor] = []
        hashes = version % self._digest_every == 0
        buckets = pack(
            tensors, bucket_bytes=self._bucket_bytes, reuse=False, hashes=hashes, keep=lambda _, raw: held.append(raw)
        )
        manifest = self.offer(version, buckets, held)
        return encode_manifest(manifest), manifest.size_bytes

    def offer(self, version: int, buckets: list[Bucket], buffers: list[torch.Tensor]) -> BroadcastManifest:
        """Hold packed buckets for those who will want them.

        Raises:
            ResourceError: the host address cannot be listened on.
        """
        _, server = self._listen()
        self._held[version] = buffers
        return BroadcastManifest(
            version=version,
            buckets=buckets,
            host=self._host,
            port=self._port,
            pull_port=server.port,
            token=server.token,
            backend="nccl" if self._device.type == "cuda" else "gloo",
        )

    def _listen(self) -> tuple[Store, PullServer]:
        if self._store is not None and self._server is not None:
            return self._store, self._server
        try:
            # The store by itself would listen on every interface of the machine.
            listening = socket.create_server((self._host, 0), backlog=512)
            self._server = PullServer(
                self._host, lambda version: self._held.get(version, []), timeout_s=self._timeout_s
            )
        except OSError as error:
            raise ResourceError(
                self._where, f"cannot listen on {self._host} ({error})", "give an address of this machine"
            ) from error
        self._port = listening.getsockname()[1]
        store = TCPStore(
            self._host,
            self._port,
            is_master=True,
            timeout=datetime.timedelta(seconds=self._timeout_s),
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
        self._store = PrefixStore(self._server.token, store)
        return self._store, self._server

    def transfer(self, version: int) -> None:
        """Broadcast to the receivers that announce themselves within half the deadline.

        Raises:
            TransferError: none came, or the sender was closed meanwhile.
        """
        store, held = self._store, self._held.get(version)
        self._transferring = version  # before looking whether we are closed: `close` looks the other way round
        came: list[Member] = []
        if store is not None and held is not None and not self._is_closed:
            came = self._gather(store, version)
        if self._is_closed or store is None or held is None:
            raise TransferError(self._where, f"closed while version {version} was being sent")
        self._last = version
        members = [member for member in came if not member.is_near]
        if members != self._plan.members or self._group is None:
            self._drop_group()
            self._plan = _Plan(group=self._plan.group + 1, members=members)
        store.set(f"{version}/plan", msgspec.json.encode(self._plan).decode())
        if not came:
            raise TransferError(
                self._where,
                f"none of {self._num_receivers} receivers announced itself for version {version} within "
                f"{self._timeout_s / 2:g} s",
                "see why the generators are gone, or raise transfer_timeout_s",
            )
        try:
            if self._group is None and members:
                self._group = self._form(store)
            if self._group is not None:
                self._group.broadcast(held)
        except RuntimeError:
            # A member died on the way. The others find their group broken and pull the same bytes from our server.
            self._drop_group()
        self._transferring = None

    def _gather(self, store: Store, version: int) -> list[Member]:
        """Wait for the announcements; return those of complete replicas, in rank order."""
        newest: dict[tuple[int, int], Member] = {}
        num_expected = self._num_came(store) or self._num_receivers
        deadline_s = time.monotonic() + self._timeout_s / 2
        for slot in count(1):
            if len(_complete(newest)) >= num_expected:
                break
            left_s = max(deadline_s - time.monotonic(), 0.001)
            try:
                store.wait([f"{version}/{slot}"], datetime.timedelta(seconds=left_s))
            except dist.DistStoreError:
                break
            if self._is_closed:
                break
            member = msgspec.json.decode(store.get(f"{version}/{slot}"), type=Member)
            newest[member.replica, member.rank] = member
        whole = _complete(newest)
        return [newest[key] for key in sorted(newest) if key[0] in whole]

    def _num_came(self, store: Store) -> int:
        """Return how many replicas came for the version before, late ones too."""
        if self._last is None:
            return 0
        slots = [f"{self._last}/{slot}" for slot in range(1, 1 + store.add(f"{self._last}/slots", 0))]
        found = [msgspec.json.decode(store.get(slot), type=Member) for slot in slots if store.check([slot])]
        return len(_complete({(member.replica, member.rank): member for member in found}))

    def _form(self, store: Store) -> BroadcastGroup:
        return BroadcastGroup(
            store,
            f"group/{self._plan.group}",
            rank=0,
            size=1 + len(self._plan.members),
            device=self._device,
            host=self._host,
            timeout_s=self._timeout_s / 2,
        )

    def _drop_group(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None

    def retire(self, version: int, keep: frozenset[int] = frozenset()) -> None:
        """Forget the buckets of every version before `version` but those in `keep`."""
        for old in [known for known in self._held if known < version and known not in keep]:
            del self._held[old]

    def close(self) -> None:
        """End a transfer under way, then release the group, the server and the store."""
        self._is_closed = True
        if self._transferring is not None and self._store is not None:
            # A second connection, because the first is waiting: an announcement of nobody wakes it.
            assert self._server is not None, "they are opened together"
            waker = _connect(self._host, self._port, self._server.token, self._timeout_s)
            _announce(waker, self._transferring, Member(-1, 0, 0, ""))
        self._drop_group()
        if self._server is not None:
            self._server.close()
        self._server = self._store = None
        self._held.clear()


class BroadcastFetcher:
    """Rank 1 and up: receives each version with the others, or pulls it alone.

    `together` is a name that only the workers of one replica have in common, all on one machine: the first receives for
    them all. Without it each receives for itself.
    """

    def __init__(
        self, where: str, *, replica: int, rank: int, size: int, device: str | torch.device, timeout_s: float,
        together: str = "",
    ) -> None:  # fmt: skip
        self.where = where
        self._together = together if size > 1 else ""
        self._is_led = bool(self._together) and rank > 0
        self._member = Member(replica, rank, 1 if self._together else size, uuid.uuid4().hex)
        self._kept = -1  # the descriptor of the memory that the other workers map
        self._device = torch.device(device)
        self._timeout_s = timeout_s
        self._sender: tuple[str, int, str] | None = None
        self._store: Store | None = None
        self._group: BroadcastGroup | None = None
        self._number = 0
        self.note = self._why = ""
        self._buffers: list[torch.Tensor] = []

    def fetch(self, manifest: AnyManifest) -> list[torch.Tensor]:
        """Receive and verify a version; the buffers are reused by the next fetch.

        Raises:
            ProofError: a digest disagrees.
            TransferError: the sender is gone or did not send before the deadline.
        """
        assert isinstance(manifest, BroadcastManifest)
        if self._is_led:
            return self._map(manifest)
        self._make_buffers(manifest)
        self.note = ""
        try:
            if not self._receive(manifest):
                self.note = f"the broadcast did not bring version {manifest.version}, which is pulled ({self._why})"
                pull(manifest, self._buffers, timeout_s=self._timeout_s, where=self.where)
            verify(manifest, self._buffers, self.where)
        except RunError as error:
            self._tell(manifest, _Kept(failure=error.what))
            raise
        self._tell(manifest, _Kept(path=f"/proc/{os.getpid()}/fd/{self._kept}"))
        return self._buffers

    def _make_buffers(self, manifest: BroadcastManifest) -> None:
        """Make room for a version, in memory that other workers can map where there are such."""
        sizes = [bucket.size for bucket in manifest.buckets]
        if [raw.numel() for raw in self._buffers] == sizes:
            return
        self._free()
        if not self._together:
            self._buffers = [torch.empty(size, dtype=torch.uint8) for size in sizes]
            return
        end = max((bucket.offset + bucket.size for bucket in manifest.buckets), default=0)
        self._kept = os.memfd_create("flowrl-weights", os.MFD_CLOEXEC)
        os.ftruncate(self._kept, max(1, end))
        self._buffers = split(torch.frombuffer(mmap.mmap(self._kept, max(1, end)), dtype=torch.uint8), manifest.buckets)

    def _tell(self, manifest: BroadcastManifest, kept: _Kept) -> None:
        """Say to the other workers where a version is, or why it is nowhere."""
        if self._together:
            with contextlib.suppress(RuntimeError):  # the sender is gone: they will see it themselves
                self._join(manifest).set(self._key(manifest), msgspec.json.encode(kept).decode())

    def _key(self, manifest: BroadcastManifest) -> str:
        return f"{manifest.version}/kept/{self._together}"

    def _map(self, manifest: BroadcastManifest) -> list[torch.Tensor]:
        """Wait until the first worker has received and verified a version, and map its memory."""
        try:
            store = self._join(manifest)
            store.wait([self._key(manifest)], datetime.timedelta(seconds=3 * self._timeout_s))
            kept = msgspec.json.decode(store.get(self._key(manifest)), type=_Kept)
            if kept.failure:
                raise TransferError(self.where, f"the first worker has no version {manifest.version}: {kept.failure}")
            return split(map_file(kept.path), manifest.buckets)
        except (RuntimeError, OSError) as error:
            what = f"version {manifest.version} did not come from the first worker ({error})"
            raise TransferError(self.where, what, "see the learner's and the first worker's log") from error

    def _receive(self, manifest: BroadcastManifest) -> bool:
        """Take part in the broadcast; false when this receiver is not in it or it broke."""
        try:
            store = self._join(manifest)
            _announce(store, manifest.version, self._member)
            store.wait([f"{manifest.version}/plan"], datetime.timedelta(seconds=self._timeout_s))
            plan = msgspec.json.decode(store.get(f"{manifest.version}/plan"), type=_Plan)
            if self._member not in plan.members:
                self._why = "it came too late for it"
                return False
            if self._group is None or self._number != plan.group:
                self._leave()
                self._number = plan.group
                self._group = BroadcastGroup(
                    store,
                    f"group/{plan.group}",
                    rank=1 + plan.members.index(self._member),
                    size=1 + len(plan.members),
                    device=self._device,
                    host=manifest.host,
                    timeout_s=self._timeout_s,
                )
            self._group.broadcast(self._buffers)
        except RuntimeError as error:  # torch's distributed errors are of this kind; pulling tells of a dead sender
            self._why = f"its group broke: {str(error).strip().partition(chr(10))[0]}"
            self._leave()
            return False
        return True

    def announce_near(self, manifest: BroadcastManifest) -> None:
        """Let the sender not wait for this receiver, which has the bytes."""
        if self._is_led:
            return
        with contextlib.suppress(RuntimeError):  # the sender is gone, or waits for a while
            _announce(self._join(manifest), manifest.version, msgspec.structs.replace(self._member, is_near=True))

    def _join(self, manifest: BroadcastManifest) -> Store:
        sender = (manifest.host, manifest.port, manifest.token)
        if self._store is None or sender != self._sender:  # a restarted learner has another store
            self._leave()
            # Half of the time: torch waits, tries once more for as long, and the pull that follows wants its own.
            self._store = _connect(manifest.host, manifest.port, manifest.token, self._timeout_s / 2)
            self._sender = sender
        return self._store

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None

    def close(self) -> None:
        """Leave the group and the store."""
        self._leave()
        self._store = None
        self._free()

    def _free(self) -> None:
        self._buffers = []
        if self._kept >= 0:
            os.close(self._kept)
        self._kept = -1


def _complete(members: dict[tuple[int, int], Member]) -> set[int]:
    """Return the replicas of which every tensor-parallel rank is there."""
    ranks: dict[int, int] = {}
    for replica, _ in members:
        ranks[replica] = ranks.get(replica, 0) + 1
    return {member.replica for member in members.values() if ranks[member.replica] == member.size}


def _connect(host: str, port: int, token: str, timeout_s: float) -> Store:
    """Return the store as who knows its token sees it; without the token no key of it is found."""
    timeout = datetime.timedelta(seconds=timeout_s)
    return PrefixStore(token, TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False))


def _announce(store: Store, version: int, member: Member) -> None:
    slot = store.add(f"{version}/slots", 1)
    store.set(f"{version}/{slot}", msgspec.json.encode(member).decode())
