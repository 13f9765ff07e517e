"""The ledger: what became of every admitted prompt group, as an append-only log with a checksum a line.

Invariants:
- each admitted group ends in exactly one of learned (in a step), filtered or failed (with the reason);
- a second ending is an error, not an overwrite.

A group that is learned again out of a replay buffer has an entry for each time, which is no ending. Every entry is one
line of `ledger.jsonl`, its JSON and the CRC-32 of it, handed to the operating system as it is written and to the disk
with each checkpoint; on a full disk entries wait, and so do cuts and admissions. A rollback is an entry too: it voids
everything after the cut it goes back to. Memory holds what is in flight, not what has ended.

The flow owns the ledger and alone writes to it; `read_entries` and `surviving` are for whoever reads one.

Tests: tests/unit/runtime/test_ledger.py
"""

from __future__ import annotations

import os
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

import msgspec

from flowrl.errors import DataError, RunError
from flowrl.telemetry.files import RecordFile, is_sealed, read_file, run_id, seal, unseal

if TYPE_CHECKING:
    from pathlib import Path

ENDINGS = ("learned", "filtered", "failed")


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the log."""

    event: Literal["admitted", "learned", "filtered", "failed", "replayed", "rollback"]
    group: int = -1
    step: int = -1  # learned or replayed: in this step; rollback: the policy version gone back to
    oldest: int = -1  # learned or replayed: the policy version that sampled its oldest token
    reason: str = ""
    records: int = -1  # rollback: entries before the cut
    start: int = -1  # rollback: the start of the command that it belongs to (runtime/rundir.py)


class Cut(msgspec.Struct, frozen=True, kw_only=True):
    """Where the flow stood between two steps; with a checkpoint it is what a run goes on from."""

    version: int = 0  # policy versions published
    next_group: int = 0  # the oldest group that has not ended
    ended_ahead: list[int] = []  # younger ones that have
    records: int = 0  # entries of the ledger
    learned: int = 0
    filtered: int = 0
    failed: int = 0
    run: str = ""  # which run this is the cut of
    digest: str = ""  # of the ledger's entries


class Ledger:
    """What became of every admitted group; `path` None keeps it in memory only."""

    def __init__(self, path: Path | None, *, cut: Cut | None = None, start: int = -1) -> None:
        """Begin a ledger, or go on from a cut of the one at `path`.

        Raises:
            DataError: the one at `path` is damaged before the cut, or ends before it.
        """
        begin = cut or Cut()
        self._counts = {"learned": begin.learned, "filtered": begin.filtered, "failed": begin.failed}
        self._low = begin.next_group  # every group below has ended
        self._ended_ahead = set(begin.ended_ahead)
        self._open: set[int] = set()
        self._records = begin.records
        self._file: RecordFile | None = None
        self._run = run_id(path.parent) if path is not None else ""
        self._hash = blake2b(digest_size=16)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = whole_lines(path, begin)
            self._records = len(lines)
            self._hash.update(b"".join(lines))
            if path.exists():
                os.truncate(path, sum(map(len, lines)))  # what follows was torn by a death, and is after the cut
            self._file = RecordFile(path)
        if cut is not None:
            self._write(Entry(event="rollback", step=cut.version, records=cut.records, start=start))

    def admit(self, group_id: int) -> None:
        """Note that a group entered the flow; the same group again (after a crash) is not a new one."""
        if group_id not in self._open and not self.has_ended(group_id):
            self._open.add(group_id)
            self._write(Entry(event="admitted", group=group_id))

    def end(self, group_id: int, ending: str, *, step: int = -1, oldest: int = -1, reason: str = "") -> None:
        """Note how a group ended.

        Raises:
            RunError: it was never admitted, or had ended before.
        """
        if ending not in ENDINGS:
            raise RunError("ledger", f"{ending!r} is not an ending", f"use one of {', '.join(ENDINGS)}")
        if group_id not in self._open:
            before = "had ended before" if self.has_ended(group_id) else "was never admitted"
            raise RunError("ledger", f"group {group_id} is to end as {ending} but {before}")
        self._write(Entry(event=ending, group=group_id, step=step, oldest=oldest, reason=reason))  # type: ignore[arg-type]
        self._open.discard(group_id)
        self._counts[ending] += 1
        self._ended_ahead.add(group_id)
        while self._low in self._ended_ahead:
            self._ended_ahead.discard(self._low)
            self._low += 1

    def replay(self, group_id: int, *, step: int, oldest: int) -> None:
        """Note that a group was learned again; `flowrl verify` holds it against the step that learned it first."""
        self._write(Entry(event="replayed", group=group_id, step=step, oldest=oldest))

    def has_ended(self, group_id: int) -> bool:
        """Return whether a group has its ending."""
        return group_id < self._low or group_id in self._ended_ahead

    @property
    def oldest_open(self) -> int:
        """Return the group below which every group has its ending."""
        return self._low

    @property
    def num_open(self) -> int:
        """Return how many groups were admitted and have not ended."""
        return len(self._open)

    def flush(self) -> str:
        """Write the entries that wait for room; returns what the disk lacks, "" once all are written."""
        return "" if self._file is None or self._file.flush() else self._file.trouble

    def cut(self, version: int) -> Cut:
        """Return where the flow stands, and see that the disk has every entry up to here; none may wait."""
        if self._file is not None:
            assert not self._file.is_waiting, "whoever cuts waits for room first"
            self._file.sync()
        return Cut(
            version=version,
            next_group=self._low,
            ended_ahead=sorted(self._ended_ahead),
            records=self._records,
            **self._counts,
            run=self._run,
            digest=self._hash.hexdigest() if self._file is not None else "",
        )

    def totals(self) -> dict[str, int]:
        """Return how many groups were admitted, ended in each way, and are unfinished."""
        unfinished = len(self._open)
        return {"admitted": sum(self._counts.values()) + unfinished, **self._counts, "unfinished": unfinished}

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, entry: Entry) -> None:
        if self._file is not None:
            line = encode_entry(entry)
            self._hash.update(line)
            self._file.append(line)
        self._records += 1


def encode_entry(entry: Entry) -> bytes:
    """Return an entry as a line of the log."""
    return seal(msgspec.json.encode(entry))


def decode_entry(line: bytes) -> Entry:
    """Read what `encode_entry` wrote.

    Raises:
        ValueError: the line is torn or was changed.
    """
    return msgspec.json.decode(unseal(line), type=Entry)


def read_entries(path: Path) -> list[Entry]:
    """Return a log's entries; a torn last line, of a writer that was killed, is left out.

    Raises:
        DataError: the file is missing, or another line is damaged.
    """
    body = read_file(path)
    if body is None:
        raise DataError(str(path), "is not there", "name the directory of a run")
    lines = body.splitlines(keepends=True)
    entries: list[Entry] = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(decode_entry(line))
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number}", f"is damaged ({error})", "the ledger cannot be trusted") from error
    return entries


def surviving(entries: list[Entry]) -> list[Entry]:
    """Return the entries that no rollback voided; groups that were open at a cut are admitted anew after it."""
    alive: list[tuple[int, Entry]] = []
    for index, entry in enumerate(entries):
        if entry.event != "rollback":
            alive.append((index, entry))
            continue
        kept = [(at, old) for at, old in alive if at < entry.records]
        ended = {old.group for _, old in kept if old.event in ENDINGS}
        alive = [(at, old) for at, old in kept if old.group in ended]
    return [entry for _, entry in alive]


def whole_lines(path: Path, cut: Cut) -> list[bytes]:
    """Return the lines of a log before the first damaged one; all before the cut must be as they were then.

    What comes after the cut is void once the run goes on from there, so damage is no loss there. A machine that lost
    its power may leave anything behind what it had brought to the disk.

    Raises:
        DataError: a line before the cut is damaged or missing, or the cut is not of this run, or not of this log.
    """
    where, remedy = str(path), "restore the file, or begin again with --from-start"
    lines = (read_file(path) or b"").splitlines(keepends=True)
    sound = next((place for place, line in enumerate(lines) if not is_sealed(line)), len(lines))
    if sound < min(cut.records, len(lines)):
        raise DataError(f"{where}:{sound + 1}", "its checksum does not fit: the line was changed", remedy)
    if sound < cut.records:
        what = f"has {sound} entries, the checkpoint of version {cut.version} was made after {cut.records}"
        raise DataError(where, what, remedy)
    if wrong := foreign(path, lines, cut):
        raise DataError(where, wrong, remedy)
    return lines[:sound]


def foreign(path: Path, lines: list[bytes], cut: Cut) -> str:
    """Return by what a cut is seen not to be of a log of these lines, "" where it is."""
    here = run_id(path.parent)
    if cut.run and here and cut.run != here:
        return f"the checkpoint of version {cut.version} is of another run ({cut.run}, this one is {here})"
    if cut.digest and cut.digest != blake2b(b"".join(lines[: cut.records]), digest_size=16).hexdigest():
        return f"its first {cut.records} entries are not those before the checkpoint of version {cut.version}"
    return ""
