"""What the user gives, and errors of functions in the words of the usage line."""

import dataclasses
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Arg:
    """An argument of a command; its `str` is the path.

    Attributes:
        what: what the usage line calls it.
        path: the folder that the user gave, or None.
        value: what a function gets: the path, or what was read from there.
    """

    what: str
    path: Path | None
    value: Any

    def __str__(self) -> str:
        return str(self.path)

    def with_value(self, value: Any) -> "Arg":
        """Returns the same argument with what was read from its folder."""
        return dataclasses.replace(self, value=value)


class _Folder(click.Path):
    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        is_option = isinstance(param, click.Option)
        what = param.opts[0] if is_option else param.human_readable_name
        return Arg(what, path, path)


FOLDER = _Folder()


def call(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """Calls a function with the values of what the user gave.

    Its errors then have the words of the usage line, with the paths.
    """
    bound = inspect.signature(function).bind(*args, **options)
    given = {name: x for name, x in bound.arguments.items() if isinstance(x, Arg)}
    bound.arguments |= {name: x.value for name, x in given.items()}
    try:
        return function(*bound.args, **bound.kwargs)
    except Exception as e:
        text = str(e)
        for name, x in given.items():
            text = _rename(text, f"`{name}`", x)
            for i, path in enumerate(x.value if isinstance(x.value, list) else ()):
                text = _rename(text, f"`{name}[{i}]`", Arg(x.what, path, path))
        for x in click.get_current_context().command.params:
            if isinstance(x, click.Option):
                text = re.sub(f"`{x.name}`|{x.name}=True", x.opts[0], text)
        if text == str(e):
            raise
        raise ValueError(text) from e


def _rename(text: str, argument: str, given: Arg) -> str:
    has_path = given.path is None or _has_path(given.path, text)
    first = given.what if has_path else f"{given.what} {given}"
    return text.replace(argument, first, 1).replace(argument, given.what)


def _has_path(path: Path, text: str) -> bool:
    names = (re.escape(str(x)) for x in (os.path.abspath(path), path))
    return any(re.search(rf"(?<![\w/.-]){name}(?![\w-])", text) for name in names)
