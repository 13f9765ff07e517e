"""The clock of a run passes as time does, whatever is done to the machine's."""

from __future__ import annotations

import time

import pytest

from flowrl.telemetry import clock


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_own", [clock.epoch()])


def test_it_is_the_time_of_day_and_is_not_set_with_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert clock.now() == pytest.approx(time.time(), abs=60.0)
    before = clock.now()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert before <= clock.now() < before + 60.0


def test_a_process_reckons_as_another_of_its_machine_does_and_no_other() -> None:
    own = clock.epoch()
    assert own.machine
    for other in ("", "another start of a machine"):
        clock.agree(clock.Epoch(other, 5.0))
        assert clock.epoch() == own
    clock.agree(clock.Epoch(own.machine, 5.0))
    assert clock.now() == pytest.approx(5.0 + time.monotonic(), abs=60.0)
