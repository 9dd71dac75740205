"""Content of untrusted files: how much of it is read, and how messages quote it."""

import reprlib
from typing import Any

VALUES = 4_000_000  # of a JSON file; each takes memory of its own


def check_values(data: bytes, what: str) -> None:
    """Raises for JSON of more than `VALUES` values, before it is parsed.

    Args:
        data: the JSON.
        what: the file, for the error.

    Raises:
        ValueError: if there may be more.
    """
    if sum(map(data.count, (b"{", b"[", b","))) > VALUES:
        raise ValueError(f"{what} holds more than {VALUES:,} values.")


def printable(text: str) -> str:
    r"""Escapes what would garble a message: control characters and bidirectional marks.

    Lines stay lines.

    Examples:
        >>> print(printable("a\0b\u202ec"))
        a\x00b\u202ec
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def show(name: str) -> str:
    """Returns a name as it is, unless it is long or would garble the message."""
    return name if name.isprintable() and len(name) <= 300 else shorten(name)


def shorten(value: Any) -> str:
    """Writes a value of a file in few characters and on one line, however it is nested."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    return short.repr(value)
