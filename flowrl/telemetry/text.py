"""Text that a model or a data set wrote, made fit to be shown: it must not move a cursor or fill the screen."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Return text with control characters written out; `printable("a\x1b[2J")` is "a\\x1b[2J"."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, most: int) -> str:
    """Return text on one line and of `most` characters at most; a text that was cut ends in "..."."""
    flat = " ".join(printable(text).split())
    return flat if len(flat) <= most else flat[: most - 3] + "..."
