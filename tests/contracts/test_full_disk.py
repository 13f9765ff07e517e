"""A disk that is full costs time and nothing else, whatever was being written; on a small file system of our own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.graph.stage import Context
from flowrl.rewards.verdicts import Ruling, Verdicts
from flowrl.runtime.ledger import Cut, Ledger, read_entries
from flowrl.telemetry.events import Notice, Span, Step
from flowrl.telemetry.files import RecordFile, is_full, replace_file
from flowrl.telemetry.metrics import MetricsFile, read_steps
from flowrl.telemetry.records import read_digests, read_groups, write_digests, write_rollouts
from flowrl.telemetry.timeline import Timeline
from tests.contracts.test_stops import check_stopped
from tests.support.driven import Driven
from tests.support.past_run import sampled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

SIZE = 1 << 20


class SmallDisk:
    """A file system of `SIZE` bytes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._ballast = root / "ballast"

    def fill(self) -> None:
        """Leave no byte free."""
        with self._ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)

    def free(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    root = tmp_path / "disk"
    root.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(root)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs to be root")
    yield SmallDisk(root)
    subprocess.run(["umount", "--lazy", str(root)], check=True)


def step(version: int) -> Step:
    return Step(version=version, num_steps=9, time_s=float(version), metrics={"loss": 1.0})


def test_a_record_is_written_whole_or_waits(disk: SmallDisk) -> None:
    said: list[str] = []
    file = RecordFile(disk.root / "records", tell=said.append)
    records = [b"%d " % number + b"r" * 3000 + b"\n" for number in range(20)]
    for record in records[:10]:
        file.append(record)
    disk.fill()
    for record in records[10:]:
        file.append(record)
        assert b"".join(records).startswith((disk.root / "records").read_bytes())
        assert (disk.root / "records").read_bytes().endswith(b"r\n"), "half a record stands in the file"
    assert file.is_waiting
    assert len(said) == 1
    assert f"its disk {disk.root} has 0 free (No space left on device); waiting for room" in said[0]
    disk.free()
    assert file.flush()
    file.close()
    assert (disk.root / "records").read_bytes() == b"".join(records)
    assert said[-1].endswith("has room again")


def ledger_rounds(disk: SmallDisk) -> Callable[[], None]:
    ledger = Ledger(disk.root / "ledger.jsonl")
    for group in range(100):
        ledger.admit(group)
    disk.fill()
    for group in range(100):
        ledger.end(group, "learned", step=0, oldest=0, reason="r" * 100)
    assert f"its disk {disk.root}" in ledger.flush()
    assert len(read_entries(disk.root / "ledger.jsonl")) >= 100, "what is there is whole"

    def after() -> None:
        assert ledger.flush() == ""
        digest = blake2b((disk.root / "ledger.jsonl").read_bytes(), digest_size=16).hexdigest()
        assert ledger.cut(1) == Cut(version=1, next_group=100, records=200, learned=100, digest=digest)
        ledger.close()
        assert len(read_entries(disk.root / "ledger.jsonl")) == 200

    return after


def metrics_rounds(disk: SmallDisk) -> Callable[[], None]:
    metrics = MetricsFile(disk.root / "metrics.jsonl")
    metrics.consume([step(1)])
    disk.fill()
    for version in range(2, 200):
        metrics.consume([step(version)])

    def after() -> None:
        metrics.consume([step(200)])
        metrics.close()
        assert list(read_steps(disk.root / "metrics.jsonl")) == list(range(1, 201))

    return after


def timeline_rounds(disk: SmallDisk) -> Callable[[], None]:
    def span(number: int) -> Span:
        return Span(node="n", replica=0, name=f"span {number}", start_s=float(number), end_s=number + 0.5)

    timeline = Timeline(disk.root / "timeline.json", say=lambda text: None)
    timeline.consume([span(0)])
    disk.fill()
    for number in range(1, 200):
        timeline.consume([span(number)])

    def after() -> None:
        timeline.consume([span(200)])
        timeline.close()
        import json

        names = [each["name"] for each in json.loads((disk.root / "timeline.json").read_text())]
        assert [name for name in names if name.startswith("span ")] == [f"span {number}" for number in range(201)]

    return after


def versions_rounds(disk: SmallDisk) -> Callable[[], None]:
    write_digests(disk.root, 0, {"w": "0" * 16})
    disk.fill()
    with pytest.raises(OSError, match="has") as caught:
        write_digests(disk.root, 1, {f"weight.{number}": "1" * 16 for number in range(200)})
    assert is_full(caught.value)

    def after() -> None:
        write_digests(disk.root, 1, {"w": "1" * 16})
        assert read_digests(disk.root) == {0: {"w": "0" * 16}, 1: {"w": "1" * 16}}

    return after


def rollouts_rounds(disk: SmallDisk) -> Callable[[], None]:
    path = disk.root / "step-000000.parquet"
    groups = [sampled(number, 0, rewards=(0.0, 1.0)) for number in range(4)]
    disk.fill()
    with pytest.raises(OSError, match="space") as caught:
        write_rollouts(path, groups, 0)
    assert is_full(caught.value), "pyarrow says which error it was"
    assert not list(disk.root.glob("*step*")), "no part of it is left"

    def after() -> None:
        write_rollouts(path, groups, 0)
        assert read_groups(path) == ("", {0, 1, 2, 3})

    return after


def whole_files_rounds(disk: SmallDisk) -> Callable[[], None]:
    replace_file(disk.root / "state.json", b"old")
    disk.fill()
    with pytest.raises(OSError, match="space"):
        replace_file(disk.root / "state.json", b"n" * 100_000)
    assert (disk.root / "state.json").read_bytes() == b"old"

    def after() -> None:
        replace_file(disk.root / "state.json", b"n" * 100_000)
        assert (disk.root / "state.json").read_bytes() == b"n" * 100_000

    return after


def verdicts_rounds(disk: SmallDisk) -> Callable[[], None]:
    verdicts = Verdicts(disk.root / "verdicts", "judge.0")
    verdicts.add("first", Ruling(1.0, ""))
    disk.fill()
    for number in range(200):
        verdicts.add(f"asked {number}", Ruling(2.0, "said" * 10))
    assert verdicts.get("asked 199") == Ruling(2.0, "said" * 10)

    def after() -> None:
        verdicts.add("last", Ruling(3.0, ""))
        verdicts.close()
        again = Verdicts(disk.root / "verdicts", "judge.0")
        assert all(again.get(name) for name in ("first", *(f"asked {number}" for number in range(200)), "last"))

    return after


ROUNDS = [
    ledger_rounds, metrics_rounds, timeline_rounds, versions_rounds, rollouts_rounds, whole_files_rounds,
    verdicts_rounds,
]  # fmt: skip


@pytest.mark.parametrize("rounds", ROUNDS, ids=lambda rounds: rounds.__name__.removesuffix("_rounds"))
def test_each_kind_of_file_goes_on_when_there_is_room(disk: SmallDisk, rounds: Any) -> None:
    after = rounds(disk)
    disk.free()
    after()


def test_a_stage_waits_for_room_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[str] = []
    told: list[Any] = []
    tries = iter([OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota"), None])

    class Alone(Context):
        def __init__(self) -> None:
            self.node, self.replica, self.run_dir, self.stopping = "learner", 0, _here(), asyncio.Event()
            self.now, self._room_told_s, self.compute = (lambda: 100.0), -60.0, self._compute
            self.recorder: Any = type("Recorder", (), {"record": staticmethod(told.append)})
            self.note_wait = self._note

        async def _note(self, text: str) -> None:
            noted.append(text)

        async def _compute(self, function: Any, *arguments: Any) -> Any:
            return function(*arguments)

    def write() -> str:
        if (error := next(tries)) is not None:
            raise error
        return "written"

    monkeypatch.setattr("flowrl.graph.stage.ROOM_RETRY_S", 0.01)
    assert asyncio.run(Alone().write(write)) == "written"
    assert [bool(text) for text in noted] == [True, False, True, False], "to the runtime it waits for room, twice"
    assert len(told) == 1
    assert isinstance(told[0], Notice)
    assert "waiting for room" in told[0].text


def _here() -> Path:
    from pathlib import Path

    return Path(os.getcwd())


def test_a_run_waits_for_room_longer_than_its_stall_limit_and_goes_on(disk: SmallDisk) -> None:
    run = Driven(disk.root, "stall_timeout_s=1")
    run.until('"version":4,')
    disk.fill()
    with pytest.raises(AssertionError, match="no "):
        run.until('"version":4000,', patience_s=3.0)
    assert run.process.poll() is None, "it did not end as stalled"
    disk.free()
    run.until("has room again")
    last = max(read_steps(disk.root / "metrics.jsonl"))
    run.until(f'"version":{last + 3},')
    run.process.send_signal(signal.SIGTERM)
    assert run.ends() == 0
    check_stopped(disk.root)


@contextlib.contextmanager
def read_only(root: Path) -> Iterator[None]:
    """Let nothing more be opened for writing under a directory."""
    subprocess.run(["mount", "--bind", str(root), str(root)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(root)], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


@pytest.mark.long
def test_a_run_waits_for_a_directory_that_is_read_only_and_goes_on_or_is_stopped(disk: SmallDisk) -> None:
    run = Driven(disk.root, "stall_timeout_s=1")
    run.until('"version":4,')
    with read_only(disk.root):
        run.until(f"its disk {disk.root} is read-only", "out")
        with pytest.raises(AssertionError, match="no "):
            run.until('"version":4000,', patience_s=3.0)
        assert run.process.poll() is None, "it did not end as stalled"
    last = max(read_steps(disk.root / "metrics.jsonl"))
    run.until(f'"version":{last + 6},')
    with read_only(disk.root):
        run.process.send_signal(signal.SIGTERM)
        assert run.ends() == 2, "its last checkpoint cannot be written, and it does not wait any more"
    assert "its report is not written" in (disk.root / "out").read_text()
    last = max(read_steps(disk.root / "metrics.jsonl"))
    again = Driven(disk.root, "resume")
    again.until(f'"version":{last + 6},')
    again.process.send_signal(signal.SIGTERM)
    assert again.ends() == 0
    check_stopped(disk.root)
