"""What every weight transport keeps, without vLLM: exact bytes, digests, deadlines, late and restarted receivers."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from flowrl.engines.weights import open_sender
from flowrl.engines.weights.base import digest, pack, unpack, verify
from flowrl.engines.weights.broadcast import BroadcastFetcher, BroadcastGroup
from flowrl.engines.weights.manifest import Bucket, decode_manifest
from flowrl.engines.weights.nearest import fetchers
from flowrl.engines.weights.shm import ShmFetcher, ShmSender
from flowrl.errors import ConfigError, ProofError, ResourceError, TransferError

pytestmark = pytest.mark.slow

SOON_S = 60.0  # far above what it takes; only a test that fails waits so long
BUCKET = 4096  # small, so that a few tensors take several buckets


def some_tensors(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(320, 16, generator=draw),  # larger than a bucket
        "norm.weight": torch.randn(7, generator=draw).to(torch.bfloat16),  # odd size: the next must be aligned
        "scale": torch.tensor(2.5 + seed),
        "transposed.weight": torch.randn(12, 30, generator=draw).T,
        **{f"layers.{i}.weight": torch.randn(16, 16, generator=draw).half() for i in range(12)},
    }


def sender_of(kind: str, *, num_receivers: int = 1, timeout_s: float = SOON_S) -> Any:
    return open_sender(
        kind, name="test/learner", num_receivers=num_receivers, timeout_s=timeout_s, device="cpu", bucket_bytes=BUCKET
    )


def receiver(
    replica: int = 0, *, rank: int = 0, size: int = 1, timeout_s: float = SOON_S, together: str = ""
) -> BroadcastFetcher:
    return BroadcastFetcher(f"g[{replica}]", replica=replica, rank=rank, size=size, device="cpu", timeout_s=timeout_s,
                            together=together)  # fmt: skip


def received(fetcher: Any, wire: bytes) -> dict[str, torch.Tensor]:
    manifest = decode_manifest(wire)
    buffers = fetcher.fetch(manifest)
    pairs = zip(manifest.buckets, buffers, strict=True)
    return {name: tensor.clone() for bucket, raw in pairs for name, tensor in unpack(bucket, raw)}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def opened():
    """Close whatever a test appended."""
    things: list[Any] = []
    yield things
    for thing in reversed(things):
        thing.close()


def packed_of(tensors: Any) -> list[tuple[Bucket, torch.Tensor]]:
    found: list[torch.Tensor] = []
    buckets = pack(tensors, bucket_bytes=BUCKET, reuse=False, keep=lambda _, raw: found.append(raw))
    return list(zip(buckets, found, strict=True))


def test_packing_respects_the_bucket_size_and_a_large_tensor_has_a_bucket_of_its_own():
    packed = packed_of(some_tensors(0).items())
    assert [bucket.tensors[0].name for bucket, _ in packed][:2] == ["embed.weight", "norm.weight"]
    assert len(packed) > 2
    assert all(bucket.size <= BUCKET for bucket, _ in packed[1:])
    expected = {name: digest(tensor.reshape(-1).view(torch.uint8)) for name, tensor in some_tensors(0).items()}
    assert {spec.name: spec.digest for bucket, _ in packed for spec in bucket.tensors} == expected


def test_packing_copies_a_tensor_before_the_next_is_asked_for():
    def gathered():
        buffer = torch.zeros(64)
        for i in range(4):
            yield f"shard.{i}", buffer.fill_(i)[:]
            buffer.fill_(-1)  # what freeing and gathering the next one does

    packed = packed_of(gathered())
    assert [tensor.unique().tolist() for bucket, raw in packed for _, tensor in unpack(bucket, raw)] == [
        [0.0], [1.0], [2.0], [3.0],
    ]  # fmt: skip


def test_a_bucket_is_hashed_and_kept_while_the_next_is_filled_and_two_buffers_are_enough():
    tensors = {f"{i}": torch.full((BUCKET // 8,), i, dtype=torch.float32) for i in range(12)}  # two to a bucket
    is_filling = threading.Event()
    seen: list[tuple[int, int, list[float]]] = []

    def given():
        for name, tensor in tensors.items():
            if name == "3":
                is_filling.set()  # the second bucket has its first tensor
            yield name, tensor

    def keep(bucket: Bucket, raw: torch.Tensor) -> None:
        assert is_filling.wait(SOON_S), "the first bucket holds up the second"
        seen.append((raw.data_ptr(), raw.numel(), [value.unique().item() for _, value in unpack(bucket, raw)]))

    buckets = pack(given(), bucket_bytes=BUCKET, reuse=True, keep=keep)
    assert [values for *_, values in seen] == [[2.0 * i, 2.0 * i + 1] for i in range(6)], "in order, none overwritten"
    assert sum(dict((place, size) for place, size, _ in seen).values()) == 2 * BUCKET
    assert [len(bucket.tensors) for bucket in buckets] == [2] * 6


def test_what_keeping_a_bucket_raises_reaches_the_sender():
    def full(bucket: Bucket, raw: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        pack(some_tensors(0).items(), bucket_bytes=BUCKET, reuse=True, keep=full)


def test_a_tied_tensor_travels_once_and_an_equal_one_twice():
    tied = torch.ones(4)
    named = [("embed", tied), ("lm_head.weight", tied), ("other", torch.ones(4))]
    ((bucket, _),) = packed_of(named)
    assert [spec.name for spec in bucket.tensors] == ["embed", "other"]


def test_shared_memory_brings_every_tensor_bit_for_bit(opened):
    sender = sender_of("shm")
    opened.append(sender)
    wire, size_bytes = sender.publish(3, some_tensors(3).items())
    sender.transfer(3)
    assert_same(received(ShmFetcher("g[0]"), wire), some_tensors(3))
    assert size_bytes == decode_manifest(wire).size_bytes


def test_shared_memory_keeps_a_mapped_version_after_it_was_retired(opened):
    sender = sender_of("shm")
    opened.append(sender)
    first, _ = sender.publish(0, some_tensors(0).items())
    manifest = decode_manifest(first)
    buffers = ShmFetcher("g[0]").fetch(manifest)
    second, _ = sender.publish(1, some_tensors(1).items())
    sender.retire(1)
    with pytest.raises(TransferError, match="version 0 cannot be read"):
        ShmFetcher("g[1]").fetch(manifest)
    verify(manifest, buffers, "g[0]")
    assert_same(received(ShmFetcher("late"), second), some_tensors(1))


@pytest.mark.parametrize("kind", ["shm", "broadcast", "nearest"])
def test_a_version_that_is_kept_is_there_for_whoever_comes_late(opened, kind: str):
    sender = sender_of(kind)
    opened.append(sender)
    wires = [sender.publish(version, some_tensors(version).items())[0] for version in range(4)]
    sender.retire(3, frozenset({1}))
    held = getattr(sender, "_shm", sender)
    assert sorted(held._files if kind != "broadcast" else held._held) == [1, 3]
    if kind == "shm":
        assert_same(received(ShmFetcher("late"), wires[1]), some_tensors(1))


def test_shared_memory_is_private_and_leaves_nothing_behind():
    sender = sender_of("shm")
    wire, _ = sender.publish(0, some_tensors(0).items())
    directory = Path(json.loads(wire)["path"]).parent
    assert directory.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in directory.iterdir()) == ["0.weights", "alive"]
    sender.close()
    assert not directory.exists()


def test_what_a_killed_sender_left_goes_when_the_next_one_opens(tmp_path):
    program = (
        "import os, sys, torch; from pathlib import Path; from flowrl.engines.weights.shm import ShmSender\n"
        "ShmSender('killed', bucket_bytes=64, root=Path(sys.argv[1])).publish(0, [('a', torch.ones(4))])\n"
        "os._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    (left,) = tmp_path.iterdir()
    living = [ShmSender(name, bucket_bytes=64, root=tmp_path) for name in ("first", "second")]
    for sender in living:
        sender.publish(0, some_tensors(0).items())
    assert not left.exists()
    assert len(list(tmp_path.iterdir())) == 2
    for sender in living:
        sender.close()
    assert not list(tmp_path.iterdir())


def test_one_changed_byte_in_shared_memory_is_found(opened):
    sender = sender_of("shm")
    opened.append(sender)
    wire, size_bytes = sender.publish(0, some_tensors(0).items())
    with open(json.loads(wire)["path"], "r+b") as file:
        file.seek(size_bytes - 5)
        old = file.read(1)[0]
        file.seek(size_bytes - 5)
        file.write(bytes([old ^ 1]))
    with pytest.raises(ProofError, match=r"layers\.11\.weight of version 0"):
        ShmFetcher("g[0]").fetch(decode_manifest(wire))


def test_full_shared_memory_is_a_resource_error_with_the_numbers(tmp_path):
    def tensors():
        yield "a", torch.ones(4)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sender = ShmSender("learner", bucket_bytes=BUCKET, root=tmp_path)
    with pytest.raises(ResourceError, match="bytes free, 0 versions held"):
        sender.publish(0, tensors())
    assert not list(tmp_path.rglob("*.partial"))


def test_an_unknown_transport_is_refused():
    with pytest.raises(ConfigError, match="'carrier-pigeon'"):
        open_sender("carrier-pigeon", name="learner", num_receivers=1, timeout_s=1.0, device="cpu")


def test_broadcast_brings_every_version_to_two_receivers_bit_for_bit(opened):
    sender = sender_of("broadcast", num_receivers=2)
    fetchers = [receiver(0), receiver(1)]
    opened += [sender, *fetchers]
    with ThreadPoolExecutor(3) as pool:
        for version in range(3):
            wire, _ = sender.publish(version, some_tensors(version).items())
            sent = pool.submit(sender.transfer, version)
            for answer in [pool.submit(received, fetcher, wire) for fetcher in fetchers]:
                assert_same(answer.result(), some_tensors(version))
            sent.result()
            sender.retire(version)


def test_broadcast_goes_through_one_group_and_not_the_pull_server(opened, monkeypatch):
    sizes: list[int] = []
    original = BroadcastGroup.broadcast

    def counted(group: BroadcastGroup, buffers: Any) -> None:
        original(group, buffers)
        sizes.append(len(buffers))

    monkeypatch.setattr(BroadcastGroup, "broadcast", counted)
    sender = sender_of("broadcast", num_receivers=2)
    fetchers = [receiver(0, rank=0, size=2), receiver(0, rank=1, size=2), receiver(1)]
    opened += [sender, *fetchers]
    wire, _ = sender.publish(0, some_tensors(0).items())
    with ThreadPoolExecutor(4) as pool:
        sent = pool.submit(sender.transfer, 0)
        for answer in [pool.submit(received, fetcher, wire) for fetcher in fetchers]:
            assert_same(answer.result(), some_tensors(0))
        sent.result()
    assert sizes == [len(decode_manifest(wire).buckets)] * 4


def test_the_workers_of_a_replica_hold_a_version_once_which_the_first_of_them_has_verified(opened, monkeypatch):
    """The others map its memory; what they hold of their own, and what is hashed and sent, does not grow with them."""
    hashed: list[int] = []
    monkeypatch.setattr("flowrl.engines.weights.broadcast.verify", lambda *told: hashed.append(1) or verify(*told))
    sender = sender_of("broadcast")
    workers = [receiver(rank=rank, size=3, together="one") for rank in range(3)]
    opened += [sender, *workers]
    for version in range(2):
        wire, size_bytes = sender.publish(version, some_tensors(version).items())
        with ThreadPoolExecutor(4) as pool:
            sending = pool.submit(sender.transfer, version)
            found = [*pool.map(lambda worker: received(worker, wire), workers)]  # noqa: B023  # done before the next
            sending.result()
        for tensors in found:
            assert_same(tensors, some_tensors(version))
    assert len(hashed) == 2, "once a version"
    assert [(member.rank, member.size) for member in sender._plan.members] == [(0, 1)]
    assert [bool(worker._buffers) for worker in workers] == [True, False, False]
    kept = os.fstat(workers[0]._kept).st_size
    assert size_bytes <= kept < size_bytes + 64 * 20, "one copy, each bucket at a multiple of 64"


def test_where_the_first_worker_fails_the_others_hear_why(opened):
    sender = sender_of("broadcast")
    workers = [receiver(rank=rank, size=2, together="one") for rank in range(2)]
    opened += [sender, *workers]
    wire, _ = sender.publish(0, some_tensors(0).items())
    sender._held[0][0][5] ^= 1
    with ThreadPoolExecutor(3) as pool:
        sending = pool.submit(sender.transfer, 0)
        failed = [pool.submit(received, worker, wire) for worker in workers]
        with pytest.raises(ProofError, match=r"embed.weight of version 0"):
            failed[0].result()
        with pytest.raises(TransferError, match=r"the first worker has no version 0: embed.weight"):
            failed[1].result()
        sending.result()


@pytest.mark.parametrize("kind", ["shm", "broadcast", "nearest"])
def test_between_versions_with_digests_come_versions_without(opened, kind):
    sender = open_sender(kind, name="test", num_receivers=0, timeout_s=SOON_S, device="cpu", bucket_bytes=BUCKET,
                         digest_every=3)  # fmt: skip
    opened.append(sender)
    told = [decode_manifest(sender.publish(version, some_tensors(0).items())[0]) for version in range(4)]
    has_digests = [{bool(spec.digest) for bucket in each.buckets for spec in bucket.tensors} for each in told]
    assert has_digests == [{True}, {False}, {False}, {True}]
    verify(told[1], [torch.zeros(bucket.size, dtype=torch.uint8) for bucket in told[1].buckets], "test")
    with pytest.raises(ProofError, match=r"embed.weight of version 3"):
        verify(told[3], [torch.zeros(bucket.size, dtype=torch.uint8) for bucket in told[3].buckets], "test")


def test_a_receiver_that_never_comes_does_not_keep_the_others_waiting_past_the_deadline(opened):
    sender = sender_of("broadcast", num_receivers=2, timeout_s=4.0)
    present = receiver(0, timeout_s=SOON_S)
    opened += [sender, present]
    wire, _ = sender.publish(0, some_tensors(0).items())
    start_s = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        sent = pool.submit(sender.transfer, 0)
        assert_same(pool.submit(received, present, wire).result(), some_tensors(0))
        sent.result()
    assert time.monotonic() - start_s < SOON_S


def test_whoever_is_gone_is_waited_for_once(opened):
    sender = sender_of("broadcast", num_receivers=2, timeout_s=30.0)
    present = receiver(0)
    opened += [sender, present]
    sender._timeout_s = 2.0
    with ThreadPoolExecutor(2) as pool:
        for version in range(2):
            wire, _ = sender.publish(version, some_tensors(version).items())
            sent = pool.submit(sender.transfer, version)
            assert_same(pool.submit(received, present, wire).result(), some_tensors(version))
            sent.result()
            sender._timeout_s = 600.0  # a wait for the second one would show
        newcomer = receiver(1)
        opened.append(newcomer)
        assert_same(received(newcomer, wire), some_tensors(1))  # late, by itself
    assert sender._num_came(sender._store) == 2, "from the next version on it is waited for"


def test_each_receiver_takes_its_nearest_way(opened, monkeypatch):
    sizes: list[int] = []
    original = BroadcastGroup.broadcast
    monkeypatch.setattr(BroadcastGroup, "broadcast", lambda group, raw: (original(group, raw), sizes.append(len(raw))))
    sender = sender_of("nearest", num_receivers=2)
    near, far = (fetchers(f"g[{i}]", replica=i, rank=0, size=1, device="cpu", timeout_s=20.0) for i in range(2))
    opened += [sender, near["nearest"], far["nearest"]]
    with ThreadPoolExecutor(3) as pool:
        for version in range(3):
            wire, _ = sender.publish(version, some_tensors(version).items())
            elsewhere = wire.replace(b"/dev/shm/", b"/of/another/machine/")
            sent = pool.submit(sender.transfer, version)
            answers = [pool.submit(received, near["nearest"], wire), pool.submit(received, far["nearest"], elsewhere)]
            for answer in answers:
                assert_same(answer.result(), some_tensors(version))
            sent.result()
            if version == 1:
                near, far = far, near  # as if both had been restarted, each where the other was
            sender.retire(version)
    assert sizes == [len(decode_manifest(wire).buckets)] * 6, "the sender and the far one, for each version"


def test_no_receiver_at_all_is_a_transfer_error_within_the_deadline(opened):
    sender = sender_of("broadcast", num_receivers=1, timeout_s=1.0)
    opened.append(sender)
    sender.publish(0, some_tensors(0).items())
    with pytest.raises(TransferError, match="none of 1 receivers"):
        sender.transfer(0)


def test_a_restarted_receiver_pulls_the_newest_version_and_joins_the_next_broadcast(opened):
    sender = sender_of("broadcast")
    dead, restarted = receiver(0), receiver(0)
    opened += [sender, dead, restarted]
    with ThreadPoolExecutor(2) as pool:
        wire, _ = sender.publish(0, some_tensors(0).items())
        sent = pool.submit(sender.transfer, 0)
        received(dead, wire)
        sent.result()
        dead.close()
        assert_same(received(restarted, wire), some_tensors(0))  # nobody sends any more
        assert "did not bring version 0, which is pulled" in restarted.note
        wire, _ = sender.publish(1, some_tensors(1).items())
        sent = pool.submit(sender.transfer, 1)
        assert_same(received(restarted, wire), some_tensors(1))
        assert not restarted.note
        sent.result()


def test_a_receiver_that_dies_in_the_group_costs_the_others_nothing_but_time(opened, monkeypatch):
    sender = sender_of("broadcast", num_receivers=2, timeout_s=4.0)
    good, bad = receiver(0, timeout_s=4.0), receiver(1, timeout_s=4.0)
    opened += [sender, good, bad]
    original = BroadcastGroup.broadcast
    doomed = threading.local()

    def dies(group: BroadcastGroup, buffers: Any) -> None:
        if getattr(doomed, "here", False):
            group.close()
            raise SystemExit  # the thread ends without taking part
        original(group, buffers)

    def dying_fetch(wire: bytes) -> None:
        doomed.here = True
        with pytest.raises(SystemExit):
            received(bad, wire)

    monkeypatch.setattr(BroadcastGroup, "broadcast", dies)
    wire, _ = sender.publish(0, some_tensors(0).items())
    with ThreadPoolExecutor(3) as pool:
        sent = pool.submit(sender.transfer, 0)
        dying = pool.submit(dying_fetch, wire)
        assert_same(pool.submit(received, good, wire).result(), some_tensors(0))
        sent.result()
        dying.result()


def test_a_sender_that_is_gone_is_a_transfer_error_within_the_deadline():
    sender = sender_of("broadcast")
    wire, _ = sender.publish(0, some_tensors(0).items())
    sender.close()
    fetcher = receiver(timeout_s=1.0)
    start_s = time.monotonic()
    with pytest.raises(TransferError, match="could not be pulled"):
        fetcher.fetch(decode_manifest(wire))
    fetcher.close()
    assert time.monotonic() - start_s < SOON_S


def test_closing_the_sender_ends_a_transfer_that_waits():
    sender = sender_of("broadcast", timeout_s=10 * SOON_S)
    sender.publish(0, some_tensors(0).items())
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(sender.transfer, 0)
        sender.close()
        with pytest.raises(TransferError, match="closed"):
            sent.result(timeout=SOON_S)


def test_a_changed_byte_in_a_broadcast_is_found(opened):
    sender = sender_of("broadcast")
    fetcher = receiver()
    opened += [sender, fetcher]
    wire, _ = sender.publish(0, some_tensors(0).items())
    sender._held[0][0][17] ^= 1  # after the digest was taken: what a broken network would do
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(sender.transfer, 0)
        with pytest.raises(ProofError, match=r"embed\.weight of version 0"):
            fetcher.fetch(decode_manifest(wire))
        sent.result()


def test_the_pull_server_gives_nothing_without_the_token(opened):
    sender = sender_of("broadcast")
    opened.append(sender)
    wire, _ = sender.publish(0, some_tensors(0).items())
    port = json.loads(wire)["pull_port"]
    with socket.create_connection(("127.0.0.1", port), timeout=SOON_S) as connection:
        connection.sendall(b'{"token":"guess","version":0}\n')
        assert connection.recv(1) == b""


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's table of sockets")
def test_a_broadcast_listens_on_its_own_address_only(opened):
    sender = sender_of("broadcast")
    opened.append(sender)
    wire, _ = sender.publish(0, some_tensors(0).items())
    ports = {json.loads(wire)["port"], json.loads(wire)["pull_port"]}
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if os.path.exists(table) else []:
            address, port = line.split()[1].split(":")
            if int(port, 16) in ports and line.split()[3] == "0A":
                found.add((address, int(port, 16)))
    assert found == {("0100007F", port) for port in ports}
