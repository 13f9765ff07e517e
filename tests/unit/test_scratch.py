"""Directories of one process alone go with it, and their paths are short enough for sockets."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from flowrl.runtime.cluster import ray_root
from flowrl.scratch import LOCK, MOST_SOCKET_BYTES, SOCKET_BYTES, ScratchDirectory, socket_root


def test_what_the_dead_left_goes_when_the_next_one_is_made_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    dead, other = tmp_path / "flowrl-vllm-1-aa", tmp_path / "flowrl-other"
    for each in (dead, other):
        each.mkdir()
    (dead / LOCK).touch()
    living = [ScratchDirectory("a name/of two", tmp_path) for _ in range(2)]
    assert {path.name for path in tmp_path.iterdir()} == {other.name, *(each.path.name for each in living)}
    assert all(each.path.stat().st_mode & 0o777 == 0o700 for each in living)
    for each in (*living, living[0]):
        each.close()
    assert [*tmp_path.iterdir()] == [other]


@pytest.mark.parametrize("length", [20, 90])
def test_sockets_lie_in_tmp_where_the_directory_for_temporary_files_has_a_long_path(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"/{'d' * (length - 1)}"
    monkeypatch.setattr(tempfile, "tempdir", root)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    expected = Path(root if length <= MOST_SOCKET_BYTES - SOCKET_BYTES else "/tmp")
    assert socket_root() == expected
    assert ray_root() == expected / "ray"
    monkeypatch.setenv("RAY_TMPDIR", "/" + "r" * 90)
    assert ray_root() == Path("/tmp/ray")
    session = "session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
    assert len(os.fsencode(ray_root() / session)) <= MOST_SOCKET_BYTES
