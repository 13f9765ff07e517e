"""How a run writes its files: whole or not at all, by living attempts alone, and without ending for want of room.

Invariants:
- `replace_file` leaves the old file or the new one, on the disk;
- a `RecordFile` ends with a whole record at any moment: what finds no room waits in memory, in order, and nothing that
  follows is glued to half a record;
- a process that belongs to an attempt which was given up writes nothing any more;
- `fence` names the file that says which attempt is the present one, and every write looks at it first.

Used by whatever writes into a run's directory: ledger, metrics, timeline, rollouts, versions, state, checkpoints.

Tests: tests/contracts/test_full_disk.py
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections import deque
from hashlib import blake2b
from typing import TYPE_CHECKING
from zlib import crc32

from flowrl.errors import FULL, DataError, LastingError, RunError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

REPLACED = "replaced"
UNREADABLE = (ValueError, RecursionError)  # what decoding a damaged JSON text may raise, one that is no text included
_fences: list[tuple[Path, int]] = []  # the attempt that this process belongs to; at most one


def fence(lock: Path, attempt: int) -> None:
    """Let this process write only as long as `lock` holds the number of its attempt."""
    _fences[:] = [(lock, attempt)]


def unfence() -> None:
    """Let this process write what it likes: it belongs to no attempt any more."""
    _fences.clear()


def check_fence() -> None:
    """See that this process may still write.

    Raises:
        RunError: another attempt has begun.
    """
    for lock, attempt in _fences:
        try:
            present = int(lock.read_text() or "0")
        except (OSError, ValueError):
            continue  # the directory is gone, or a number is being written: nobody has taken over
        if present > attempt:
            raise RunError(str(lock.parent), f"attempt {attempt} was replaced by attempt {present} and writes no more")


def is_full(error: BaseException) -> bool:
    """Return whether an error says that a disk, or what one may use of it, is full, or that it is read-only."""
    return isinstance(error, OSError) and error.errno in FULL


def why_closed(path: Path) -> str:
    """Return why the disk that a path is on takes nothing, however many bytes of it are free; "": it would."""
    try:
        about = os.statvfs(path)
    except OSError:
        return "cannot be reached"
    if about.f_flag & os.ST_RDONLY:
        return "is read-only"
    return "has room for no further file (inodes)" if about.f_files and not about.f_favail else ""


def no_room(path: Path, needed: int | None = None, *, why: str | None = None) -> str:
    """Return a sentence that names the disk: `/data/run needs 4096 bytes, its disk /data has 12 free`.

    `why` is the system's own word: bytes may be free to others, or where a disk has become read-only by a fault of it.
    """
    mount = next((each for each in (path, *path.parents) if os.path.ismount(each)), path)
    has = why_closed(mount) or f"has {shutil.disk_usage(mount).free} free"
    text = f"{path} needs {'more' if needed is None else needed} bytes, its disk {mount} {has}"
    return f"{text} ({why})" if why else text


def read_file(path: Path, offset: int = 0) -> bytes | None:
    """Return what a file of a run holds, from a byte on, None where nothing is there.

    Raises:
        DataError: it cannot be read, or is something else than a file.
    """
    try:
        if path.exists() and not path.is_file():
            raise DataError(str(path), "is no file", "restore the file")  # reading a pipe would wait for ever
        with path.open("rb") as file:
            file.seek(offset)
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})", "mend its permissions") from error


def replace_file(path: Path, body: bytes, *, mode: int = 0o644, is_synced: bool = True) -> None:
    """Put a file in the place of another, whole; with `is_synced` the disk has it when this returns.

    Raises:
        OSError: the old file is as it was.
    """
    with new_file(path) as aside:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            os.fchmod(descriptor, mode)
            write_all(descriptor, body)
            if is_synced:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if is_synced:
        sync(path.parent)


@contextlib.contextmanager
def new_file(path: Path):  # noqa: ANN201
    """Yield where to write a file that takes the place of `path` when the block ends; an error leaves the old one."""
    check_fence()
    aside = path.with_name(f".{path.name}.partial")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def set_aside(paths: list[Path]) -> None:
    """Move files of a history that was given up into `replaced/` beside them, until `forget_replaced`."""
    for path in paths:
        (path.parent / REPLACED).mkdir(exist_ok=True)
        os.replace(path, path.parent / REPLACED / path.name)


def forget_replaced(run_dir: Path) -> None:
    """Delete what was set aside: the history that took its place has a checkpoint of its own."""
    for directory in run_dir.glob(f"*/{REPLACED}"):
        shutil.rmtree(directory, ignore_errors=True)


def write_all(descriptor: int, body: bytes) -> None:
    """Write every byte: a single write may take some of them and say so."""
    rest = memoryview(body)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync(path: Path) -> None:
    """Bring a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def steps_in(directory: Path, suffix: str = "") -> list[tuple[int, Path]]:
    """Return what is named by a step, with the step and in its order: step-000012 of 12, or step-000012.parquet.

    A copy of another name is of no step.
    """
    named = re.compile(rf"step-([0-9]{{6,}}){re.escape(suffix)}")
    found = ((named.fullmatch(path.name), path) for path in directory.glob(f"step-*{suffix}"))
    return sorted((int(name[1]), path) for name, path in found if name)


