"""User code in processes of its own, so that nothing it does can harm or hold up the engine.

    async with IsolatedFunction(opening, ...) as function:
        scores = await function(group)

Each `Worker` (a process of flowrl.rewards.worker behind its guard) does one thing at a time; further ones are started
only when all that run are busy. One that passes the time limit or dies is ended with everything it started and replaced
at the next call.

Invariants:
- a call returns one finite number for each sample or raises RewardError;
- after the block no worker is left, whatever the way out.

Called by the reward and evaluator stages; environments (sessions.py) use the workers.

Tests: tests/contracts/test_reward_workers.py
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import msgspec

from flowrl.errors import ConfigError, RewardError
from flowrl.messages import encode
from flowrl.rewards.function import LARGEST, overdue
from flowrl.rewards.worker import (
    MAX_FRAME_BYTES,
    Opened,
    Opening,
    Playing,
    Refused,
    Reply,
    Scores,
    frame,
    read_frame,
    reply_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from flowrl.messages import Rollouts
    from flowrl.rewards.environments import Request

T = TypeVar("T")

STOP_S = 5.0  # for an idle worker to end by itself, its exit handlers included
# Not `python -m`: that finds flowrl only where it is installed or in the working directory, and may find another one.
BOOT = "import os, sys; sys.path[:] = sys.argv.pop().split(os.pathsep); from flowrl.rewards import guard; guard.main()"
END_S = 10.0  # for the guard to kill what is left; it takes milliseconds
DUMP_S = 1.0  # for one that hangs to write where it is


class IsolatedFunction:
    """A reward function behind worker processes."""

    def __init__(self, opening: Opening, *, log: Path, num_workers: int = 1, start_timeout_s: float = 120.0) -> None:
        self._workers = [Worker(opening, start_timeout_s, log) for _ in range(num_workers)]
        # Last in, first out: as many processes start as are ever busy at a time.
        self._free: asyncio.LifoQueue[Worker] = asyncio.LifoQueue()

    async def __aenter__(self) -> Self:
        """Start the first worker.

        Raises:
            ConfigError: the function does not load.
            RewardError: the worker died or took too long while it loaded.
        """
        for worker in reversed(self._workers):
            self._free.put_nowait(worker)
        await self._workers[0].start()  # what fails to start leaves no process
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every worker."""
        async with asyncio.TaskGroup() as tasks:
            for worker in self._workers:
                tasks.create_task(worker.stop() if kind is None else worker.end())

    async def __call__(self, group: Rollouts) -> list[float]:
        """Score every sample of the group, in order; waits for a free worker, then for it, at most its time limit.

        Raises:
            RewardError: the function raised, took too long, returned something else than one number per sample, or its
                process died.
        """
        worker = await self._free.get()
        try:
            about = f"group {group.group_id}"
            reply = await worker.ask(encode(group), about, Scores)
            # User code may have replaced what checks them there.
            if len(reply.scores) != len(group.samples) or not all(abs(score) <= LARGEST for score in reply.scores):
                raise await worker.garbled(about)
            return reply.scores
        finally:
            self._free.put_nowait(worker)

    @property
    def num_running(self) -> int:
        """Return how many worker processes there are."""
        return sum(worker.is_running for worker in self._workers)


def check_loads(
    opening: Opening | Playing,
    requests: Sequence[tuple[str, bytes | Request]] = (),
    *,
    tries: int = 1,
    timeout_s: float = 120.0,
) -> Opened:
    """Load the user code in a worker, try requests on it, each at most `tries` times, and end it; blocks.

    A request comes with the row of the data that it is made of, in words. Returns what the worker said of the code.

    Raises:
        ConfigError: it does not load, or has no answer to a request.
    """
    process, channel = _spawn(subprocess.DEVNULL)
    doing, limit_s, remedy = f"importing {opening.path}", timeout_s, "mend the module, or raise start_timeout_s"
    body, opened = b"", Opened()
    try:
        with channel, channel.makefile("rb") as stream:
            for number, (row, request) in enumerate((("", opening), *requests)):
                if number:
                    doing, limit_s = f"{opening.path}, tried on {row},", opening.timeout_s
                    remedy = "make it faster, or raise timeout_s"
                for attempt in range(tries if number else 1):
                    channel.settimeout(limit_s)
                    channel.sendall(frame(request))
                    body = read_frame(stream.read)
                    if not body:
                        raise EOFError("its process has ended")
                    if not isinstance(reply := reply_of(body), Refused):
                        opened = reply if isinstance(reply, Opened) else opened
                        break
                    if attempt + 1 == tries or not number:
                        raise _untaken(reply, opening, row)
    except TimeoutError as error:
        raise ConfigError(opening.where, f"{doing} took longer than {limit_s:g} s", remedy) from error
    except (OSError, EOFError):
        body = b""
    finally:
        code = _end(process)  # changes nothing about how one that is dead has ended
    if not body:
        what = f"{doing} ended its process ({_ending(code)})"
        raise ConfigError(opening.where, what, "mend the module, or raise memory_bytes")
    return opened


