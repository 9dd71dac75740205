"""Content of untrusted files: bounds it, and quotes it in messages."""

import reprlib

VALUES = 4_000_000  # in a JSON file; parsing allocates memory for each


def check_values(data: bytes, what: str) -> None:
    """Raises for JSON of more than `VALUES` values, before it is parsed.

    Args:
        data: the JSON.
        what: the file, for the error.

    Raises:
        ValueError: if the JSON may have more.
    """
    if sum(map(data.count, (b"{", b"[", b","))) > VALUES:
        raise ValueError(f"{what} holds more than {VALUES:,} values.")


def printable(text: str) -> str:
    r"""Escapes what would garble a message: control characters and bidirectional marks.

    Line breaks stay.

    Examples:
        >>> print(printable("a\0b\u202ec"))
        a\x00b\u202ec
    """
    odd = {c for c in set(text) - {"\n"} if not c.isprintable()}
    return text.translate({ord(c): c.encode("unicode_escape").decode() for c in odd})


def show(name: str) -> str:
    """Returns a name as it is, or shortened and escaped if it is long or would garble a message."""
    return name if name.isprintable() and len(name) <= 300 else shorten(name)


def shorten(value: object) -> str:
    """Writes a value of a file in few characters on one line, however deeply it is nested."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    return short.repr(value)
