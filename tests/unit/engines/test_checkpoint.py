"""A checkpoint is whole or not there: killed at every file operation, flipped, truncated, out of room."""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.engines import checkpoint as module
from flowrl.engines.checkpoint import (
    Best,
    CheckpointWriter,
    best_version,
    complete_checkpoints,
    damage,
    forget_ratings,
    newest_sound,
    read_cut,
    set_checkpoints_aside,
    strays,
    version_of,
)
from flowrl.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

KILLED = 9
NUM_FILES = 12


def save(
    directory: Path, version: int, *, score: float | None = 0.0, keep: int = 2, awaited: frozenset[int] = frozenset()
) -> Path:
    """Write a checkpoint of a dozen small files as the learner does."""
    saver = CheckpointWriter(directory, keep=keep, awaited=awaited)
    aside = saver.begin(version)
    for place in range(NUM_FILES):
        path = aside / f"part{place % 3}" / f"file{place}.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(random.Random(version * 100 + place).randbytes(200 + place))
    return saver.commit(aside, version=version, cut=b'{"version":%d}' % version, score=score)


def save_until_killed(directory: Path, version: int, operation: int) -> bool:
    """Save in a child that is killed at its n-th file operation; returns whether it got to the end."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, _: Any) -> None:
            nonlocal seen
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree"):
                seen += 1
                if seen == operation:
                    os._exit(KILLED)

        sys.addaudithook(count)
        save(directory, version)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is such: hundreds of checkpoints brought to a disk take minutes."""
    root = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=root if root.is_dir() else tmp_path) as directory:
        yield Path(directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", [3, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)]
)  # checkpoints there before: with three, an old one is pruned as well
def test_a_kill_at_any_file_operation_leaves_a_sound_checkpoint(first: int, memory_path: Path) -> None:
    operation = kills = 0
    is_whole = False
    while not is_whole:
        operation += 1
        directory = memory_path / f"{first}-{operation}"
        for version in range(1, first + 1):
            save(directory, version)
        is_whole = save_until_killed(directory, first + 1, operation)
        kills += not is_whole
        found, damaged = newest_sound(directory)
        assert found is not None
        assert not damaged, f"killed at operation {operation}: {damaged}"
        assert found.name in (f"step-{first:06d}", f"step-{first + 1:06d}")
        assert read_cut(found) == b'{"version":%d}' % int(found.name[5:])
        save(directory, first + 1)  # and the next attempt is not hindered by what was left
        shutil.rmtree(directory)
    assert kills >= 60


@pytest.mark.slow
def test_a_changed_or_truncated_file_is_named_and_its_checkpoint_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    draw = random.Random(0)
    for _ in range(240):
        path = draw.choice(files)
        whole = path.read_bytes()
        if draw.random() < 0.5:
            place = draw.randrange(len(whole))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        else:
            path.write_bytes(whole[: draw.randrange(len(whole))])
        found, damaged = newest_sound(tmp_path)
        path.write_bytes(whole)
        assert found == tmp_path / "step-000001", path
        assert len(damaged) == 1
        assert damaged[0].startswith("step-000002: ")
    assert newest_sound(tmp_path) == (newest, [])


def test_a_file_missing_is_damage_and_a_stray_one_is_not(tmp_path: Path) -> None:
    newest = save(tmp_path, 1)
    for name in (".nfs000000000123", "notes.txt~", "part0/more.bin"):
        (newest / name).write_bytes(b"x")
    assert damage(newest) == ""
    assert strays(newest) == [".nfs000000000123", "notes.txt~", "part0/more.bin"]
    (newest / "part1" / "file1.bin").unlink()
    assert damage(newest) == "part1/file1.bin is missing"


