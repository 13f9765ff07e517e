"""What asks a command to stop ends it with the exit code of that signal, and what it changed is set right again."""

from __future__ import annotations

import signal

import pytest

from flowrl.stops import STOPS, Interrupted, interrupted


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
def test_each_signal_ends_the_block_and_leaves_the_handlers_as_they_were(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"stopped by {number.name}") as caught, interrupted():
        signal.raise_signal(number)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before


def test_a_closed_terminal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupted():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_comes_twice_at_once_is_one_and_does_not_disturb_what_is_being_closed() -> None:
    closed: list[str] = []

    def command() -> None:
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
            closed.append("the first file")

    with pytest.raises(Interrupted, match="stopped by SIGHUP"), interrupted():
        command()
    assert closed == ["the first file"]
