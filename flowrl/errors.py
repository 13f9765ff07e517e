"""What a user is told: every exception flowrl raises on purpose, in one tree, and the one way to print a text.

An error says where, what is wrong with the numbers, and what to do. `UserError` is something the user can mend
before anything has started (exit code 2); `RunError` happened while a run was under way (exit code 1).

Invariant: everything is printed by `say`, which lets nothing foreign through and never fails.

    FlowrlError
    ├── UserError          ConfigError  GraphError  DataError  ModelError  ResourceError
    ├── RunError           StageError  RewardError  LastingError  ProofError  TransferError  StallError
    └── ChannelClosed      the far side of an edge has ended; a stage normally lets it end its loop

Tests: tests/unit/telemetry/test_hostile_text.py
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import TextIO


# How the system says that a disk takes nothing as it is: full, so is one's share of it, or it is mounted read-only.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
MOST_CHARACTERS = 4000  # of an error's line


def printable(text: str) -> str:
    r"""Return text with control characters written out; `printable("a\x1b[2J")` is "a\\x1b[2J".

    Whatever a model, a data set, user code or a server wrote goes through here or `one_line` before it is shown. It
    must not move a cursor, set the clipboard or pass for a line of ours.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    r"""Return text like `printable`, line breaks and tabs written out too; `one_line("a\nb")` is "a\\nb"."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


class FlowrlError(Exception):
    """Say `where`: `what`; `remedy`."""

    exit_code = 1

    def __init__(self, where: str, what: str, remedy: str = "") -> None:
        super().__init__(where, what, remedy)
        self.where = where
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}"
        text = f"{text}; {self.remedy}" if self.remedy else text
        if len(text) > MOST_CHARACTERS:  # foreign words within it: its beginning and its end are ours
            half = MOST_CHARACTERS // 2
            text = f"{text[:half]} ... ({len(text) - 2 * half:,} characters) ... {text[-half:]}"
        return one_line(text)


class UserError(FlowrlError):
    """Something to mend before a run can start; nothing has been started or written."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, out of range or at odds with another."""


class GraphError(UserError):
    """The graph file or the graph it builds cannot run."""


class DataError(UserError):
    """A data set is missing, empty, or has a row that cannot be read."""


class ModelError(UserError):
    """A model, tokenizer or chat template is missing or unfit for its role."""


class ResourceError(UserError):
    """The machine lacks the cores, GPUs, memory, disk space or port that was asked for."""


class RunError(FlowrlError):
    """Something failed while the run was under way; `where` names node and replica."""


class StageError(RunError):
    """A stage's own code raised."""


class RewardError(RunError):
    """A reward function raised, returned NaN, or returned the wrong number of scores."""


class LastingError(RunError):
    """It will be back however often it is tried: the run ends, and nothing is started again."""


class ProofError(RunError):
    """A generator could not prove that it serves the version it was sent (digest or canary)."""


class TransferError(RunError):
    """A weight transfer failed or passed its deadline."""


class StallError(RunError):
    """A wait passed its deadline; the message names who waits for what."""


class ChannelClosed(FlowrlError):
    """The edge was closed and holds nothing more."""


def check_text(text: str, where: str) -> None:
    """Insist that a text can be written down: a path of bytes that are not UTF-8 cannot.

    Raises:
        ConfigError: it cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(where, "is not UTF-8, so no record of a run can name it", "give it another name") from error


@contextlib.contextmanager
def files_named() -> Generator[None]:
    """Let what the system says of a file in this block be an error of ours: a line that names the file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        what = f"cannot be used ({error.strerror})"
        raise ResourceError(str(error.filename), what, "see whose it is, and whether its disk is there") from error


def say(text: str, *, aside: bool = False) -> None:
    """Print text, on standard error with `aside`; whoever would read it may be gone, or its disk full.

    Our own line breaks are kept; a foreign text within must be one line already (`errors.one_line`).
    """
    stream = sys.stderr if aside else sys.stdout
    try:
        print(printable(text), file=stream, flush=True)
    except UnicodeEncodeError:
        with contextlib.suppress(OSError, ValueError):
            print(printable(text).encode("ascii", "backslashreplace").decode(), file=stream, flush=True)
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError) or error.errno not in FULL:
            _let_go(stream)


def hold_output() -> None:
    """Open what a process was started without of its three standard streams: a run's file would take the place."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if descriptor else "r"))  # noqa: SIM115  it stays open


def let_go_of_output() -> None:
    """See that what could not be printed does not fail the end of the process."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _let_go(stream)


def _let_go(stream: TextIO) -> None:
    """Send what is still to come nowhere: the terminal or the reader is gone."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def number_of(count: float, noun: str) -> str:
    """Return how many there are in words: `number_of(1, "thread")` is "1 thread", of 2 it is "2 threads"."""
    return f"{count:,.10g} {noun}{'s' * (count != 1)}"


BRIEF_CHARS = 300


def shortened(text: str, most: int) -> str:
    """Return text on one line and of `most` characters at most; a text that was cut ends in "..."."""
    flat = " ".join(printable(text).split())
    return flat if len(flat) <= most else flat[: most - 3] + "..."


def said_briefly(error: BaseException) -> str:
    """Return an error's kind and text as one short line."""
    return shortened(f"{type(error).__name__}: {error}", BRIEF_CHARS)
