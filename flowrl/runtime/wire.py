"""The wire: what carries the calls of replicas to the gate of the flow, a TCP connection for each process.

Frames go both ways: four bytes of length, then msgpack. A process first sends the secret that it was started with, then
requests; each is answered once, in any order.

Invariants:
- nothing but bytes and plain values crosses, no object is ever unpickled;
- who does not know the secret is not heard;
- when either side is gone, the other's waits end.

That a call is carried out once, however often it arrives, is the gate's business (calls.py).

Ray's actor calls could carry them too, at about ten times the cost (decision 0001); Ray starts, places and watches the
processes (ray.py) and carries what is said twice a second. The hub opens a `Listener`, a replica a `Connection`, and a
proxy between them both (proxy.py).

Tests: tests/contracts/test_wire.py
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import msgspec

from flowrl.errors import ChannelClosed, FlowrlError, LastingError, RunError
from flowrl.runtime.calls import Call, begin
from flowrl.runtime.ledger import Cut

if TYPE_CHECKING:
    from flowrl.runtime.calls import Gate

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

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._server: asyncio.Server | None = None
        self._num_greeting = 0  # connections that have not said the secret yet

    async def open(self, host: str) -> Address:
        """Listen at a free port of one of this machine's addresses."""
        self._server = await asyncio.get_running_loop().create_server(lambda: _Caller(self), host, 0)
        port = self._server.sockets[0].getsockname()[1]
        return Address(host, port, self._secret.hex())

    def close(self) -> None:
        """Take no further connections."""
        if self._server is not None:
            self._server.close()

    def begin_greeting(self) -> bool:
        """Return whether one more caller may be about to say the secret; only so many may be at a time."""
        if self._num_greeting >= MAX_GREETING:
            return False
        self._num_greeting += 1
        return True

    def end_greeting(self) -> None:
        """Note that a caller has said something, or is gone."""
        self._num_greeting -= 1

    def knows_secret(self, said: bytes) -> bool:
        """Return whether a caller was told the secret."""
        return hmac.compare_digest(said, self._secret)

    async def answer(self, number: int, call: Call) -> WireAnswer:
        """Carry a call out and return what became of it."""
        try:
            found = await self._gate.call(call)
            return WireAnswer(number, "done", msgspec.json.encode(found) if isinstance(found, Cut) else found)
        except ChannelClosed as closed:
            return WireAnswer(number, "closed", (closed.where, closed.what))
        except LastingError as error:
            return WireAnswer(number, "lasting", (error.where, error.what, error.remedy))
        except FlowrlError as error:
            return WireAnswer(number, "failed", (error.where, error.what))
        except Exception as error:  # a defect of the flow; the replica that met it says so
            return WireAnswer(number, "failed", ("flow", f"{type(error).__name__}: {error}"))

    def undo(self, call: Call) -> None:
        """End a call that nobody waits for any more."""
        self._gate.undo(call)


