"""People judge a running policy: what they prefer is learned, and what nobody judges gives its credit back."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from typing import TYPE_CHECKING

import msgspec
import pytest

from flowrl.data.judgments import JUDGMENTS, QUESTIONS, Closed, Judgment, JudgmentFile, Question, Tail
from flowrl.runtime.ledger import read_entries
from flowrl.runtime.local import LocalOptions, run_local
from flowrl.simulation.clock import run_virtual
from flowrl.stages.humans import Humans
from flowrl.telemetry.events import Notice, Step
from flowrl.telemetry.records import read_samples, step_path
from tests.unit.stages.test_selector import graph

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.graph.graph import Graph
    from flowrl.telemetry.events import Event

THINKS_S = 3.0


def asking(**config: object) -> Graph:
    """The selector's flow with people in place of its judge."""
    return graph(steps=4, per_step=3, max_staleness=1, judge=Humans(msgspec.convert(config, Humans.Config)))


async def _rater(run_dir: Path, ignored: int, late_s: float) -> None:
    """Prefer the longer answer, or of equals the greater; of groups that `ignored` divides only after `late_s`."""
    left_for: list[tuple[float, Question]] = []
    tail, file = Tail(run_dir / QUESTIONS, Question | Closed), JudgmentFile(run_dir / JUDGMENTS, now=lambda: 0.0)
    try:
        while True:
            await asyncio.sleep(THINKS_S)
            now_s = asyncio.get_running_loop().time()
            asked = [question for question in tail.read() if isinstance(question, Question)]
            left_for += [(now_s + late_s, question) for question in asked if ignored and not question.group % ignored]
            due = [question for at_s, question in left_for if at_s <= now_s]
            left_for = [each for each in left_for if each[0] > now_s]
            for question in [*due, *(each for each in asked if not ignored or each.group % ignored)]:
                left, right = question.answers
                verdict = "left" if (len(left), left) > (len(right), right) else "right"
                key = f"{question.group}"
                file.add(Judgment(key=key, question=question.id, rater="ann", verdict=verdict))
                file.add(Judgment(key=key, question=question.id, rater="ann", verdict=verdict))
    finally:
        file.close()


def judged(
    run_dir: Path, made: Graph, *, ignored: int = 0, late_s: float = math.inf, is_there: bool = True
) -> list[Event]:
    """Run a flow whose rater is there, or has been."""
    events: list[Event] = []
    options = LocalOptions(run_dir=run_dir, is_virtual=True, consume=events.extend, stall_timeout_s=100.0)

    async def both() -> None:
        rating = asyncio.ensure_future(_rater(run_dir, ignored, late_s)) if is_there else None
        try:
            await run_local(made, options)
        finally:
            if rating is not None:
                rating.cancel()
                await asyncio.gather(rating, return_exceptions=True)

    run_virtual(both())
    return events


@pytest.mark.slow
def test_what_people_prefer_is_learned_and_what_nobody_judges_is_filtered(tmp_path: Path) -> None:
    events = judged(tmp_path, asking(deadline_s=300.0, undo_s=2.0, name="people"), ignored=4)
    ended = Counter((entry.event, entry.reason) for entry in read_entries(tmp_path / "ledger.jsonl"))
    assert ended["learned", ""] == 12
    unjudged = ended["filtered", "not judged within 300 s"]
    assert unjudged == 4, "groups 0, 4, 8 and 12 of the sixteen that twelve judged ones lie among"
    assert any("not judged within 300 s" in event.text for event in events if isinstance(event, Notice))
    assert max(stale for event in events if isinstance(event, Step) for stale in event.staleness) <= 1
    for step in range(4):
        for group in read_samples(step_path(tmp_path / "rollouts", step)):
            better, worse = (sample.text for sample in group.samples)
            assert (len(better), better) > (len(worse), worse)
            assert group.scores == {"people": [1.0, 0.0]}
            assert group.metrics["people.wait_s"] >= 2.0
    lines = Tail(tmp_path / QUESTIONS, Question | Closed).read()
    closed = Counter(line.how for line in lines if isinstance(line, Closed))
    assert (closed["judged"], closed["unjudged"]) == (12, 4)
    assert (tmp_path / QUESTIONS).stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_what_was_said_before_a_crash_counts_after_it_and_nobody_is_asked_again(tmp_path: Path) -> None:
    judged(tmp_path, asking(deadline_s=300.0))
    (tmp_path / QUESTIONS).unlink()
    (tmp_path / "ledger.jsonl").unlink()
    judged(tmp_path, asking(deadline_s=300.0), is_there=False)
    asked = [line for line in Tail(tmp_path / QUESTIONS, Question | Closed).read() if isinstance(line, Question)]
    said = {each.question for each in Tail(tmp_path / JUDGMENTS, Judgment).read()}
    assert not {question.id for question in asked} & said
    assert sum(entry.event == "learned" for entry in read_entries(tmp_path / "ledger.jsonl")) == 12


@pytest.mark.slow
def test_what_is_said_too_late_is_kept_and_told_and_what_is_said_in_time_counts(tmp_path: Path) -> None:
    made = asking(deadline_s=4.0, undo_s=2.5)  # said after 3 s, it may be taken back until 5.5 s
    events = judged(tmp_path, made, ignored=4, late_s=6.0)
    ended = Counter((entry.event, entry.reason) for entry in read_entries(tmp_path / "ledger.jsonl"))
    assert ended["learned", ""] == 12
    late = [event.text for event in events if isinstance(event, Notice) and "too late" in event.text]
    assert late[-1].startswith(f"{ended['filtered', 'not judged within 4 s']} groups judged too late")
    assert "--export trl" in late[-1]
    assert len(Tail(tmp_path / JUDGMENTS, Judgment).read()) == sum(ended[key] for key in ended if key[0] != "admitted")
