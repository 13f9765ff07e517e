"""The report: every figure against a hand-computed one, every sum that must come out."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest

from flowrl.telemetry.report import Ending, report, write_report
from flowrl.telemetry.view import RunView
from tests.unit.telemetry.streams import evaluation, random_run, span, status, step

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.telemetry.events import Event

ENDING = Ending(
    name="ppo-1",
    totals={"admitted": 30, "learned": 24, "filtered": 2, "failed": 1, "unfinished": 3},
    checkpoint="runs/ppo-1/checkpoints/step-000006",
    resume="flowrl run graphs/ppo_async.py --resume runs/ppo-1",
)


def report_of(*events: Event, ending: Ending = ENDING) -> str:
    view = RunView()
    view.fold(events)
    return report(view, ending)


def line_with(text: str, start: str) -> str:
    return next(line.strip() for line in text.splitlines() if line.strip().startswith(start))


def numbers(line: str) -> list[float]:
    return [float(n) for n in re.findall(r"[-+]?\d+\.\d+", line)]


def test_heldout_scores_and_their_paired_change_agree_with_numpy() -> None:
    draw = np.random.default_rng(0)
    before, after = draw.random((10, 4)), draw.random((10, 4)) + 0.5
    text = report_of(evaluation(0, before.tolist()), evaluation(6, after.tolist()))
    for name, rows in (("version 0", before), ("version 6", after), ("change", after - before)):
        means = rows.mean(axis=1)
        half = 2.26216 * means.std(ddof=1) / np.sqrt(10)
        expected = [means.mean(), means.mean() - half, means.mean() + half]
        assert numbers(line_with(text, name)) == pytest.approx(expected, abs=1e-4)
    assert "above 0: the policy is better" in text


def test_a_change_whose_interval_holds_zero_is_not_called_one() -> None:
    text = report_of(evaluation(0, [[0.0], [1.0], [0.5]]), evaluation(6, [[1.0], [0.0], [0.6]]))
    assert "contains 0: no change is shown" in text


def test_completions_stand_before_and_after_by_prompt() -> None:
    text = report_of(evaluation(0, [[0.0]]), evaluation(3, [[1.0]]), evaluation(6, [[1.0]]))
    assert (
        "  prompt: What is 2 + 2?\n    version 0, score 1: said by version 0\n    version 6, score 1: said by version 6"
        in text
    )


@pytest.mark.parametrize("seed", range(3))
def test_every_node_s_time_adds_up_to_100_percent(seed: int) -> None:
    text = report_of(*random_run(seed))
    row = line_with(text, "generator  ")
    assert numbers(row)[-1] == 100.0
    assert sum(numbers(row)[:-1]) == pytest.approx(100.0, abs=0.3)
    assert "adds up: 100.0 % of the replicas' wall clock" in text


def test_time_that_nobody_was_charged_with_is_said() -> None:
    text = report_of(status(at=0.0), status(at=10.0, computing=5.0))
    assert "DOES NOT ADD UP, charged against wall clock: generator.0 5.0 of 10.0 s" in text


def steady(node: str, *, busy: float, filled: float | None = None) -> list[Event]:
    def at(time_s: float) -> Event:
        return status(
            node, at=time_s, computing=busy * time_s, waiting_for_input=(1 - busy) * time_s,
            filled_s=None if filled is None else filled * time_s,
        )  # fmt: skip

    return [at(10.0), span(node, "generate" if node == "generator" else "work", 1, 2, 0), step(1, at=10.0), at(110.0)]


def test_bottleneck_is_the_busiest_node_on_the_path_with_its_reason() -> None:
    idle_but_charged = status("evaluation", at=110.0, computing=110.0)  # handles no prompt groups
    events = [
        *steady("generator", busy=0.93, filled=0.31),
        *steady("learner", busy=0.41),
        idle_but_charged,
        step(2, at=110.0),
    ]
    text = report_of(*events)
    assert line_with(text, "bottleneck") == (
        "bottleneck: generator, computing 93% of the time between the first and the last step, more than any other "
        "node on the path (next learner, 41%)"
    )
    assert "learner spends 59% of that time waiting for input" in text
    assert "give generator more replicas" in text
    assert line_with(text, "generator slot occupancy").endswith("between the first and the last step: 31.0%")
    assert "31% of its decode slots are filled" in text


def test_a_run_in_which_nobody_is_busy_waits_in_turns() -> None:
    text = report_of(*steady("generator", busy=0.5), *steady("learner", busy=0.4), step(2, at=110.0))
    assert "they wait for each other in turns" in text


def test_throughput_between_first_and_last_step_and_from_the_start() -> None:
    text = report_of(status(at=0.0), *(step(v, at=10.0 + v, tokens=1000, samples=8) for v in (1, 2, 3)))
    assert line_with(text, "first to last step").split()[-2:] == ["8.00", "1,000"]
    assert line_with(text, "from the start").split()[-2:] == ["1.85", "231"]  # 24 and 3000 in 13 s


def test_staleness_histogram_and_logprob_gap() -> None:
    first = step(1, at=1.0, staleness=(0, 0, 0), logprob_gap__mean=0.0021, logprob_gap__max=0.11)
    text = report_of(first, step(2, at=2.0, staleness=(1,)))
    assert "staleness of 4 learned groups, in policy versions: mean 0.25, max 1" in text
    assert line_with(text, "0  3").split() == ["0", "3", "75.0%", "#" * 30]
    assert "generator vs learner log-probs of sampled tokens: mean |d| 0.0021, max 0.11" in text


def test_mostly_cut_responses_are_said() -> None:
    said = "WARNING: 94% of the responses in step 4 were cut off before their end: raise sampling.max_tokens"
    assert said in report_of(step(3, at=1.0), step(4, at=2.0, response_tokens__cut=0.94))
    assert "cut off" not in report_of(
        step(3, at=1.0, response_tokens__cut=0.94), step(4, at=2.0, response_tokens__cut=0.3)
    )


def test_ledger_line_adds_up_or_says_that_it_does_not() -> None:
    assert "ledger: admitted 30 = learned 24 + filtered 2 + failed 1 + unfinished 3\n" in report_of(step(1, at=1.0))
    lost = Ending(name="x", totals={"admitted": 30, "learned": 24, "filtered": 2, "failed": 1, "unfinished": 2})
    assert "DOES NOT ADD UP, by 1" in report_of(step(1, at=1.0), ending=lost)


def test_a_run_that_failed_before_its_first_step_still_has_a_report() -> None:
    text = report_of(ending=Ending(name="ppo-1", failure="generator.0: its process died"))
    assert text == "ppo-1 failed: no step in 0 s\n  generator.0: its process died\n"


def test_report_says_where_to_go_on_and_is_written_whole(tmp_path: Path) -> None:
    text = report_of(*random_run(0))
    assert text.splitlines()[0].startswith("ppo-1 finished: 6 of 6 steps in ")
    assert text.endswith(f"checkpoint: {ENDING.checkpoint}\ncontinue:   {ENDING.resume}\n")
    write_report(tmp_path / "report.txt", text)
    assert (tmp_path / "report.txt").read_text() == text
    assert len(list(tmp_path.iterdir())) == 1