def _untaken(reply: Refused, opening: Opening | Playing, row: str) -> ConfigError:
    if not row:
        return ConfigError(reply.where, reply.what, reply.remedy)
    return untaken(opening.path, opening.where, row, reply.what, reply.remedy)


def untaken(path: str, where: str, row: str, what: str, remedy: str) -> ConfigError:
    """Return the error for user code that cannot do with a row of the data what a run would ask of it."""
    return ConfigError(where, f"{path} was tried on {row} and {what}", remedy)


class Worker:
    """One worker process, or the place of one that is not running."""

    def __init__(self, opening: Opening | Playing, start_timeout_s: float, log: Path) -> None:
        self._opening = opening
        self._start_timeout_s = start_timeout_s
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: Any = None
        self._writer: Any = None
        self.num_starts = 0  # processes so far; what one of them held is gone with it

    @property
    def is_running(self) -> bool:
        """Return whether there is a process."""
        return self._process is not None

    async def start(self) -> None:
        """Start the process and load the user code; ends it where that fails."""
        try:
            await self._start()
        except BaseException:
            await self.end()
            raise

    async def _start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process, channel = _spawn(log.fileno())
        self._reader, self._writer = await asyncio.open_unix_connection(sock=channel)
        self.num_starts += 1
        reply = await self._ask(frame(self._opening), self._where, self._start_timeout_s, "start_timeout_s")
        if isinstance(reply, Refused):
            raise (ConfigError if reply.is_config else RewardError)(reply.where, reply.what, reply.remedy)

    @property
    def _where(self) -> str:
        return f"{self._opening.where} ({self._opening.path})"

    async def ask(self, request: bytes | Request, about: str, kind: type[T]) -> T:
        """Have a request answered, by a new process if the last has ended; `about` is named in errors.

        Raises:
            RewardError: the user code raised or took too long, its process died, or the answer is of another kind.
        """
        if self._process is None:
            try:
                await self.start()
            except ConfigError as error:  # it loaded before: this request's trouble, not the settings'
                raise RewardError(error.where, error.what, error.remedy) from error
        reply = await self._ask(frame(request), f"{self._where}, {about}", self._opening.timeout_s, "timeout_s")
        if isinstance(reply, Refused):
            raise RewardError(reply.where, reply.what, reply.remedy)
        if not isinstance(reply, kind):
            raise await self.garbled(about)
        return reply

    async def _ask(self, request: bytes, where: str, timeout_s: float, setting: str) -> Reply:
        """Send a frame and wait for the reply; a process that gives none in time is ended."""
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(request)
                await self._writer.drain()
                length = int.from_bytes(await self._reader.readexactly(4), "little")
                body = await self._reader.readexactly(length) if length <= MAX_FRAME_BYTES else b""
        except TimeoutError as error:
            await self._dump()
            await self.end()
            if setting == "timeout_s":
                raise overdue(where, timeout_s) from error
            what = f"did not load in {timeout_s:g} s"
            raise RewardError(where, what, f"raise {setting}; {self._log} shows where it was") from error
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            what = f"its process died ({_ending(await self.end())})"
            raise RewardError(where, what, f"see {self._log}") from error
        except asyncio.CancelledError:
            await self.end()
            raise
        try:
            return reply_of(body)
        except msgspec.MsgspecError as error:
            await self.end()
            raise _no_reply(where) from error

    async def garbled(self, about: str) -> RewardError:
        """End the process; returns the error for a reply that is none."""
        await self.end()
        return _no_reply(f"{self._where}, {about}")

    async def _dump(self) -> None:
        """Have the process write to the log where it is, and end."""
        assert self._process is not None, "only a running one is asked"
        self._process.send_signal(signal.SIGABRT)
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(DUMP_S):
                await self._reader.read()

    async def stop(self) -> None:
        """Let the process end by itself, then end what is left of it."""
        if self._process is None:
            return
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(STOP_S):
                self._writer.write(frame(b""))
                await self._reader.read()
        await self.end()

    async def end(self) -> int | None:
        """Kill the process and all it started; returns how it ended."""
        process, self._process = self._process, None
        if process is None:
            return None
        if self._writer is not None:
            self._writer.close()
            self._reader = self._writer = None
        return await asyncio.to_thread(_end, process)


def _no_reply(where: str) -> RewardError:
    return RewardError(
        where, "its process sent something that is not a reply", "do not write to file descriptors it did not open"
    )


def _spawn(log: int) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a worker; returns it and our end of its channel."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-c", BOOT, os.pathsep.join(sys.path)]
    with theirs:
        try:
            process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=log, stderr=log, start_new_session=True)
        except OSError:
            ours.close()
            raise
    return process, ours


def _end(process: subprocess.Popen[bytes]) -> int:
    """Have the guard kill the worker and all it started, whatever session that is in; returns how the worker ended."""
    process.terminate()
    try:
        return process.wait(END_S)
    except subprocess.TimeoutExpired:  # somebody has stopped the guard
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def _ending(code: int | None) -> str:
    if code is None:
        return "unknown"
    if code >= 0:
        return f"exit code {code}"
    try:
        return cast("str", signal.Signals(-code).name)
    except ValueError:
        return f"signal {-code}"