class Link(asyncio.Protocol):
    """Either end of a connection: whole frames in; frames out, those of one turn of the loop in one piece."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._rest: bytearray = bytearray()  # of what has come: the beginning of a frame
        self._sending: list[bytes] = []

    @property
    def is_open(self) -> bool:
        """Return whether both sides are there."""
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._rest:
            self._rest += data
        with memoryview(self._rest or data) as whole:
            begin = self._take_frames(whole)
        if self._rest:
            del self._rest[:begin]
        else:
            self._rest += data[begin:]

    def _take_frames(self, whole: memoryview) -> int:
        """Take every whole frame in; returns where the next one begins."""
        begin = 0
        while (body := begin + LENGTH_BYTES) <= len(whole):
            length = int.from_bytes(whole[begin:body], "little")
            try:
                if length > MAX_FRAME_BYTES:
                    raise ValueError(f"a frame of {length} bytes is longer than {MAX_FRAME_BYTES}")
                if body + length > len(whole):
                    break
                self.take(whole[body : body + length])
            except (ValueError, RecursionError):  # no message, or too long: it is not heard any further
                self.hang_up()
                return len(whole)
            begin = body + length
        return begin

    def take(self, frame: memoryview) -> None:
        """Take a frame in, which is there until this returns.

        Raises:
            ValueError: it is no message.
        """
        raise NotImplementedError

    def send(self, message: WireRequest | WireAnswer) -> None:
        """Send a message, behind those before it, at the end of this turn of the loop.

        Raises:
            RunError: it is too long for a frame.
        """
        body = _encoder.encode(message)
        if len(body) > MAX_FRAME_BYTES:
            what = f"a message of {len(body)} bytes is longer than {MAX_FRAME_BYTES}"
            raise RunError("flow", what, "lower group_size")
        if not self._sending:
            asyncio.get_running_loop().call_soon(self._flush)
        self._sending += (len(body).to_bytes(LENGTH_BYTES, "little"), body)

    def _flush(self) -> None:
        sending, self._sending = self._sending, []
        if sending and self._transport is not None and self.is_open:
            self._transport.writelines(sending)

    def hang_up(self) -> None:
        """Send what is to be sent, and end the connection."""
        self._flush()
        if self._transport is not None:
            self._transport.close()


class _Caller(Link):
    """A process that has connected to a listener; the calls that it waits for end when it is gone."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self._listener = listener
        self._waiting: dict[int, asyncio.Future[WireAnswer]] = {}
        self._greeting: asyncio.TimerHandle | None = None  # while it may say the secret
        self._is_known = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self._listener.begin_greeting():
            self._greeting = asyncio.get_running_loop().call_later(GREETING_S, self.hang_up)
        else:
            self.hang_up()

    def data_received(self, data: bytes) -> None:
        if self._is_known:
            super().data_received(data)
        elif self._greeting is not None:
            self._rest += data
            if len(self._rest) >= SECRET_BYTES:
                self._greet()

    def _greet(self) -> None:
        said, further = bytes(self._rest[:SECRET_BYTES]), bytes(self._rest[SECRET_BYTES:])
        self._rest.clear()
        self._end_greeting()
        self._is_known = self._listener.knows_secret(said)
        if self._is_known:
            super().data_received(further)
        else:
            self.hang_up()

    def _end_greeting(self) -> None:
        if self._greeting is not None:
            self._greeting.cancel()
            self._greeting = None
            self._listener.end_greeting()

    def take(self, frame: memoryview) -> None:
        request = _requests.decode(frame)
        waiting = self._waiting.get(request.number)
        if request.is_cancelled:
            self._listener.undo(request.call)
            if waiting is not None:
                waiting.cancel()
            return
        answered = begin(self._listener.answer(request.number, request.call))
        if answered.done():
            self._say(answered)
        else:
            self._waiting[request.number] = answered
            answered.add_done_callback(partial(self._say, number=request.number))

    def _say(self, answered: asyncio.Future[WireAnswer], number: int = -1) -> None:
        """Send an answer, unless nobody waits for it any more."""
        self._waiting.pop(number, None)
        if answered.cancelled() or not self.is_open:
            return
        answer = answered.result()
        try:
            self.send(answer)
        except RunError as error:
            self.send(WireAnswer(answer.number, "failed", (error.where, error.what)))

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_greeting()
        for waiting in list(self._waiting.values()):
            waiting.cancel()


class Connection(Link):
    """A replica's side."""

    def __init__(self) -> None:
        super().__init__()
        self._number = 0
        self._waiting: dict[int, asyncio.Future[WireAnswer]] = {}
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def open(cls, address: Address) -> Connection:
        """Connect to a listener.

        Raises:
            RunError: nobody listens there.
        """
        try:
            transport, made = await asyncio.get_running_loop().create_connection(cls, address.host, address.port)
        except OSError as error:
            raise RunError("flow", f"its host does not answer at {address.host}:{address.port} ({error})") from error
        transport.write(bytes.fromhex(address.secret))
        return made

    async def carry(self, call: Call) -> Any:
        """Return what the flow answers to a call; cancelling the wait cancels the call.

        Raises:
            ChannelClosed: the flow says so.
            RunError: the flow says that it failed, or its host is gone.
        """
        if self._lost.done():
            raise _gone(call.replica)
        number = self._number
        self._number += 1
        self.send(WireRequest(number, call))
        answered = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            answer = await answered
        except asyncio.CancelledError:
            self.undo(call, number)
            raise
        except ConnectionError as error:
            raise _gone(call.replica) from error
        finally:
            del self._waiting[number]
        if answer.outcome == "done":
            return answer.value
        kinds = {"closed": ChannelClosed, "lasting": LastingError, "failed": RunError}
        raise kinds[answer.outcome](*answer.value)

    def undo(self, call: Call, number: int = -1) -> None:
        """Say that nobody waits for a call any more: this connection's of that number, or one already answered."""
        if self.is_open:
            head = msgspec.structs.replace(call, arguments=call.arguments[:1])
            self.send(WireRequest(number, head, is_cancelled=True))

    async def is_lost_within(self, wait_s: float) -> bool:
        """Return whether the other side is gone, as soon as it is, or after `wait_s`."""
        await asyncio.wait([self._lost], timeout=wait_s)
        return self._lost.done()

    def take(self, frame: memoryview) -> None:
        answer = _answers.decode(frame)
        waiting = self._waiting.get(answer.number)  # none: the wait was cancelled
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ConnectionError("the other side is gone"))
        self._lost.set_result(None)

    async def close(self) -> None:
        """Hang up."""
        self.hang_up()
        await self._lost


def _gone(replica: str) -> RunError:
    return RunError(replica, "the flow's host is gone")
