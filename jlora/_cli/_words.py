"""Errors of functions in the words of the command line."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

Given = tuple[str, Path | None]  # how the usage line calls an argument, and its path


@contextlib.contextmanager
def called(**arguments: Given) -> Iterator[None]:
    """Errors about the `arguments` of a function are about what the user gave for them.

    The path is said too where the message does not have it.
    """
    try:
        yield
    except Exception as e:
        text = str(e)
        renamed = text.replace("follow_links=True", "--follow-links")
        for name, given in arguments.items():
            renamed = _renamed(renamed, f"`{name}`", *given)
        if renamed == text:
            raise
        raise ValueError(renamed) from e


def _is_said(path: Path, text: str) -> bool:
    names = (re.escape(str(x)) for x in (os.path.abspath(path), path))
    return any(re.search(rf"(?<![\w/.-]){name}(?![\w-])", text) for name in names)


def _renamed(text: str, argument: str, what: str, path: Path | None) -> str:
    first = what if path is None or _is_said(path, text) else f"{what} {path}"
    return text.replace(argument, first, 1).replace(argument, what)
