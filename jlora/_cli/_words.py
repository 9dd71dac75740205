"""Errors of functions, told in the words of the command line."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

Given = tuple[str, Path | None]  # how the usage line calls an argument, and its path


@contextlib.contextmanager
def called(**arguments: Given) -> Iterator[None]:
    """Renames the `arguments` of a function in its errors to what the user gave for them.

    It adds the path if the message does not have it.
    """
    try:
        yield
    except Exception as e:
        text = str(e)
        renamed = text.replace("follow_links=True", "--follow-links")
        for name, given in arguments.items():
            renamed = _rename(renamed, f"`{name}`", *given)
        if renamed == text:
            raise
        raise ValueError(renamed) from e


def _has_path(path: Path, text: str) -> bool:
    names = (re.escape(str(x)) for x in (os.path.abspath(path), path))
    return any(re.search(rf"(?<![\w/.-]){name}(?![\w-])", text) for name in names)


def _rename(text: str, argument: str, what: str, path: Path | None) -> str:
    first = what if path is None or _has_path(path, text) else f"{what} {path}"
    return text.replace(argument, first, 1).replace(argument, what)
