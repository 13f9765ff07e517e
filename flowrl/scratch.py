"""Directories that one process has for itself, in /tmp or /dev/shm, and that go with it.

Each holds a file that its owner keeps locked.

Invariants:
- it is readable by its owner alone and goes with `close`;
- that of a process that was killed goes when the next one is made beside it, which knows the dead by a lock that nobody
  holds.

Tests: tests/unit/test_scratch.py
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "flowrl-"
LOCK = "alive"
MOST_SOCKET_BYTES = 107  # of the path of a Unix socket, on Linux
SOCKET_BYTES = 70  # that a directory needs for the sockets in it: Ray's have names of 65


class ScratchDirectory:
    """One of them; until `close`."""

    def __init__(self, name: str, root: Path | None = None) -> None:
        """Make it, once those of the dead beside it are removed; `root` is by default one that sockets may lie in."""
        root = root or socket_root()
        sweep(root)
        # Two runs may share a name, a process may have two of them, and on two machines process ids are the same.
        self.path = root / f"{PREFIX}{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{os.getpid()}-{secrets.token_hex(6)}"
        unlisted = self.path.with_name(f".{self.path.name}")  # a sweep must not meet it without its lock
        unlisted.mkdir(mode=0o700)
        self._lock = os.open(unlisted / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unlisted.rename(self.path)

    def close(self) -> None:
        """Remove it; safe to call twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


def sweep(*roots: Path) -> None:
    """Remove the directories of processes that were killed; who has mapped a file of theirs keeps it."""
    for directory in [each for root in roots or {socket_root(), SHARED_MEMORY} for each in root.glob(f"{PREFIX}*")]:
        try:
            lock = os.open(directory / LOCK, os.O_RDWR)
        except OSError:  # somebody else's, or gone meanwhile
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its owner lives
        else:
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(lock)


def socket_root() -> Path:
    """Return the directory for temporary files, or /tmp where the path of a socket there would be too long."""
    root = tempfile.gettempdir()
    return Path(root if len(os.fsencode(root)) <= MOST_SOCKET_BYTES - SOCKET_BYTES else "/tmp")
