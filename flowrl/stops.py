"""Signals that ask to stop, and what they do while there is nothing yet that could be stopped in order.

A run that is under way hears them on its event loop (runtime/launch.py). Before that, and in every other command, each
of them is an `Interrupted`, so that whatever is open is closed and the command says how it ended.

Invariant: who asked that a closed terminal be ignored (nohup) is heeded.

Ray's processes hold all of them back (runtime/cluster.py).

Who asks often asks twice at once. `timeout` signals its command and then the whole group; a shell whose terminal is
gone passes SIGHUP on, and the system sends it again. What comes within `ECHO_S` of the first is part of it.

Tests: tests/unit/test_stops.py
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import FrameType

# Ctrl-C; batch systems and clusters; a closed terminal; batch systems again, as their notice before the time is up.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ALWAYS = {signal.SIGINT, signal.SIGTERM}  # also where whoever started us ignores them: a script's background jobs do
ECHO_S = 0.5


class Interrupted(KeyboardInterrupt):
    """A signal has asked to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number  # as a shell reports a process that a signal ended


def heard() -> list[signal.Signals]:
    """Return the signals that this thread is to hear; only a main thread hears any."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in STOPS if number in ALWAYS or signal.getsignal(number) is not signal.SIG_IGN]


def put_back(handlers: dict[signal.Signals, Any]) -> None:
    """Let signals have the handlers that they had; what native code had put there cannot be put back."""
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def interrupted() -> Generator[None]:
    """Let each of them end this block with `Interrupted`."""

    asked_s = -math.inf

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal asked_s
        if time.monotonic() - asked_s >= ECHO_S:
            asked_s = time.monotonic()
            raise Interrupted(number)

    before = {number: signal.getsignal(number) for number in heard()}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        put_back(before)
