"""What all commands share: `--json`, `--debug`, and how they fail."""

import contextlib
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import click
import jax

from .._untrusted import printable

ERROR, INTERRUPTED = 2, 130
LINES = 12  # of an error's list that are shown without --debug


class Done(NamedTuple):
    """The answer of a command that wrote something."""

    text: str
    fields: dict[str, Any]

    exit_code = 0

    def as_json(self) -> dict[str, Any]:
        """What was written."""
        return self.fields

    def __str__(self) -> str:
        return self.text


class Command(click.Command):
    """A command whose function returns the answer, and perhaps the exit code with it.

    The answer has `as_json()`, and its `str()` is what a person reads. Any exception becomes one
    line on stderr and the exit code 2.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `click.Command`, with two more options."""
        super().__init__(*args, **kwargs)
        as_json = click.Option(["--json"], is_flag=True, help="Print JSON, for programs.")
        debug = click.Option(["--debug"], is_flag=True, help="Print the traceback of an error.")
        self.params += [as_json, debug]

    def invoke(self, ctx: click.Context) -> None:
        """Runs the function and prints its answer."""
        as_json, debug = ctx.params.pop("json"), ctx.params.pop("debug")
        try:
            # Without it JAX would narrow float64 and int64 that a file holds.
            with jax.enable_x64(True), _told():
                answer = super().invoke(ctx)
            text = json.dumps(answer.as_json(), indent=2) if as_json else str(answer)
            click.echo(printable(text))
        except KeyboardInterrupt:
            click.echo("jlora: interrupted; nothing is half written.", err=True)
            sys.stderr.flush()
            # At once: what Orbax was about to do would be complained of on the way out.
            os._exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except Exception as e:
            if debug:
                click.echo(printable(traceback.format_exc()), err=True, nl=False)
                ctx.exit(ERROR)
            click.echo(printable(f"jlora: {one_line(e)}"), err=True)
            ctx.exit(ERROR)
        ctx.exit(answer.exit_code)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Prints warnings as lines on stderr, before the error if there is one."""
    # Of what Orbax logs, an error says what matters.
    orbax, level = logging.getLogger("absl"), logging.getLogger("absl").level
    orbax.setLevel(logging.ERROR)
    with warnings.catch_warnings(record=True) as found:
        try:
            yield
        finally:
            orbax.setLevel(level)
            for x in found:
                said = " ".join(str(x.message).split())
                click.echo(printable(f"jlora: warning: {said}"), err=True)


def one_line(error: BaseException) -> str:
    """The message of an error, its list cut where it is long."""
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
