"""A run looked back on: how it stands, what became of its groups, and the commands that show it."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

import pytest

from flowrl.cli import main
from flowrl.errors import ConfigError
from flowrl.runs.review import fate_of, flattened, inspect_group, write_review
from flowrl.runtime.ledger import Entry
from flowrl.runtime.rundir import is_held
from flowrl.telemetry.report import Ending, write_ending
from tests.support.past_run import past_run

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return past_run(tmp_path_factory.mktemp("review") / "run", num_steps=3)


def words(page: Path) -> str:
    return " ".join(page.read_text().split())


@pytest.mark.slow
def test_the_report_has_what_only_the_ledger_and_the_settings_know(run_dir: Path, tmp_path: Path) -> None:
    out = write_review(run_dir, tmp_path / "page.html", None, say=lambda line: None)
    text = words(out)
    assert "<span>admitted</span><strong>13</strong>" in text
    assert '<td>filtered</td><td class="words">all rewards are alike said</td><td>1</td>' in text
    assert "<dt>learner.lr</dt><dd>1e-05</dd>" in text
    assert "3 steps, admitted 13, learned 12, filtered 1, failed 0" in text, "the verdict"
    assert "in order, window 1, staleness &lt;= 1" in text, "the graph"
    assert 'class="condition good">finished' in text


@pytest.mark.slow
def test_a_page_that_cannot_be_written_is_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        write_review(run_dir, tmp_path / "no" / "page.html", None, say=lambda line: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "condition"),
    [
        (Ending(name="run", failure="learner.0: ran out of memory", resume="flowrl run G --resume R"), "failed"),
        (Ending(name="run", was_stopped=True), "stopped"),
    ],
)
def test_a_run_that_did_not_finish_says_how_it_ended(ending: Ending, condition: str, tmp_path: Path) -> None:
    run_dir = past_run(tmp_path / "run", num_steps=2)
    write_ending(run_dir, ending)
    text = words(write_review(run_dir, None, None, say=lambda line: None))
    assert f">{condition}<" in text
    assert ending.failure in text
    assert ending.resume in text


@pytest.mark.slow
def test_a_run_is_running_while_a_process_holds_it_and_killed_when_none_does(tmp_path: Path) -> None:
    run_dir = past_run(tmp_path / "run", num_steps=2, ending="killed")
    assert not is_held(run_dir), "nobody has driven it"
    lock = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert is_held(run_dir)
        assert ">running<" in words(write_review(run_dir, None, None, say=lambda line: None))
    finally:
        os.close(lock)
    assert ">killed: it did not come to its end<" in words(write_review(run_dir, None, None, say=lambda line: None))


def test_a_group_s_fate_is_that_of_the_history_that_survived() -> None:
    entries = [
        Entry(event="admitted", group=0),
        Entry(event="admitted", group=1),
        Entry(event="learned", group=0, step=0, oldest=0),
        Entry(event="learned", group=1, step=1, oldest=0),
        Entry(event="rollback", step=1, records=3),
        Entry(event="admitted", group=1),
        Entry(event="failed", group=1, reason="its holder died 3 times"),
        Entry(event="admitted", group=2),
        Entry(event="replayed", group=0, step=2, oldest=0),
    ]
    assert fate_of(entries, 0) == "learned in step 0, and again in 2"
    assert fate_of(entries, 1) == "failed: its holder died 3 times"
    assert fate_of(entries, 2) == "admitted, without an ending yet"
    assert fate_of(entries, 3) == ""


@pytest.mark.slow
def test_a_group_that_was_not_learned_has_its_reason(run_dir: Path) -> None:
    assert next(inspect_group(run_dir, 12)) == "group 12: filtered: all rewards are alike said"
    assert next(inspect_group(run_dir, 5)) == "group 5: learned in step 1"
    with pytest.raises(ConfigError, match="has no group 99"):
        inspect_group(run_dir, 99)


def test_settings_are_listed_by_path() -> None:
    tree = {"learner": {"lr": 0.1, "betas": [0.9], "schedule": {"kind": "cosine"}}, "name": "", "options": {}}
    assert dict(flattened(tree)) == {
        "learner.lr": "0.1", "learner.betas": "[0.9]", "learner.schedule.kind": "cosine", "name": "''", "options": "{}",
    }  # fmt: skip


@pytest.mark.slow
def test_the_commands_answer(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run_dir), "--where", "reward < 0 and staleness > 0", "--columns", "group_id"]) == 0
    assert capsys.readouterr().out.splitlines() == ["group_id", "       4", "       8", "2 of 24 samples"]
    assert main(["inspect", str(run_dir), "--group", "4"]) == 0
    assert capsys.readouterr().out.startswith("group 4: learned in step 1\n")
    assert main(["inspect", str(run_dir), "--where", "rewrd < 0"]) == 2
    assert "did you mean 'reward'" in capsys.readouterr().err
    assert main(["inspect", str(run_dir), "--limit", "0"]) == 2
    assert main(["watch", str(run_dir)]) == 0
    assert "has ended" in capsys.readouterr().out
    for command in ("report", "inspect", "watch"):
        assert main([command, str(tmp_path)]) == 2
        assert "holds no run" in capsys.readouterr().err


@pytest.mark.slow
def test_watching_a_killed_run_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(past_run(tmp_path / "run", num_steps=2, ending="killed"))]) == 1
    assert "is dead" in capsys.readouterr().out
