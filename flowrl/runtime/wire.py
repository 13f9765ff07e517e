"""The wire: what carries the calls of replicas to the gate of the flow, a TCP connection for each process.

Frames go both ways: four bytes of length, then msgpack. A process first sends the secret that it was started with, then
requests; each is answered once, in any order.

Invariants:
- nothing but bytes and plain values crosses, no object is ever unpickled;
- who does not know the secret is not heard;
- when either side is gone, the other's waits end.

That a call is carried out once, however often it arrives, is the gate's business (calls.py).

Ray's actor calls could carry them too, at about ten times the cost (decision 0001); Ray starts, places and watches the
processes (ray.py) and carries what is said twice a second. The hub opens a `Listener`, a replica a `Connection`.

Tests: tests/contracts/test_wire.py
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from flowrl.errors import ChannelClosed, FlowrlError, LastingError, RunError
from flowrl.runtime.calls import Call
from flowrl.runtime.ledger import Cut

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter

    from flowrl.runtime.calls import CallGate

READ_AHEAD_BYTES = 1 << 20
LENGTH_BYTES = 4
SECRET_BYTES = 32
GREETING_S = 10.0  # for the secret to arrive
MAX_GREETING = 4096  # connections that may be about to say it: many times the processes of a large run
MAX_FRAME_BYTES = 1 << 30  # many times the largest group of samples


class Address(NamedTuple):
    """Where a listener is, and what it wants to hear first."""

    host: str
    port: int
    secret: str  # hexadecimal


class WireRequest(msgspec.Struct, frozen=True, array_like=True):
    """A call, or that nobody waits for it any more."""

    number: int  # counts this connection's calls
    call: Call
    is_cancelled: bool = False


class WireAnswer(msgspec.Struct, frozen=True, array_like=True):
    """What became of a request: what the call returned, or where and what went wrong."""

    number: int
    outcome: Literal["done", "closed", "failed", "lasting"]
    value: Any


_requests = msgspec.msgpack.Decoder(WireRequest)
_answers = msgspec.msgpack.Decoder(WireAnswer)
_encoder = msgspec.msgpack.Encoder()


class Listener:
    """The flow's side."""

    def __init__(self, gate: CallGate) -> None:
        self._gate = gate
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._server: asyncio.Server | None = None
        self._num_greeting = 0  # connections that have not said the secret yet

    async def open(self, host: str) -> Address:
        """Listen at a free port of one of this machine's addresses."""
        self._server = await asyncio.start_server(self._serve, host, 0, limit=READ_AHEAD_BYTES)
        port = self._server.sockets[0].getsockname()[1]
        return Address(host, port, self._secret.hex())

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Carry out what one process asks until it is gone; its waiting calls end with it."""
        waiting: dict[int, asyncio.Task[None]] = {}
        try:
            if not await self._knows_secret(reader):
                return
            while True:
                request = _requests.decode(await _read(reader))
                if request.is_cancelled:
                    self._gate.undo(request.call)
                    if (task := waiting.get(request.number)) is not None:
                        task.cancel()
                    continue
                task = asyncio.ensure_future(self._carry_out(request.number, request.call, writer))
                waiting[request.number] = task
                task.add_done_callback(lambda _, number=request.number: waiting.pop(number, None))
        except (asyncio.IncompleteReadError, OSError):
            pass  # the process is gone
        except (ValueError, RecursionError):
            pass  # what it says is no request, or too long: it is not heard any further
        finally:
            for task in waiting.values():
                task.cancel()
            writer.close()

    async def _knows_secret(self, reader: StreamReader) -> bool:
        """Return whether a caller greets with the secret, soon; only so many may be about to at a time."""
        if self._num_greeting >= MAX_GREETING:
            return False
        self._num_greeting += 1
        try:
            async with asyncio.timeout(GREETING_S):
                return hmac.compare_digest(await reader.readexactly(SECRET_BYTES), self._secret)
        except TimeoutError:
            return False
        finally:
            self._num_greeting -= 1

    async def _carry_out(self, number: int, call: Call, writer: StreamWriter) -> None:
        try:
            found = await self._gate.call(call)
            answer = WireAnswer(number, "done", msgspec.json.encode(found) if isinstance(found, Cut) else found)
        except ChannelClosed as closed:
            answer = WireAnswer(number, "closed", (closed.where, closed.what))
        except LastingError as error:
            answer = WireAnswer(number, "lasting", (error.where, error.what, error.remedy))
        except FlowrlError as error:
            answer = WireAnswer(number, "failed", (error.where, error.what))
        except Exception as error:  # a defect of the flow; the replica that met it says so
            answer = WireAnswer(number, "failed", ("flow", f"{type(error).__name__}: {error}"))
        if not writer.is_closing():
            writer.write(_frame(answer))


class Connection:
    """A replica's side."""

    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._number = 0
        self._waiting: dict[int, asyncio.Future[WireAnswer]] = {}
        self._listening = asyncio.ensure_future(self._listen())

    @classmethod
    async def open(cls, address: Address) -> Connection:
        """Connect to a listener.

        Raises:
            RunError: nobody listens there.
        """
        try:
            reader, writer = await asyncio.open_connection(address.host, address.port, limit=READ_AHEAD_BYTES)
        except OSError as error:
            raise RunError("flow", f"its host does not answer at {address.host}:{address.port} ({error})") from error
        writer.write(bytes.fromhex(address.secret))
        return cls(reader, writer)

    async def carry(self, call: Call) -> Any:
        """Return what the flow answers to a call; cancelling the wait cancels the call.

        Raises:
            ChannelClosed: the flow says so.
            RunError: the flow says that it failed, or its host is gone.
        """
        if self._listening.done():
            raise _gone(call.replica)
        number = self._number
        self._number += 1
        answered = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._writer.write(_frame(WireRequest(number, call)))
        try:
            answer = await answered
        except asyncio.CancelledError:
            if self._listening.done():
                raise
            head = msgspec.structs.replace(call, arguments=call.arguments[:1])
            self._writer.write(_frame(WireRequest(number, head, is_cancelled=True)))
            raise
        except ConnectionError as error:
            raise _gone(call.replica) from error
        finally:
            del self._waiting[number]
        if answer.outcome == "done":
            return answer.value
        kinds = {"closed": ChannelClosed, "lasting": LastingError, "failed": RunError}
        raise kinds[answer.outcome](*answer.value)

    async def close(self) -> None:
        """Hang up."""
        self._listening.cancel()
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def _listen(self) -> None:
        try:
            while True:
                answer = _answers.decode(await _read(self._reader))
                waiting = self._waiting.get(answer.number)  # none: the wait was cancelled
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        except (asyncio.IncompleteReadError, OSError, ValueError, RecursionError):
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(ConnectionError("the other side is gone"))
            self._writer.close()


def _gone(replica: str) -> RunError:
    return RunError(replica, "the flow's host is gone")


def _frame(message: WireRequest | WireAnswer) -> bytes:
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise RunError("flow", f"a message of {len(body)} bytes is longer than {MAX_FRAME_BYTES}", "lower group_size")
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


async def _read(reader: StreamReader) -> bytes:
    length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "little")
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes is longer than {MAX_FRAME_BYTES}")
    return await reader.readexactly(length)
