"""A clock that is set, in a run or between two starts of it, changes nothing but the time of day that is told."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest

from flowrl.runs.review import write_review
from flowrl.telemetry.metrics import read_state, read_steps
from perf.faults import leaping_clock
from tests.contracts.test_stops import check_stopped
from tests.support.driven import Driven

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.long]

HOUR_S = 3600


@pytest.mark.parametrize("first", [HOUR_S, -HOUR_S], ids=["on", "back"])
def test_an_hour_on_or_back_changes_no_duration(tmp_path: Path, first: int) -> None:
    clock, run_dir, began_s = tmp_path / "clock", tmp_path / "run", time.monotonic()
    if not (environment := leaping_clock(clock)):
        pytest.skip("no C compiler is here")
    run = Driven(run_dir, "stall_timeout_s=20", environment=environment)
    run.until('"version":3,')
    for leap in (first, 0, -first):
        clock.write_text(f"{leap}\n")
        time.sleep(2.0)  # it is looked at once a second
        last = max(read_steps(run_dir / "metrics.jsonl"))
        run.until(f'"version":{last + 5},')
    run.process.send_signal(signal.SIGTERM)
    assert run.ends() == 0
    check_stopped(run_dir)
    last = max(read_steps(run_dir / "metrics.jsonl"))
    clock.write_text(f"{first}\n")  # between the two
    again = Driven(run_dir, "resume", environment=environment)
    again.until(f'"version":{last + 6},')
    state = read_state(run_dir)
    again.process.send_signal(signal.SIGTERM)
    assert again.ends() == 0
    check_stopped(run_dir)
    took_s = time.monotonic() - began_s
    assert all(0 <= (step["step_s"] or 0.0) <= took_s for step in read_steps(run_dir / "metrics.jsonl").values())
    assert state is not None
    assert 0 <= state.time_s - state.started_s <= took_s
    assert "DOES NOT ADD UP" not in (run_dir / "report.txt").read_text()
    write_review(run_dir, tmp_path / "page.html", None, say=lambda line: None)
