"""Verdicts that a judge gave outlive the process that asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import flowrl.rewards.verdicts as kept
from flowrl.rewards.verdicts import Ruling, Verdicts

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_what_was_said_and_paid_is_there_after_a_kill(tmp_path: Path):
    first = Verdicts(tmp_path, "judge.0")
    first.paid.read, first.paid.written = 50, 3
    first.add("a", Ruling(7.0, "[[7]]"))
    first.paid.read += 50
    first.add("b", Ruling(None, "well\nwell"))  # never closed

    again = Verdicts(tmp_path, "judge.0")
    assert again.get("a") == Ruling(7.0, "[[7]]")
    assert again.get("b") == Ruling(None, "well\nwell")
    assert again.get("c") is None
    assert (again.paid.read, again.paid.written) == (100, 3)


def test_replicas_share_what_was_said_and_each_counts_what_it_paid(tmp_path: Path):
    one = Verdicts(tmp_path, "judge.0")
    one.paid.read = 9
    one.add("a", Ruling(1.0, ""))
    other_node = Verdicts(tmp_path, "judge.more.0")
    other_node.add("b", Ruling(2.0, ""))

    two = Verdicts(tmp_path, "judge.1")
    assert two.get("a") == Ruling(1.0, "")
    assert two.get("b") is None  # what another judge said
    assert two.paid.read == 0


def test_a_torn_and_a_changed_line_are_no_verdicts_and_the_rest_is(tmp_path: Path):
    first = Verdicts(tmp_path, "judge.0")
    for digest in "abcd":
        first.add(digest, Ruling(1.0, ""))
    path = tmp_path / "judge.0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"1.0", b"9.0") + lines[2] + lines[3][:-5])

    again = Verdicts(tmp_path, "judge.0")
    assert [again.get(digest) is not None for digest in "abcd"] == [True, False, True, False]
    again.add("e", Ruling(3.0, ""))
    assert Verdicts(tmp_path, "judge.0").get("e") == Ruling(3.0, "")


def test_what_is_in_memory_is_bounded_by_what_was_used_last(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kept, "MOST", 2)
    verdicts = Verdicts()
    for digest in "ab":
        verdicts.add(digest, Ruling(1.0, ""))
    verdicts.get("a")
    verdicts.add("c", Ruling(1.0, ""))
    assert [verdicts.get(digest) is not None for digest in "abc"] == [True, False, True]
