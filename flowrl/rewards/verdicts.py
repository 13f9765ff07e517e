"""What a judge said, by a digest of who was asked what: nothing that was paid for is asked again.

Verdicts are remembered in memory and, where a directory is given, in `NODE.REPLICA.jsonl` there. Each is a sealed line,
with the tokens that the replica has paid for in all starts of the run. At the start all replicas' are read.

Invariants:
- a verdict counts for the same model and sampling, way, principle and answers alone;
- at most `MOST` are in memory, those used last;
- a line that is torn or was changed is no verdict, and stops nothing.

Called by the Judgement, for the Judge stage with the run's directory.

Tests: tests/unit/rewards/test_verdicts.py
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from flowrl.telemetry.files import UNREADABLE, RecordFile, read_file, seal, unseal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MOST = 100_000
MOST_WAITING = 1 << 20  # bytes that wait for room on the disk: they may be asked again


class Ruling(NamedTuple):
    """What was said, and what it is worth."""

    mark: float | None  # points, what the answer shown first won, or the truth of it; None: unreadable
    said: str


class Paid(msgspec.Struct):
    """Tokens that a server has counted so far."""

    read: int = 0
    written: int = 0


class _Line(msgspec.Struct, array_like=True):
    digest: str
    mark: float | None
    said: str
    read: int  # tokens paid for up to here
    written: int


class Verdicts:
    """Remembers verdicts; without a directory for as long as this process lives.

    `paid` is what this replica has paid in all starts of the run; a server's voice counts on in it.
    """

    def __init__(
        self, directory: Path | None = None, name: str = "", *, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        """Read what the replicas of a node have written; `name` is this one's, NODE.REPLICA."""
        self.paid = Paid()
        self._known: OrderedDict[str, Ruling] = OrderedDict()
        self._file: RecordFile | None = None
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        siblings = re.compile(rf"{re.escape(name.rpartition('.')[0])}\.[0-9]+\.jsonl")
        for path in sorted(directory.iterdir()):
            if siblings.fullmatch(path.name):
                self._read(path, is_own=path.name == f"{name}.jsonl")
        self._file = RecordFile(directory / f"{name}.jsonl", most_bytes=MOST_WAITING, tell=tell)

    def _read(self, path: Path, *, is_own: bool) -> None:
        for text in (read_file(path) or b"").splitlines(keepends=True):
            try:
                line = msgspec.json.decode(unseal(text), type=_Line)
            except UNREADABLE:
                continue
            self._keep(line.digest, Ruling(line.mark, line.said))
            if is_own:
                self.paid = Paid(line.read, line.written)

    def get(self, digest: str) -> Ruling | None:
        """Return what was said; None where nobody was asked, or where it is forgotten."""
        found = self._known.get(digest)
        if found is not None:
            self._known.move_to_end(digest)
        return found

    def add(self, digest: str, verdict: Ruling) -> None:
        """Remember what was said."""
        self._keep(digest, verdict)
        if self._file is not None:
            line = _Line(digest, verdict.mark, verdict.said, self.paid.read, self.paid.written)
            self._file.append(seal(msgspec.json.encode(line)))

    def _keep(self, digest: str, verdict: Ruling) -> None:
        self._known[digest] = verdict
        self._known.move_to_end(digest)
        if len(self._known) > MOST:
            self._known.popitem(last=False)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
