"""The parts that all commands share: arguments, `--json`, `--debug`, and errors."""

import dataclasses
import inspect
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
import jax

from .._errors import ArgumentError, printable

T = TypeVar("T")
Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Arg:
    """An argument of a command; its `str` is the path.

    Attributes:
        what: its name in the usage line.
        path: the folder that the user gave, or None.
        value: the value for a function: the path, or what was read from it.
    """

    what: str
    path: Path | None
    value: Any

    def __str__(self) -> str:
        return str(self.path)

    def with_value(self, value: object) -> "Arg":
        """Returns the same argument with another value, which was read from its folder."""
        return dataclasses.replace(self, value=value)


class _Folder(click.Path):
    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        is_option = isinstance(param, click.Option)
        what = param.opts[0] if is_option else param.human_readable_name
        return Arg(what, path, path)


FOLDER = _Folder()


def call(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """Calls a function with the values of the user's arguments.

    Its errors then have the names in the usage line, with the paths.
    """
    bound = inspect.signature(function).bind(*args, **options)
    given = {name: x for name, x in bound.arguments.items() if isinstance(x, Arg)}
    bound.arguments |= {name: x.value for name, x in given.items()}
    try:
        return function(*bound.args, **bound.kwargs)
    except ArgumentError as e:
        known = click.get_current_context().command.params
        names = {x.name or "": x.opts[0] for x in known if isinstance(x, click.Option)}
        paths = {name: x.path for name, x in given.items() if x.path is not None}
        names |= {name: x.what for name, x in given.items()}
        raise ValueError(e.text(names, paths)) from e


ERROR, INTERRUPTED = 2, 130
# ----------------------------------------------------------------------------- answers and failures

LINES = 12  # lines of an error that are shown without --debug


class Answer(NamedTuple):
    """The answer of a command.

    Attributes:
        text: the text to print.
        fields: the fields for `--json`.
        exit_code: 1 for "no", such as adapters that differ.
    """

    text: str
    fields: Json
    exit_code: int = 0

    def as_json(self) -> str:
        """Writes the fields as JSON, with null for floats that are not finite."""
        text = json.dumps(self.fields)
        return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=2)


class Command(click.Command):
    """A command whose function returns an `Answer`.

    An exception becomes one line on stderr, with exit code 2.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Adds the options `--json` and `--debug`."""
        super().__init__(*args, **kwargs)
        as_json = click.Option(["--json"], is_flag=True, help="Print JSON, for programs.")
        debug = click.Option(["--debug"], is_flag=True, help="Print the traceback of an error.")
        self.params += [as_json, debug]

    def invoke(self, ctx: click.Context) -> None:
        """Runs the function and prints its answer."""
        as_json, debug = ctx.params.pop("json"), ctx.params.pop("debug")
        try:
            # Without x64, JAX would narrow float64 and int64 from files.
            with jax.enable_x64(True), warnings.catch_warnings():
                warnings.showwarning = _print_warning
                answer: Answer = super().invoke(ctx)
            click.echo(printable(answer.as_json() if as_json else answer.text))
        except KeyboardInterrupt:
            click.echo("jlora: interrupted; nothing is half written.", err=True)
            sys.stderr.flush()
            # Immediately, as otherwise Orbax reports its unfinished work.
            os._exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except Exception as e:
            text = traceback.format_exc().rstrip() if debug else f"jlora: {_one_line(e)}"
            click.echo(printable(text), err=True)
            ctx.exit(ERROR)
        ctx.exit(answer.exit_code)


def _print_warning(message: Warning | str, *_: object) -> None:
    """Prints a warning as one line."""
    click.echo(printable(f"jlora: warning: {' '.join(str(message).split())}"), err=True)


def _one_line(error: BaseException) -> str:
    """Returns the message of an error as one line; a long list is cut."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    left = len(lines) - LINES
    if left > 1:
        lines = [*lines[:LINES], f"… and {left} more lines, which --debug shows"]
    text = lines[0]
    for line in lines[1:]:
        text += (" " if text.endswith((":", ".", ",")) else "; ") + line
    return text
