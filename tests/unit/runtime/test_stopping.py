"""Which signals ask for a stop, and which of those that follow end the run as it is."""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from typing import TYPE_CHECKING

import pytest

from flowrl.runtime import launch
from flowrl.runtime.launch import RunCompanion
from flowrl.telemetry.sinks import Sinks
from flowrl.telemetry.view import RunView

if TYPE_CHECKING:
    from collections.abc import Callable

HANG_UP = [signal.SIGHUP, signal.SIGHUP]  # a shell passes it on, and the system sends it again at the shell's end
TIMEOUT = [signal.SIGTERM, signal.SIGTERM]  # `timeout` signals its command, and then its whole group
SLURM = [signal.SIGUSR1, signal.SIGTERM]


@pytest.mark.parametrize(
    ("numbers", "echo_s", "aborts"),
    [
        (HANG_UP, 60.0, False), (TIMEOUT, 60.0, False), ([signal.SIGTERM, signal.SIGHUP], 60.0, False),
        (HANG_UP, 0.0, False), ([signal.SIGTERM, signal.SIGUSR2], 0.0, False),
        ([signal.SIGINT, signal.SIGINT], 0.0, True), (TIMEOUT, 0.0, True), (SLURM, 0.0, True),
    ],
)  # fmt: skip
def test_a_signal_that_comes_twice_at_once_asks_once(
    numbers: list[signal.Signals], echo_s: float, aborts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "ECHO_S", echo_s)
    stopping = asyncio.Event()

    async def body() -> None:
        hear: dict[int, Callable[[], None]] = {}
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "add_signal_handler", lambda number, *call: hear.update({number: partial(*call)}))
        with launch._stops(stopping, Sinks(RunView(), say=lambda line: None), 60.0, RunCompanion()):
            for number in numbers:
                hear[number]()
                assert stopping.is_set()
            await asyncio.sleep(0)

    if aborts:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(body())
    else:
        asyncio.run(body())
