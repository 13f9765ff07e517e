"""The ledger: one ending for each group, a checksum for each line, and rollbacks that void what came after a cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flowrl.errors import DataError, RunError
from flowrl.runtime.ledger import Cut, Ledger, read_entries, surviving

if TYPE_CHECKING:
    from pathlib import Path


def test_a_group_ends_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.admit(0)
    ledger.end(0, "learned", step=0)
    with pytest.raises(RunError, match="had ended before"):
        ledger.end(0, "failed", reason="late")
    with pytest.raises(RunError, match="never admitted"):
        ledger.end(1, "learned", step=0)
    assert ledger.totals() == {"admitted": 1, "learned": 1, "filtered": 0, "failed": 0, "unfinished": 0}
    ledger.close()


def test_a_cut_says_what_has_ended_and_what_has_not() -> None:
    ledger = Ledger(None)
    for group in range(5):
        ledger.admit(group)
    for group in (0, 1, 3):
        ledger.end(group, "learned", step=0)
    cut = ledger.cut(1)
    assert (cut.version, cut.next_group, cut.ended_ahead, cut.learned, cut.records) == (1, 2, [3], 3, 8)


def test_a_ledger_goes_on_from_a_cut_and_voids_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    first = Ledger(path)
    for group in range(4):
        first.admit(group)
    first.end(0, "learned", step=0, oldest=0)
    cut = first.cut(1)
    first.end(1, "learned", step=1, oldest=0)
    first.end(2, "failed", reason="broke")
    first.close()
    second = Ledger(path, cut=cut)
    assert second.totals() == {"admitted": 1, "learned": 1, "filtered": 0, "failed": 0, "unfinished": 0}
    for group in (1, 2, 3):
        second.admit(group)
        second.end(group, "learned", step=1, oldest=1)
    second.close()
    alive = surviving(read_entries(path))
    assert [(e.group, e.step) for e in alive if e.event == "learned"] == [(0, 0), (1, 1), (2, 1), (3, 1)]
    assert not [e for e in alive if e.event == "failed"]
    assert sorted(e.group for e in alive if e.event == "admitted") == [0, 1, 2, 3]


def test_a_torn_last_line_is_cut_off_and_the_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    first = Ledger(path)
    first.admit(0)
    first.admit(1)
    first.close()
    path.write_bytes(path.read_bytes()[:-5])
    assert [e.group for e in read_entries(path)] == [0]
    second = Ledger(path, cut=Cut())
    second.admit(0)
    second.close()
    assert [e.event for e in read_entries(path)] == ["admitted", "rollback", "admitted"]


def test_a_changed_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for group in range(3):
        ledger.admit(group)
    ledger.close()
    path.write_bytes(path.read_bytes().replace(b'"group":1', b'"group":7'))
    with pytest.raises(DataError, match=r"ledger\.jsonl:2: is damaged"):
        read_entries(path)