def test_what_somebody_puts_beside_checkpoints_is_none_and_stays(tmp_path: Path) -> None:
    newest = save(tmp_path, 1)
    for name in ("step-000001.bak", "step-000001 (1)", "step-copy"):
        shutil.copytree(newest, tmp_path / name)
    (tmp_path / "step-latest").symlink_to(newest.name)
    there = {path.name for path in tmp_path.iterdir()} - {newest.name}
    assert newest_sound(tmp_path) == (newest, [])
    for version in (2, 999_999, 1_000_000):
        save(tmp_path, version, score=0.5, keep=1)
    assert names(tmp_path) == [2, 1_000_000], "the best and the newest"
    set_checkpoints_aside(tmp_path)
    assert there <= {path.name for path in tmp_path.iterdir()}


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for version, score in ((1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3), (5, 0.4)):
        save(tmp_path, version, score=score)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000002", "step-000004", "step-000005"]


def names(directory: Path) -> list[int]:
    return [version_of(path) for path in complete_checkpoints(directory)]


def test_what_evaluations_say_later_decides_and_equal_scores_are_the_earliest_s(tmp_path: Path) -> None:
    for version in range(1, 5):
        save(tmp_path, version, score=None, keep=1, awaited=frozenset({1, 2, 3}))
    assert names(tmp_path) == [1, 2, 3, 4]
    assert best_version(tmp_path) is None
    for version, score, is_best, awaited, left in (
        (0, 0.5, True, {1, 2, 3}, [1, 2, 3, 4]),
        (2, 0.25, False, {1, 3}, [1, 2, 3, 4]),
        (1, None, False, {3}, [2, 3, 4]),
        (3, 0.75, True, set[int](), [3, 4]),
        (4, 0.75, False, set[int](), [3, 4]),
    ):
        writer = CheckpointWriter(tmp_path, keep=1, awaited=frozenset(awaited))
        assert writer.rate(version, score, by="heldout") == is_best
        assert names(tmp_path) == left, version
    best = best_version(tmp_path)
    assert best == Best(3, 0.75, "heldout", tmp_path / "step-000003")
    forget_ratings(tmp_path, 2)
    assert best_version(tmp_path) == Best(0, 0.5, "heldout", None)
    (tmp_path / "scores.json").write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"scores\.json: is damaged"):
        best_version(tmp_path)
    set_checkpoints_aside(tmp_path)
    assert best_version(tmp_path) is None


def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save(tmp_path, 1)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "sync", full)
    with pytest.raises(ResourceError, match=r"the checkpoint of version 2 needs about .* MiB, .* MiB are free"):
        save(tmp_path, 2)
    assert newest_sound(tmp_path) == (old, [])
    assert not list(tmp_path.glob(".step-*"))


def test_a_disk_that_turns_read_only_before_the_name_is_given_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save(tmp_path, 1)

    def refused(*paths: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "replace", refused)
        with pytest.raises(ResourceError, match="the checkpoint of version 2 needs"):
            save(tmp_path, 2)
    assert newest_sound(tmp_path) == (before, [])
    newest = save(tmp_path, 2)
    assert newest_sound(tmp_path) == (newest, [])


def test_a_disk_that_is_nearly_full_is_not_even_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(ResourceError, match="make room on that disk"):
        save(tmp_path, 2)


@pytest.mark.parametrize(
    ("flag", "files", "words"),
    [(os.ST_RDONLY, 9, "is read-only"), (0, 0, "has room for no further file")],
)
def test_a_disk_that_takes_nothing_although_bytes_are_free_is_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: int, files: int, words: str
) -> None:
    about = SimpleNamespace(f_flag=flag, f_files=9, f_favail=files, f_bavail=1 << 30, f_frsize=1, f_blocks=1, f_bfree=1)
    monkeypatch.setattr("flowrl.telemetry.files.os.statvfs", lambda path: about)
    error = RuntimeError("torch cannot write")
    found = CheckpointWriter(tmp_path, keep=2).failure(tmp_path / "aside", 1, error)
    assert isinstance(found, ResourceError)
    assert words in found.what
