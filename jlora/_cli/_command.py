"""What all commands share: `--json`, `--debug`, and how they fail."""

import json
import os
import sys
import traceback
import warnings
from typing import Any, NamedTuple

import click
import jax

from .._untrusted import printable

ERROR, INTERRUPTED = 2, 130
LINES = 12  # of an error's list that are shown without --debug


class Answer(NamedTuple):
    """What a command found or did.

    Attributes:
        text: for people.
        fields: for `--json`, where a float that is not finite becomes null.
        exit_code: 1 for "no", such as adapters that differ.
    """

    text: str
    fields: dict[str, Any]
    exit_code: int = 0

    def as_json(self) -> str:
        """The fields in JSON, which has no floats that are not finite."""
        text = json.dumps(self.fields)
        return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=2)


class Command(click.Command):
    """A command whose function returns an `Answer`.

    Any exception becomes one line on stderr and the exit code 2.
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
            with jax.enable_x64(True), warnings.catch_warnings():
                warnings.showwarning = _print_warning
                answer: Answer = super().invoke(ctx)
            click.echo(printable(answer.as_json() if as_json else answer.text))
        except KeyboardInterrupt:
            click.echo("jlora: interrupted; nothing is half written.", err=True)
            sys.stderr.flush()
            # At once: Orbax would complain of its unfinished work on the way out.
            os._exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except Exception as e:
            text = traceback.format_exc().rstrip() if debug else f"jlora: {_one_line(e)}"
            click.echo(printable(text), err=True)
            ctx.exit(ERROR)
        ctx.exit(answer.exit_code)


def _print_warning(message: Any, *_: Any) -> None:
    """Prints a warning as one line."""
    click.echo(printable(f"jlora: warning: {' '.join(str(message).split())}"), err=True)


def _one_line(error: BaseException) -> str:
    """The message of an error, with a long list cut."""
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
