"""A register: the newest value wins, and its writer learns when every live reader has taken it in.

Invariant: a reader sees versions in rising order and never an older one after a newer one.
"""

from __future__ import annotations

from flowrl.errors import ChannelClosed, RunError
from flowrl.runtime.channels.waiters import Waiters


class RegisterChannel:
    """The newest value, and who has taken it in."""

    def __init__(self, name: str, readers: list[str]) -> None:
        self.name = name
        self.version = -1
        self.body = b""
        self._confirmed = dict.fromkeys(readers, -1)
        self._readers: Waiters[int] = Waiters()
        self._writers: Waiters[int] = Waiters()
        self._closed = False

    def expect(self, readers: list[str]) -> None:
        """Have writers wait for these readers too."""
        self._confirmed |= dict.fromkeys(readers, -1)

    def waits(self) -> list[str]:
        """Say who waits here and for what."""
        behind = ", ".join(f"{reader} (at {seen})" for reader, seen in self._confirmed.items() if seen < self.version)
        return [f"{self.name}: version {v} waits to be acknowledged by {behind}" for v in self._writers.requests()]

    async def put(self, version: int, body: bytes) -> None:
        """Set the value and wait until every live reader has confirmed it or a newer one; a repeat is not an error.

        Raises:
            RunError: `version` is not newer than the present one, and not the same value.
            ChannelClosed: the register was closed.
        """
        if self._closed:
            raise ChannelClosed(self.name, "is closed")
        if version <= self.version and (version, body) != (self.version, self.body):
            raise RunError(self.name, f"version {version} is not newer than {self.version}")
        self.version, self.body = version, body
        for future, seen in self._readers:
            if seen < version:
                self._readers.grant(future)
        if not self._is_confirmed(version):
            await self._writers.wait(version)

    async def get(self, reader: str, newer_than: int) -> tuple[int, bytes]:
        """Wait for a version newer than `newer_than` and return the newest; from now on writers wait for the reader.

        Raises:
            ChannelClosed: the register was closed.
        """
        self._confirmed.setdefault(reader, -1)
        if self.version <= newer_than and not self._closed:
            await self._readers.wait(newer_than)
        if self.version <= newer_than:
            raise ChannelClosed(self.name, "is closed")
        return self.version, self.body

    def confirm(self, reader: str, version: int) -> None:
        """Note that `reader` serves `version`."""
        self._confirmed[reader] = max(version, self._confirmed.get(reader, -1))
        self._wake_writers()

    def release(self, reader: str) -> None:
        """Wait no more for a dead reader."""
        self._confirmed.pop(reader, None)
        self._wake_writers()

    def close(self) -> None:
        """Wake every waiter."""
        self._closed = True
        self._readers.fail(ChannelClosed(self.name, "is closed"))
        self._writers.fail(ChannelClosed(self.name, "is closed"))

    def _is_confirmed(self, version: int) -> bool:
        return all(seen >= version for seen in self._confirmed.values())

    def _wake_writers(self) -> None:
        for future, version in self._writers:
            if self._is_confirmed(version):
                self._writers.grant(future)
