"""Text for the terminal: everything is printed by `say`, which lets nothing foreign through and never fails.

Tests: tests/unit/telemetry/test_hostile_text.py
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from flowrl.errors import printable
from flowrl.telemetry.files import FULL

if TYPE_CHECKING:
    from typing import TextIO


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


def shortened(text: str, most: int) -> str:
    """Return text on one line and of `most` characters at most; a text that was cut ends in "..."."""
    flat = " ".join(printable(text).split())
    return flat if len(flat) <= most else flat[: most - 3] + "..."