def run_id(run_dir: Path) -> str:
    """Return what tells a run from every other, a digest of its first start; "" where that is not known."""
    first = (read_file(run_dir / "starts.jsonl") or b"").partition(b"\n")[0]
    return blake2b(first, digest_size=8).hexdigest() if is_sealed(first + b"\n") else ""


def seal(text: bytes) -> bytes:
    """Return a JSON text as a line that shows when it was torn or changed: with its CRC-32."""
    return b"%s %08x\n" % (text, crc32(text))


def is_sealed(line: bytes) -> bool:
    """Return whether a line is as `seal` made it."""
    text, _, checksum = line.rstrip(b"\n").rpartition(b" ")
    return line.endswith(b"\n") and checksum == b"%08x" % crc32(text)


def unseal(line: bytes) -> bytes:
    """Return the text of a sealed line.

    Raises:
        ValueError: the line is torn or was changed.
    """
    if not is_sealed(line):
        raise ValueError("its checksum does not fit")
    return line.rstrip(b"\n").rpartition(b" ")[0]


class RecordFile:
    """A file to which whole records are appended; while its disk is full they wait here.

    `most_bytes` may wait, then the oldest are dropped and counted; None keeps every one. `tell` hears when waiting
    begins and ends.
    """

    def __init__(
        self, path: Path, *, most_bytes: int | None = None, tell: Callable[[str], None] = lambda text: None,
        is_new: bool = False, mode: int = 0o644,
    ) -> None:  # fmt: skip
        self.path = path
        self.num_dropped = 0
        self._tell = tell
        self._most_bytes = most_bytes
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._is_told = False
        self._why: str | None = None  # what is waited for has no room
        self._is_torn = False  # half a record may stand at the end
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (os.O_TRUNC if is_new else 0)
        self._descriptor = os.open(path, flags, mode)
        self._end = os.fstat(self._descriptor).st_size  # of the last whole record
        if self._end and not _ends_a_line(path):
            self.append(b"\n")  # a kill cut the last line short

    @property
    def is_waiting(self) -> bool:
        """Return whether records wait for room."""
        return bool(self._waiting)

    @property
    def trouble(self) -> str:
        """Return what is waited for, "" where nothing is."""
        return no_room(self.path, self._waiting_bytes, why=self._why) if self._waiting else ""

    def append(self, record: bytes) -> None:
        """Append a record, behind those that wait; it waits too where there is no room.

        Raises:
            OSError: the file cannot be written, for another reason than a full disk.
        """
        was_waiting = self.is_waiting
        self._waiting.append(record)
        self._waiting_bytes += len(record)
        if was_waiting and self._most_bytes is not None:
            while self._waiting_bytes > self._most_bytes and len(self._waiting) > 1:
                self._waiting_bytes -= len(self._waiting.popleft())
                self.num_dropped += 1
        self.flush()

    def flush(self) -> bool:
        """Write what waits, as far as there is room; returns whether all of it is written."""
        if not self._waiting:
            return True
        check_fence()
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting_bytes -= len(self._waiting.popleft())
        except OSError as error:
            if not is_full(error):
                raise
            self._why = error.strerror
            if not self._is_told:
                self._is_told = True
                self._tell(f"{self.trouble}; waiting for room")
            return False
        if self._is_told:
            self._is_told = False
            gone = f"; {self.num_dropped} older records are left out" if self.num_dropped else ""
            self._tell(f"{self.path} has room again{gone}")
        return True

    def _write(self, record: bytes) -> None:
        self._cut_torn()
        self._is_torn = True
        try:
            write_all(self._descriptor, record)
        except OSError:
            with contextlib.suppress(OSError):  # a disk that is read-only now lets nothing be cut off either
                self._cut_torn()
            raise
        self._is_torn = False
        self._end += len(record)

    def _cut_torn(self) -> None:
        """Cut off half a record, which is none."""
        if self._is_torn:
            os.ftruncate(self._descriptor, self._end)
            self._is_torn = False

    def sync(self) -> None:
        """Bring what is written to the disk.

        Raises:
            LastingError: the file was removed, or has another in its place: nobody will find what was written.
        """
        os.fsync(self._descriptor)
        mine = os.fstat(self._descriptor)
        if not self.path.exists() or not os.path.samestat(mine, self.path.stat()):
            what = "was removed or replaced while it was written, so what it held is lost"
            raise LastingError(str(self.path), what, "restore it, or begin again in another directory")

    def close(self) -> None:
        """Write what there is room for and close the file."""
        try:
            self.flush()
        finally:
            os.close(self._descriptor)


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
