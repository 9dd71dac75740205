"""What is wrong with an argument, as data; its text is made at the end."""

import collections
import contextlib
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

MOST = 100  # problems that a text lists


class Problem(NamedTuple):
    """One thing that is wrong with an argument.

    Attributes:
        where: the path, tensor, module or field; it may be any text of a file.
        why: what was expected there, and what was got.
        remedy: what to do, as a sentence; empty if `why` says it.

    Examples:
        >>> import jlora
        >>> print(jlora.types.Problem("r", "expected an integer of at least 1, got 0"))
        r: expected an integer of at least 1, got 0
    """

    where: str
    why: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{show(self.where)}: {self.why}" + f". {self.remedy}" * bool(self.remedy)


class ArgumentError(Exception):
    """An argument of a function is not as expected; `str` makes the text of the fields.

    Attributes:
        argument: the name of the argument.
        sentence: what was expected, and what was got; it follows the name. Other arguments are in
            backticks.
        path: the file or folder that the sentence names, within the argument's folder or absolute;
            None if it names none.
        remedy: what to do about all problems.
        problems: what is wrong, if it is several things or one of many places.
    """

    def __init__(
        self,
        argument: str,
        sentence: str,
        *,
        path: object = None,
        remedy: str = "",
        problems: Iterable[Problem] = (),
    ) -> None:
        super().__init__()
        self.args = argument, sentence  # by which a copy is made
        self.argument, self.sentence, self.remedy = argument, sentence, remedy
        self.path = None if path is None else str(path)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return self.text({}, {})

    def text(self, names: Mapping[str, str], paths: Mapping[str, object]) -> str:
        """Makes the text.

        Args:
            names: what else to call arguments, such as `DIR` for `path`.
            paths: the user's path of each argument; it stands after the name, unless the sentence
                has it.
        """

        def rename(text: str) -> str:
            for name, other in names.items():
                text = text.replace(f"`{name}`", other).replace(f"`{name}=True`", other)
            return text

        start = rename(f"`{self.argument}`")
        if self.argument in paths and not os.path.isabs(self.path or ""):
            start += f" {paths[self.argument]}"
        start += ":" * (self.path is not None)
        n = len(self.problems)
        count = f" {n} problem{'s' * (n > 1)}:" if n else ""
        counts = collections.Counter(x.remedy for x in self.problems)
        shared = [remedy for remedy, n in counts.items() if n > 1]
        each = [x._replace(remedy="") if x.remedy in shared else x for x in self.problems[:MOST]]
        lines = [f"  {Problem(*map(rename, x))}" for x in each]
        lines += [f"  … and {n - MOST} more"] * (n > MOST)
        below = map(rename, filter(None, dict.fromkeys([*shared, self.remedy])))
        return "\n".join([f"{start} {rename(self.sentence)}{count}", *lines, *below])


class InputError(ArgumentError, ValueError):
    """A `ValueError`: an argument, or a file or tree in it, has a wrong value.

    Programs read its fields: `argument`, the name of the argument; `sentence`, what is wrong with
    it; `path`, the file or folder, or None; `problems`, a tuple of `Problem`; and `remedy`, what to
    do about all problems.

    Examples:
        >>> import jlora
        >>> try:
        ...     jlora.LoRA("w", rank=0)
        ... except jlora.types.InputError as e:
        ...     print(e.argument, "|", e)
        rank | `rank` of LoRA('w') must be an integer of at least 1; got 0.
    """


def stop(
    problems: Iterable[Problem], argument: str, why: str, remedy: str = "", path: object = None
) -> None:
    """Raises one error about all problems with an argument, if there are any."""
    if listed := tuple(problems):
        raise InputError(argument, why, path=path, remedy=remedy, problems=listed)


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
        argument,
        f"could not write {path}: {reason}. Nothing is left of it, and nothing else "
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
        raise InputError(argument, f"{part}{path} {e}.", path=path) from None


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


def list_few(values: Sequence[object], n: int) -> str:
    """Lists `n` values; "…" stands for the others."""
    return ", ".join(map(str, [*values[:n], "…"] if values[n:] else values))


def shorten(value: Any) -> str:
    """Writes a value of a file in few characters on one line, however deeply it is nested."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    return short.repr(value)
