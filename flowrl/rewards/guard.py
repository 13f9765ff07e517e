"""The guard of a reward worker: its parent process, which runs no user code and outlives it by a moment.

Invariants:
- when the worker ends, or the engine goes away or says so (SIGTERM), all that user code has started is dead before the
  guard ends;
- no session hides a process: the kernel hands those whose parents are gone to the guard;
- what the worker and they print reaches the log up to `MOST_OUTPUT_BYTES`, and that it was cut is said;
- the guard ends as the worker ended.

Started by flowrl.rewards.isolated.

Tests: tests/contracts/test_reward_workers.py
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
from pathlib import Path

MOST_OUTPUT_BYTES = 16 << 20  # of one worker: what user code prints must not fill a disk
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """Start the worker and guard it."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # Ray's processes are started with some signals held back
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    printed, printing = os.pipe()
    waking = _wake_on(signal.SIGCHLD, signal.SIGTERM, signal.SIGABRT)
    guard = os.getpid()
    worker = os.fork()
    if worker == 0:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != guard:
            os._exit(1)
        os.setsid()
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGABRT):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.dup2(printing, 1)
        os.dup2(printing, 2)
        for descriptor in (printed, printing, waking):
            os.close(descriptor)
        from flowrl.rewards import worker as serving

        serving.main()
        sys.stdout.flush()
        return
    os.close(printing)
    status = _watch(worker, printed, waking)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with contextlib.suppress(OSError, ValueError):  # those that cannot be caught need no default
            signal.signal(number, signal.SIG_DFL)
        os.kill(guard, number)
    os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1)


def _wake_on(*numbers: signal.Signals) -> int:
    """Return a descriptor from which each signal that came can be read as a byte."""
    reading, writing = os.pipe()
    for descriptor in (reading, writing):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(writing)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    return reading


def _watch(worker: int, printed: int, waking: int) -> int:
    """Wait for the worker's end, or bring it about; returns how it ended, once nothing of it is left."""
    output = _Output(printed)
    poller = select.poll()
    poller.register(0, 0)  # no event but the hang-up, which is always reported
    poller.register(waking, select.POLLIN)
    poller.register(printed, select.POLLIN)
    status: int | None = None
    is_over = False
    while not is_over:
        for descriptor, event in poller.poll():
            if descriptor == printed and not output.carry():
                poller.unregister(printed)
            elif descriptor == waking:
                came = os.read(waking, 64)
                is_over |= signal.SIGTERM in came
                if signal.SIGABRT in came:
                    os.kill(worker, signal.SIGABRT)  # it says where it is, and ends
            elif descriptor == 0 and event:
                is_over = True
        ended, found = _reap(worker)
        status = found if ended else status
        is_over |= status is not None
    found = _end_all(worker)
    output.finish()
    return found if status is None else status


def _reap(worker: int) -> tuple[bool, int]:
    """Take note of whoever has ended; returns whether the worker has, and how."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == worker:
                return True, status
            if pid == 0:
                break
    return False, 0


def _end_all(worker: int) -> int:
    """Kill every child until there is none: the children of the dead come to us; returns how the worker ended."""
    found = 0
    with contextlib.suppress(ChildProcessError):
        while True:
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(int(child), signal.SIGKILL)
            pid, status = os.waitpid(-1, 0)
            found = status if pid == worker else found
    return found


class _Output:
    """Carries what is printed to the log, as far as it may."""

    def __init__(self, printed: int) -> None:
        self._printed = printed
        self._left = MOST_OUTPUT_BYTES
        self._num_cut = 0
        os.set_blocking(printed, False)

    def carry(self) -> bool:
        """Carry what is there; returns whether more may come."""
        try:
            piece = os.read(self._printed, 1 << 16)
        except BlockingIOError:
            return True
        if taken := piece[: self._left]:
            with contextlib.suppress(OSError):  # the log's disk is full: what is printed is lost, not the worker
                os.write(1, taken)
        self._left -= len(taken)
        self._num_cut += len(piece) - len(taken)
        return bool(piece)

    def finish(self) -> None:
        """Carry the rest, and say what was cut."""
        while self.carry() and select.select([self._printed], [], [], 0)[0]:
            pass
        if self._num_cut:
            with contextlib.suppress(OSError):
                os.write(1, f"\n[cut here: {self._num_cut:,} more bytes were printed]\n".encode())
