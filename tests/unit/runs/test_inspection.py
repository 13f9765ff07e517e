"""Rollouts on disk, chosen, counted, listed; one group in full."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowrl.errors import ConfigError, DataError
from flowrl.runs.inspection import RecordedRollouts, as_json, as_table, describe_group
from flowrl.telemetry.records import step_path, write_rollouts
from tests.support.past_run import HOSTILE, sampled
from tests.unit.telemetry.test_hostile_text import HOSTILE as ESCAPES
from tests.unit.telemetry.test_hostile_text import check_harmless

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Three steps of two groups of two samples; the groups' second rewards are their numbers."""
    for step in range(3):
        groups = [sampled(2 * step + k, step, rewards=(-1.0, 2.0 * step + k), text=f"answer {step}") for k in range(2)]
        write_rollouts(step_path(tmp_path / "rollouts", step), groups, step)
    return tmp_path


def test_samples_are_chosen_counted_and_cut_at_the_limit(run_dir: Path) -> None:
    listing = RecordedRollouts(run_dir).choose("reward < 0 and staleness > 0", limit=3, columns=["group_id", "reward"])
    assert listing.rows == [{"group_id": group, "reward": -1.0} for group in (2, 3, 4)]
    assert (listing.num_chosen, listing.num_samples) == (4, 12)
    assert list(as_table(listing))[-1] == "4 of 12 samples, the first 3 shown"
    assert RecordedRollouts(run_dir).choose("score.exact == 5 and tokens == 2", limit=9, columns=[]).num_chosen == 1
    assert RecordedRollouts(run_dir).choose("", limit=99, columns=[]).num_chosen == 12


def test_a_column_that_only_some_steps_have_is_missing_in_the_others(run_dir: Path) -> None:
    path = step_path(run_dir / "rollouts", 2)
    table = pq.ParquetFile(path).read()
    pq.write_table(table.append_column("score.length", pa.array([0.5] * table.num_rows)), path)
    rollouts = RecordedRollouts(run_dir)
    assert rollouts.choose("score.length > 0", limit=9, columns=["learned_in_step"]).rows == [
        {"learned_in_step": 2} for _ in range(4)
    ]
    assert rollouts.choose("score.length is None", limit=99, columns=[]).num_chosen == 8


def test_unknown_columns_are_refused_with_the_nearest(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"--columns: .*'responce'; did you mean 'response'"):
        RecordedRollouts(run_dir).choose("", limit=1, columns=["responce"])
    with pytest.raises(ConfigError, match=r"--where: .*'message'"):
        RecordedRollouts(run_dir).choose("message == 1", limit=1, columns=[])


def test_a_run_without_rollouts_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rollouts: no step was learned yet"):
        RecordedRollouts(tmp_path)


def test_a_damaged_file_is_named(run_dir: Path) -> None:
    step_path(run_dir / "rollouts", 1).write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"step-000001\.parquet"):
        RecordedRollouts(run_dir)


def test_lines_fit_the_terminal_and_cannot_move_its_cursor(tmp_path: Path) -> None:
    groups = [sampled(0, 0, rewards=(0.0, 1.0), text=f"{HOSTILE}\n{'x' * 500}")]
    write_rollouts(step_path(tmp_path / "rollouts", 0), groups, 0)
    listing = RecordedRollouts(tmp_path).choose("", limit=9, columns=[])
    lines = list(as_table(listing, width=120))
    assert len(lines) == 4
    assert max(map(len, lines)) <= 120
    shown = [*lines, *describe_group(RecordedRollouts(tmp_path).group(0), "learned in step 0", None)]
    assert not any("\x1b" in line for line in shown)
    assert [json.loads(line)["response"] for line in as_json(listing)] == [groups[0].samples[0].text] * 2


def test_a_group_in_full_says_each_token_s_version_and_probability(run_dir: Path) -> None:
    rows = RecordedRollouts(run_dir).group(5)
    assert [(row["sample"], row["reward"]) for row in rows] == [(0, -1.0), (1, 5.0)]
    lines = list(describe_group(rows, "learned in step 2", lambda ids: [f"t{token}" for token in ids]))
    assert lines[0] == "group 5: learned in step 2"
    assert "  | t3t4" in lines, "the prompt"
    assert "sample 1: reward 5 (score.exact 5)" in lines
    assert "  mean advantage 5, staleness 1, ended by stop, generator.0, learned in step 2" in lines
    assert [line.split() for line in lines if line.endswith('"t6"')] == [["6", "2", "0.3679", '"t6"']] * 2


def test_importance_ratios_are_shown_where_they_were_recorded(run_dir: Path) -> None:
    row = {**RecordedRollouts(run_dir).group(5)[0], "learner_logprobs": [-0.5, -0.5], "token_versions": [-1, 2]}
    lines = list(describe_group([row], "learned in step 2", None))
    assert [line.split() for line in lines[-2:]] == [["5", "env"], ["6", "2", "0.3679", "1.649"]]


@pytest.mark.parametrize("where", ["staleness + 9223372036854775807 > 0", "reward / 0 > 1"])
def test_numbers_that_cannot_be_computed_are_refused(run_dir: Path, where: str) -> None:
    with pytest.raises(ConfigError, match="cannot be evaluated"):
        RecordedRollouts(run_dir).choose(where, limit=1, columns=[])
    assert RecordedRollouts(run_dir).group(10**30) == []


def test_hostile_text_in_any_column_is_shown_harmless_and_stays_json(tmp_path: Path) -> None:
    groups = [sampled(0, 0, rewards=(0.0, 1.0), text=ESCAPES)]
    path = step_path(tmp_path / "rollouts", 0)
    write_rollouts(path, groups, 0)
    table = pq.ParquetFile(path).read()
    for name in ("generator", "finish"):  # somebody wrote into the file
        table = table.set_column(table.schema.get_field_index(name), name, pa.array([ESCAPES] * table.num_rows))
    pq.write_table(table.append_column(f"score.{ESCAPES}", pa.array([0.5] * table.num_rows)), path)
    recorded = RecordedRollouts(tmp_path)
    columns = ["response", "generator", "finish", "reward", f"score.{ESCAPES}"]
    listing = recorded.choose("", limit=9, columns=columns)
    shown = [*as_table(listing, width=200), *as_json(listing)]
    shown += describe_group(recorded.group(0), f"filtered: {ESCAPES}", lambda ids: [ESCAPES] * len(ids))
    for line in shown:
        check_harmless(line)
        assert "\n" not in line
    assert json.loads(next(as_json(listing)))["generator"] == ESCAPES
