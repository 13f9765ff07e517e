"""A server of packed buckets for receivers that a broadcast did not reach.

A collective reaches those who are in its group when it starts; a generator that restarted meanwhile, or whose group
broke, asks here for the same bytes. One request a connection: a line of JSON with the token and the version; the
answer is the buckets one after the other, or nothing when the version is not held. Called by `broadcast`.

Tests: tests/contracts/test_hostile_wire.py
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import socketserver
import threading
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.engines.weights.base import memory
from flowrl.errors import TransferError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from flowrl.engines.weights.manifest import BroadcastManifest

MAX_REQUEST_BYTES = 4096  # a request is a token and a number
MAX_CONNECTIONS = 256  # served at a time; who is turned away asks again
GREETING_S = 10.0  # for a request to arrive


class PullRequest(msgspec.Struct, frozen=True):
    """What a receiver sends."""

    token: str
    version: int


class PullServer:
    """Serves `held(version)`, the host buffers of a version, from threads of its own until closed."""

    def __init__(self, host: str, held: Callable[[int], Sequence[torch.Tensor]], *, timeout_s: float) -> None:
        self.token = secrets.token_hex(16)
        token = self.token

        class Handler(socketserver.StreamRequestHandler):
            timeout = min(timeout_s, GREETING_S)

            def handle(self) -> None:
                # A receiver that went away or talks nonsense costs this thread, never the learner.
                with contextlib.suppress(OSError, msgspec.DecodeError, UnicodeError, RecursionError):
                    request = msgspec.json.decode(self.rfile.readline(MAX_REQUEST_BYTES), type=PullRequest)
                    if hmac.compare_digest(request.token.encode(), token.encode()):
                        self.request.settimeout(timeout_s)
                        for raw in held(request.version):
                            self.request.sendall(memory(raw))

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False
            free = threading.BoundedSemaphore(MAX_CONNECTIONS)

            def process_request(self, request: Any, client_address: Any) -> None:
                if self.free.acquire(blocking=False):
                    super().process_request(request, client_address)
                else:
                    self.shutdown_request(request)

            def process_request_thread(self, request: Any, client_address: Any) -> None:
                try:
                    super().process_request_thread(request, client_address)
                finally:
                    self.free.release()

        self._server = Server((host, 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="flowrl-pull", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Return the port it listens on."""
        return self._server.server_address[1]

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def pull(manifest: BroadcastManifest, buffers: Sequence[torch.Tensor], *, timeout_s: float, where: str) -> None:
    """Fill `buffers`, one for each bucket, from the sender's server; not yet verified.

    Raises:
        TransferError: the sender cannot be reached, is too slow, or no longer holds the version.
    """
    request = msgspec.json.encode(PullRequest(manifest.token, manifest.version)) + b"\n"
    try:
        with socket.create_connection((manifest.host, manifest.pull_port), timeout=timeout_s) as connection:
            connection.sendall(request)
            for raw in buffers:
                _receive(connection, memory(raw))
    except OSError as error:
        raise TransferError(
            where,
            f"version {manifest.version} could not be pulled from {manifest.host}:{manifest.pull_port} ({error})",
            "the learner has gone or holds a newer version",
        ) from error


def _receive(connection: socket.socket, target: memoryview) -> None:
    while target:
        count = connection.recv_into(target)
        if count == 0:
            raise ConnectionError(f"the sender stopped with {len(target)} bytes of a bucket to go")
        target = target[count:]
