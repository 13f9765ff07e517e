"""Judgments: written before they are acknowledged, once each, the last of a rater's counts, and how raters agree."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import msgspec
import pytest

from flowrl.data.judgments import JUDGMENTS, Judgment, JudgmentFile, Said, Tail, Verdict, alpha, ask, worths
from flowrl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pathlib import Path

QUESTION = ask(0, "why?", ["because", "why not"], way="pairs", version=0, places=[0, 1])


def judgment(key: str, verdict: Verdict, rater: str = "ann", **fields: object) -> Judgment:
    made = {"key": key, "question": QUESTION.id, "rater": rater, "verdict": verdict, **fields}
    return msgspec.convert(made, Judgment)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / JUDGMENTS


def test_what_is_sent_twice_is_one_judgment_and_the_last_counts(path: Path) -> None:
    file = JudgmentFile(path, now=lambda: 7.0)
    assert file.add(judgment("a", "left"))
    assert not file.add(judgment("a", "left"))
    assert file.add(judgment("b", "tie"))
    assert [each.verdict for each in file.said.of(QUESTION.id)] == ["tie"]
    file.add(judgment("c", "undone"))
    assert file.said.of(QUESTION.id) == []
    file.close()
    assert path.stat().st_mode & 0o777 == 0o600
    found = Tail(path, Judgment).read()
    assert [(each.key, each.time_s) for each in found] == [("a", 7.0), ("b", 7.0), ("c", 7.0)]


def test_a_line_that_a_kill_cut_short_is_taken_back_and_a_damaged_one_is_named(path: Path) -> None:
    file = JudgmentFile(path, now=lambda: 0.0)
    file.add(judgment("a", "left"))
    file.close()
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    again = JudgmentFile(path, now=lambda: 0.0)
    again.add(judgment("b", "right"))
    again.close()
    assert [each.key for each in Tail(path, Judgment).read()] == ["a", "b"]
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(DataError, match=rf"{JUDGMENTS}:1: is damaged"):
        JudgmentFile(path, now=lambda: 0.0)


def test_two_processes_do_not_write_the_same_file(path: Path) -> None:
    file = JudgmentFile(path, now=lambda: 0.0)
    with pytest.raises(ConfigError, match="another `flowrl feedback` writes it"):
        JudgmentFile(path, now=lambda: 0.0)
    file.close()


def test_a_full_disk_acknowledges_nothing_and_leaves_no_half_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = JudgmentFile(path, now=lambda: 0.0)
    file.add(judgment("a", "left"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            file.add(judgment("b", "right"))
    assert file.add(judgment("b", "right"))
    file.close()
    assert [each.key for each in Tail(path, Judgment).read()] == ["a", "b"]


def test_a_reader_takes_whole_lines_as_they_come(path: Path) -> None:
    tail = Tail(path, Judgment)
    assert tail.read() == []
    line = msgspec.json.encode(judgment("a", "left")) + b"\n"
    path.write_bytes(line + line[:9])
    assert len(tail.read()) == 1
    path.write_bytes(line + line)
    assert len(tail.read()) == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"verdict": "left"}, ""),
        ({"verdict": "rated", "ratings": [1, 5]}, "asks for pairs"),
        ({"verdict": "left", "ratings": [1]}, "comes with ratings"),
        ({"verdict": "tie", "edits": {2: "?"}}, "answers 0 to 1"),
        ({"verdict": "tie", "rater": " "}, "1 to 64 characters"),
        ({"verdict": "skip", "flag": "x" * 1001}, "at most 1000"),
    ],
)
def test_what_cannot_be_said_about_a_question_is_told(fields: dict[str, object], said: str) -> None:
    made = msgspec.convert({"key": "k", "question": QUESTION.id, "rater": "ann", **fields}, Judgment)
    fault = made.fault(QUESTION)
    assert said in fault
    assert bool(said) == bool(fault)


def test_a_pair_is_of_answers_that_differ_and_neither_side_is_always_first() -> None:
    shown = [ask(k, "p", ["x", "x", "y"], way="pairs", version=0, places=[0, 1, 2]) for k in range(40)]
    assert all(sorted(each.places) == [0, 2] for each in shown)
    assert 5 < sum(each.answers[0] == "x" for each in shown) < 35
    assert shown[3] == ask(3, "p", ["x", "x", "y"], way="pairs", version=0, places=[0, 1, 2])
    assert len({each.id for each in shown}) == 40


def test_answers_are_worth_what_raters_say_on_average() -> None:
    assert worths([judgment("a", "left"), judgment("b", "tie"), judgment("c", "skip")]) == [0.75, 0.25]
    assert worths([judgment("a", "rated", ratings=[1, 4]), judgment("b", "rated", ratings=[2, 5])]) == [1.5, 4.5]


def test_agreement_is_krippendorffs_alpha() -> None:
    nan = math.nan  # nominal data of Krippendorff 2011, section C: four observers, twelve units, alpha = 0.743
    rows = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
        [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan],
    ]
    units = [[value for value in unit if not math.isnan(value)] for unit in zip(*rows, strict=True)]
    assert alpha(units, lambda a, b: float(a != b)) == pytest.approx(0.743, abs=5e-4)
    assert alpha(units, lambda a, b: (a - b) ** 2) == pytest.approx(0.849, abs=5e-4)
    assert alpha([["left"], ["right"]], lambda a, b: float(a != b)) is None
    said = Said([judgment("a", "left"), judgment("b", "left", "bob")])
    assert said.agreement() is None, "nobody could have differed"
