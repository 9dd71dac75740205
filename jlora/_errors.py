"""What is wrong with an argument, as data; its text is made at the end."""

import contextlib
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

MOST = 100  # problems that a text lists
_ARGUMENT = re.compile(r"`(\w+(\[\d+\])?)(=True)?`")


class Problem(NamedTuple):
    """One thing that is wrong with an argument.

    Attributes:
        where: the path, tensor, module or field; it may be any text of a file.
        why: what was expected there, and what was got.
        remedy: what to do; empty if `why` says it. A whole sentence is printed below all problems,
            once for all that have it.

    Examples:
        >>> import jlora
        >>> print(jlora.types.Problem("r", "expected an integer of at least 1, got 0"))
        r: expected an integer of at least 1, got 0
    """

    where: str
    why: str
    remedy: str = ""

    @property
    def is_sentence(self) -> bool:
        """Whether the remedy is a sentence of its own."""
        return self.remedy.endswith(".")

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy and not self.is_sentence else ""
        return f"{show(self.where)}: {self.why}{remedy}"


class ArgumentError(Exception):
    """An argument of a function is not as expected; `str` makes the text.

    Attributes:
        argument: the name of the argument: the first name in backticks in `why`.
        why: what was expected, what was got, and what to do.
        path: the file or folder that `why` names, within the argument's folder or absolute; None
            if `why` names none.
        problems: what is wrong, if it is several things or one of many places.
        remedy: what to do about all problems.
    """

    def __init__(
        self, why: str, *, path: object = None, problems: Iterable[Problem] = (), remedy: str = ""
    ) -> None:
        super().__init__(why)
        named = _ARGUMENT.search(why)
        assert named is not None, why
        self.argument, self.why, self.remedy = named[1], why, remedy
        self.path = None if path is None else str(path)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return self.text({}, {})

    def text(self, names: Mapping[str, str], paths: Mapping[str, object]) -> str:
        """Makes the text.

        Args:
            names: what else to call arguments, such as `DIR` for `path`.
            paths: the user's paths, to write once after the name unless `why` has the path.
        """
        is_whole = os.path.isabs(self.path or "")
        left = {k: path for k, path in paths.items() if k != self.argument or not is_whole}

        def name(found: re.Match[str]) -> str:
            path = f" {left.pop(found[1])}" if found[1] in left else ""
            return names.get(found[1], found[0]) + path

        def rename(text: str) -> str:
            return _ARGUMENT.sub(name, text)

        why = rename(self.why)
        found = [Problem(*map(rename, problem)) for problem in self.problems]
        more = len(found) - MOST
        if found and not why.endswith(":"):
            why += f" {len(found)} problem{'s' * (len(found) > 1)}:"
        lines = [f"  {p}" for p in found[:MOST]] + [f"  … and {more} more"] * (more > 0)
        remedies = [p.remedy for p in found if p.is_sentence]
        below = filter(None, dict.fromkeys([*remedies, rename(self.remedy)]))
        return "\n".join([why, *lines, *below])


class InputError(ArgumentError, ValueError):
    """A `ValueError`: an argument, or a file or tree in it, has a wrong value.

    Programs read its fields: `argument`, the name of the argument; `path`, the file or folder, or
    None; `problems`, a tuple of `Problem`; and `remedy`, what to do about all problems.

    Examples:
        >>> import jlora
        >>> try:
        ...     jlora.LoRA("w", rank=0)
        ... except jlora.types.InputError as e:
        ...     print(e.argument, "|", e)
        rank | `rank` of LoRA('w') must be an integer of at least 1; got 0.
    """


class MissingError(ArgumentError, FileNotFoundError):
    """A file or folder is not there."""


class OccupiedError(ArgumentError, FileExistsError):
    """A file or folder is where one should be made."""


class WritingError(ArgumentError, OSError):
    """A file or folder could not be written."""


def not_written(argument: str, path: object, reason: str, number: int | None = None) -> OSError:
    """Makes the error about a file or folder that could not be written, and of which none is left.

    Args:
        argument: the name of the argument.
        path: the file or folder.
        reason: why.
        number: the number of the system's error.
    """
    error = WritingError(
        f"`{argument}`: could not write {path}: {reason}. Nothing is left of it, and nothing else "
        "was touched. Make room or permission there, or give another path.",
        path=path,
    )
    error.errno = number
    return error


@contextlib.contextmanager
def blame(argument: str, path: object, part: str = "") -> Iterator[None]:
    """Turns a `ValueError` about what a file holds, or a part of it, into one about the file."""
    try:
        yield
    except InputError:
        raise
    except ValueError as e:
        raise InputError(f"`{argument}`: {part}{path} {e}.", path=path) from None


# -------------------------------------------------------------------- what others wrote, in a text


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


def shorten(value: Any) -> str:
    """Writes a value of a file in few characters on one line, however deeply it is nested."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    return short.repr(value)
