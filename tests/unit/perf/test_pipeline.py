"""The pipeline's data never mixes held-out problems into training; its table says what the runs' files say."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.errors import DataError
from flowrl.telemetry.events import Evaluation
from perf.pipeline_data import split
from perf.pipeline_table import curve_rows, read_policies, read_policy, step_rows, table

if TYPE_CHECKING:
    from pathlib import Path


def question(problem: int, wording: int) -> dict[str, Any]:
    return {"prompt": f"{wording}: {problem}?", "entry": {"metadata": {"expression": str(problem)}}}


@pytest.mark.parametrize("seed", range(3))
def test_a_problem_is_on_one_side_in_whatever_words(seed: int):
    rows = [question(k % 10, k) for k in range(25)]
    train, heldout = split(rows, 6, seed)
    problems = [{row["entry"]["metadata"]["expression"] for row in part} for part in (train, heldout)]
    assert not problems[0] & problems[1]
    assert len(train) + len(heldout) == 25
    assert 6 <= len(heldout) <= 8


def write_samples(directory: Path, rewards: list[list[float]], kl: float) -> None:
    """Two samples to each prompt, whose true score is the reward less 1."""
    (directory / "data").mkdir(parents=True)
    rows = [
        {"row": {"prompt": f"prompt {k}"}, "score.reward_model_0": reward, "score.reasoning_gym_score": reward - 1.0,
         "logprob": -3.0, "ref_logprob": -3.0 - kl}
        for k, group in enumerate(rewards) for reward in group
    ]  # fmt: skip
    (directory / "data" / "train-000000.jsonl").write_text("\n".join(map(json.dumps, rows)))


def evaluation(version: int, scores: list[float]) -> Evaluation:
    return Evaluation(version=version, time_s=0.0, scores=[[score] for score in scores], completions=[])


def test_the_table_compares_each_method_s_last_checkpoint_with_the_sft_model(tmp_path: Path):
    write_samples(tmp_path / "eval-sft", [[1.0, 1.0], [2.0, 2.0]], kl=0.0)
    write_samples(tmp_path / "eval-ppo-000004", [[9.0, 9.0], [9.0, 9.0]], kl=0.5)
    write_samples(tmp_path / "eval-ppo-000008", [[2.0, 2.0], [3.0, 3.0]], kl=1.5)
    (tmp_path / "eval-sft.out").write_text("what the run printed")
    policies = read_policies(tmp_path)
    text = table([evaluation(0, [-3.0, -2.0]), evaluation(9, [-1.0, -1.0])], [evaluation(9, [1.0, 1.0, 0.0])], policies)
    lines = [line.split() for line in text.splitlines()]
    assert lines[1][-3:] == ["2.500", "[-3.853,", "8.853]"], "two examples: t = 12.706, s / sqrt(2) = 0.5"
    assert "-1.500" in lines[2]
    assert lines[3][-3] == "0.667"
    (ppo,) = [line for line in lines if line[0].startswith("ppo")]
    assert ppo[0] == "ppo-000008"
    assert "1.000" in ppo, "the change, prompt by prompt"
    assert not any("9.000" in line for line in text.splitlines()), "an earlier checkpoint stands in the curve only"
    curve = curve_rows(policies)
    assert [row[0] for row in curve[1:]] == ["sft", "ppo-000004", "ppo-000008"]
    assert [float(row[1]) for row in curve[1:]] == [0.0, 0.5, 1.5]
    assert [float(row[5]) for row in curve[1:]] == [0.5, 8.0, 1.5]
    assert not math.isnan(float(curve[1][3]))


def test_a_run_that_wrote_nothing_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="holds no samples"):
        read_policy(tmp_path, "sft")


def test_the_training_curve_has_a_row_a_step():
    steps = {2: {"kl": 0.2, "score.reward_model_0": 1.5}, 1: {"kl": 0.1, "score.reward_model_0": 1.0}}
    assert step_rows(steps) == [("step", "kl", "reward"), (1, 0.1, 1.0), (2, 0.2, 1.5)]
