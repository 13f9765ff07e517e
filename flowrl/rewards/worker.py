"""A process of its own that runs one reward function or environment: `main`, started by flowrl.rewards.guard.

It speaks frames (4 bytes of length, then MessagePack, never a pickle) over the socket that is its standard input. First
comes an `Opening` or a `Playing`, answered with `Opened` or `Refused`; then groups in their wire form, each answered
with `Scores` or `Refused`, or an environment's `Request`s, answered with `Observed` or `Refused`; an empty frame ends
it. User code runs in the main thread, where signals work, and what it prints goes to the log.

Invariants:
- it is the leader of its own process group;
- when the other end of the socket is gone the whole group is killed at once.

A call that holds the interpreter's lock all the while ends by itself soon after its time limit. Its guard (guard.py)
sees to it that no process which user code has started is left over.

Tests: tests/contracts/test_reward_workers.py
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import resource
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.errors import ConfigError, FlowrlError
from flowrl.messages import Rollouts, decode
from flowrl.rewards.environments import Environments, Observed, Request, run_here
from flowrl.rewards.function import RewardFunction, saying
from flowrl.rewards.signatures import Adapter

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator

MAX_FRAME_BYTES = 1 << 30  # what is longer is not a frame: something else was written to the socket
GRACE_S = 2.0  # beyond the time limit, before a call without a parent ends by itself
MOST_LOGGED = 1 << 16  # characters of one error
MOST_S = 1e6  # the longest time the fault handler's own timer takes


class Opening(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a worker is to run."""

    function: str  # module:name
    where: str  # named in errors
    adapter: Adapter = "auto"
    label_column: str = "answer"
    timeout_s: float = 60.0  # for one group
    memory_bytes: int = 0  # of address space; 0: no limit

    @property
    def path(self) -> str:
        """Return the import path of the user code."""
        return self.function


class Playing(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An environment class for a worker to play episodes with."""

    environment: str  # module:Class
    where: str  # named in errors
    options: dict[str, Any] = {}  # of its constructor
    timeout_s: float = 60.0  # for one call
    memory_bytes: int = 0  # of address space; 0: no limit

    @property
    def path(self) -> str:
        """Return the import path of the user code."""
        return self.environment


class Opened(msgspec.Struct, frozen=True, tag=True):
    """The user code is loaded."""

    has_labels: bool = True  # a column of labels is looked for


class Scores(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One finite number for each sample."""

    scores: list[float]


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The user code did not load, or gave no answer."""

    is_config: bool
    where: str
    what: str
    remedy: str


Reply = Opened | Scores | Observed | Refused
Serve = Callable[[bytes, asyncio.Runner], Reply]

_encoder = msgspec.msgpack.Encoder()
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_openings: msgspec.msgpack.Decoder[Opening | Playing] = msgspec.msgpack.Decoder(Opening | Playing)
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)


def frame(content: Opening | Playing | Request | Reply | bytes) -> bytes:
    """Return the wire form of one frame; bytes go in as they are."""
    body = content if isinstance(content, bytes) else _encoder.encode(content)
    return len(body).to_bytes(4, "little") + body


def reply_of(body: bytes) -> Reply:
    """Return the reply a frame's body holds."""
    return _replies.decode(body)


def read_frame(read: Callable[[int], bytes]) -> bytes:
    """Return the body of the next frame, b"" at the end of the stream.

    Raises:
        EOFError: the stream ends within a frame, or what comes is none.
    """
    length = int.from_bytes(read(4), "little")
    body = read(length) if length <= MAX_FRAME_BYTES else b""
    if len(body) < length:
        raise EOFError(f"{len(body)} of {length} bytes arrived")
    return body


def main() -> None:
    """Serve one parent to its end."""
    channel = socket.socket(fileno=os.dup(0))  # not inherited by what user code starts
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    cast("io.TextIOWrapper", sys.stdout).reconfigure(line_buffering=True)  # the last lines before a death count most
    faulthandler.enable()  # on SIGABRT, by which the parent ends what takes too long: the log says where it was
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.register_at_fork(after_in_child=lambda: os.close(channel.detach()))  # else our death would go unnoticed
    with _signals_held_back():
        threading.Thread(target=_die_with, args=(channel.fileno(),), name="parent", daemon=True).start()
    stream = channel.makefile("rb")
    body = read_frame(stream.read)
    if body:
        opening = _openings.decode(body)
        try:
            opened, serve = _open(opening)
        except FlowrlError as error:
            channel.sendall(frame(_refused(error)))
        else:
            channel.sendall(frame(opened))
            with asyncio.Runner() as runner:
                while body := read_frame(stream.read):
                    channel.sendall(frame(_answer(serve, body, runner, opening.timeout_s)))


def _open(opening: Opening | Playing) -> tuple[Opened, Serve]:
    if opening.memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (opening.memory_bytes, opening.memory_bytes))
    try:
        return _scoring(opening) if isinstance(opening, Opening) else _playing(opening)
    except FlowrlError:
        raise
    except BaseException as error:
        _log_error()
        what = f"importing {opening.path} {saying(error)}"
        raise ConfigError(opening.where, what, "mend the module") from error


def _scoring(opening: Opening) -> tuple[Opened, Serve]:
    function = RewardFunction(
        opening.function, opening.where, adapter=opening.adapter, label_column=opening.label_column
    )
    opened = Opened(function.has_labels)
    return opened, lambda body, runner: Scores(scores=function.call_here(cast("Rollouts", decode(body)), runner))


def _playing(opening: Playing) -> tuple[Opened, Serve]:
    environments = Environments(opening.environment, opening.where, options=opening.options, run=run_here)
    return Opened(), lambda body, runner: runner.run(environments.answer(_requests.decode(body)))


def _answer(serve: Serve, body: bytes, runner: asyncio.Runner, timeout_s: float) -> Reply:
    with _signals_held_back():
        faulthandler.dump_traceback_later(min(timeout_s + GRACE_S, MOST_S), exit=True, file=2)  # needs no lock
    try:
        return serve(body, runner)
    except FlowrlError as error:
        _log_error()
        return _refused(error)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _log_error() -> None:
    """Write where the present error came from to the log, whatever user code has made of `sys.stderr`."""
    with contextlib.suppress(OSError):
        os.write(2, traceback.format_exc()[:MOST_LOGGED].encode(errors="backslashreplace"))


def _refused(error: FlowrlError) -> Refused:
    is_config = isinstance(error, ConfigError)
    return Refused(is_config=is_config, where=error.where, what=error.what, remedy=error.remedy)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Start threads in this block: they inherit that no signal is for them.

    One that takes user code's alarm in the main thread's place, as the timer's does before it has got to hold signals
    back itself. It leaves it unnoticed for as long as user code computes without a pause.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _die_with(descriptor: int) -> None:
    """Wait until the parent's end is gone, then kill the process group."""
    poller = select.poll()
    poller.register(descriptor, 0)  # no event but the hang-up, which is always reported
    poller.poll()
    with contextlib.suppress(ProcessLookupError):  # not a group's leader: started by hand
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)
